"""Time flash-linear-attention's Triton kernels for TTT-Linear (causal, C = 16), where PyTorch and it are installed.

    python -m ttt_kernels.fla --rows=8 --tokens=8192 --heads=32      # prints JSON: milliseconds by kernel and pass

A program of its own, so that PyTorch and JAX do not share a process. Its kernels add the same LayerNorm and residual.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from typing import Any

CALLS = 5


def is_installed() -> bool:
    """Whether both can be imported."""
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "fla"))


def milliseconds(rows: int, tokens: int, heads: int) -> dict[str, dict[str, float]]:
    """By kernel: forward, and forward with the gradients of all arguments.

    Raises:
        subprocess.CalledProcessError: It failed.
    """
    command = [sys.executable, "-m", "ttt_kernels.fla", f"--rows={rows}", f"--tokens={tokens}", f"--heads={heads}"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> int:
    """The program; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("rows", "tokens", "heads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    print(json.dumps(_measure(options.rows, options.tokens, options.heads)))
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
        forward(kernel).sum().backward()

    def median(function, kernel) -> float:
        times = []
        for _ in range(CALLS + 2):  # the first two compile and warm up
            torch.cuda.synchronize()
            start = time.perf_counter()
            function(kernel)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return 1e3 * statistics.median(times[2:])

    return {
        name: {"forward": median(forward, kernel), "forward_backward": median(forward_backward, kernel)}
        for name, kernel in (("fla_chunk", ttt.chunk_ttt_linear), ("fla_fused", ttt.fused_chunk_ttt_linear))
    }


if __name__ == "__main__":
    sys.exit(main())
