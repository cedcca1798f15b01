"""Causal attention over a rolling window or hard segments, in one piece or streamed through a ring of recent keys."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.dtypes import at_least_float32
from ttt_jax.layers.rope import RotaryEmbedding, rotate

Kind = Literal["window", "segment"]
MASKED = -1e30  # finite: a masked logit must not turn a gradient into NaN


class AttentionCache(NamedTuple):
    """The last `size` real frames of every row; frame p of a row lies in slot `p % size`.

    Keys are stored before rotation and turned by their distance when read, so no angle grows with the position.
    """

    keys: jax.Array  # [B, size, H, D]
    values: jax.Array  # [B, size, H, D]
    position: jax.Array  # [B] int32, real frames seen so far


class _KeySet(NamedTuple):
    """Keys in the queries' frame of reference, and which query sees which."""

    keys: jax.Array  # [..., S, H, D]
    values: jax.Array  # [..., S, H, D]
    visible: jax.Array  # bool, broadcastable to [..., T, S]


def init_attention_cache(batch_size: int, size: int, num_heads: int, head_dim: int, dtype=jnp.float32):
    """An empty `AttentionCache` for a window or segment of `size` frames."""
    shape = (batch_size, size, num_heads, head_dim)  # two buffers: a donated one may not appear twice
    return AttentionCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(batch_size, jnp.int32))


def window_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    window: int,
    sinks: int = 0,
    rope: RotaryEmbedding | None = None,
    cache: AttentionCache | None = None,
    length: jax.Array | None = None,
    reset: jax.Array | None = None,
) -> tuple[jax.Array, AttentionCache]:
    """Causal softmax attention of frame t to frames `t - window + 1 .. t` (Moshi's `delta < context`).

    A sequence may be split into calls anywhere, any T >= 0, by handing each call the cache of the one before.

    Args:
        q: `[B, T, H, D]` un-rotated queries; k and v alike.
        k: keys.
        v: values.
        window: frames visible to a frame, itself included.
        sinks: not supported yet, must be 0.
        rope: rotates queries and keys, None for no position.
        cache: of the previous call, or None for a fresh start.
        length: `[B]` int, only the first `length[b]` frames of row b are real (clipped to [0, T]). The rest return
            zeros, change nothing, and their values never matter, NaN included.
        reset: `[B]` bool, these rows forget the cache before the first frame.

    Returns:
        Output `[B, T, H, D]` in q's dtype (softmax in float32) and the cache to continue from.

    Raises:
        ValueError: shapes, dtypes or static values that do not fit. NotImplementedError: sinks.
    """
    if sinks:
        raise NotImplementedError(f"attention sinks are not supported yet, got sinks={sinks}; use sinks=0")
    return _causal_attention("window", "window", window, q, k, v, rope, cache, length, reset)


def segment_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    segment: int,
    overlap: int = 0,
    causal: bool = True,
    sinks: int = 0,
    rope: RotaryEmbedding | None = None,
    cache: AttentionCache | None = None,
    length: jax.Array | None = None,
    reset: jax.Array | None = None,
) -> tuple[jax.Array, AttentionCache]:
    """Causal softmax attention inside hard segments: frame t sees `s <= t` with `s // segment == t // segment`.

    Frames are counted per row from the row's last reset. Everything else is as in `window_attention`; `overlap`,
    `sinks` and `causal=False` are not supported yet and raise NotImplementedError.
    """
    for name, value, supported in (("overlap", overlap, 0), ("causal", causal, True), ("sinks", sinks, 0)):
        if value != supported:
            raise NotImplementedError(f"{name}={value} is not supported yet; use {name}={supported}")
    return _causal_attention("segment", "segment", segment, q, k, v, rope, cache, length, reset)


def _causal_attention(kind: Kind, name: str, size: int, q, k, v, rope, cache, length, reset):
    length, reset = (None if x is None else jnp.asarray(x) for x in (length, reset))
    _check(name, size, q, k, v, cache, length, reset)
    batch, frames, heads, head_dim = q.shape
    fresh = cache is None
    if cache is None:
        cache = init_attention_cache(batch, size, heads, head_dim, k.dtype)
    if reset is not None:
        cache = cache._replace(position=jnp.where(reset, 0, cache.position))
    if frames == 0:
        return q, cache
    if length is not None:
        length = jnp.clip(length, 0, frames).astype(jnp.int32)
        real = (_count(frames)[None] < length[:, None])[:, :, None, None]
        q, k, v = (jnp.where(real, x, jnp.zeros((), x.dtype)) for x in (q, k, v))
    attend = _attend_whole if frames <= 2 * size else _attend_in_blocks
    out = attend(kind, size, q, k, v, rope, None if fresh else cache, cache.position)
    if length is not None:
        out = jnp.where(real, out, jnp.zeros((), out.dtype))
    return out, _push(cache, k, v, length)


def _attend_whole(kind, size, q, k, v, rope, cache, start):
    """All queries at once against the ring and against the call's own keys, positions relative to the call's start."""
    frames = _count(q.shape[1])
    at = start[:, None] + frames[None]
    sets = [_KeySet(_rotated(rope, k, frames), v, _visible(kind, size, at, at))]
    if cache is not None:
        slot = _count(size)[None]
        held = start[:, None] - 1 - (start[:, None] - 1 - slot) % size
        values = jnp.where((held >= 0)[:, :, None, None], cache.values, jnp.zeros((), cache.values.dtype))
        keys = jnp.where((held >= 0)[:, :, None, None], cache.keys, jnp.zeros((), cache.keys.dtype))
        ring = _rotated(rope, keys, held - start[:, None])
        sets.insert(0, _KeySet(ring, values, _visible(kind, size, at, held)))
    return _softmax_attention(_rotated(rope, q, frames), sets)


def _attend_in_blocks(kind, size, q, k, v, rope, cache, start):
    """Blocks of `size` queries against their own and the previous block's keys: memory O(T * size), never O(T * T).

    Positions are relative to each block's start, so angles stay small however long the call is.
    """
    batch, frames = q.shape[:2]
    num_blocks = -(-frames // size)
    padding = ((0, 0), (0, num_blocks * size - frames), (0, 0), (0, 0))
    blocks = [jnp.pad(x, padding).reshape(batch, num_blocks, size, *x.shape[2:]) for x in (q, k, v)]
    inside = _count(size)
    at = start[:, None] + inside[None]
    own = _KeySet(_rotated(rope, blocks[1], inside), blocks[2], _visible(kind, size, at, at)[:, None])
    sets = [own]
    if not (kind == "segment" and cache is None):  # a fresh start aligns blocks with segments
        before = [_previous_blocks(x, ring) for x, ring in zip(blocks[1:], _unrolled(cache, k, v, size), strict=True)]
        block_start = start[:, None] + size * _count(num_blocks)[None]
        exists = block_start[:, :, None] - size + inside[None, None] >= 0
        visible = _window_or_segment(kind, size, at, at - size)[:, None] & exists[:, :, None, :]
        sets.append(_KeySet(_rotated(rope, before[0], inside - size), before[1], visible))
    out = _softmax_attention(_rotated(rope, blocks[0], inside), sets)
    return out.reshape(batch, num_blocks * size, *q.shape[2:])[:, :frames]


def _unrolled(cache: AttentionCache | None, k, v, size: int):
    """The ring's keys and values oldest first: each `[B, size, H, D]`, zeros where there are none."""
    if cache is None:
        return [jnp.zeros((x.shape[0], size, *x.shape[2:]), x.dtype) for x in (k, v)]
    slot = (cache.position[:, None] + _count(size)[None]) % size
    held = cache.position[:, None] - size + _count(size)[None] >= 0
    rings = (jnp.take_along_axis(ring, slot[:, :, None, None], axis=1) for ring in (cache.keys, cache.values))
    return [jnp.where(held[:, :, None, None], ring, jnp.zeros((), ring.dtype)) for ring in rings]


def _previous_blocks(blocks, ring):
    """`[B, N, size, H, D]` shifted by one block, the ring in front."""
    return jnp.concatenate([ring[:, None].astype(blocks.dtype), blocks[:, :-1]], axis=1)


def _push(cache: AttentionCache, k, v, length) -> AttentionCache:
    """Writes each row's last `size` real frames into the ring: touches T slots, in place under donation."""
    batch, frames = k.shape[:2]
    size = cache.keys.shape[1]
    real = jnp.full(batch, frames, jnp.int32) if length is None else length
    frame = _count(frames)[None]
    kept = (frame < real[:, None]) & (frame >= real[:, None] - size)
    slot = jnp.where(kept, (cache.position[:, None] + frame) % size, size)  # slot `size` does not exist: dropped
    rows = jnp.arange(batch)[:, None]
    keys = cache.keys.at[rows, slot].set(k.astype(cache.keys.dtype), mode="drop")
    values = cache.values.at[rows, slot].set(v.astype(cache.values.dtype), mode="drop")
    return AttentionCache(keys, values, cache.position + real)


def _visible(kind: Kind, size: int, query_at, key_at):
    """Which keys a query sees: `[B, T]` and `[B, S]` positions since the row's start to bool `[B, T, S]`."""
    return _window_or_segment(kind, size, query_at, key_at) & (key_at >= 0)[:, None, :]


def _window_or_segment(kind: Kind, size: int, query_at, key_at):
    t, s = query_at[:, :, None], key_at[:, None, :]
    near = t - s < size if kind == "window" else t // size == s // size
    return (s <= t) & near


def _count(n: int):
    return jnp.arange(n, dtype=jnp.int32)


def _rotated(rope: RotaryEmbedding | None, x, positions):
    return x if rope is None else rotate(rope, x, positions)


def _softmax_attention(q, sets: list[_KeySet]):
    """One softmax over several key sets, without joining their keys. Leading axes `...` are shared."""
    wide = at_least_float32(q.dtype)
    scale = q.shape[-1] ** -0.5
    logits = []
    for keys, _, visible in sets:
        scores = jnp.einsum("...thd,...shd->...hts", q, keys.astype(q.dtype), preferred_element_type=wide) * scale
        logits.append(jnp.where(visible[..., None, :, :], scores, MASKED))
    weights = jax.nn.softmax(jnp.concatenate(logits, axis=-1), axis=-1).astype(q.dtype)
    out, offset = jnp.zeros((), wide), 0
    for keys, values, _ in sets:
        part = weights[..., offset : offset + keys.shape[-3]]
        out = out + jnp.einsum("...hts,...shd->...thd", part, values.astype(q.dtype), preferred_element_type=wide)
        offset += keys.shape[-3]
    return out.astype(q.dtype)


def _check(name: str, size: int, q, k, v, cache, length, reset):
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"{name} must be an int >= 1 (frames), got {size!r}")
    for argument, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, jax.Array | np.ndarray):
            raise ValueError(f"{argument} must be an array, got {type(x).__name__}; make it one with jnp.asarray")
    if q.ndim != 4:
        raise ValueError(f"q must have shape [B, T, H, D], got {q.shape}")
    for other, x in (("k", k), ("v", v)):
        if x.shape != q.shape or x.dtype != q.dtype:
            raise ValueError(f"{other} must be like q, {q.dtype}{list(q.shape)}, got {x.dtype}{list(x.shape)}")
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q must be floating, got {q.dtype}")
    batch, _, heads, head_dim = q.shape
    _check_cache(name, (batch, size, heads, head_dim), cache)
    for argument, x, kind in (("length", length, jnp.integer), ("reset", reset, jnp.bool_)):
        if x is not None and (x.shape != (batch,) or not jnp.issubdtype(x.dtype, kind)):
            raise ValueError(f"{argument} must be {kind.__name__} of shape ({batch},), got {x.dtype}{list(x.shape)}")


def _check_cache(name: str, shape: tuple[int, int, int, int], cache):
    if cache is None:
        return
    if not isinstance(cache, AttentionCache):
        raise ValueError(f"cache must be the AttentionCache of an earlier call or None, got {type(cache).__name__}")
    for leaf, letters, expected, kind in (
        ("keys", f"[B, {name}, H, D]", shape, jnp.floating),
        ("values", f"[B, {name}, H, D]", shape, jnp.floating),
        ("position", "[B]", shape[:1], jnp.int32),
    ):
        x = getattr(cache, leaf)
        if x.shape != expected:
            raise ValueError(
                f"cache.{leaf} must have shape {expected} = {letters}, got {x.shape}; "
                f"was the cache made with another batch size or {name}?"
            )
        if not jnp.issubdtype(x.dtype, kind):
            raise ValueError(f"cache.{leaf} must be {kind.__name__}, got {x.dtype}")
