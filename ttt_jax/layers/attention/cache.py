"""What causal attention keeps of the past: a ring of recent keys and values, and the first ones for ever."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.rows import zero_where_not


class Sinks(NamedTuple):
    """The first frames of every row since its reset; frame j lies in slot j. Keys are stored before rotation."""

    keys: jax.Array  # [B, sinks, H, D]
    values: jax.Array  # [B, sinks, H, D]


class AttentionCache(NamedTuple):
    """The last `size` real frames of every row; frame p of a row lies in slot `p % size`.

    Keys are stored before rotation and turned by their distance when read, so no angle grows with the position.
    """

    keys: jax.Array  # [B, size, H, D]
    values: jax.Array  # [B, size, H, D]
    position: jax.Array  # [B] int32, real frames seen so far
    sinks: Sinks | None = None  # not arrays of size 0, which checkpoints refuse


def init_attention_cache(
    batch_size: int, size: int, num_heads: int, head_dim: int, dtype=jnp.float32, *, sinks: int = 0
) -> AttentionCache:
    """An empty `AttentionCache`; `size` is the window, or segment + overlap, in frames."""

    def empty(frames):
        return jnp.zeros((batch_size, frames, num_heads, head_dim), dtype)

    # A buffer for each leaf: a donated one may not appear twice.
    first = Sinks(empty(sinks), empty(sinks)) if sinks else None
    return AttentionCache(empty(size), empty(size), jnp.zeros(batch_size, jnp.int32), first)


def push_recent(cache: AttentionCache, k, v, length) -> AttentionCache:
    """Writes each row's last `size` real frames into the ring: touches T slots, in place under donation."""
    batch, frames = k.shape[:2]
    size = cache.keys.shape[1]
    real = jnp.full(batch, frames, jnp.int32) if length is None else length
    frame = jnp.arange(frames, dtype=jnp.int32)[None]
    kept = (frame < real[:, None]) & (frame >= real[:, None] - size)
    slot = jnp.where(kept, (cache.position[:, None] + frame) % size, size)  # slot `size` does not exist: dropped
    keys, values = _written(cache.keys, slot, k), _written(cache.values, slot, v)
    return cache._replace(keys=keys, values=values, position=cache.position + real)


def push_sinks(cache: AttentionCache, k, v, length) -> Sinks | None:
    """The sinks with those that this call brings; zeros where a row has not come that far."""
    if cache.sinks is None:
        return None
    frames, sinks = k.shape[1], cache.sinks.keys.shape[1]
    real = jnp.int32(frames) if length is None else length[:, None]
    frame = jnp.arange(min(frames, sinks), dtype=jnp.int32)[None]
    position = cache.position[:, None] + frame
    slot = jnp.where((frame < real) & (position < sinks), position, sinks)  # slot `sinks` does not exist: dropped
    held = jnp.arange(sinks, dtype=jnp.int32)[None] < cache.position[:, None] + real
    leaves = (
        jnp.where(held[:, :, None, None], _written(old, slot, new[:, : frame.shape[1]]), jnp.zeros((), old.dtype))
        for old, new in zip(cache.sinks, (k, v), strict=True)
    )
    return Sinks(*leaves)


def _written(buffer, slot, x):
    rows = jnp.arange(x.shape[0])[:, None]
    return buffer.at[rows, slot].set(x.astype(buffer.dtype), mode="drop")


def held_positions(cache: AttentionCache):
    """Position of the frame in each slot of the ring, negative where there is none: `[B, size]`."""
    last = cache.position[:, None] - 1
    return last - (last - jnp.arange(cache.keys.shape[1], dtype=jnp.int32)[None]) % cache.keys.shape[1]


def unrolled(cache: AttentionCache | None, k, v, size: int):
    """The ring's keys and values oldest first: each `[B, size, H, D]`, zeros where there are none."""
    if cache is None:
        return [jnp.zeros((x.shape[0], size, *x.shape[2:]), x.dtype) for x in (k, v)]
    before = jnp.arange(size, dtype=jnp.int32)[None] - size
    slot = (cache.position[:, None] + before) % size
    held = cache.position[:, None] + before >= 0
    rings = (jnp.take_along_axis(ring, slot[:, :, None, None], axis=1) for ring in (cache.keys, cache.values))
    return [jnp.where(held[:, :, None, None], ring, jnp.zeros((), ring.dtype)) for ring in rings]


def evicted(cache: AttentionCache | None, k, v, size: int, reset=None):
    """What leaves a ring of `size` frames while the frames of k and v come in, one for each.

    Args:
        cache: before these frames; None is a fresh start.
        k: `[B, T, H, D]` keys that come in; v alike.
        v: values.
        size: frames that the ring holds.
        reset: `[B]` bool, rows whose ring is empty.

    Returns:
        Keys and values `[B, T, H, D]`, zeros where nothing leaves, and where something does: `[B, T]` bool. Where the
        call's frames are not real, they mean nothing.
    """
    batch, frames = k.shape[:2]
    position = jnp.zeros(batch, jnp.int32) if cache is None else cache.position
    if reset is not None:
        position = jnp.where(reset, 0, position)
    position = position[:, None] + jnp.arange(frames, dtype=jnp.int32)[None]
    leaves = position >= size
    if cache is None:
        old = [jnp.zeros((batch, min(frames, size), *x.shape[2:]), x.dtype) for x in (k, v)]
    else:
        slot = (position[:, :size] % size)[:, :, None, None]
        old = [jnp.take_along_axis(ring, slot, axis=1) for ring in (cache.keys, cache.values)]
    joined = (
        jnp.concatenate([before.astype(x.dtype), x[:, : max(frames - size, 0)]], axis=1)
        for before, x in zip(old, (k, v), strict=True)
    )
    return *(zero_where_not(leaves, x) for x in joined), leaves
