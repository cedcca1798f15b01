"""Run the kernels on a CPU, in JAX's interpreter of the GPU's threads, barriers and memories."""

import contextlib
import contextvars
import os
from collections.abc import Iterator

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

_PARAMETERS: contextvars.ContextVar[plgpu.InterpretGPUParams | None] = contextvars.ContextVar(
    "parameters", default=None
)


@contextlib.contextmanager
def interpreted(*, detect_races: bool = False) -> Iterator[None]:
    """Kernels that are traced inside run interpreted, as if on an H100; some 50 ms for each mini-batch.

    Args:
        detect_races: print every access to memory that no barrier orders.
    """
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=8)
    token = _PARAMETERS.set(plgpu.InterpretGPUParams(detect_races=detect_races))
    try:
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
            yield
    finally:
        _PARAMETERS.reset(token)


def parameters() -> plgpu.InterpretGPUParams | None:
    """Those of the interpreter inside of `interpreted`, else None."""
    return _PARAMETERS.get()


def detects_races() -> bool:
    """Whether kernels are traced for an interpreter that looks for races."""
    found = _PARAMETERS.get()
    return found is not None and found.detect_races


def require_threads(count: int) -> None:
    """For thread blocks or warpgroups that wait for each other: each may hold one of XLA's threads.

    Raises:
        RuntimeError: XLA has fewer threads than `count`; it would wait forever.
    """
    threads = max(os.cpu_count() or 1, len(jax.devices("cpu")))
    if threads < count:
        raise RuntimeError(
            f"to interpret this kernel XLA needs {count} threads, it has {threads}: set "
            "XLA_FLAGS=--xla_force_host_platform_device_count=8"
        )
