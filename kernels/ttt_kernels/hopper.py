"""What the kernels share: layouts, matrix products, and the inner LayerNorm on a transposed mini-batch.

A mini-batch lives in registers as [D, C]: features are rows, tokens columns. A Hopper matrix product (wgmma) has 64
rows, which D fills and C = 16 would not. Vectors over features are `ROWS`, vectors over tokens `COLUMNS`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

TILE = 64
"""Tokens that are copied at once."""

WGMMA: Any = plgpu.Layout.WGMMA
ROWS: Any = plgpu.Layout.WGMMA.reduce(1)
COLUMNS: Any = plgpu.Layout.WGMMA.reduce(0)


def _transforms(columns: int, swizzle: int) -> tuple[Any, Any]:
    """Of an SMEM buffer: tiles of 8 rows, swizzled over this many bytes."""
    tiling: Any = plgpu.TilingTransform
    swizzling: Any = plgpu.SwizzleTransform
    return tiling((8, columns)), swizzling(swizzle)


OVER_FEATURES = _transforms(64, 128)
"""Of buffers that products sum over their 64 features."""

FLOAT32 = _transforms(32, 128)
"""Of float32 matrices, so that registers reach them without bank conflicts."""

OVER_TOKENS = _transforms(16, 32)
"""Of buffers that products sum over the 16 tokens of a mini-batch: a swizzle of 32 bytes spans just those."""


def load(ref, layout=WGMMA):
    """SMEM to registers; a transposed view needs the slow path."""
    return plgpu.load(ref, layout=layout, optimized=False)


def over_columns(rows: jax.Array, num_columns: int) -> jax.Array:
    """A vector over features, the same for each token."""
    return lax.broadcast_in_dim(rows, (rows.shape[0], num_columns), [0])


def over_rows(columns: jax.Array, num_rows: int = 64) -> jax.Array:
    """A vector over tokens, the same for each feature."""
    return lax.broadcast_in_dim(columns, (num_rows, columns.shape[0]), [1])


def product(shape: tuple[int, int], *pairs) -> jax.Array:
    """Sum of the products of the pairs, float32; right operands are in SMEM."""

    def accumulate(acc) -> Any:
        for a, b in pairs:
            plgpu.wgmma(acc, a, b)
        return acc[...]

    result: Any = pl.run_scoped(accumulate, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))
    return result


def mean_over_rows(x: jax.Array) -> jax.Array:
    """[D, C] to its mean over features, the same for each feature."""
    return over_rows(x.sum(axis=0) * (1.0 / x.shape[0]), x.shape[0])


def normalize(z: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """[D, C] to zero mean and unit variance over features; also 1/std, [D, C]."""
    centered = z - mean_over_rows(z)
    rstd = lax.rsqrt((centered * centered).sum(axis=0) * (1.0 / z.shape[0]) + eps)
    rstd = over_rows(rstd, z.shape[0])
    return centered * rstd, rstd


def without_projections(x: jax.Array, normalized: jax.Array) -> jax.Array:
    """`x` without its mean and its part along `normalized`: a LayerNorm's derivative, times std."""
    return x - mean_over_rows(x) - normalized * mean_over_rows(x * normalized)
