"""The fields of `MimiConfig` under the names of published checkpoints' configs: Kyutai's and Hugging Face's."""

import difflib
import math
from collections.abc import Mapping
from typing import Any

_SEANET = (
    *("dimension", "n_filters", "n_residual_layers", "ratios", "kernel_size", "residual_kernel_size"),
    *("last_kernel_size", "dilation_base", "compress"),
)
_TRANSFORMER = ("num_heads", "num_layers", "dim_feedforward", "context", "max_period", "layer_scale")

_KYUTAI: dict[str, dict[str, str]] = {
    "": {"sample_rate": "sample_rate", "frame_rate": "frame_rate"},
    "seanet": {name: name for name in _SEANET},
    "quantizer": {"dimension": "codebook_dim", "n_q": "n_q", "n_q_semantic": "n_q_semantic", "bins": "bins"},
    "transformer": {name: name for name in _TRANSFORMER},
}
"""Kyutai's fields, part by part, and what they are called here."""

_KYUTAI_WIDTHS = {
    "quantizer": ("input_dimension", "output_dimension"),
    "transformer": ("d_model", "input_dimension", "output_dimensions"),
}
"""Those that may differ from `seanet.dimension` in Kyutai's code, with a projection that this model does not have."""

_KYUTAI_FIXED: dict[str, Any] = {
    "channels": 1,
    "seanet.channels": 1,
    "seanet.causal": True,
    "seanet.activation": "ELU",
    "seanet.activation_params": {"alpha": 1.0},
    "seanet.norm": "none",
    "seanet.pad_mode": "constant",
    "seanet.true_skip": True,
    "transformer.causal": True,
    "transformer.conv_layout": True,
    "transformer.gating": "none",
    "transformer.norm": "layer_norm",
    "transformer.positional_embedding": "rope",
    "transformer.kv_repeat": 1,
}
"""Fields that this model implements for one value only."""

_KYUTAI_IGNORED = frozenset(
    (
        *("seanet.disable_norm_outer_blocks", "seanet.norm_params"),
        *("quantizer.q_dropout", "quantizer.no_quantization_rate", "quantizer.decay"),
        *("quantizer.threshold_usage_ratio", "quantizer.replaced_usage_ratio", "transformer.checkpointing"),
    )
)
"""Fields that matter to training alone, or not without their switch."""

_HUGGING_FACE = {
    "sampling_rate": "sample_rate",
    "hidden_size": "dimension",
    "num_filters": "n_filters",
    "num_residual_layers": "n_residual_layers",
    "upsampling_ratios": "ratios",
    "kernel_size": "kernel_size",
    "residual_kernel_size": "residual_kernel_size",
    "last_kernel_size": "last_kernel_size",
    "dilation_growth_rate": "dilation_base",
    "compress": "compress",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
    "intermediate_size": "dim_feedforward",
    "sliding_window": "context",
    "rope_theta": "max_period",
    "layer_scale_initial_scale": "layer_scale",
    "vector_quantization_hidden_dimension": "codebook_dim",
    "num_quantizers": "n_q",
    "num_semantic_quantizers": "n_q_semantic",
    "codebook_size": "bins",
}

_HUGGING_FACE_FIXED = {
    "audio_channels": 1,
    "use_causal_conv": True,
    "pad_mode": "constant",
    "trim_right_ratio": 1.0,
    "use_conv_shortcut": False,
    "hidden_act": "gelu",
    "norm_eps": 1e-5,
    "attention_bias": False,
}


def kyutai_fields(config: Mapping[str, Any], published: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that Kyutai's config sets; `published` are the values of those that it leaves out.

    Raises:
        ValueError: a field is unknown (with a suggestion), or holds a value this model does not implement.
    """
    parts = {name: config.get(name) or {} for name in _KYUTAI if name}
    parts[""] = {name: value for name, value in config.items() if name not in parts}
    chosen = {}
    for part, raw in parts.items():
        for name, value in raw.items():
            full = f"{part}.{name}" if part else name
            if name in _KYUTAI[part]:
                chosen |= _set(_KYUTAI[part][name], value)
            elif full in _KYUTAI_FIXED:
                _check_fixed(full, value, _KYUTAI_FIXED[full])
            elif name not in _KYUTAI_WIDTHS.get(part, ()) and full not in _KYUTAI_IGNORED:
                raise ValueError(_unknown(full))
    width = {**published, **chosen}["dimension"]
    for part, names in _KYUTAI_WIDTHS.items():
        for name in names:
            value = parts[part].get(name)
            _check_fixed(f"{part}.{name}", value[0] if isinstance(value, list) and len(value) == 1 else value, width)
    return chosen


def as_kyutai(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Kyutai's config, whole, of this model's fields."""
    named = {part: {theirs: fields[ours] for theirs, ours in names.items()} for part, names in _KYUTAI.items()}
    for full, value in _KYUTAI_FIXED.items():
        part, _, name = full.rpartition(".")
        named[part][name] = value
    for part, names in _KYUTAI_WIDTHS.items():
        for name in names:
            named[part][name] = [fields["dimension"]] if name == "output_dimensions" else fields["dimension"]
    named["seanet"]["ratios"] = list(fields["ratios"])
    return named.pop("") | named


def hugging_face_fields(config: Mapping[str, Any], published: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a config.json of Mimi in transformers sets; `published` are the values of those it leaves out.

    Its many fields that say nothing of the model are not read.

    Raises:
        ValueError: a field holds a value this model does not implement.
    """
    config = {**(config.get("rope_parameters") or {}), **config}
    chosen = {}
    for theirs, ours in _HUGGING_FACE.items():
        chosen |= _set(ours, config.get(theirs))
    for name, value in _HUGGING_FACE_FIXED.items():
        _check_fixed(name, config.get(name), value)
    whole = {**published, **chosen}
    same = {
        "codebook_dim": whole["codebook_dim"],
        "upsample_groups": whole["dimension"],
        "num_key_value_heads": whole["num_heads"],
        "head_dim": whole["dimension"] // whole["num_heads"],
    }
    for name, value in same.items():
        _check_fixed(name, config.get(name), value)
    frame_samples = 2 * math.prod(whole["ratios"])  # transformers knows no other stride
    chosen["frame_rate"] = config.get("frame_rate") or config.get("_frame_rate") or whole["sample_rate"] / frame_samples
    return chosen


def _set(name: str, value: Any) -> dict[str, Any]:
    return {} if value is None else {name: tuple(value) if isinstance(value, list) else value}


def _check_fixed(name: str, value: Any, only: Any):
    if value is not None and value != only:
        raise ValueError(f"{name}={value!r} is not supported; this model implements {name}={only!r}")


def _unknown(full: str) -> str:
    part, _, _ = full.rpartition(".")
    known = [f"{part}.{name}" if part else name for name in (*_KYUTAI[part], *_KYUTAI_WIDTHS.get(part, ()))]
    known += [name for name in _KYUTAI_FIXED if name.rpartition(".")[0] == part]
    close = difflib.get_close_matches(full, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known fields: {', '.join(sorted(known))}"
    return f"unknown field {full!r} in the Mimi config; {hint}"
