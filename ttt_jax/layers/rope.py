"""Rotary position embedding (Su et al. 2021) on interleaved pairs of features."""

import dataclasses

import jax
import jax.numpy as jnp

from ttt_jax.dtypes import at_least_float32


@dataclasses.dataclass(frozen=True)
class RotaryEmbedding:
    """Pair i of D/2 turns by `position * theta^(-2i/D)` radians.

    Only differences of positions matter to attention, so callers pass positions relative to something near:
    float32 angles lose a digit per factor of ten, and a stream has no last position.
    """

    theta: float = 1e4

    def __post_init__(self):
        if not self.theta > 0:
            raise ValueError(f"theta must be > 0, got {self.theta!r}; 1e4 is usual")


def rotate(rope: RotaryEmbedding, x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotates `x [..., T, H, D]` to `positions [..., T]` (or `[T]`), pairs (2i, 2i + 1) together, in x's dtype.

    Raises:
        ValueError: D is odd.
    """
    head_dim = x.shape[-1]
    if head_dim % 2:
        raise ValueError(f"x must have an even head dim to rotate pairs, got shape {x.shape}")
    wide = at_least_float32(x.dtype)
    frequencies = rope.theta ** (-jnp.arange(0, head_dim, 2, dtype=wide) / head_dim)
    positions = positions.reshape((1,) * (x.ndim - 2 - positions.ndim) + positions.shape)
    angles = positions.astype(wide)[..., None, None] * frequencies.reshape((1,) * (x.ndim - 1) + (-1,))
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    pairs = x.astype(wide).reshape(*x.shape[:-1], head_dim // 2, 2)
    real, imaginary = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)


def rotate_3d(rope: RotaryEmbedding, x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotates `x [..., T, H, D]` to the (frame, row, column) of `positions [..., T, 3]` (or `[T, 3]`), in x's dtype.

    The first D/4 features turn by the frame, the next 3D/8 by the row and the last 3D/8 by the column, each part as
    `rotate` turns a head of that size. Position (0, 0, 0) leaves x as it is, bit for bit.

    Raises:
        ValueError: D is no multiple of 16, so that a part would be odd.
    """
    head_dim = x.shape[-1]
    if head_dim % 16:
        raise ValueError(f"x must have a head dim that 16 divides to rotate in three axes, got shape {x.shape}")
    ends = (head_dim // 4, head_dim // 4 + 3 * head_dim // 8)
    parts = jnp.split(x, ends, axis=-1)
    return jnp.concatenate([rotate(rope, part, positions[..., i]) for i, part in enumerate(parts)], axis=-1)
