"""Sums over the rows of a matrix in the registers of one of a thread block's warpgroups.

Pallas' own have one scratch for all warpgroups, and wait for it as many times as it is too small.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from ttt_kernels import hopper, inner

_COLUMNS, _WARPS, _LANES = 64, 4, 32


def scratch(warpgroups: int) -> Any:
    """What `total` takes, for each warpgroup."""
    return plgpu.SMEM((warpgroups, _COLUMNS * _WARPS), jnp.float32)


def total(scratch, *, interpreted: bool) -> Callable[[jax.Array], jax.Array]:
    """A function that sums `[64 m, n]` float32 over its rows; n is 8, 16, 32 or 64.

    Args:
        scratch: this warpgroup's.
        interpreted: whether to leave it to the interpreter.
    """

    def of(x: jax.Array) -> jax.Array:
        result = plgpu.ShapeDtypeStruct(x.shape[1:], jnp.float32, layout=hopper.COLUMNS)
        return hopper.inline(_total, hopper.WGMMA, plgpu.RefType(), result=result)(x, scratch)

    return inner.sum_rows if interpreted else of


def _total(_, x, scratch):
    """Of a thread's registers each has a pair of columns, 2 (lane mod 4) and the next, of 8; of 64 rows it has two."""
    int32 = hopper.int32()
    pair, four = (ir.VectorType.get((size,), ir.F32Type.get()) for size in (2, 4))

    def number(value: int):
        return mgpu.c(value, int32)

    def at(column, warp):
        index = arith.addi(arith.muli(column, number(_WARPS)), warp)
        return arith.index_cast(ir.IndexType.get(), index)

    thread = mgpu.utils.thread_idx()
    lane, warp = (arith.remui(thread, number(_LANES)), arith.divui(thread, number(_LANES)))
    warp = arith.remui(warp, number(_WARPS))
    pair_of_lane = arith.muli(arith.remui(lane, number(4)), number(2))
    of_thread = []
    for of_rows in x.registers.reshape(x.shape[0] // 64, -1, 2).transpose(1, 0, 2).reshape(x.shape[1] // 8, -1):
        value = functools.reduce(arith.addf, of_rows)
        of_thread += [hopper.element(value, i) for i in range(2)]
    of_warp, first_of_lane = _over_lanes(of_thread, lane)
    for i, value in enumerate(of_warp):
        i = arith.addi(first_of_lane, number(i))
        column = arith.addi(arith.muli(arith.divui(i, number(2)), number(8)), arith.remui(i, number(2)))
        value = vector.broadcast(ir.VectorType.get((1,), ir.F32Type.get()), value)
        vector.store(value, scratch, [at(arith.addi(column, pair_of_lane), warp)])
    mgpu.warpgroup_barrier()
    sums = []
    for i in range(len(of_thread) // 2):
        found = []
        for j in range(2):
            of_warps = vector.load(four, scratch, [at(arith.addi(pair_of_lane, number(8 * i + j)), number(0))])
            first, second, third, fourth = (hopper.element(of_warps, w) for w in range(_WARPS))
            found.append(arith.addf(arith.addf(first, second), arith.addf(third, fourth)))
        sums.append(vector.from_elements(pair, found))
    mgpu.warpgroup_barrier()
    layout = x.layout.reduce((0,))
    registers = x.registers.reshape(-1)[: len(sums)].copy()
    registers[:] = sums
    shape = (x.shape[1],)
    return mgpu.FragmentedArray(
        _registers=registers.reshape(layout.registers_shape(shape)), _layout=layout, _is_signed=None
    )


def _over_lanes(values, lane):
    """Sums over the lanes of a warp that have the same columns, and which of `values` the first one left is.

    As long as there are several, each of two lanes gives the other a half of them and goes on with the other half: 14
    numbers are exchanged for 16 sums, and 48 if each lane got all.
    """
    int32 = hopper.int32()
    zero, first = mgpu.c(0, int32), mgpu.c(0, int32)
    for distance in (16, 8, 4):
        half = len(values) // 2
        given = kept = values
        if half:
            is_upper = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(lane, mgpu.c(distance, int32)), zero)
            first = arith.addi(first, arith.select(is_upper, mgpu.c(half, int32), zero))
            halves = list(zip(values[:half], values[half:], strict=True))
            kept = [arith.select(is_upper, upper, lower) for lower, upper in halves]
            given = [arith.select(is_upper, lower, upper) for lower, upper in halves]
        values = [arith.addf(x, mgpu.utils.shfl_bfly(y, distance)) for x, y in zip(kept, given, strict=True)]
    return values, first
