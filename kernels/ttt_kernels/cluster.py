"""Sums over the thread blocks of a cluster, each of which holds a slice of the inner MLP's hidden units."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, nvvm

from ttt_kernels import hopper

SLICES = 4
"""Thread blocks of a cluster: slices of 64 of the 256 hidden units."""

AXIS = "slice"

_WARPS = 4


def units_of(slice_index) -> Any:
    """The hidden units of a slice, among all."""
    return pl.ds(pl.multiple_of(slice_index * hopper.D, hopper.D), hopper.D)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Sums of `[64, columns]` float32 values over the cluster, the same bits in every block.

    Each block stores its summands in every block's SMEM, which waits for all of them; when all have read them, the
    next sums may begin.

    Attributes:
        columns: of the summands.
        through_gmem: summands go through global memory instead: the GPU interpreter cannot reach other blocks' SMEM.
        at_once: sums that wait for each other; more are made one after the other.
    """

    columns: int
    through_gmem: bool
    at_once: int = 2

    def results(self, rows: tuple[int, ...]) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Buffers in global memory that it takes among the kernel's results."""
        shape = (*rows, self.at_once, SLICES, 64, self.columns)
        return (jax.ShapeDtypeStruct(shape, jnp.float32),) if self.through_gmem else ()

    def scratch(self) -> list[Any]:
        """What `bind` takes of the kernel's scratch."""
        everyone: Any = plgpu.ClusterBarrier(collective_axes=(AXIS,))
        slots = plgpu.SMEM((self.at_once, SLICES, 64, self.columns), jnp.float32, transforms=self._transforms)
        if not self.through_gmem:
            return [everyone, slots, plgpu.SMEM((2,), jnp.int32)]  # an mbarrier, see `_Arrivals`
        staging = plgpu.SMEM((64, self.columns), jnp.float32, transforms=self._transforms)
        return [everyone, slots, everyone, staging, plgpu.Barrier()]

    @property
    def _transforms(self) -> tuple[Any, Any]:
        return hopper.float32_columns(self.columns)

    def bind(
        self, buffers: Sequence[Any], scratch: Sequence[Any], zero: Callable[[], Any]
    ) -> Callable[..., list[jax.Array]]:
        """A function of functions that compute summands, to their sums; `buffers` are `results`, at a row and head.

        A summand is on its way to the other blocks while the next is computed.

        `zero` is a `hopper.hidden_zero`.
        """
        has_read, slots, *rest = scratch
        own = lax.axis_index(AXIS)

        def through_smem(summands: Sequence[Callable[[], jax.Array]]) -> None:
            arrivals = _Arrivals(rest[0])
            parity = arrivals.expect(len(summands) * SLICES * 64 * self.columns * 4)
            for part, summand in enumerate(summands):
                arrivals.store(summand(), slots.at[part + zero(), own], self._transforms)
            arrivals.wait(parity)

        def through_gmem(summands: Sequence[Callable[[], jax.Array]]) -> None:
            arrived, staging, loaded = rest
            for part, summand in enumerate(summands):
                staging[...] = summand()
                hopper.save((staging, buffers[0].at[part, own]))
            plgpu.barrier_arrive(arrived)
            plgpu.barrier_wait(arrived)
            for part in range(len(summands)):
                hopper.fetch(loaded, (buffers[0].at[part], slots.at[part]))

        def sums(*summands: Callable[[], jax.Array]) -> list[jax.Array]:
            if len(summands) > self.at_once:
                return [sums(summand)[0] for summand in summands]
            plgpu.barrier_wait(has_read)
            (through_gmem if self.through_gmem else through_smem)(summands)
            found = []
            for part in range(len(summands)):
                of_blocks = [hopper.load(slots.at[part + zero(), i]) for i in range(SLICES)]
                found.append((of_blocks[0] + of_blocks[1]) + (of_blocks[2] + of_blocks[3]))
            plgpu.barrier_arrive(has_read)
            return found

        if not self.through_gmem:
            _Arrivals(rest[0]).start()
        plgpu.barrier_arrive(has_read)
        return sums

    def finish(self, scratch: Sequence[Any]) -> None:
        """Before a block ends: no other may still be signalling to it."""
        plgpu.barrier_wait(scratch[0])


@dataclasses.dataclass(frozen=True)
class _Arrivals:
    """Stores into the SMEM of all blocks of a cluster, and an mbarrier that counts the bytes which have come.

    `plgpu.async_store_smem` makes each thread that stores announce its bytes to the other block's barrier, which takes
    a fence over the GPU's memory for each store. Here each block announces to its own barrier what it is going to
    receive, which takes none.

    Attributes:
        barrier: `[2]` int32 in SMEM, the 8 bytes of the mbarrier.
    """

    barrier: Any

    def start(self) -> None:
        """Once, before any block stores: each block arrives at a cluster barrier after it."""

        def initialize(_, barrier):
            first = mgpu.single_thread_predicate(scope=mgpu.ThreadSubset.BLOCK)
            nvvm.mbarrier_init(_pointer(barrier), mgpu.c(_WARPS, hopper.int32()), predicate=first)
            mgpu.utils.inline_ptx("fence.mbarrier_init.release.cluster;", has_side_effects=True)
            mgpu.warpgroup_barrier()

        hopper.inline(initialize, plgpu.RefType())(self.barrier)

    def expect(self, num_bytes: int) -> jax.Array:
        """Announces what all blocks together will store here; returns the parity to wait for, int32."""

        def announce(_, barrier):
            # A warp's threads see the barrier's parity before the warp arrives, so before the phase can end.
            parity: Any = mgpu.utils.inline_ptx(
                """
                {
                    .reg .pred is_odd, is_first;
                    .reg .b32 lane;
                    mbarrier.test_wait.parity.shared.b64 is_odd, [$1], 0;
                    selp.b32 $0, 1, 0, is_odd;
                    bar.warp.sync 0xffffffff;
                    mov.u32 lane, %laneid;
                    setp.eq.u32 is_first, lane, 0;
                    @is_first mbarrier.arrive.expect_tx.shared.b64 _, [$1], $2;
                }
                """,
                _pointer(barrier),
                mgpu.c(num_bytes // _WARPS, hopper.int32()),
                result_types=hopper.int32(),
                has_side_effects=True,
                convergent=True,
            )
            return mgpu.FragmentedArray.splat(parity, (), is_signed=True)

        scalar: Any = plgpu.Layout.WG_SPLAT
        result = plgpu.ShapeDtypeStruct((), jnp.int32, layout=scalar)
        return hopper.inline(announce, plgpu.RefType(), result=result)(self.barrier)

    def store(self, value: jax.Array, target: Any, transforms: tuple[Any, Any]) -> None:
        """Into `target` of every block."""

        def store(_, value, target, barrier):
            index, x = ir.IndexType.get(), gpu.Dimension.x
            # Else the compiler packs values into pairs before the product that they come from has ended.
            value = mgpu.optimization_barrier(value)
            phases: Any = None
            arrivals = mgpu.BarrierRef(_pointer(barrier), mgpu.c(0, hopper.int32()), phases, 1)
            for i in range(SLICES):
                peer = arith.remui(arith.addi(gpu.cluster_block_id(x), mgpu.c(i, index)), mgpu.c(SLICES, index))
                value.store_tiled_async(
                    target, arrivals, cluster_dim=x, cluster_idx=peer, swizzle=4 * value.shape[1], optimized=False
                )

        hopper.inline(store, hopper.WGMMA, plgpu.RefType(transforms), plgpu.RefType())(value, target, self.barrier)

    def wait(self, parity: jax.Array) -> None:
        """Until all has come."""

        def wait(_, barrier, parity):
            nvvm.mbarrier_try_wait_parity(
                _pointer(barrier), parity.registers.item(), mgpu.c(10_000_000, hopper.int32())
            )

        hopper.inline(wait, plgpu.RefType(), plgpu.Layout.WG_SPLAT)(self.barrier, parity)


def _pointer(barrier: Any) -> Any:
    return mgpu.utils.memref_ptr(barrier)
