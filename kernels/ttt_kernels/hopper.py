"""What the kernels share: layouts and matrix products.

A mini-batch lives in registers as [D, C]: features are rows, tokens columns. A Hopper matrix product (wgmma) has 64
rows, which D fills and C = 16 would not. Vectors over features are `ROWS`, vectors over tokens `COLUMNS`.

Products read bfloat16. A float32 number is read as the sum of two, itself rounded and what that left over: 16 bits.
"""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import gpu, nvvm, vector

from ttt_kernels import interpreter

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


def total(terms) -> Any:
    """Of arrays, one or more, in their order; unlike `sum`'s, it does not begin with 0."""
    return functools.reduce(operator.add, terms)


def over_columns(rows: jax.Array, num_columns: int) -> jax.Array:
    """A vector over features, the same for each token."""
    return lax.broadcast_in_dim(rows, (rows.shape[0], num_columns), [0])


def over_rows(columns: jax.Array, num_rows: int = 64) -> jax.Array:
    """A vector over tokens, the same for each feature."""
    return lax.broadcast_in_dim(columns, (num_rows, columns.shape[0]), [1])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Matrix:
    """A matrix in SMEM that products read, in one part or in two, of which the second has what the first left over.

    Attributes:
        parts: Of scratch, references to bfloat16.
    """

    parts: tuple[Any, ...]

    @classmethod
    def scratch(cls, parts: int, shape: tuple[int, ...], transforms: Any) -> Any:
        """A kernel's scratch, which the kernel gets as a `Matrix`."""
        return cls((plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms),) * parts)

    def __getitem__(self, at: Any) -> "Matrix":
        """A view."""
        return Matrix(tuple(part.at[at] for part in self.parts))

    @property
    def T(self) -> "Matrix":
        """A view."""
        return Matrix(tuple(part.T for part in self.parts))

    def write(self, value: jax.Array) -> None:
        """`value` is float32."""
        for part, rounded in zip(self.parts, split(value, len(self.parts)), strict=True):
            part[...] = rounded

    def read(self) -> jax.Array:
        """Float32, in registers."""
        return sum((load(part).astype(jnp.float32) for part in self.parts[1:]), load(self.parts[0]).astype(jnp.float32))


def parts_of(dtype: Any) -> int:
    """Into how many bfloat16 numbers one of `dtype` is split."""
    return 1 if dtype == jnp.bfloat16 else 2


def split(value: jax.Array, parts: int) -> list[jax.Array]:
    """In a kernel: bfloat16 numbers whose sum is `value`, but for what the last leaves over."""
    found = []
    for _ in range(parts):
        found.append(value.astype(jnp.bfloat16))
        value = value - found[-1].astype(jnp.float32)
    return found


def stacked(x: jax.Array) -> jax.Array:
    """`[B, ...]` to a kernel's argument: all first parts, then all second ones, `[parts * B, ...]` bfloat16."""
    if parts_of(x.dtype) == 1:
        return x
    first = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)  # XLA would leave out a cast there and back
    return jnp.concatenate([first, x - first]).astype(jnp.bfloat16)


def joined(x: jax.Array, dtype: Any) -> jax.Array:
    """Back from `stacked`."""
    parts = parts_of(dtype)
    return x.astype(dtype).reshape(parts, x.shape[0] // parts, *x.shape[1:]).sum(axis=0) if parts > 1 else x


def product(shape: tuple[int, int], *pairs) -> jax.Array:
    """Sum of the products of the pairs, float32; right operands are in SMEM.

    An operand is a `Matrix`, or a reference or registers, which are one part; a left one may be `FirstRows`.
    """

    def accumulate(acc) -> Any:
        for a, b in pairs:
            multiply(acc, a, b)
        return acc[...]

    result: Any = pl.run_scoped(accumulate, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))
    if interpreter.detects_races():
        for operand in itertools.chain.from_iterable(pairs):
            result = result + _zero_read_from(operand)
    return result


@dataclasses.dataclass(frozen=True)
class FirstRows:
    """A left operand, the rows behind whose first `count` may be anything, and may be written meanwhile."""

    ref: Any
    count: int


def _zero_read_from(operand) -> Any:
    """0, for which an operand in SMEM is loaded: of what products read themselves the interpreter finds no races."""
    if isinstance(operand, jax.Array):
        return 0.0
    if isinstance(operand, FirstRows):
        operand = operand.ref.at[pl.ds(0, operand.count)]
    return sum(jnp.where(jnp.isnan(load(ref).sum()), 0.0, 0.0) for ref in _parts(operand))


def multiply(acc, a, b) -> None:
    """Adds a product to an accumulator; the parts' least product, that of what both left over, is left out."""
    a, b = _parts(a.ref if isinstance(a, FirstRows) else a), _parts(b)
    for i, x in enumerate(a):
        for y in b[: max(len(a), len(b)) - i]:
            plgpu.wgmma(acc, x, y)


def updated(weights: jax.Array, left, right, *, fused: bool) -> Any:
    """`weights` plus a product; fused, it accumulates onto them, and takes no other registers."""
    if not fused:
        return weights + product((weights.shape[0], weights.shape[1]), (left, right))
    return pl.run_state(lambda acc: multiply(acc, left, right))(plgpu.WGMMAAccumulatorRef.init(weights))


def _parts(operand) -> tuple[Any, ...]:
    return operand.parts if isinstance(operand, Matrix) else (operand,)


def copy_tokens(source, at: tuple[Any, Any, Any], target: Matrix, barrier) -> None:
    """`at` a row, tokens and head, from `[parts * B, T, H, D]` in global memory to SMEM."""
    for i, part in enumerate(target.parts):
        plgpu.copy_gmem_to_smem(source.at[*_of_part(i, source, target, at)], part, barrier)


def copy_tokens_back(source: Matrix, target, at: tuple[Any, Any, Any]) -> None:
    """From SMEM to global memory."""
    for i, part in enumerate(source.parts):
        plgpu.copy_smem_to_gmem(part, target.at[*_of_part(i, target, source, at)])


def fetch_tokens(barrier, at: tuple[Any, Any, Any], *copies: tuple[Any, Any]) -> None:
    """`at` a row, tokens and head, from `[B, T, H, D]` or `[B, H, T]` in global memory to SMEM."""
    for source, target in copies:
        plgpu.copy_gmem_to_smem(source.at[*_of_tokens(source, at)], target, barrier)


def save_tokens(at: tuple[Any, Any, Any], *copies: tuple[Any, Any]) -> None:
    """Back from SMEM, without waiting for it."""
    for source, target in copies:
        plgpu.copy_smem_to_gmem(source, target.at[*_of_tokens(target, at)])


def _of_tokens(ref, at: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
    row, tokens, head = at
    return at if ref.ndim == 4 else (row, head, tokens)


def _of_part(i: int, ref, matrix: Matrix, at: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
    row, *others = at
    return row + i * (ref.shape[0] // len(matrix.parts)) if i else row, *others


def compiler_params(*, exact: bool = False, auto_barriers: bool = True) -> Any:
    """Of a kernel.

    Args:
        exact: whether `tanh`, `exp` and the like are not approximated.
        auto_barriers: whether Pallas makes a warpgroup wait for all its threads around each store. Else the kernel sees
            to it that between reading from SMEM and overwriting it, and between writing and reading what other threads
            wrote, there is a `commit_smem` or `wait_for_each_other`.
    """
    return plgpu.CompilerParams(
        approx_math=not exact, reduction_scratch_bytes=0, unsafe_no_auto_barriers=not auto_barriers
    )


def wait_for_each_other(barrier, *, interpreted: bool) -> None:
    """All warpgroups of a block, each of which then sees what the others wrote to SMEM.

    Args:
        barrier: at which each arrives, for the interpreter; the chip has one of its own.
        interpreted: whether to use it.
    """

    def wait(_) -> None:
        nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)
        gpu.barrier()

    if interpreted:
        plgpu.commit_smem()
        plgpu.barrier_arrive(barrier)
        plgpu.barrier_wait(barrier)
    else:
        inline(wait)()


def wait_for_warpgroup(*, interpreted: bool) -> None:
    """All threads of a warpgroup, each of which then sees what the others wrote to SMEM; products do not."""
    if interpreted:
        plgpu.commit_smem()
    else:
        inline(lambda _: mgpu.warpgroup_barrier())()


def inline(function: Callable[..., Any], *arguments: Any, result: Any = None) -> Callable[..., Any]:
    """A function of Pallas' from one that writes Mosaic's code."""
    inlined: Any = plgpu.inline_mgpu(arg_types=arguments, return_type=result)
    return inlined(function)


def int32() -> Any:
    """Mosaic's type."""
    return ir.IntegerType.get_signless(32)


def element(vector_of_registers, i: int) -> Any:
    """Element i of a vector in Mosaic's code."""
    return vector.extract(vector_of_registers, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))


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
