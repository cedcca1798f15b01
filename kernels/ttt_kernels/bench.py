"""Time the kernels beside the scan on this GPU, and set both beside what the device could do at best.

    python -m ttt_kernels.bench --output=kernels/measured

Writes DEVICE.json and DEVICE.png there and prints the table. Everything is measured in one run. Each shape has a
process of its own: all compile beside each other; when all have, one after the other measures and ends, so that it
returns its memory. What has been measured is written at once. Where flash-linear-attention is installed, its TTT-Linear
is compiled and timed too, before the rest.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ttt_kernels import fla
from ttt_kernels.cluster import SLICES
from ttt_kernels.hopper import D
from ttt_kernels.operations import MINI_BATCH_SIZES

HEADS = 32
"""Of 64, or as many as are as wide."""

IMPLEMENTATIONS = ("pallas", "scan")
PASSES = ("forward", "forward_backward")
FULL_SHAPE = (8, 8192)
"""Rows and tokens of the table; the plot has one row of 1k to 256k tokens."""

PLOTTED_TOKENS = tuple(1024 * 16**n for n in range(3))
_COMPARED: tuple[tuple[int, int], ...] = (FULL_SHAPE, *((1, tokens) for tokens in PLOTTED_TOKENS))
TOKENS_ALONE = 8192
"""Of the one row and head of which errors and the serial latency are measured."""

CALLS = 5


@dataclasses.dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for."""

    model: str  # "linear" or "mlp"
    mini_batch_size: int
    causal: bool
    head_dim: int = D
    dtype: str = "bfloat16"

    @property
    def heads(self) -> int:
        """As many as are `HEADS` of 64 wide."""
        return HEADS * D // self.head_dim

    def __str__(self) -> str:
        name = f"{self.model}, C = {self.mini_batch_size}, {'causal' if self.causal else 'full'}"
        name += "" if self.head_dim == D else f", D = {self.head_dim}"
        return name if self.dtype == "bfloat16" else f"{name}, {self.dtype}"


VARIANTS = (
    *(Variant(model, c, causal) for model in ("linear", "mlp") for c in MINI_BATCH_SIZES for causal in (True, False)),
    Variant("linear", 16, causal=True, head_dim=128),
    *(Variant(model, 16, causal=True, dtype="float32") for model in ("linear", "mlp")),
)
"""With float32 tokens the backward pass is the scan's."""

PLOTTED = (Variant("linear", 16, causal=True), Variant("mlp", 16, causal=True))


@dataclasses.dataclass(frozen=True)
class Rates:
    """What the device does at best, as measured.

    Attributes:
        bytes_per_second: read and written by a copy of 1 GiB.
        flops_per_second: of a bfloat16 product of two 8192 x 8192 matrices.
    """

    bytes_per_second: float
    flops_per_second: float


@dataclasses.dataclass(frozen=True)
class Floor:
    """The least time a shape can take, and what binds it: "bytes", "FLOPs" or "serial latency"."""

    seconds: float
    bound: str


def floor(variant: Variant, batch_size: int, num_tokens: int, rates: Rates, latency: float, *, backward: bool) -> Floor:
    """Over all heads, forward or forward and backward.

    Counted is what the maths needs: q, k, v and the output, two step sizes and a checkpoint of float32
    weights each 256 tokens; the products with the weights and those within the mini-batch. The backward pass also
    computes the forward pass again. Serial latency is `latency`, the seconds that the forward kernel takes for each
    mini-batch of one row and head while nothing else shares the device; thrice with the backward pass, which walks
    forward again and back.
    """
    c, d, tokens = variant.mini_batch_size, variant.head_dim, batch_size * num_tokens * variant.heads
    f = SLICES * d
    # Products of each token, and of each pair of tokens in a mini-batch: forward, backward.
    if variant.model == "linear":
        weights, of_weights, of_pairs = d * d + d, (3 * d * d, 6 * d * d), (2 * d, 4 * d)
    else:
        weights, of_weights, of_pairs = 2 * d * f + f + d, (7 * d * f, 14 * d * f), (2 * d + 2 * f, 4 * d + 4 * f)
    checkpoint = 4 * weights / 256
    size = jnp.dtype(variant.dtype).itemsize
    num_bytes, flops = 4 * size * d + 2 * 4 + checkpoint, 2 * of_weights[0] + 2 * c * of_pairs[0]
    serial = num_tokens / c * latency
    if backward:
        num_bytes += 7 * size * d + 5 * 4 + checkpoint
        flops += flops + 2 * of_weights[1] + 2 * c * of_pairs[1]
        serial *= 3
    floors = {
        "bytes": tokens * num_bytes / rates.bytes_per_second,
        "FLOPs": tokens * flops / rates.flops_per_second,
        "serial latency": serial,
    }
    bound = max(floors, key=lambda name: floors[name])
    return Floor(floors[bound], bound)


def median_seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """Of a call: the median of `CALLS` timings of 50 ms of calls in a row; where one takes 1 s, that one.

    The first call is not timed: the scan's of 262,144 tokens took a quarter more.
    """

    def seconds(calls: int) -> float:
        start = time.perf_counter()
        results = [function(*arguments) for _ in range(calls)]
        jax.block_until_ready(results[-1])
        return (time.perf_counter() - start) / calls

    jax.block_until_ready(function(*arguments))
    once = seconds(1)
    if once > 1:
        return once
    in_a_row = min(100, max(1, round(0.05 / once)))
    return statistics.median(seconds(in_a_row) for _ in range(CALLS))


def make_arguments(variant: Variant, batch_size: int, num_tokens: int, num_heads: int) -> tuple[Any, ...]:
    """params, q, k, v, lr as a trained layer might have them."""
    from ttt_jax import TTTLinearParams, TTTMLPParams

    keys, dim = jax.random.split(jax.random.key(0), 6), variant.head_dim

    def normal(key, *shape: int, scale: float = 1.0):
        return scale * jax.random.normal(key, shape, jnp.float32)

    hidden = SLICES * dim
    ln = jnp.ones((num_heads, dim)), jnp.zeros((num_heads, dim))
    if variant.model == "linear":
        params = TTTLinearParams(normal(keys[0], num_heads, dim, dim, scale=0.1), jnp.zeros((num_heads, dim)), *ln)
    else:
        w1, w2 = normal(keys[0], num_heads, dim, hidden, scale=0.1), normal(keys[5], num_heads, hidden, dim, scale=0.05)
        params = TTTMLPParams(w1, jnp.zeros((num_heads, hidden)), w2, jnp.zeros((num_heads, dim)), *ln)
    shape = (batch_size, num_tokens, num_heads)
    scales = (dim**-0.5, dim**-0.5, 1.0)
    tokens = (normal(key, *shape, dim, scale=scale) for key, scale in zip(keys[1:4], scales, strict=True))
    lr = jax.random.uniform(keys[4], shape, jnp.float32, 0.0, 0.5)
    return params, *(x.astype(variant.dtype) for x in tokens), lr


def operation(implementation: str, variant: Variant, *, backward: bool) -> Callable[..., Any]:
    """A jitted forward pass, or one with the gradients of all arguments."""
    import ttt_jax

    function = ttt_jax.ttt_linear if variant.model == "linear" else ttt_jax.ttt_mlp
    options = {"mini_batch_size": variant.mini_batch_size, "causal": variant.causal}
    forward = functools.partial(function, implementation=implementation, **options)
    if not backward:
        return jax.jit(forward)

    def total(arguments):
        out, state = forward(*arguments)
        return jnp.sum(out.astype(jnp.float32)) + sum(jnp.sum(w) for w in state.weights)

    return jax.jit(lambda *arguments: jax.grad(total)(arguments))


def compile_operation(
    implementation: str, variant: Variant, arguments: Callable[[], tuple[Any, ...]], *, backward: bool
) -> Callable[..., Any]:
    """For what `arguments` would return."""
    return operation(implementation, variant, backward=backward).lower(*jax.eval_shape(arguments)).compile()


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is timed in a process of its own; the full shape's also measures what belongs to the variant."""

    variant: Variant
    rows: int
    tokens: int

    def compile(self, implementations: Sequence[str]) -> Callable[[], dict[str, Any]]:
        """Returns what measures: milliseconds of each implementation, forward and with the backward pass."""
        arguments = functools.partial(make_arguments, self.variant, self.rows, self.tokens, self.variant.heads)
        compiled = {
            (name, part): compile_operation(name, self.variant, arguments, backward=backward)
            for name in implementations
            for part, backward in zip(PASSES, (False, True), strict=True)
        }

        def measure() -> dict[str, Any]:
            given = arguments()
            ms = {
                name: {part: 1e3 * median_seconds(compiled[name, part], *given) for part in PASSES}
                for name in implementations
            }
            return {**dataclasses.asdict(self), "heads": self.variant.heads, "ms": ms}

        return measure


@dataclasses.dataclass(frozen=True)
class Alone:
    """What is measured of one row and head."""

    variant: Variant
    num_tokens: int = TOKENS_ALONE

    def arguments(self) -> tuple[Any, ...]:
        """The operation's."""
        return make_arguments(self.variant, 1, self.num_tokens, 1)

    def compile(self, implementations: Sequence[str]) -> dict[str, Callable[..., Any]]:
        """Forward passes."""
        return {name: compile_operation(name, self.variant, self.arguments, backward=False) for name in implementations}

    def errors(self, compiled: dict[str, Callable[..., Any]]) -> dict[str, Any]:
        """Relative to float64 on the same numbers, by norm: of the outputs, and of the final weights."""
        arguments = self.arguments()
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda x: x.astype(jnp.float64), arguments)
            exact = operation("scan", self.variant, backward=False)(*wide)

        def relative(x, y) -> float:
            x, y = (
                np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(z)]) for z in (x, y)
            )
            return float(np.linalg.norm(x - y) / np.linalg.norm(y))

        found = {}
        for name, function in compiled.items():
            out, state = function(*arguments)
            found[name] = {"out": relative(out, exact[0]), "weights": relative(state.weights, exact[1].weights)}
        return found

    def latency(self, function: Callable[..., Any]) -> float:
        """Seconds of a forward pass for each mini-batch."""
        return median_seconds(function, *self.arguments()) / (self.num_tokens / self.variant.mini_batch_size)


def measure_rates() -> Rates:
    """Of this device."""
    copied = jnp.zeros(1 << 28, jnp.float32)
    matrix = jnp.ones((8192, 8192), jnp.bfloat16)
    copy = median_seconds(jax.jit(lambda x: x + 1), copied)
    product = median_seconds(jax.jit(lambda x: x @ x), matrix)
    return Rates(2 * copied.nbytes / copy, 2 * 8192**3 / product)


def _measure(shape: Shape, parent: Any) -> None:
    """In a process of its own; `parent` is told that all has compiled, says when to measure, and gets the result."""
    measure = shape.compile(IMPLEMENTATIONS)
    alone, compiled, found = Alone(shape.variant), {}, {}
    if (shape.rows, shape.tokens) == FULL_SHAPE:
        compiled = alone.compile(IMPLEMENTATIONS)
        found["errors"] = alone.errors(compiled)
    parent.send("compiled")
    parent.recv()
    found |= measure()
    if compiled:
        found["latency"] = alone.latency(compiled["pallas"])
    parent.send(found)


def _started(shapes: Sequence[Shape]) -> list[tuple[Any, Any]]:
    """Of each shape its process, which compiles now, and the pipe to it."""
    spawn, started = multiprocessing.get_context("spawn"), []
    for shape in shapes:
        parent, child = spawn.Pipe()
        process = spawn.Process(target=_measure, args=(shape, child), daemon=True)
        process.start()
        child.close()
        started.append((process, parent))
    return started


def run(output: pathlib.Path) -> dict[str, Any]:
    """All measurements; what there is so far is in `output` whenever it is ended.

    Raises:
        EOFError: a process failed; what it raised it has printed.
    """
    from tqdm import tqdm

    shapes = [Shape(variant, *FULL_SHAPE) for variant in VARIANTS]
    shapes += [Shape(variant, 1, tokens) for variant in PLOTTED for tokens in PLOTTED_TOKENS]
    others = fla.compile_all(_COMPARED, HEADS) if fla.is_installed() else None
    started = _started(shapes)
    for _, pipe in tqdm(started, "compiled", file=sys.stderr):
        pipe.recv()
    if others is not None:
        others.wait()
    result: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
        "rates": dataclasses.asdict(measure_rates()),
        "latency": {},
        "errors": {},
        "shapes": [],
    }
    compared = compare(result) if others is not None else {}
    for shape, (process, pipe) in zip(tqdm(shapes, "measured", file=sys.stderr), started, strict=True):
        pipe.send("measure")
        found = pipe.recv()
        process.join()
        for name in found.keys() & {"latency", "errors"}:
            result[name][str(shape.variant)] = found.pop(name)
        if shape.variant == PLOTTED[0]:
            found["ms"] |= compared.get((shape.rows, shape.tokens), {})
        result["shapes"].append(found)
        write(result, output)
    return result


def compare(result: dict[str, Any]) -> dict[tuple[int, int], dict[str, dict[str, float]]]:
    """Flash-linear-attention's times by rows and tokens, its version to the result; if it fails, says so on stderr."""
    try:
        times = fla.milliseconds(_COMPARED, HEADS)
    except subprocess.CalledProcessError as error:
        print(f"flash-linear-attention was not timed:\n{error.stderr}", file=sys.stderr)
        return {}
    result["versions"]["fla-core"] = importlib.metadata.version("fla-core")
    return dict(zip(_COMPARED, times, strict=True))


def table(result: dict[str, Any]) -> str:
    """The result as Markdown tables."""
    rates = Rates(**result["rates"])
    lines = [
        "| operation | rows | tokens | pass | pallas, ms | scan, ms | scan / pallas | of the floor | bound by |",
        "|---|" + "---|" * 8,
    ]
    for shape in result["shapes"]:
        variant = Variant(**shape["variant"])
        for part, backward in zip(PASSES, (False, True), strict=True):
            pallas, scan = (shape["ms"][name][part] for name in IMPLEMENTATIONS)
            least = floor(
                *(variant, shape["rows"], shape["tokens"], rates, result["latency"][str(variant)]), backward=backward
            )
            cells = (variant, shape["rows"], shape["tokens"], part.replace("_", " + "), f"{pallas:.3f}", f"{scan:.3f}")
            cells += (f"{scan / pallas:.1f}", f"{pallas / (1e3 * least.seconds):.2f}", least.bound)
            lines.append("| " + " | ".join(map(str, cells)) + " |")
            others = {name: ms for name, ms in shape["ms"].items() if name not in IMPLEMENTATIONS}
            lines += [
                f"| {name} | | | | {ms[part]:.3f} | | {ms[part] / pallas:.1f} | | |" for name, ms in others.items()
            ]
    lines += ["", "| operation | implementation | relative error of outputs | of final weights |", "|---|---|---|---|"]
    for variant, found in result["errors"].items():
        for name, error in found.items():
            lines.append(f"| {variant} | {name} | {error['out']:.1e} | {error['weights']:.1e} |")
    return "\n".join(lines)


def figure(result: dict[str, Any]) -> Any:
    """Time over length, one panel for each operation, one line for each implementation and pass: Matplotlib."""
    from matplotlib.figure import Figure

    plotted = Figure(figsize=(12, 4.5), layout="constrained")
    plotted.suptitle(f"1 row, {HEADS} heads: {result['device']}")
    for variant, axes in zip(PLOTTED, plotted.subplots(1, len(PLOTTED), sharey=True), strict=True):
        shapes = [s for s in result["shapes"] if s["rows"] == 1 and s["variant"] == dataclasses.asdict(variant)]
        names = shapes[0]["ms"] if shapes else ()
        for i, name in enumerate(names):
            for part, style in zip(PASSES, ("-", "--"), strict=True):
                points = [(shape["tokens"], shape["ms"][name][part]) for shape in shapes if name in shape["ms"]]
                label = f"{name}, {part.replace('_', ' + ')}"
                axes.plot(*zip(*points, strict=True), style, marker="o", color=f"C{i}", label=label)
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms", title=str(variant))
        axes.grid(alpha=0.3)
    handles, labels = plotted.axes[0].get_legend_handles_labels()
    plotted.legend(handles, labels, loc="outside right center")
    return plotted


def write(result: dict[str, Any], output: pathlib.Path) -> None:
    """The JSON."""
    from ttt_jax.files import write_atomically

    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / f"{_name(result)}.json", json.dumps(result, indent=2) + "\n")


def draw(result: dict[str, Any], output: pathlib.Path) -> None:
    """The plot."""
    figure(result).savefig(output / f"{_name(result)}.png", dpi=120)


def _name(result: dict[str, Any]) -> str:
    return result["device"].replace(" ", "_")


def main() -> int:
    """The program; returns its exit status."""
    from ttt_jax import explain

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, required=True, help="directory for the results")
    options = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the processes share the device
    reason = explain(*make_arguments(PLOTTED[0], 1, MINI_BATCH_SIZES[0], 1))
    if "cannot" in reason:
        print(f"error: nothing was measured: {reason.removeprefix('scan; ')}", file=sys.stderr)
        return 1
    result = run(options.output)
    draw(result, options.output)
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
