"""Compile every kernel for an H100, without one, and hold what it takes of the chip against a committed table.

    python -m ttt_kernels.check           # exits with 1 where a kernel takes other resources than the table says
    python -m ttt_kernels.check --write   # writes the table

`make kernels-check` installs what it needs: JAX's CUDA compiler and ptxas.
"""

import argparse
import concurrent.futures
import contextlib
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ttt_kernels.h100 import H100

TABLE = pathlib.Path(__file__).parents[1] / "resources.json"
KERNELS_PER_PROCESS = 3
REGISTERS_OF_SM, SHARED_MEMORY_OF_SM, RESERVED_OF_CTA = 65536, 233472, 1024


def kernels() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Name to kernel and abstract arguments, at a few rows and heads: neither changes what is compiled."""
    import functools

    import jax
    import jax.numpy as jnp

    from ttt_kernels import linear_backward, linear_forward, mlp
    from ttt_kernels.blocks import LinearBlocks, MLPBlocks
    from ttt_kernels.cluster import SLICES
    from ttt_kernels.operations import FLOAT32_HEAD_DIMS
    from ttt_kernels.step import ttt_step

    batch_size, num_tokens, num_heads = 2, 1024, 4

    def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch_size, num_heads, *shape), dtype)

    def of_linear(dim: int):
        return linear_forward.forward, linear_backward.backward, ((dim, dim), (dim,)), ((dim, dim), (dim,))

    def of_mlp(dim: int):
        matrix, hidden = (SLICES, dim, dim), SLICES * dim
        of_kernels = (matrix, (SLICES, dim), matrix, (dim,))
        return mlp.forward, mlp.backward, of_kernels, ((dim, hidden), (hidden,), (hidden, dim), (dim,))

    models = {
        ("linear", ""): (64, LinearBlocks.choose, *of_linear(64)),
        ("linear", "_d128"): (128, functools.partial(LinearBlocks.choose, head_dim=128), *of_linear(128)),
        ("mlp", ""): (64, MLPBlocks.choose, *of_mlp(64)),
    }
    found = {}
    for (name, suffix), (dim, choose, forward, backward, weights, of_step) in models.items():
        tokens, float32_tokens = (
            jax.ShapeDtypeStruct((batch_size, num_tokens, num_heads, dim), dtype)
            for dtype in (jnp.bfloat16, jnp.float32)
        )
        ln = (jax.ShapeDtypeStruct((num_heads, dim), jnp.float32),) * 2
        for c, causal in ((16, True), (16, False), (64, True), (64, False)):
            blocks = choose(c, mini_batches_per_checkpoint=num_tokens)  # the most SMEM
            options = {"causal": causal, "eps": 1e-6, "blocks": blocks, "interpret": False}
            scale = jax.ShapeDtypeStruct((c,), jnp.float32)
            others = (array(num_tokens), array(num_tokens), scale)
            inputs = (*(tokens,) * 3, *others)
            at_end = tuple(array(*shape) for shape in weights)
            kept = tuple(array(-(-num_tokens // 64 // blocks.tiles_per_checkpoint), *shape) for shape in weights)
            variant = f"{'causal' if causal else 'full'}_c{c}{suffix}"
            found[f"{name}_forward_{variant}"] = (
                functools.partial(forward, keep=True, **options),
                (*inputs, *at_end, *ln),
            )
            if dim in FLOAT32_HEAD_DIMS:
                found[f"{name}_forward_{variant}_float32"] = (
                    functools.partial(forward, keep=False, **options),
                    (*(float32_tokens,) * 3, *others, *at_end, *ln),
                )
            arguments = (*inputs, *kept, *ln, tokens, *at_end)
            found[f"{name}_backward_{variant}"] = functools.partial(backward, **options), arguments
        state, scale = tuple(array(*shape) for shape in of_step), jax.ShapeDtypeStruct((batch_size,), jnp.float32)
        found[f"{name}_step{suffix}"] = ttt_step, (*(array(dim),) * 3, array(), scale, scale, state, state, *ln)
    return found


def resources(names: Sequence[str]) -> dict[str, dict[str, int]]:
    """Compiles kernels, in a process of their own, since the compiler reports to its output.

    Raises:
        RuntimeError: One does not compile, or what compiles it is not installed.
    """
    directories = [_directory_of_ptxas(), *os.environ.get("PATH", "").split(os.pathsep)]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "PATH": os.pathsep.join(directories),
    }
    command = [sys.executable, "-m", "ttt_kernels.check", "--compile", *names]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    _, *reports = re.split(r"^kernel (\S+)\n", done.stdout, flags=re.MULTILINE)
    reported = dict(zip(reports[::2], reports[1::2], strict=True))
    return {name: _resources_in(reported.get(name, done.stdout), name) for name in names}


def _resources_in(report: str, name: str) -> dict[str, int]:
    registers = re.search(r"Used (\d+) registers", report)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    shared = re.search(r"shared memory: (\d+) bytes", report)
    threads = re.search(r"threads: (\d+)", report)
    if registers is None or spills is None or shared is None or threads is None:
        raise RuntimeError(f"{name} was not compiled:\n{report[-3000:]}")
    found = {
        "threads": int(threads[1]),
        "registers": int(registers[1]),
        "spill_store_bytes": int(spills[1]),
        "spill_load_bytes": int(spills[2]),
        "shared_memory_bytes": int(shared[1]),
    }
    return found | {"ctas_per_sm": ctas_per_sm(found["registers"], found["shared_memory_bytes"], found["threads"])}


def ctas_per_sm(registers: int, shared_memory: int, threads: int) -> int:
    """How many CTAs an SM of an H100 holds at once; registers come in blocks of 8 a thread."""
    by_registers = REGISTERS_OF_SM // (-(-registers // 8) * 8 * threads)
    return min(by_registers, SHARED_MEMORY_OF_SM // (shared_memory + RESERVED_OF_CTA))


def compile_kernel(name: str) -> None:
    """Compiles for an H100; this prints the name, then it and ptxas what the kernel takes."""
    import jax
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="cuda", topology_name="", topology="1x1x1", target_config=H100)
    mesh = topologies.make_mesh(topology, (1,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    print(f"kernel {name}", flush=True)
    kernel, arguments = kernels()[name]
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), _reported_launches():
        lowered = jax.jit(kernel).trace(*arguments).lower(lowering_platforms=("cuda",))
    lowered.compile()


@contextlib.contextmanager
def _reported_launches() -> Iterator[None]:
    """Prints a kernel's shared memory as Mosaic adds it up, and its threads: the compiled program does not tell."""
    from jax.experimental.mosaic.gpu import core

    add_up, launch = core._smem_tree_size, core._launch

    def report(buffers):
        size = add_up(buffers)
        print(f"shared memory: {size} bytes", flush=True)
        return size

    def launched(token, grid, cluster, block, *arguments, **options):
        print(f"threads: {math.prod(block)}", flush=True)
        return launch(token, grid, cluster, block, *arguments, **options)

    core._smem_tree_size, core._launch = report, launched
    try:
        yield
    finally:
        core._smem_tree_size, core._launch = add_up, launch


def _directory_of_ptxas() -> str:
    """Of the one that is installed beside JAX's compiler, whose version is fixed; else of that on PATH."""
    packaged = [str(path) for root in sys.path for path in pathlib.Path(root).glob("nvidia/*/bin/ptxas")]
    found = next(iter(packaged), shutil.which("ptxas"))
    if found is None:
        raise RuntimeError("ptxas is not installed; `make kernels-check` installs it")
    return str(pathlib.Path(found).parent)


def differences(found: dict[str, dict[str, int]], expected: dict[str, dict[str, int]]) -> list[str]:
    """Where the kernels and the table disagree, a line each; a saving too is to be written down."""
    wrong = [
        f"{name}: {key} expected {expected.get(name, {}).get(key)}, got {value}"
        for name, values in found.items()
        for key, value in values.items()
        if expected.get(name, {}).get(key) != value
    ]
    return wrong + [f"{name}: in the table, but no kernel" for name in sorted(expected.keys() - found.keys())]


def main() -> int:
    """The program; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table")
    parser.add_argument("--compile", nargs="+", metavar="KERNEL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile:
        for name in options.compile:
            compile_kernel(name)
        return 0
    names, found = list(kernels()), {}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for group in pool.map(resources, itertools.batched(names, KERNELS_PER_PROCESS)):
            found |= group
            for name, taken in group.items():
                print(name, *(f"{value} {key}" for key, value in taken.items()), sep="  ", flush=True)
    if options.write:
        TABLE.write_text(json.dumps(found, indent=2) + "\n")
        return 0
    expected = json.loads(TABLE.read_text())
    wrong = differences(found, expected)
    print(*wrong, sep="\n") if wrong else print("as in", TABLE.name)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
