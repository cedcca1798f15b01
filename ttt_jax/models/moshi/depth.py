"""The depth transformer: the dep_q audio tokens of one frame, one after the other, each step with its own weights.

Arrays are step-major, `[S, P, width]` with S steps and P positions (any frames of any rows): per-step weights
`[S, in, out]` then are one batched product, and a single step is the same code with S = 1.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ttt_jax.dtypes import at_least_float32
from ttt_jax.layers.linear import linear
from ttt_jax.layers.mlp import gated_hidden_size, gated_silu
from ttt_jax.layers.norm import RMSNorm
from ttt_jax.models.moshi.config import MoshiConfig

STEP_KERNEL_INIT = nn.initializers.lecun_normal(batch_axis=(0,))
STACKED_EMBEDDING_INIT = nn.initializers.variance_scaling(1.0, "fan_out", "truncated_normal", batch_axis=(0,))
EMBEDDING_INIT = nn.initializers.variance_scaling(1.0, "fan_out", "truncated_normal")


class StepKeys(NamedTuple):
    """Keys and values of the steps before, of one layer: each `[S, P, H, D]`."""

    keys: jax.Array
    values: jax.Array


def embed(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows of `table [card + 1, width]` for int tokens `[...]`; a negative token gives zeros."""
    rows = jnp.take(table, jnp.maximum(tokens, 0), axis=0)
    return jnp.where((tokens >= 0)[..., None], rows, jnp.zeros((), rows.dtype))


def step_product(x: jax.Array, weights: jax.Array, *, sets: Sequence[int]) -> jax.Array:
    """`x [S, P, in]`, or `[P, in]` for all steps, times the weight set of each step, `weights [sets, in, out]`.

    `[S, P, out]` in x's dtype.
    """
    sets = tuple(sets)
    if sets != tuple(range(weights.shape[0])):
        weights = jnp.stack([weights[i] for i in sets])
    return jnp.einsum("pd,sde->spe" if x.ndim == 2 else "spd,sde->spe", x, weights.astype(x.dtype))


def step_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention over steps, all `[steps, P, H, D]`: the last query sees every key, the one before all but the last."""
    queries, keys = q.shape[0], k.shape[0]
    wide = at_least_float32(q.dtype)
    logits = jnp.einsum("sphd,tphd->phst", q, k, preferred_element_type=wide) * q.shape[-1] ** -0.5
    seen = jnp.tril(jnp.ones((queries, keys), bool), k=keys - queries)
    weights = jax.nn.softmax(jnp.where(seen[None, None], logits, -1e30), axis=-1)
    return jnp.einsum("phst,tphd->sphd", weights.astype(q.dtype), v)


class DepthBlock(nn.Module):
    """`x + SA(RMS(x))`, then `x + FF(RMS(x))`; projections per weight set, norms shared between steps."""

    config: MoshiConfig

    def setup(self):
        """Parameters."""
        c = self.config
        sets, dim = max(c.depth_schedule) + 1, c.depformer_dim
        feedforward = c.depformer_dim_feedforward or int(c.hidden_scale * dim)
        hidden = gated_hidden_size(dim, feedforward)
        self.norm1, self.norm2 = RMSNorm(), RMSNorm()
        self.in_proj = self.param("in_proj", STEP_KERNEL_INIT, (sets, dim, 3 * dim), jnp.float32)
        self.out_proj = self.param("out_proj", STEP_KERNEL_INIT, (sets, dim, dim), jnp.float32)
        self.linear_in = self.param("linear_in", STEP_KERNEL_INIT, (sets, dim, 2 * hidden), jnp.float32)
        self.linear_out = self.param("linear_out", STEP_KERNEL_INIT, (sets, hidden, dim), jnp.float32)

    def __call__(self, x: jax.Array, sets: tuple[int, ...], past: StepKeys | None) -> tuple[jax.Array, StepKeys]:
        """Steps `x [S, P, dim]` that use weight sets `sets`, after the steps in `past`."""
        heads = self.config.depformer_num_heads
        multiply = functools.partial(linear, self, product=step_product, sets=sets)
        qkv = multiply("in_proj", self.norm1(x), self.in_proj)
        q, k, v = (part.reshape(*x.shape[:2], heads, x.shape[-1] // heads) for part in jnp.split(qkv, 3, axis=-1))
        if past is not None:
            k, v = jnp.concatenate([past.keys, k]), jnp.concatenate([past.values, v])
        x = x + multiply("out_proj", step_attention(q, k, v).reshape(x.shape), self.out_proj)
        hidden = gated_silu(multiply("linear_in", self.norm2(x), self.linear_in))
        return x + multiply("linear_out", hidden, self.linear_out), StepKeys(k, v)


class DepthTransformer(nn.Module):
    """Predicts audio token j of a frame from the temporal output z, the text token and audio tokens before j."""

    config: MoshiConfig

    def setup(self):
        """Parameters and layers."""
        c = self.config
        dim, sets = c.depformer_dim, max(c.depth_schedule) + 1
        rank = c.depformer_low_rank_embeddings or dim
        self.depformer_in = self.param("depformer_in", STEP_KERNEL_INIT, (sets, c.dim, dim), jnp.float32)
        self.depformer_text_emb = self.param("depformer_text_emb", EMBEDDING_INIT, (c.text_card + 1, rank), jnp.float32)
        if c.dep_q > 1:
            shape = (c.dep_q - 1, c.card + 1, rank)
            self.depformer_emb = self.param("depformer_emb", STACKED_EMBEDDING_INIT, shape, jnp.float32)
        if c.depformer_low_rank_embeddings is not None:
            # One for the token read by each step, the text's first.
            shape = (c.dep_q, rank, dim)
            self.depformer_low_rank = self.param("depformer_low_rank", STEP_KERNEL_INIT, shape, jnp.float32)
        self.layers = [DepthBlock(c) for _ in range(c.depformer_num_layers)]
        self.linears = self.param("linears", STEP_KERNEL_INIT, (c.dep_q, dim, c.card), jnp.float32)

    def hidden(self, z: jax.Array, tokens: jax.Array) -> jax.Array:
        """Teacher-forced: `z [P, dim]` and the frame's tokens `[dep_q, P]` (text, then audio but the last).

        Returns `[dep_q, P, depformer_dim]`, the input of `logits`.
        """
        steps = range(self.config.dep_q)
        x = self._inputs(z, steps, [tokens[j] for j in steps])
        for layer in self.layers:
            x, _ = layer(x, self.config.depth_schedule, None)
        return x

    def step(self, z: jax.Array, j: int, token: jax.Array, past: tuple[StepKeys, ...] | None):
        """Step j alone, of `z [P, dim]` and the token before it `[P]`: its logits `[P, card]` and the keys so far."""
        x = self._inputs(z, [j], [token])
        keys = []
        for i, layer in enumerate(self.layers):
            x, layer_keys = layer(x, (self.config.depth_schedule[j],), None if past is None else past[i])
            keys.append(layer_keys)
        return self.logits(x, [j])[0], tuple(keys)

    def logits(self, x: jax.Array, steps: Sequence[int] | None = None) -> jax.Array:
        """`[S, P, depformer_dim]` of `steps` (default all) to float32 `[S, P, card]`."""
        steps = range(self.config.dep_q) if steps is None else steps
        logits = linear(self, "linears", x, self.linears, step_product, sets=steps)
        return logits.astype(at_least_float32(x.dtype))

    def _inputs(self, z, steps, tokens):
        """`depformer_in[s_j] z` plus the embedding of the token before step j."""
        dtype = jnp.dtype(self.config.dtype)
        tables = [self.depformer_text_emb if j == 0 else self.depformer_emb[j - 1] for j in steps]
        embedded = jnp.stack([embed(table, token) for table, token in zip(tables, tokens, strict=True)]).astype(dtype)
        if self.config.depformer_low_rank_embeddings is not None:
            embedded = linear(self, "depformer_low_rank", embedded, self.depformer_low_rank, step_product, sets=steps)
        sets = tuple(self.config.depth_schedule[j] for j in steps)
        return linear(self, "depformer_in", z.astype(dtype), self.depformer_in, step_product, sets=sets) + embedded
