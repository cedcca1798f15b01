"""The `config.json` of Kyutai's checkpoints: which of its fields this model reads, ignores or refuses."""

import difflib
from collections.abc import Mapping
from typing import Any

WRITTEN: dict[str, Any] = {
    "causal": True,
    "layer_scale": None,
    "gating": "silu",
    "norm": "rms_norm_f32",
    "positional_embedding": "rope",
    "depformer_layer_scale": None,
    "depformer_multi_linear": True,
    "depformer_gating": "silu",
    "depformer_pos_emb": "none",
    "depformer_weights_per_step": True,
}
DEFAULTS: dict[str, Any] = {
    "norm_emb": False,
    "bias_proj": False,
    "kv_repeat": 1,
    "cross_attention": False,
    "depformer_norm": None,
    "depformer_kv_repeat": 1,
    "demux_second_stream": False,
    "demux_second_text_stream": False,
}
SUPPORTED_VALUES = WRITTEN | DEFAULTS
"""Fields that this model implements for one value only; where that is "off", every empty value means it."""

NOT_THE_MODEL = frozenset(
    (
        *("moshi_name", "mimi_name", "mimi_config_name", "tokenizer_name", "version", "model_id"),
        *("lm_gen_config", "tts_config", "stt_config", "gradient_checkpointing"),
        *("quantize", "lora", "lora_name", "lora_rank", "lora_scaling"),  # of the tensors: converted to a plain model
        *("depformer_causal", "depformer_context", "depformer_max_period"),  # deprecated or unused
    )
)
"""Fields that do not change the model."""

READ_APART = frozenset(("conditioners", "fuser", "text_card_out"))

PERSONAPLEX = {"dep_q": 16}
"""What NVIDIA's PersonaPlex changes in the 7B model; its `config.json` holds no sizes at all."""


def read_fields(raw: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `MoshiConfig`'s fields (with their `defaults`) that the file holds, conditioners aside.

    Raises:
        ValueError: a field is unknown (with a suggestion), or holds a value this model does not implement.
    """
    if raw.get("model_type") == "tts":
        raise ValueError(
            "model_type='tts' is not supported: text-to-speech models read their voices by cross attention"
        )
    chosen: dict[str, Any] = dict(PERSONAPLEX) if raw.get("model_type") == "personaplex" else {}
    for name, value in raw.items():
        if name in SUPPORTED_VALUES:
            _check_supported(name, value)
        elif name in defaults.keys() - READ_APART:
            chosen[name] = tuple(value) if isinstance(value, list) else value
        elif name not in NOT_THE_MODEL | READ_APART:
            raise ValueError(_unknown_field(name, defaults.keys() | SUPPORTED_VALUES.keys() | READ_APART))
    if isinstance(chosen.get("depformer_dim_feedforward"), tuple):
        raise ValueError("depformer_dim_feedforward must be one int, a list per step is not supported")
    text_card_out = raw.get("text_card_out")
    if text_card_out not in (None, raw.get("text_card", defaults["text_card"])):
        raise ValueError(f"text_card_out={text_card_out} different from text_card is not supported")
    return chosen


def read_conditioners(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The fields of each `Conditioner`, in the order in which their vectors are added.

    Raises:
        ValueError: one is no lookup table, or is not fused by addition.
    """
    conditioners, fuser = raw.get("conditioners") or {}, raw.get("fuser") or {}
    for way in ("cross", "prepend"):
        if fuser.get(way):
            raise ValueError(f"fuser.{way}={fuser[way]} is not supported; this model adds conditions, fuser.sum")
    names = list(fuser.get("sum") or [])
    if set(names) != set(conditioners):
        raise ValueError(f"fuser.sum must name every one of the conditioners {sorted(conditioners)}, got {names}")
    return [_read_table(name, conditioners[name]) for name in names]


def write_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The whole file, from `MoshiConfig`'s fields as a mapping: Kyutai's defaults are not the 7B model's."""
    conditioners = {fields["name"]: _write_table(fields) for fields in fields["conditioners"]}
    written = WRITTEN | {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    del written["conditioners"]
    if conditioners:
        fuser = {"cross_attention_pos_emb": False, "cross_attention_pos_emb_scale": 1}
        fuser |= {"sum": list(conditioners), "prepend": [], "cross": []}
        written |= {"conditioners": conditioners, "fuser": fuser}
    return written


def _read_table(name: str, conditioner: Mapping[str, Any]) -> dict[str, Any]:
    kind = conditioner.get("type")
    if kind != "lut":
        raise ValueError(f"conditioners[{name!r}].type={kind!r} is not supported; this model implements 'lut'")
    table = {key: value for key, value in conditioner["lut"].items() if key != "init_scale"}
    tokenizer = table.pop("tokenizer", "noop")
    if tokenizer != "noop":
        raise ValueError(f"conditioners[{name!r}].lut.tokenizer must be 'noop', got {tokenizer!r}")
    unknown = sorted(table.keys() - {"n_bins", "dim", "possible_values"})
    if unknown or not {"n_bins", "dim"} <= table.keys():
        raise ValueError(f"conditioners[{name!r}].lut must hold n_bins, dim and possible_values, got {sorted(table)}")
    return {"name": name, **table}


def _write_table(fields: Mapping[str, Any]) -> dict[str, Any]:
    values = fields["possible_values"]
    table = {"n_bins": fields["n_bins"], "dim": fields["dim"], "tokenizer": "noop"}
    return {"type": "lut", "lut": table | {"possible_values": None if values is None else list(values)}}


def _check_supported(name: str, value: Any):
    supported = SUPPORTED_VALUES[name]
    off = not supported and not value
    if value != supported and not off:
        raise ValueError(f"{name}={value!r} is not supported; this model implements {name}={supported!r}")


def _unknown_field(name: str, known) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known fields: {', '.join(sorted(known))}"
    return f"unknown field {name!r} in the Moshi config; {hint}"
