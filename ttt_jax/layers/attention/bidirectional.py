"""Attention without a mask inside segments that may overlap, all segments in one batch."""

import jax.numpy as jnp

from ttt_jax.dtypes import at_least_float32
from ttt_jax.layers.attention import flash
from ttt_jax.layers.attention.softmax import KeySet, softmax_attention
from ttt_jax.layers.rope import RotaryEmbedding, rotate


def attend_bidirectional(segment: int, overlap: int, q, k, v, rope: RotaryEmbedding | None, length, use_flash: bool):
    """`[B, T, H, D]`, zero beyond `length [B]`: the mean over the segments that hold a frame.

    Segment i holds the frames `[i * stride, i * stride + segment)`, stride = segment - overlap, and exists in a row
    if it is the first or holds a real frame that the one before does not.
    """
    frames, stride = q.shape[1], segment - overlap
    num_segments = max(1, -(-(frames - overlap) // stride))
    starts = stride * jnp.arange(num_segments, dtype=jnp.int32)[None]
    real = jnp.clip(length[:, None] - starts, 0, segment)
    exists = (starts == 0) | (real > overlap)
    q, k, v = (cut(x, num_segments, segment, stride) for x in (q, k, v))
    if rope is not None:
        inside = jnp.arange(segment, dtype=jnp.int32)
        q, k = rotate(rope, q, inside), rotate(rope, k, inside)
    out = (flash.attend_real if use_flash else attend_real)(q, k, v, real)
    exists = jnp.broadcast_to(exists[:, :, None, None, None], (*q.shape[:3], 1, 1))
    out = jnp.where(exists, out, jnp.zeros((), out.dtype)).astype(at_least_float32(out.dtype))
    count = summed(exists.astype(out.dtype), stride)[:, :frames]
    return (summed(out, stride)[:, :frames] / jnp.maximum(count, 1)).astype(q.dtype)


def attend_real(q, k, v, real):
    """`[B, N, S, H, D]`, every query against the first `real [B, N]` keys of its segment."""
    visible = jnp.arange(q.shape[2], dtype=jnp.int32)[None, None, None] < real[:, :, None, None]
    return softmax_attention([KeySet(q, k, v, visible)])


def cut(x, num_segments: int, segment: int, stride: int):
    """`[B, T, ...]` to `[B, N, segment, ...]`, by slices of whole strides: gathers and their gradients are slow."""
    pieces = -(-segment // stride)
    blocks = num_segments - 1 + pieces
    x = jnp.pad(x, ((0, 0), (0, blocks * stride - x.shape[1]), (0, 0), (0, 0)))
    x = x.reshape(x.shape[0], blocks, stride, *x.shape[2:])
    return jnp.concatenate([x[:, p : p + num_segments] for p in range(pieces)], axis=2)[:, :, :segment]


def summed(segments, stride: int):
    """The opposite of `cut`: `[B, N, segment, ...]` to `[B, T', ...]`, shared frames added up."""
    batch, num_segments, segment, *rest = segments.shape
    pieces = -(-segment // stride)
    unused = ((0, 0),) * len(rest)
    segments = jnp.pad(segments, ((0, 0), (0, 0), (0, pieces * stride - segment), *unused))
    total = jnp.zeros((batch, num_segments - 1 + pieces, stride, *rest), segments.dtype)
    for p, part in enumerate(jnp.split(segments, pieces, axis=2)):
        total = total + jnp.pad(part, ((0, 0), (p, pieces - 1 - p), (0, 0), *unused))
    return total.reshape(batch, (num_segments - 1 + pieces) * stride, *rest)
