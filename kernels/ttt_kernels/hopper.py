"""What the kernels share: layouts and matrix products.

A mini-batch lives in registers as [D, C]: features are rows, tokens columns. A Hopper matrix product (wgmma) has 64
rows, which D fills and C = 16 would not. Vectors over features are `ROWS`, vectors over tokens `COLUMNS`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

TILE = 64
"""Tokens that are copied at once."""

D = 64
"""Head dim."""

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


def over_tokens(count: int) -> tuple[Any, Any]:
    """Of buffers that products sum over this many tokens: a swizzle of 32 bytes spans 16 of them."""
    return _transforms(count, 2 * count)


def float32_columns(columns: int) -> tuple[Any, Any]:
    """Of float32 buffers with few columns."""
    return _transforms(columns, 4 * columns)


HIDDEN_ZERO: Any = plgpu.SMEM((1,), jnp.int32)
"""Scratch of `hidden_zero`."""


def hidden_zero(ref, *, known: bool) -> Callable[[], Any]:
    """A function that returns 0 unknown to the compiler, where not `known`.

    An address that depends on it is computed where it is needed. Of others the compiler computes hundreds before the
    loop over the tokens, and then has no registers left.
    """
    if known:
        return lambda: 0
    ref[0] = jnp.int32(0)
    return lambda: ref[0]


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


def fetch(barrier, *copies: tuple[Any, Any]) -> None:
    """From global memory to SMEM, waiting for it."""
    for source, target in copies:
        plgpu.copy_gmem_to_smem(source, target, barrier)
    plgpu.barrier_wait(barrier)


def save(*copies: tuple[Any, Any]) -> None:
    """From SMEM to global memory, waiting for it."""
    plgpu.commit_smem()
    for source, target in copies:
        plgpu.copy_smem_to_gmem(source, target)
    plgpu.wait_smem_to_gmem(0)
