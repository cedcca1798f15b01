"""One checked call of the operation, as the implementations receive it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.ttt import inner
from ttt_jax.ttt.types import TTTLinearParams, TTTParams, TTTState


class Call(NamedTuple):
    """Arguments of `ttt_linear` / `ttt_mlp` in one compute dtype, their shapes already checked."""

    params: TTTParams
    q: jax.Array  # [B, T, H, D]
    k: jax.Array
    v: jax.Array
    lr: jax.Array  # [B, T, H]
    token_scale: jax.Array  # [C]
    state: TTTState | None
    length: jax.Array | None  # [B] int32 in [0, T]
    causal: bool
    eps: float
    remat_every: int
    dtype: jnp.dtype  # of q, k and v as they came

    @property
    def model(self) -> inner.InnerModel:
        """The fast model that `params` belong to."""
        return inner.LINEAR if isinstance(self.params, TTTLinearParams) else inner.MLP

    @property
    def mini_batch_size(self) -> int:
        """C."""
        return self.token_scale.shape[0]

    @property
    def lengths(self) -> jax.Array:
        """Real tokens of every row, [B] int32."""
        batch_size, num_tokens = self.q.shape[:2]
        return jnp.full(batch_size, num_tokens, jnp.int32) if self.length is None else self.length

    @property
    def is_real(self) -> jax.Array:
        """Which tokens are within their row's length, [B, T] bool."""
        return jnp.arange(self.q.shape[1], dtype=jnp.int32)[None] < self.lengths[:, None]


def fresh_state(params: TTTParams, batch_size: int) -> TTTState:
    """The state of rows that have read nothing: the initial fast weights, no gradient, count 0."""
    weights = tuple(jnp.broadcast_to(w, (batch_size, *w.shape)) for w in params.fast_weights)
    return TTTState(weights, tuple(jnp.zeros_like(w) for w in weights), jnp.zeros(batch_size, jnp.int32))


def select_rows(rows: jax.Array, on_true, on_false):
    """`where(rows[b], on_true[b], on_false[b])` for every leaf of two pytrees whose leaves lead with B."""

    def select(a, b):
        return jnp.where(rows.reshape(rows.shape + (1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(select, on_true, on_false)


def commit_pending(state: TTTState, token_scale: jax.Array) -> TTTState:
    """Apply the open mini-batch's gradient, as at its end."""
    weights = tuple(w - token_scale[-1] * g for w, g in zip(state.weights, state.gradient, strict=True))
    return TTTState(weights, tuple(jnp.zeros_like(w) for w in weights), jnp.zeros_like(state.count))


def vary_together(tree, inputs):
    """Under `shard_map` a scan's carry must vary over the mesh axes that its inputs vary over from the start."""

    def axes(x):
        return jax.typeof(x).manual_axis_type.varying

    everything = frozenset().union(*(axes(x) for x in jax.tree.leaves(inputs) if isinstance(x, jax.Array)))
    return jax.tree.map(lambda x: jax.lax.pcast(x, tuple(everything - axes(x)), to="varying"), tree)
