"""Kyutai's Moshi checkpoints and this library's parameter tree."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from ttt_jax.convert.fused import split_fused
from ttt_jax.convert.table import Rule, Table, Tensors, make_params
from ttt_jax.layers.mlp import gated_hidden_size
from ttt_jax.models.moshi.config import Conditioner, MoshiConfig


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
    table = moshi_table(config)
    return make_params(table, split_fused(table, tensors), np.float32)


def moshi_table(config: MoshiConfig) -> Table:
    """Every parameter of `Moshi(config)` without TTT, by the current names of Kyutai's code."""
    c = config
    rules = [
        Rule("text_emb", ("text_emb.weight",), (c.text_card + 1, c.dim)),
        _stacked("emb", "emb.{}.weight", c.n_q, (c.card + 1, c.dim), transpose=False),
        Rule("out_norm/alpha", ("out_norm.alpha",), (1, 1, c.dim), view=(c.dim,)),
        Rule("text_linear", ("text_linear.weight",), (c.text_card, c.dim), transpose=True),
    ]
    hidden = gated_hidden_size(c.dim, int(c.hidden_scale * c.dim))
    for i in range(c.num_layers):
        rules += _temporal_layer(f"layers_{i}", f"transformer.layers.{i}", c.dim, hidden)
    if c.extra_heads_num_heads:
        rules.append(
            _stacked("extra_heads", "extra_heads.{}.weight", c.extra_heads_num_heads, (c.extra_heads_dim, c.dim))
        )
    for conditioner in c.conditioners:
        rules += _conditioner(conditioner, c.dim)
    return Table((*rules, *(_depth_rules(c) if c.dep_q else ())))


def _conditioner(conditioner: Conditioner, width: int) -> Iterable[Rule]:
    path, name = f"conditioners_{conditioner.name}", f"condition_provider.conditioners.{conditioner.name}"
    yield Rule(f"{path}/embed", (f"{name}.embed.weight",), (conditioner.n_bins + 1, conditioner.dim))
    yield _kernel(f"{path}/output_proj", f"{name}.output_proj.weight", (width, conditioner.dim))
    yield Rule(f"{path}/learnt_padding", (f"{name}.learnt_padding",), (1, 1, width), view=(width,))


def _depth_rules(c: MoshiConfig) -> Iterable[Rule]:
    sets, dim = max(c.depth_schedule) + 1, c.depformer_dim
    rank = c.depformer_low_rank_embeddings or dim
    yield Rule("depformer/depformer_text_emb", ("depformer_text_emb.weight",), (c.text_card + 1, rank))
    tables = [f"depformer_emb.{k}" for k in range(c.dep_q - 1)]
    if tables:
        yield Rule(
            "depformer/depformer_emb", tuple(f"{name}.weight" for name in tables), (c.card + 1, rank), stack=True
        )
    if c.depformer_low_rank_embeddings is not None:
        names = tuple(f"{name}.low_rank.weight" for name in ("depformer_text_emb", *tables))
        yield Rule("depformer/depformer_low_rank", names, (dim, rank), transpose=True, stack=True)
    yield _stacked("depformer/depformer_in", "depformer_in.{}.weight", sets, (dim, c.dim))
    yield _stacked("depformer/linears", "linears.{}.weight", c.dep_q, (c.card, dim))
    hidden = gated_hidden_size(dim, c.depformer_dim_feedforward or int(c.hidden_scale * dim))
    for i in range(c.depformer_num_layers):
        path, name = f"depformer/layers_{i}", f"depformer.layers.{i}"
        yield from _norms(path, name, dim)
        yield _stacked(f"{path}/in_proj", name + ".self_attn.in_projs.{}.weight", sets, (3 * dim, dim))
        yield _stacked(f"{path}/out_proj", name + ".self_attn.out_projs.{}.weight", sets, (dim, dim))
        yield _stacked(f"{path}/linear_in", name + ".gating.{}.linear_in.weight", sets, (2 * hidden, dim))
        yield _stacked(f"{path}/linear_out", name + ".gating.{}.linear_out.weight", sets, (dim, hidden))


def _temporal_layer(path: str, name: str, dim: int, hidden: int) -> Iterable[Rule]:
    yield from _norms(path, name, dim)
    yield _kernel(f"{path}/self_attn/in_proj", f"{name}.self_attn.in_projs.0.weight", (3 * dim, dim))
    yield _kernel(f"{path}/self_attn/out_proj", f"{name}.self_attn.out_projs.0.weight", (dim, dim))
    yield _kernel(f"{path}/gating/linear_in", f"{name}.gating.linear_in.weight", (2 * hidden, dim))
    yield _kernel(f"{path}/gating/linear_out", f"{name}.gating.linear_out.weight", (dim, hidden))


def _norms(path: str, name: str, dim: int) -> Iterable[Rule]:
    for norm in ("norm1", "norm2"):
        yield Rule(f"{path}/{norm}/alpha", (f"{name}.{norm}.alpha",), (1, 1, dim), view=(dim,))


def _kernel(path: str, name: str, shape: tuple[int, int]) -> Rule:
    return Rule(path, (name,), shape, transpose=True)


def _stacked(path: str, pattern: str, count: int, shape: tuple[int, int], *, transpose: bool = True) -> Rule:
    return Rule(path, tuple(pattern.format(i) for i in range(count)), shape, transpose=transpose, stack=True)
