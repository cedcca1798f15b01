"""Sums over the thread blocks of a cluster, each of which holds a slice of the inner MLP's hidden units."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from ttt_kernels import hopper

SLICES = 4
"""Thread blocks of a cluster: slices of 64 of the 256 hidden units."""

AXIS = "slice"


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
        transforms = hopper.float32_columns(self.columns)
        everyone: Any = plgpu.ClusterBarrier(collective_axes=(AXIS,))
        slots = plgpu.SMEM((self.at_once, SLICES, 64, self.columns), jnp.float32, transforms=transforms)
        if not self.through_gmem:
            arrived = plgpu.Barrier(num_arrivals=SLICES, num_barriers=self.at_once)
            return [everyone, slots, arrived]
        staging = plgpu.SMEM((64, self.columns), jnp.float32, transforms=transforms)
        return [everyone, slots, everyone, staging, plgpu.Barrier()]

    def bind(
        self, buffers: Sequence[Any], scratch: Sequence[Any], zero: Callable[[], Any]
    ) -> Callable[..., list[jax.Array]]:
        """A function of values to their sums over the cluster; `buffers` are `results`, at a row and head.

        `zero` is a `hopper.hidden_zero`.
        """
        has_read, slots, arrived, *through_gmem = scratch
        own = lax.axis_index(AXIS)
        plgpu.barrier_arrive(has_read)

        def store(part: int, value: jax.Array) -> None:
            if not self.through_gmem:
                target, barrier = slots.at[part + zero(), own], arrived.at[part]

                def send(i, carry):
                    peer = lax.rem(own + i, SLICES)
                    plgpu.async_store_smem(value, target, barrier, cluster_idx=peer, cluster_dim=AXIS, optimized=False)
                    return carry

                lax.fori_loop(0, SLICES + zero(), send, 0)
                return
            staging, _ = through_gmem
            staging[...] = value
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(staging, buffers[0].at[part, own])
            plgpu.wait_smem_to_gmem(0)

        def fetch(part: int) -> None:
            if not self.through_gmem:
                plgpu.barrier_wait(arrived.at[part])
                return
            _, loaded = through_gmem
            plgpu.copy_gmem_to_smem(buffers[0].at[part], slots.at[part], loaded)
            plgpu.barrier_wait(loaded)

        def sums(*values: jax.Array) -> list[jax.Array]:
            if len(values) > self.at_once:
                return [sums(value)[0] for value in values]
            plgpu.barrier_wait(has_read)
            for part, value in enumerate(values):
                store(part, value)
            if self.through_gmem:
                plgpu.barrier_arrive(arrived)
                plgpu.barrier_wait(arrived)
            found = []
            for part in range(len(values)):
                fetch(part)
                summands = [hopper.load(slots.at[part + zero(), i]) for i in range(SLICES)]
                found.append((summands[0] + summands[1]) + (summands[2] + summands[3]))
            plgpu.barrier_arrive(has_read)
            return found

        return sums

    def finish(self, scratch: Sequence[Any]) -> None:
        """Before a block ends: no other may still be signalling to it."""
        plgpu.barrier_wait(scratch[0])
