"""Matrices that a warpgroup keeps in global memory for itself: of each thread its registers, 16 bytes at a time.

A thread reads what it wrote, so there is nothing to wait for. Row by row, bfloat16 would fill half of each sector.
"""

import jax
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from ttt_kernels import hopper

_THREADS, _WORDS = 128, 4


def keep(ref, value: jax.Array, *, interpreted: bool) -> None:
    """Writes `value`, to be read by `kept` alone.

    Args:
        ref: `[64 m, n]` in global memory, contiguous, n a multiple of 16.
        value: as `ref`, bfloat16 or float32, in the layout of products.
        interpreted: whether to leave it to the interpreter.
    """
    if interpreted:
        ref[...] = value
    else:
        hopper.inline(_store, hopper.WGMMA, plgpu.RefType())(value, ref)


def kept(ref, *, interpreted: bool) -> jax.Array:
    """What `keep` wrote last."""
    if interpreted:
        return hopper.load(ref)
    result = plgpu.ShapeDtypeStruct(ref.shape, ref.dtype, layout=hopper.WGMMA)
    return hopper.inline(_load, plgpu.RefType(), result=result)(ref)


def _address(ref):
    """In global memory, of a thread's first words."""
    thread = arith.remui(mgpu.utils.thread_idx(), mgpu.c(_THREADS, hopper.int32()))
    start = llvm.addrspacecast(llvm.PointerType.get(1), mgpu.utils.memref_ptr(ref))
    return mgpu.utils.getelementptr(start, [thread], ir.VectorType.get((_WORDS,), hopper.int32()))


def _offset(i: int) -> int:
    """In bytes, of the words i and on."""
    return 4 * i * _THREADS


def _store(_, value, ref) -> None:
    words = []
    for register in value.registers.reshape(-1):
        size = _words_of(register.type)
        of_register = vector.bitcast(ir.VectorType.get((size,), hopper.int32()), register)
        words += [hopper.element(of_register, i) for i in range(size)]
    address = _address(ref)
    for i in range(0, len(words), _WORDS):
        mgpu.utils.inline_ptx(
            f"st.global.v4.b32 [$0+{_offset(i)}], {{$1, $2, $3, $4}};",
            *(address, *words[i : i + _WORDS]),
            has_side_effects=True,
        )


def _load(_, ref):
    """Not a load that the compiler may leave out, keeping the value in registers instead."""
    matrix, layout = ir.MemRefType(ref.type), mgpu.WGMMA_LAYOUT
    shape = layout.registers_shape(tuple(matrix.shape))
    register = layout.registers_element_type(matrix.element_type)
    size, words, address = _words_of(register), [], _address(ref)
    for i in range(0, int(np.prod(shape)) * size, _WORDS):
        words += mgpu.utils.inline_ptx(
            f"ld.relaxed.cta.global.v4.b32 {{$0, $1, $2, $3}}, [$4+{_offset(i)}];",
            address,
            result_types=(hopper.int32(),) * _WORDS,
            has_side_effects=True,
        )
    registers = np.empty(shape, object)
    for i, at in enumerate(np.ndindex(shape)):
        of_register = vector.from_elements(ir.VectorType.get((size,), hopper.int32()), words[size * i :][:size])
        registers[at] = vector.bitcast(register, of_register)
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _words_of(register) -> int:
    found = ir.VectorType(register)
    return found.shape[0] * mgpu.bitwidth(found.element_type) // 32
