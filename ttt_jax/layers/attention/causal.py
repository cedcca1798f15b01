"""Causal attention to a run of recent frames and to the first ones, as XLA computes it."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from ttt_jax.layers.attention.cache import AttentionCache, Sinks, held_positions, unrolled
from ttt_jax.layers.attention.softmax import KeySet, softmax_attention
from ttt_jax.layers.rope import RotaryEmbedding, rotate

Kind = Literal["window", "segment"]
Attend = Callable[[list[KeySet]], jax.Array]


@dataclasses.dataclass(frozen=True)
class Context:
    """What frame t sees: the run `first(t) .. t`, and the sinks `j < min(sinks, first(t))`. All in frames.

    The frames between the last sink and the run are forgotten, and positions are counted as if they had never been.
    """

    kind: Kind
    size: int
    overlap: int = 0
    sinks: int = 0

    @property
    def reach(self) -> int:
        """The longest run."""
        return self.size + self.overlap

    def first(self, t):
        """Where the run of frame t starts; negative before the row's first frame."""
        if self.kind == "window":
            return t - self.size + 1
        return t // self.size * self.size - self.overlap

    def sees(self, query_at, key_at):
        """Positions `[..., T]` and `[..., S]` since the row's start to bool `[..., T, S]`, sinks apart."""
        t, s = query_at[..., :, None], key_at[..., None, :]
        return (s <= t) & (s >= self.first(t)) & (s >= 0)

    def seen_from(self, t):
        """Where frame t stands for a sink: `t`, less the frames forgotten in between."""
        return jnp.minimum(t, self.sinks + t - self.first(t))


def attend_causal(
    context: Context,
    q,
    k,
    v,
    rope: RotaryEmbedding | None,
    cache: AttentionCache | None,
    sinks: Sinks | None,
    start,
    attend: Attend = softmax_attention,
):
    """`[B, T, H, D]` of T >= 1 frames.

    Args:
        context: what a frame sees.
        q: `[B, T, H, D]`; k and v alike.
        k: keys.
        v: values.
        rope: rotates queries and keys.
        cache: before these frames, None for a fresh start.
        sinks: after these frames.
        start: `[B]` int32, the first frame's position in its row.
        attend: what computes the softmax over sets of keys.
    """
    form = _attend_whole if q.shape[1] <= 2 * context.reach else _attend_in_blocks
    return form(context, q, k, v, rope, cache, sinks, start, attend)


def _attend_whole(context: Context, q, k, v, rope, cache, sinks, start, attend):
    """All queries at once against the ring and against the call's own keys, positions relative to the call's start."""
    frames = _count(q.shape[1])
    at = start[:, None] + frames[None]
    queries = _rotated(rope, q, frames)
    sets = [KeySet(queries, _rotated(rope, k, frames), v, context.sees(at, at))]
    if cache is not None:
        held = held_positions(cache)
        keys, values = (
            jnp.where((held >= 0)[:, :, None, None], x, jnp.zeros((), x.dtype)) for x in (cache.keys, cache.values)
        )
        sets.insert(0, KeySet(queries, _rotated(rope, keys, held - start[:, None]), values, context.sees(at, held)))
    return attend(sets + _sink_sets(context, q, at, rope, sinks))


def _attend_in_blocks(context: Context, q, k, v, rope, cache, sinks, start, attend):
    """Blocks of `reach` queries against their own and the previous block's keys: memory O(T * reach), never O(T * T).

    Positions are relative to each block's start, so angles stay small however long the call is.
    """
    batch, frames = q.shape[:2]
    size = context.reach
    num_blocks = -(-frames // size)
    padding = ((0, 0), (0, num_blocks * size - frames), (0, 0), (0, 0))
    q, *own = (jnp.pad(x, padding).reshape(batch, num_blocks, size, *x.shape[2:]) for x in (q, k, v))
    inside = _count(size)
    at = (start[:, None] + size * _count(num_blocks)[None])[:, :, None] + inside[None, None]
    queries = _rotated(rope, q, inside)
    sets = [KeySet(queries, _rotated(rope, own[0], inside), own[1], context.sees(at, at))]
    aligned = context.kind == "segment" and context.overlap == 0 and cache is None  # blocks are segments
    if not aligned:
        before = [_previous_blocks(x, ring) for x, ring in zip(own, unrolled(cache, k, v, size), strict=True)]
        visible = context.sees(at, at - size)
        sets.append(KeySet(queries, _rotated(rope, before[0], inside - size), before[1], visible))
    out = attend(sets + _sink_sets(context, q, at, rope, sinks))
    return out.reshape(batch, num_blocks * size, *q.shape[3:])[:, :frames]


def _sink_sets(context: Context, q, at, rope, sinks: Sinks | None) -> list[KeySet]:
    """Sinks as frames `[..., T]` at positions `at` see them: those that the frame's run does not hold already."""
    if sinks is None:
        return []
    shape = (at.shape[0], *(1,) * (at.ndim - 2), *sinks.keys.shape[1:])
    keys, values = (x.reshape(shape) for x in sinks)
    j = _count(context.sinks)
    visible = j.reshape((1,) * at.ndim + j.shape) < context.first(at)[..., None]
    return [KeySet(_rotated(rope, q, context.seen_from(at)), _rotated(rope, keys, j), values, visible)]


def _previous_blocks(blocks, ring):
    """`[B, N, size, H, D]` shifted by one block, the ring in front."""
    return jnp.concatenate([ring[:, None].astype(blocks.dtype), blocks[:, :-1]], axis=1)


def _count(n: int):
    return jnp.arange(n, dtype=jnp.int32)


def _rotated(rope: RotaryEmbedding | None, x, positions):
    return x if rope is None else rotate(rope, x, positions)
