"""The Hugging Face layout of Moshi (`MoshiForConditionalGeneration` of transformers) under Kyutai's names.

There q, k and v are separate, q and k of the temporal transformer are permuted for a rotary embedding of half-split
instead of interleaved pairs, and the depth transformer's steps are stacked.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ttt_jax.convert.tensors import Tensor, computed
from ttt_jax.models.moshi.config import MoshiConfig

MARK = "decoder.model.embed_tokens.weight"
"""A tensor that only this layout has."""

CODEC = "audio_encoder."
"""Prefix of the tensors of Mimi, which this layout keeps in the same file."""

_PLAIN = {
    "decoder.model.embed_tokens.weight": "text_emb.weight",
    "decoder.model.norm.weight": "out_norm.alpha",
    "decoder.lm_head.weight": "text_linear.weight",
    "depth_decoder.text_embed_tokens.weight": "depformer_text_emb.weight",
}
_STACKED = {
    "depth_decoder.input_projections.weight": "depformer_in.{}.weight",
    "depth_decoder.lm_heads.weight": "linears.{}.weight",
}
_EMBEDDING = re.compile(r"(?P<depth>depth_decoder\.)?embed_tokens\.(?P<k>\d+)\.weight")
_LAYER = re.compile(r"(?P<stack>decoder\.model|depth_decoder)\.layers\.(?P<i>\d+)\.(?P<part>.+)\.weight")
_LAYER_PARTS = {
    "input_layernorm": "norm1.alpha",
    "post_attention_layernorm": "norm2.alpha",
    "self_attn.o_proj.linear": "self_attn.out_projs.{}.weight",
    "mlp.fc1": "gating{}.linear_in.weight",
    "mlp.fc2": "gating{}.linear_out.weight",
}
_FIXED = {"hidden_act": "silu", "rms_norm_eps": 1e-8}
"""Of the layout's config: what this model implements for one value only."""

_QKV = {f"self_attn.{part}_proj.linear": part for part in "qkv"}


def is_hugging_face(tensors: Mapping[str, Any]) -> bool:
    """Whether a Moshi's tensors are in this layout."""
    return MARK in tensors


def has_codec(tensors: Mapping[str, Any]) -> bool:
    """Whether Mimi's tensors are among them."""
    return any(name.startswith(CODEC) for name in tensors)


def codec_tensors(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Those of Mimi in it, by their names in the layout of Mimi alone."""
    return {name.removeprefix(CODEC): x for name, x in tensors.items() if name.startswith(CODEC)}


def moshi_config(config: Mapping[str, Any]) -> MoshiConfig:
    """From the layout's config.json. It tells no delays: they are the published ones, 1 for all acoustic codebooks.

    Raises:
        ValueError: It describes a model that `MoshiConfig` does not.
    """
    depth = {"hidden_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 16, "ffn_dim": 5632}
    depth |= _told(config.get("depth_decoder_config") or {})
    config = _told(config)
    width, codebooks = config.get("hidden_size", 4096), config.get("num_codebooks", 8)
    parts = (
        ("", config, config.get("num_attention_heads", 32)),
        ("depth_decoder_config.", depth, depth["num_attention_heads"]),
    )
    for part, sizes, heads in parts:
        expected = {"num_key_value_heads": heads, "head_dim": sizes.get("hidden_size", 4096) // heads, **_FIXED}
        wrong = [f"{part}{name}={sizes[name]!r}" for name, value in expected.items() if sizes.get(name, value) != value]
        if wrong:
            raise ValueError(f"{', '.join(wrong)} is not supported; this model implements {expected}")
    return MoshiConfig(
        dim=width,
        text_card=config.get("vocab_size", 32000),
        n_q=2 * codebooks,
        dep_q=codebooks,
        card=config.get("audio_vocab_size") or depth.get("audio_vocab_size", 2048),
        num_heads=config.get("num_attention_heads", 32),
        num_layers=config.get("num_hidden_layers", 32),
        hidden_scale=_feedforward(config.get("ffn_dim", 22528), width) / width,
        context=config.get("sliding_window", 3000),
        max_period=config.get("rope_theta", 10000.0),
        depformer_dim=depth["hidden_size"],
        depformer_dim_feedforward=_feedforward(depth["ffn_dim"], depth["hidden_size"]),
        depformer_num_heads=depth["num_attention_heads"],
        depformer_num_layers=depth["num_hidden_layers"],
        delays=(0, *(0, *(1,) * (codebooks - 1)) * 2),
    )


def _told(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the config says: null is the default, and newer files keep the rotary embedding's theta in a part."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type={rope['rope_type']!r} is not supported; this model implements 'default'")
    told = {name: rope[name] for name in ("rope_theta",) if name in rope} | dict(config)
    return {name: value for name, value in told.items() if value is not None}


def _feedforward(gated: int, width: int) -> int:
    """Kyutai's feed-forward size, before gating takes its two thirds, from both gated branches' size."""
    return 4 * width if gated // 2 == 21 * width // 8 else -(-3 * (gated // 2) // 2)


def moshi_tensors(config: MoshiConfig, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors under Kyutai's names; those of Mimi are left out, unknown ones keep their names."""
    renamed, attention = {}, {}
    for name, x in tensors.items():
        if name.startswith(CODEC):
            continue
        if name in _PLAIN:
            renamed[_PLAIN[name]] = _as_norm(x) if name.endswith(".norm.weight") else x
        elif name in _STACKED:
            renamed |= _unstacked(_STACKED[name], x)
        elif match := _EMBEDDING.fullmatch(name):
            renamed[f"{'depformer_' if match['depth'] else ''}emb.{match['k']}.weight"] = x
        elif match := _LAYER.fullmatch(name):
            stack = "depformer" if match["stack"] == "depth_decoder" else "transformer"
            layer = f"{stack}.layers.{match['i']}"
            if match["part"] in _QKV:
                attention.setdefault(layer, {})[_QKV[match["part"]]] = x
            else:
                renamed |= _layer_part(layer, match["part"], x) or {name: x}
        else:
            renamed[name] = x
    for layer, parts in attention.items():
        renamed |= _joined(config, layer, parts)
    return renamed


def _layer_part(layer: str, part: str, x) -> dict[str, Any]:
    pattern = _LAYER_PARTS.get(part)
    if pattern is None:
        return {}
    if pattern.endswith("alpha"):
        return {f"{layer}.{pattern}": _as_norm(x)}
    if layer.startswith("transformer"):
        return {f"{layer}.{pattern.format('0' if 'attn' in pattern else '')}": x}
    return _unstacked(f"{layer}.{pattern.replace('gating{}', 'gating.{}')}", x)


def _as_norm(x) -> Tensor:
    return computed((1, 1, *x.shape), x.dtype, lambda: np.asarray(x).reshape(1, 1, -1))


def _unstacked(pattern: str, x) -> dict[str, Any]:
    return {
        pattern.format(i): computed(x.shape[1:], x.dtype, lambda i=i: np.asarray(x[i : i + 1])[0])
        for i in range(x.shape[0])
    }


def _joined(config: MoshiConfig, layer: str, parts: dict[str, Any]) -> dict[str, Any]:
    """q, k and v as one tensor a step."""
    if set(parts) != set("qkv"):
        return {f"{layer}.self_attn.{part}_proj": x for part, x in parts.items()}  # an error will list them
    q, k, v = (parts[part] for part in "qkv")
    if layer.startswith("transformer"):
        heads = config.num_heads

        def join():
            return np.concatenate([interleaved(q, heads), interleaved(k, heads), np.asarray(v)])

        return {f"{layer}.self_attn.in_projs.0.weight": computed((3 * q.shape[0], q.shape[1]), q.dtype, join)}
    shape = (3 * q.shape[1], q.shape[2])
    return {
        f"{layer}.self_attn.in_projs.{i}.weight": computed(
            shape, q.dtype, lambda i=i: np.concatenate([np.asarray(x[i : i + 1])[0] for x in (q, k, v)])
        )
        for i in range(q.shape[0])
    }


def interleaved(x, heads: int) -> np.ndarray:
    """Rows of every head from (all first halves of the rotated pairs, all second ones) to pair by pair."""
    rows, columns = x.shape
    return np.asarray(x).reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
