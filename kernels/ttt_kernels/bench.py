"""Time the kernels beside the scan on this GPU, and set both beside what the device could do at best.

    python -m ttt_kernels.bench --output=kernels/measured

Writes DEVICE.json and DEVICE.png there and prints the table. Everything is measured in one run: each shape compiled and
warmed up first, every time the median of calls that have ended on the device.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ttt_kernels.linear import HEAD_DIM as D
from ttt_kernels.linear import MINI_BATCH_SIZE as C

HEADS = 32
IMPLEMENTATIONS = ("pallas", "scan")
FULL_SHAPE = (8, 8192)
"""Rows and tokens of the table; the plot has one row of 1k to 256k tokens."""

PLOTTED_TOKENS = tuple(1024 * 4**n for n in range(5))
ACCURACY_TOKENS = 8192
CALLS = 10


@dataclasses.dataclass(frozen=True)
class Rates:
    """What the device does at best, as measured.

    Attributes:
        bytes_per_second: read and written by a copy of 1 GiB.
        flops_per_second: of a bfloat16 product of two 8192 x 8192 matrices.
        seconds_per_mini_batch: of the forward kernel on one row and head: nothing else shares the device, and each
            mini-batch waits for the one before.
    """

    bytes_per_second: float
    flops_per_second: float
    seconds_per_mini_batch: float


@dataclasses.dataclass(frozen=True)
class Floor:
    """The least time a shape can take, and what binds it: "bytes", "FLOPs" or "serial latency"."""

    seconds: float
    bound: str


def linear_floor(batch_size: int, num_tokens: int, rates: Rates, *, backward: bool) -> Floor:
    """Of TTT-Linear over all heads, forward or forward and backward.

    Counted is what the maths needs: q, k, v and the output in bfloat16, two step sizes and a checkpoint of float32
    weights each 128 tokens; 3 products with the weights and 2 within the mini-batch forward, 6 and 4 more backward,
    which also computes the forward pass again. Serial latency is counted as the forward kernel's, thrice with the
    backward pass: it walks forward again and back.
    """
    tokens = batch_size * num_tokens * HEADS
    checkpoint = 4 * (D * D + D) / 128
    num_bytes = 4 * 2 * D + 2 * 4 + checkpoint
    flops = 2 * D * D * 3 + 2 * D * C * 2
    serial = num_tokens / C * rates.seconds_per_mini_batch
    if backward:
        num_bytes += 7 * 2 * D + 5 * 4 + checkpoint
        flops += flops + 2 * D * D * 6 + 2 * D * C * 4
        serial *= 3
    floors = {
        "bytes": tokens * num_bytes / rates.bytes_per_second,
        "FLOPs": tokens * flops / rates.flops_per_second,
        "serial latency": serial,
    }
    bound = max(floors, key=lambda name: floors[name])
    return Floor(floors[bound], bound)


def median_seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """Of `CALLS` calls, after two that compile and warm up."""
    for _ in range(2):
        jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(CALLS):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def make_arguments(batch_size: int, num_tokens: int, num_heads: int) -> tuple[Any, ...]:
    """params, q, k, v, lr as a trained layer might have them."""
    from ttt_jax import TTTLinearParams

    keys = jax.random.split(jax.random.key(0), 6)

    def normal(key, *shape: int, scale: float = 1.0):
        return scale * jax.random.normal(key, shape, jnp.float32)

    ln = jnp.ones((num_heads, D)), jnp.zeros((num_heads, D))
    params = TTTLinearParams(normal(keys[0], num_heads, D, D, scale=0.1), jnp.zeros((num_heads, D)), *ln)
    shape = (batch_size, num_tokens, num_heads)
    q, k = (normal(key, *shape, D, scale=D**-0.5).astype(jnp.bfloat16) for key in keys[1:3])
    lr = jax.random.uniform(keys[4], shape, jnp.float32, 0.0, 0.5)
    return params, q, k, normal(keys[3], *shape, D).astype(jnp.bfloat16), lr


def operation(implementation: str, *, backward: bool) -> Callable[..., Any]:
    """A jitted forward pass, or one with the gradients of all arguments."""
    from ttt_jax import ttt_linear

    forward = functools.partial(ttt_linear, mini_batch_size=C, implementation=implementation)
    if not backward:
        return jax.jit(forward)

    def total(arguments):
        out, state = forward(*arguments)
        return jnp.sum(out.astype(jnp.float32)) + sum(jnp.sum(w) for w in state.weights)

    return jax.jit(lambda *arguments: jax.grad(total)(arguments))


def time_shape(batch_size: int, num_tokens: int, implementations: Sequence[str]) -> dict[str, Any]:
    """Milliseconds of each implementation, forward and with the backward pass."""
    arguments = make_arguments(batch_size, num_tokens, HEADS)
    ms = {
        name: {
            "forward": 1e3 * median_seconds(operation(name, backward=False), *arguments),
            "forward_backward": 1e3 * median_seconds(operation(name, backward=True), *arguments),
        }
        for name in implementations
    }
    return {"rows": batch_size, "tokens": num_tokens, "heads": HEADS, "ms": ms}


def errors(implementations: Sequence[str], num_tokens: int = ACCURACY_TOKENS) -> dict[str, dict[str, float]]:
    """Relative to float64 on the same bfloat16 numbers, by norm: of the outputs, and of the final weights."""
    arguments = make_arguments(1, num_tokens, 2)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), arguments)
        exact = operation("scan", backward=False)(*wide)

    def relative(x, y) -> float:
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        return float(np.linalg.norm(x - y) / np.linalg.norm(y))

    found = {}
    for name in implementations:
        out, state = operation(name, backward=False)(*arguments)
        weights = relative(state.weights[0], exact[1].weights[0])
        found[name] = {"out": relative(out, exact[0]), "weights": weights}
    return found


def measure_rates() -> Rates:
    """Of this device."""
    copied = jnp.zeros(1 << 28, jnp.float32)
    matrix = jnp.ones((8192, 8192), jnp.bfloat16)
    copy = median_seconds(jax.jit(lambda x: x + 1), copied)
    product = median_seconds(jax.jit(lambda x: x @ x), matrix)
    alone = median_seconds(operation("pallas", backward=False), *make_arguments(1, FULL_SHAPE[1], 1))
    return Rates(2 * copied.nbytes / copy, 2 * 8192**3 / product, alone / (FULL_SHAPE[1] / C))


def run() -> dict[str, Any]:
    """All measurements."""
    from tqdm import tqdm

    rates = measure_rates()
    shapes = [FULL_SHAPE, *((1, tokens) for tokens in PLOTTED_TOKENS)]
    return {
        "device": jax.devices()[0].device_kind,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
        "rates": dataclasses.asdict(rates),
        "errors": errors(IMPLEMENTATIONS),
        "shapes": [
            time_shape(rows, tokens, IMPLEMENTATIONS) for rows, tokens in tqdm(shapes, "shapes", file=sys.stderr)
        ],
    }


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    rates = Rates(**result["rates"])
    lines = [
        "| rows | tokens | pass | pallas, ms | scan, ms | scan / pallas | of the floor | bound by |",
        "|---|" + "---|" * 7,
    ]
    for shape in result["shapes"]:
        for part, backward in (("forward", False), ("forward_backward", True)):
            pallas, scan = (shape["ms"][name][part] for name in IMPLEMENTATIONS)
            floor = linear_floor(shape["rows"], shape["tokens"], rates, backward=backward)
            cells = (shape["rows"], shape["tokens"], part.replace("_", " + "), f"{pallas:.3f}", f"{scan:.3f}")
            cells += (f"{scan / pallas:.1f}", f"{pallas / (1e3 * floor.seconds):.2f}", floor.bound)
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    for name, found in result["errors"].items():
        lines.append(f"\n{name}: relative error {found['out']:.1e} of outputs, {found['weights']:.1e} of final weights")
    return "\n".join(lines)


def figure(result: dict[str, Any]) -> Any:
    """Time over length, one line for each implementation and pass, as a Matplotlib figure."""
    from matplotlib.figure import Figure

    plotted = Figure(figsize=(7, 4.5), layout="constrained")
    axes = plotted.subplots()
    shapes = [shape for shape in result["shapes"] if shape["rows"] == 1]
    for name in IMPLEMENTATIONS:
        for part, style in (("forward", "-"), ("forward_backward", "--")):
            ms = [shape["ms"][name][part] for shape in shapes]
            label = f"{name}, {part.replace('_', ' + ')}"
            axes.plot([shape["tokens"] for shape in shapes], ms, style, marker="o", label=label)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="tokens",
        ylabel="ms",
        title=f"TTT-Linear, 1 row, {HEADS} heads: {result['device']}",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    return plotted


def write(result: dict[str, Any], output: pathlib.Path) -> None:
    """The JSON and the plot."""
    name = result["device"].replace(" ", "_")
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    figure(result).savefig(output / f"{name}.png", dpi=120)


def main() -> int:
    """The program; returns its exit status."""
    from ttt_jax import explain

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, required=True, help="directory for the results")
    options = parser.parse_args()
    reason = explain(*make_arguments(1, C, 1))
    if "cannot" in reason:
        print(f"error: nothing was measured: {reason.removeprefix('scan; ')}", file=sys.stderr)
        return 1
    result = run()
    write(result, options.output)
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
