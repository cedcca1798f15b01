"""Acoustic delays: stream k of codes is read `delays[k]` frames late, behind one initial token."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def delay(codes: jax.Array, delays: Sequence[int], initial: Sequence[int]) -> jax.Array:
    """`[B, K, T]` codes to the `[B, K, T + 1]` delayed sequence that Moshi reads and predicts.

    Position p of stream k holds `codes[:, k, p - 1 - delays[k]]`, or `initial[k]` where that frame does not exist.
    The model reads positions `[:, :, :-1]` and predicts positions `[:, :, 1:]`.
    """
    batch, _, frames = codes.shape
    delayed = []
    for k, (shift, token) in enumerate(zip(delays, initial, strict=True)):
        head = jnp.full((batch, min(shift, frames) + 1), token, codes.dtype)
        delayed.append(jnp.concatenate([head, codes[:, k, : max(frames - shift, 0)]], axis=1))
    return jnp.stack(delayed, axis=1)


def delayed_positions(
    codes: np.ndarray, start: int, num_positions: int, delays: Sequence[int], initial: Sequence[int]
) -> np.ndarray:
    """Positions `start .. start + num_positions - 1` of what `delay` makes of one row `[K, T]`, in NumPy.

    Positions that read behind the last frame hold -1, so that a walk can go on until the latest stream has ended.
    """
    first = max(0, start - 1 - max(delays))  # what comes before is not read
    codes = np.pad(codes[:, first : start + num_positions], ((0, 0), (0, 1)), constant_values=-1)
    frame = np.arange(start, start + num_positions)[None] - 1 - np.asarray(delays)[:, None]
    inside = np.clip(frame - first, 0, codes.shape[1] - 1)
    tokens = np.where(frame < 0, np.asarray(initial)[:, None], np.take_along_axis(codes, inside, axis=1))
    return tokens.astype(np.int32)


def undelay(x: jax.Array, delays: Sequence[int], *, axis: int) -> jax.Array:
    """Moves stream k of `x [K, ...]` back by `delays[k]` frames along `axis`; frames past the end are zeros."""
    frames = x.shape[axis]
    moved = []
    for k, shift in enumerate(delays):
        tail = jax.lax.slice_in_dim(x[k], min(shift, frames), frames, axis=axis - 1)
        padding = [(0, 0)] * tail.ndim
        padding[axis - 1] = (0, min(shift, frames))
        moved.append(jnp.pad(tail, padding))
    return jnp.stack(moved)


def delay_mask(num_frames: int, delays: Sequence[int]) -> jax.Array:
    """`[K, T]` bool: whether the delayed position that predicts a frame lies inside the sequence."""
    last = num_frames - jnp.asarray(delays, jnp.int32)
    return jnp.arange(num_frames, dtype=jnp.int32)[None] < last[:, None]
