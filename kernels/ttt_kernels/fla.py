"""Time flash-linear-attention's Triton kernels for TTT-Linear (causal, C = 16), where PyTorch and it are installed.

    python -m ttt_kernels.fla --heads=32 8x8192 1x1024   # prints JSON: of each shape, milliseconds by kernel and pass

A program of its own, so that PyTorch and JAX do not share a process. Its kernels add the same LayerNorm and residual.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

CALLS = 5


def is_installed() -> bool:
    """Whether both can be imported."""
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "fla"))


def milliseconds(shapes: Sequence[tuple[int, int]], heads: int) -> list[dict[str, dict[str, float]]]:
    """Of each number of rows and tokens, by kernel: forward, and forward with the gradients of all arguments.

    Raises:
        subprocess.CalledProcessError: It failed.
    """
    done = subprocess.run(_command(shapes, heads), capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def compile_all(shapes: Sequence[tuple[int, int]], heads: int) -> subprocess.Popen:
    """A process that leaves in Triton's cache what `milliseconds` then need not compile, in minutes."""
    quiet = subprocess.DEVNULL
    return subprocess.Popen(_command(shapes, heads), stdout=quiet, stderr=quiet)


def _command(shapes: Sequence[tuple[int, int]], heads: int) -> list[str]:
    shapes_named = (f"{rows}x{tokens}" for rows, tokens in shapes)
    return [sys.executable, "-m", "ttt_kernels.fla", f"--heads={heads}", *shapes_named]


def main() -> int:
    """The program; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, required=True)
    parser.add_argument("shapes", nargs="+", metavar="ROWSxTOKENS")
    options = parser.parse_args()
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes]
    print(json.dumps([_measure(rows, tokens, options.heads) for rows, tokens in shapes]))
    return 0


def _measure(rows: int, tokens: int, heads: int) -> dict[str, dict[str, float]]:
    import torch  # pyright: ignore[reportMissingImports]
    from fla.ops import ttt  # pyright: ignore[reportMissingImports]

    dim = 64

    def normal(*shape: int, dtype: Any = torch.bfloat16, scale: float = 1.0) -> Any:
        return (scale * torch.randn(*shape, device="cuda")).to(dtype).requires_grad_()

    q, k, v = (normal(rows, tokens, heads, dim, scale=scale) for scale in (dim**-0.5, dim**-0.5, 1.0))
    w, b = normal(heads, dim), normal(heads, dim)
    step = (0.5 * torch.rand(rows, tokens, heads, 1, device="cuda")).to(torch.bfloat16).requires_grad_()
    state = normal(rows, heads, dim, dim, dtype=torch.float32, scale=0.1)
    bias = normal(rows, heads, 1, dim, dtype=torch.float32)
    arguments = (q, k, v, w, b, step)

    def forward(kernel):
        return kernel(
            *arguments, scale=1.0, chunk_size=16, initial_state=state, initial_state_bias=bias, output_final_state=True
        )[0]

    def forward_backward(kernel):
        torch.autograd.grad(forward(kernel).sum(), (*arguments, state, bias))

    def median(function, kernel) -> float:
        """As `bench.median_seconds`."""

        def seconds(calls: int) -> float:
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                function(kernel)
            torch.cuda.synchronize()
            return (time.perf_counter() - start) / calls

        seconds(2)  # compiles
        in_a_row = min(100, max(1, round(0.05 / seconds(1))))
        return 1e3 * statistics.median(seconds(in_a_row) for _ in range(CALLS))

    found = {}
    for name, kernel in (("fla_chunk", ttt.chunk_ttt_linear), ("fla_fused", ttt.fused_chunk_ttt_linear)):
        try:
            found[name] = {"forward": median(forward, kernel), "forward_backward": median(forward_backward, kernel)}
        except Exception as error:  # of Triton's many types: too little SMEM, say
            print(f"{name} was not timed: {error}", file=sys.stderr)
    return found


if __name__ == "__main__":
    sys.exit(main())
