"""The fields of `VideoDiTConfig` under the names of published checkpoints: ttt-video-dit's and diffusers'."""

import difflib
import re
from collections.abc import Mapping
from typing import Any

FieldTypes = Mapping[str, type]

_OF_VIDEOS = frozenset(("num_frames", "num_chunks", "text_length", "latent_height", "latent_width"))
"""What metadata also tells, of the videos and not of the model."""

_OLD_NAMES = {"kind": "ssm_layer"}

_COGVIDEOX = {
    "num_attention_heads": "num_heads",
    "num_layers": "num_layers",
    "text_embed_dim": "text_dim",
    "time_embed_dim": "time_embed_dim",
    "patch_size": "patch_size",
    "in_channels": "in_channels",
}

_COGVIDEOX_FIXED: dict[str, Any] = {
    "activation_fn": "gelu-approximate",
    "timestep_activation_fn": "silu",
    "attention_bias": True,
    "patch_bias": True,
    "norm_elementwise_affine": True,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "use_rotary_positional_embeddings": True,
    "use_learned_positional_embeddings": False,
    "patch_size_t": None,
    "ofs_embed_dim": None,
}
"""Fields that this model implements for one value only."""

_COGVIDEOX_IGNORED = frozenset(
    (
        *("attention_head_dim", "out_channels"),  # read apart
        *("dropout", "max_text_seq_length", "sample_frames", "sample_height", "sample_width", "norm_eps"),
        *("spatial_interpolation_scale", "temporal_interpolation_scale", "temporal_compression_ratio"),
    )
)
"""Fields that do not change this model: its norms have TTT-Video-DiT's eps, whatever CogVideoX' have."""


def state_dict(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors without what their names begin with when the model is part of something, such as "model.".

    What does not begin so is not the model's, an optimizer's state for example, and is left out.
    """
    known = "patch_embedding.text_proj.weight"
    prefix = next((name.removesuffix(known) for name in tensors if name.endswith(known)), "")
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def ttt_video_dit_fields(metadata: Mapping[str, Any], tensors: Mapping[str, Any], types: FieldTypes) -> dict[str, Any]:
    """What the metadata says, as the types say, and else what the tensors tell.

    Raises:
        ValueError: an unknown field, a value that is no number, or one that the tensors contradict.
    """
    chosen = {}
    for name, value in metadata.items():
        name = _OLD_NAMES.get(name, name)
        if name not in _OF_VIDEOS:
            chosen[name] = _read(name, value, types)
    told = _told_by(tensors)
    wrong = {name: chosen[name] for name, value in told.items() if chosen.get(name, value) != value}
    if wrong:
        told = {name: told[name] for name in wrong}
        raise ValueError(f"the metadata is not that of this checkpoint: it says {wrong}, the tensors say {told}")
    return told | chosen


def cogvideox_fields(raw: Mapping[str, Any], types: FieldTypes) -> dict[str, Any]:
    """The fields of diffusers under the names here, and fields of this model.

    Raises:
        ValueError: a field is unknown (with a suggestion), or holds a value that this model does not implement.
    """
    chosen: dict[str, Any] = {}
    for name, value in raw.items():
        if name in _COGVIDEOX:
            chosen[_COGVIDEOX[name]] = value
        elif name in _COGVIDEOX_FIXED:
            if value != _COGVIDEOX_FIXED[name]:
                raise ValueError(f"{name}={value!r} is not supported; this model has {_COGVIDEOX_FIXED[name]!r}")
        elif not name.startswith("_") and name not in _COGVIDEOX_IGNORED:
            chosen[name] = _read(name, value, types)
    if "num_heads" in chosen or "attention_head_dim" in raw:
        chosen["model_dim"] = chosen.get("num_heads", 48) * raw.get("attention_head_dim", 64)
    out = raw.get("out_channels")
    if out not in (None, chosen.get("in_channels", 16)):
        raise ValueError(f"out_channels={out} different from in_channels is not supported, as image to video has it")
    return chosen


def as_cogvideox(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What diffusers reads, of this model's fields."""
    named = {theirs: fields[ours] for theirs, ours in _COGVIDEOX.items()}
    named |= {"attention_head_dim": fields["model_dim"] // fields["num_heads"], "out_channels": fields["in_channels"]}
    return {"_class_name": "CogVideoXTransformer3DModel", "norm_eps": 1e-6} | named | _COGVIDEOX_FIXED


def _read(name: str, value: Any, types: FieldTypes) -> Any:
    if name not in types:
        close = difflib.get_close_matches(name, types, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known fields: {', '.join(types)}"
        raise ValueError(f"unknown field {name!r} in the Video-DiT config; {hint}")
    if value is None:
        return None
    try:
        return types[name](value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be {types[name].__name__} or a string of one, got {value!r}") from error


def _told_by(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes that a ttt-video-dit state_dict tells; those of tensors that it lacks are left out."""
    told: dict[str, Any] = {}
    shapes = {name: tuple(x.shape) for name, x in state_dict(tensors).items()}
    layers = {match[1] for name in shapes if (match := re.match(r"layers\.(\d+)\.", name))}
    if layers:
        told["num_layers"] = len(layers)
    if len(shape := shapes.get("patch_embedding.vid_proj.weight", ())) == 4:
        told |= {"model_dim": shape[0], "in_channels": shape[1], "patch_size": shape[2]}
    if len(shape := shapes.get("patch_embedding.text_proj.weight", ())) == 2:
        told["text_dim"] = shape[1]
    if len(shape := shapes.get("time_embed.0.weight", ())) == 2:
        told["time_embed_dim"] = shape[0]
    ttt = "layers.0.seq_modeling_block.ssm.ttt"
    if len(shape := shapes.get(f"{ttt}.W1", ())) == 3:
        told |= {"num_heads": shape[0], "ssm_layer": "ttt_mlp" if f"{ttt}.W2" in shapes else "ttt_linear"}
    return told
