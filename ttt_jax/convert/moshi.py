"""Kyutai's Moshi checkpoints (fused legacy names and current ones) to this library's parameter tree."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from ttt_jax.convert.checks import check_tensors
from ttt_jax.layers.mlp import gated_hidden_size
from ttt_jax.models.moshi.config import MoshiConfig

Tensors = Mapping[str, Any]
Expected = dict[str, tuple[int, ...]]


def moshi_params(config: MoshiConfig, tensors: Tensors) -> dict[str, Any]:
    """The Flax parameter tree of `Moshi(config)` from Kyutai's tensors, in float32.

    Linear weights `[out, in]` become kernels `[in, out]`; embeddings and the depth transformer's per-step weights are
    stacked on a leading axis. `self_attn.in_proj_weight` / `out_proj.weight` (the depth transformer's blocks step-major
    in one tensor) and `in_projs.{i}.weight` / `out_projs.{i}.weight` are both read.

    Args:
        config: sizes; its TTT layers are not part of Kyutai's checkpoints, so `config.ttt` must be None.
        tensors: name to array (anything `numpy.asarray` takes).

    Raises:
        ValueError: one error that lists every missing, unexpected or misshapen tensor.
    """
    if config.ttt is not None:
        raise ValueError("config.ttt must be None: convert without TTT, then insert it into the parameter tree")
    tensors = _split_fused(config, tensors)
    check_tensors(_expected_shapes(config), tensors)

    def take(name: str) -> np.ndarray:
        return np.asarray(tensors[name], dtype=np.float32)

    params: dict[str, Any] = {
        "text_emb": take("text_emb.weight"),
        "emb": np.stack([take(f"emb.{k}.weight") for k in range(config.n_q)]),
        "out_norm": {"alpha": take("out_norm.alpha").reshape(-1)},
        "text_linear": take("text_linear.weight").T,
        "depformer": _depformer(config, take),
    }
    for i in range(config.num_layers):
        params[f"layers_{i}"] = _temporal_layer(f"transformer.layers.{i}", take)
    return jax.tree.map(np.ascontiguousarray, params)


def _temporal_layer(name: str, take: Callable[[str], np.ndarray]) -> dict[str, Any]:
    return {
        "norm1": {"alpha": take(f"{name}.norm1.alpha").reshape(-1)},
        "self_attn": {
            "in_proj": take(f"{name}.self_attn.in_projs.0.weight").T,
            "out_proj": take(f"{name}.self_attn.out_projs.0.weight").T,
        },
        "norm2": {"alpha": take(f"{name}.norm2.alpha").reshape(-1)},
        "gating": {
            "linear_in": take(f"{name}.gating.linear_in.weight").T,
            "linear_out": take(f"{name}.gating.linear_out.weight").T,
        },
    }


def _depformer(config: MoshiConfig, take: Callable[[str], np.ndarray]) -> dict[str, Any]:
    sets = max(config.depth_schedule) + 1

    def kernels(pattern: str, count: int) -> np.ndarray:
        return np.stack([take(pattern.format(i)).T for i in range(count)])

    params: dict[str, Any] = {
        "depformer_in": kernels("depformer_in.{}.weight", sets),
        "depformer_text_emb": take("depformer_text_emb.weight"),
        "linears": kernels("linears.{}.weight", config.dep_q),
    }
    if config.dep_q > 1:
        params["depformer_emb"] = np.stack([take(f"depformer_emb.{k}.weight") for k in range(config.dep_q - 1)])
    for i in range(config.depformer_num_layers):
        name = f"depformer.layers.{i}"
        params[f"layers_{i}"] = {
            "norm1": {"alpha": take(f"{name}.norm1.alpha").reshape(-1)},
            "in_proj": kernels(name + ".self_attn.in_projs.{}.weight", sets),
            "out_proj": kernels(name + ".self_attn.out_projs.{}.weight", sets),
            "norm2": {"alpha": take(f"{name}.norm2.alpha").reshape(-1)},
            "linear_in": kernels(name + ".gating.{}.linear_in.weight", sets),
            "linear_out": kernels(name + ".gating.{}.linear_out.weight", sets),
        }
    return params


_FUSED = re.compile(
    r"(?P<layer>(?P<stack>transformer|depformer)\.layers\.\d+\.self_attn)\.(?P<part>in|out)_proj[._]weight"
)


def _split_fused(config: MoshiConfig, tensors: Tensors) -> dict[str, Any]:
    """Legacy fused projections under their current per-step names; blocks are equal parts of the first axis."""
    current = {}
    for name, tensor in tensors.items():
        match = _FUSED.fullmatch(name)
        blocks = 1 if match is None or match["stack"] == "transformer" else max(config.depth_schedule) + 1
        if match is None or not tensor.shape or tensor.shape[0] % blocks:
            current[name] = tensor
            continue
        rows = tensor.shape[0] // blocks
        for i in range(blocks):
            target = f"{match['layer']}.{match['part']}_projs.{i}.weight"
            if target in tensors:
                raise ValueError(f"both {name} and {target} are there, expected one of the two namings")
            current[target] = tensor[i * rows : (i + 1) * rows]
    return current


def _expected_shapes(config: MoshiConfig) -> Expected:
    c = config
    shapes: Expected = {
        "text_emb.weight": (c.text_card + 1, c.dim),
        "out_norm.alpha": (1, 1, c.dim),
        "text_linear.weight": (c.text_card, c.dim),
        "depformer_text_emb.weight": (c.text_card + 1, c.depformer_dim),
    }
    shapes |= {f"emb.{k}.weight": (c.card + 1, c.dim) for k in range(c.n_q)}
    shapes |= {f"depformer_emb.{k}.weight": (c.card + 1, c.depformer_dim) for k in range(c.dep_q - 1)}
    shapes |= {f"linears.{k}.weight": (c.card, c.depformer_dim) for k in range(c.dep_q)}
    sets = range(max(c.depth_schedule) + 1)
    shapes |= {f"depformer_in.{i}.weight": (c.depformer_dim, c.dim) for i in sets}
    hidden = gated_hidden_size(c.dim, int(c.hidden_scale * c.dim))
    for i in range(c.num_layers):
        shapes |= _layer_shapes(f"transformer.layers.{i}", c.dim, hidden, [0], ["gating"])
    feedforward = c.depformer_dim_feedforward or int(c.hidden_scale * c.depformer_dim)
    hidden = gated_hidden_size(c.depformer_dim, feedforward)
    for i in range(c.depformer_num_layers):
        gatings = [f"gating.{step}" for step in sets]
        shapes |= _layer_shapes(f"depformer.layers.{i}", c.depformer_dim, hidden, list(sets), gatings)
    return shapes


def _layer_shapes(name: str, dim: int, hidden: int, steps: list[int], gatings: list[str]) -> Expected:
    shapes: Expected = {f"{name}.norm{i}.alpha": (1, 1, dim) for i in (1, 2)}
    shapes |= {f"{name}.self_attn.in_projs.{i}.weight": (3 * dim, dim) for i in steps}
    shapes |= {f"{name}.self_attn.out_projs.{i}.weight": (dim, dim) for i in steps}
    shapes |= {f"{name}.{gating}.linear_in.weight": (2 * hidden, dim) for gating in gatings}
    shapes |= {f"{name}.{gating}.linear_out.weight": (dim, hidden) for gating in gatings}
    return shapes
