"""Plots of a run: what people look at first."""

import pathlib
from collections.abc import Collection, Iterable

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ttt_jax.evaluation import recall
from ttt_jax.evaluation.block_speed import LOCAL, BlockSpeed
from ttt_jax.evaluation.nll_by_position import Curve, NLLByPosition
from ttt_jax.evaluation.speed import FULL, WINDOW, Speed, Throughput
from ttt_jax.training.metrics import read_metrics

LABELS = {
    "carried": "TTT, state carried",
    "reset": "TTT, state reset every segment",
    "off": "TTT off",
    "baseline": "baseline",
}
COLORS = {"carried": "tab:blue", "reset": "tab:orange", "off": "tab:gray", "baseline": "tab:green"}
THROUGHPUT_COLORS = {
    **{"TTT-Linear": "tab:blue", "TTT-MLP": "tab:purple"},
    **{WINDOW: "tab:orange", LOCAL: "tab:orange", FULL: "tab:gray"},
}
matplotlib.use("Agg")


def label(memory: str, curves: Iterable[Curve | recall.Curve]) -> str:
    """A memory's name in a legend; a model without TTT has only one, which is no matter of TTT."""
    has_ttt = any(curve.memory == "off" for curve in curves)
    return LABELS[memory] if has_ttt or memory != "carried" else "model without TTT"


def nll_figure(result: NLLByPosition) -> Figure:
    """NLL by position for audio and text, every memory, and below it what carrying the state gains."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    for column, streams in enumerate(("audio", "text")):
        frames = "sounding" if streams == "audio" else "all"
        _draw(axes[0, column], result, [c for c in result.curves if (c.streams, c.frames) == (streams, frames)])
        _draw(axes[1, column], result, [c for c in result.gains if (c.streams, c.frames) == (streams, frames)])
        axes[0, column].set_title(f"{streams}, {frames} frames")
        axes[0, column].set_ylabel("NLL [nats per token]")
        axes[1, column].axhline(0, color="black", linewidth=0.8)
        axes[1, column].set_ylabel("gain of carrying the state [nats]")
        axes[1, column].set_xlabel("position in the recording [s]")
    axes[0, 0].legend()
    if result.gains:
        labels = {"reset": "over a reset state", "off": "over no TTT"}
        handles = [line for line in axes[1, 0].get_lines() if line.get_gid() in labels]
        axes[1, 0].legend(handles, [labels[str(line.get_gid())] for line in handles])
    return figure


def _draw(axes: Axes, result: NLLByPosition, curves: list[Curve]) -> None:
    """One line a memory through the buckets' middles, with its 95 % band."""
    edges = np.asarray(result.edges) / result.frame_rate_hz
    middles = (edges[:-1] + edges[1:]) / 2
    for curve in curves:
        mean, low, high = (np.array([getattr(b, name) for b in curve.buckets]) for name in ("mean", "low", "high"))
        color = COLORS[curve.memory]
        axes.plot(
            middles,
            mean,
            marker="o",
            markersize=3,
            color=color,
            label=label(curve.memory, result.curves),
            gid=curve.memory,
        )
        axes.fill_between(middles, low, high, color=color, alpha=0.15, linewidth=0)
    axes.axvline(result.context_frames / result.frame_rate_hz, color="black", linestyle=":", linewidth=0.8)
    axes.set_xscale("log")
    axes.grid(alpha=0.3)


def recall_figure(result: recall.Recall) -> Figure:
    """Accuracy and margin by gap, as text and as audio where there are such answers, one line a memory."""
    answered = {c.modality for c in result.curves if c.group == "all" and c.overall.accuracy.num_tokens}
    edges = np.asarray(result.gap_edges_windows)
    middles = bucket_middles(edges)
    figure, panels = recall_panels(answered, edges, result.reach_windows, result.chance)
    for modality, axes in panels.items():
        curves = [c for c in result.curves if (c.modality, c.group) == (modality, "all")]
        for panel, measure in zip(axes, ("accuracy", "margin"), strict=True):
            for n, curve in enumerate(curves):
                shift = 1.04 ** (n - len(curves) / 2)  # side by side, so that equal ones are seen
                _error_bars(panel, middles * shift, [getattr(b, measure) for b in curve.by_gap], curve, result)
        numbers = ["" if not b.accuracy.num_tokens else str(b.accuracy.num_tokens) for b in curves[0].by_gap]
        axes[1].set_xlabel(f"{axes[1].get_xlabel()}\ngray: number of answers")
        for x, number in zip(middles, numbers, strict=True):
            place = axes[1].get_xaxis_transform()
            axes[1].text(x, 0.02, number, transform=place, ha="center", fontsize="x-small", color="gray")
    figure.axes[0].set_ylim(bottom=-0.03)
    figure.axes[0].legend(fontsize="small")
    return figure


def recall_panels(
    answered: Collection[str], edges: np.ndarray, reach_windows: float, chance: float
) -> tuple[Figure, dict[str, tuple[Axes, Axes]]]:
    """Empty axes for accuracy and, below it, margin by gap.

    Args:
      answered: modalities ("text", "audio") that have answers; without any, both are shown.
      edges: where the buckets of gaps begin, in windows.
      reach_windows: how far back all layers' windows reach together.
      chance: accuracy of a guess.

    Returns:
      The figure and its axes by modality.
    """
    modalities = [modality for modality in ("text", "audio") if modality in answered] or ["text", "audio"]
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, len(modalities), sharex=True, squeeze=False)
    for other in axes[0, 1:]:
        other.sharey(axes[0, 0])
    for column, modality in enumerate(modalities):
        axes[0, column].axhline(chance, color="black", linewidth=0.8, linestyle="--", label="chance")
        axes[1, column].axhline(0, color="black", linewidth=0.8)
        axes[0, column].set_title(f"answers as {modality}")
        axes[1, column].set_xlabel("gap since the latest mention [attention windows]")
        for panel in axes[:, column]:
            _gap_axis(panel, edges, reach_windows)
    axes[0, 0].set_ylabel("accuracy among the candidates")
    axes[1, 0].set_ylabel("margin over distractors [nats per answer]")
    return figure, dict(zip(modalities, map(tuple, axes.T), strict=True))


def bucket_middles(edges: np.ndarray) -> np.ndarray:
    """Where buckets that begin at `edges` (0 first, the last without end) stand on a logarithmic axis."""
    return np.concatenate([[edges[1] / 2**0.5], np.sqrt(edges[1:-1] * edges[2:]), [edges[-1] * 2**0.5]])


def _gap_axis(axes: Axes, edges: np.ndarray, reach_windows: float) -> None:
    """Make x a logarithmic axis of gaps in windows, with the window and the reach of all layers' windows marked."""
    axes.set_xscale("log")
    axes.set_xticks(edges[1:], [f"{edge:g}" for edge in edges[1:]])
    axes.set_xlim(edges[1] / 2, edges[-1] * 2)
    axes.minorticks_off()
    for gap, text in ((1, "one window"), (reach_windows, "reach of all layers")):
        axes.axvline(gap, color="black", linestyle=":", linewidth=0.8)
        place = {"transform": axes.get_xaxis_transform(), "rotation": 90, "fontsize": "x-small", "color": "gray"}
        axes.text(gap, 0.98, f" {text}", va="top", ha="right", **place)
    axes.grid(alpha=0.3)


def _error_bars(axes: Axes, x, estimates, curve: recall.Curve, result: recall.Recall) -> None:
    """Means with their 95 % intervals, joined."""
    mean, low, high = (np.array([getattr(e, name) for e in estimates]) for name in ("mean", "low", "high"))
    there = ~np.isnan(mean)
    spread = np.nan_to_num([mean - low, high - mean])[:, there]
    color, name = COLORS[curve.memory], label(curve.memory, result.curves)
    bars = np.maximum(spread, 0)
    axes.errorbar(x[there], mean[there], yerr=bars, marker="o", markersize=3, capsize=2, color=color, label=name)


def streams_figure(result: NLLByPosition) -> Figure:
    """Each stream's NLL beside what tables reach on it."""
    figure = Figure(figsize=(10, 3.5), layout="constrained")
    axes = figure.subplots()
    at = np.arange(len(result.streams))
    kinds = {
        "unigram table": ([s.unigram for s in result.streams], "lightgray"),
        "bigram table": ([s.bigram for s in result.streams], "tab:gray"),
        "model": ([s.model.mean for s in result.streams], "tab:blue"),
    }
    for offset, (label, (values, color)) in enumerate(kinds.items()):
        axes.bar(at + 0.27 * (offset - 1), values, width=0.27, label=label, color=color)
    axes.set_xticks(at, [s.name for s in result.streams], rotation=20)
    axes.set_ylabel("NLL [nats per token]")
    axes.set_title(f"whole {result.split} recordings")
    axes.legend()
    return figure


def speed_figure(result: Speed) -> Figure:
    """Time and memory of streaming by position, tokens per second of operations and of the model by length."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    (time_axes, memory_axes), (ops_axes, steps_axes) = figure.subplots(2, 2)
    middles = [(at.start_frame * at.end_frame) ** 0.5 for at in result.stream]
    time_axes.plot(middles, [at.ms_per_frame for at in result.stream], marker="o", markersize=3, color="tab:blue")
    quartiles = [at.low_ms for at in result.stream], [at.high_ms for at in result.stream]
    time_axes.fill_between(middles, *quartiles, color="tab:blue", alpha=0.2, linewidth=0)
    time_axes.set_ylim(bottom=0)
    time_axes.set_ylabel("ms per frame (median, quartiles)")
    time_axes.set_title(f"stream_step on {result.device}", fontsize="medium")
    sizes = {"state": "state_bytes", "all arrays": "live_bytes", "process": "process_bytes", "device": "device_bytes"}
    for name, field in sizes.items():
        values = [getattr(at, field) for at in result.stream]
        if None not in values:
            ends = [at.end_frame for at in result.stream]
            memory_axes.plot(ends, [v / 2**20 for v in values], marker="o", markersize=3, label=name)
    memory_axes.set_yscale("log")
    memory_axes.set_ylabel("memory [MiB]")
    for axes in (time_axes, memory_axes):
        axes.set_xlabel("frame of the stream")
        axes.set_xscale("log")
    _draw_throughput(ops_axes, result.ops)
    ops_axes.set_title("operations: forward (solid), with gradients (dashed)", fontsize="medium")
    _draw_throughput(steps_axes, result.steps)
    steps_axes.set_title("the model, forward and backward", fontsize="medium")
    for axes in (time_axes, memory_axes, ops_axes, steps_axes):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    return figure


def _draw_throughput(axes: Axes, measured: list[Throughput]) -> None:
    """Tokens per second by length, a color a name, dashed with gradients."""
    for name in dict.fromkeys(m.name for m in measured):
        label = name
        for work, style in (("forward", "-"), ("training", "--")):
            points = [(m.length, m.tokens_per_s) for m in measured if (m.name, m.work) == (name, work)]
            if points:
                color = THROUGHPUT_COLORS[name.split(" and ")[0]]
                axes.plot(*zip(*points, strict=True), style, marker="o", markersize=3, color=color, label=label)
                label = None  # one entry in the legend for both
    axes.set_xscale("log")
    axes.set_yscale("log")
    lengths = sorted({m.length for m in measured})
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.xaxis.minorticks_off()
    axes.set_xlabel("sequence length [tokens]")
    axes.set_ylabel("tokens/s")


def block_figure(result: BlockSpeed) -> Figure:
    """Time and memory of one block by the number of scenes, dashed with gradients, dotted lines at the crossovers."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    drawn = {
        "time": ("ms", lambda run: run.ms),
        "memory": ("memory of the program [MiB]", lambda run: run.memory_bytes / 2**20),
    }
    numbers = sorted({run.scenes for run in result.runs})
    for axes, (measure, (label, value)) in zip(figure.subplots(1, 2), drawn.items(), strict=True):
        for name, work in dict.fromkeys((run.name, run.work) for run in result.runs):
            runs = [run for run in result.runs if (run.name, run.work) == (name, work)]
            style, color = "-" if work == "forward" else "--", THROUGHPUT_COLORS[name.split(" and ")[0]]
            legend = name if work == "forward" else None  # one entry for both
            points = ([run.scenes for run in runs], [value(run) for run in runs])
            axes.plot(*points, style, marker="o", markersize=3, color=color, label=legend)
        for crossover in result.crossovers:
            if crossover.measure == measure and crossover.scenes is not None:
                axes.axvline(crossover.scenes, color="black", linestyle=":", linewidth=1)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(numbers, [str(number) for number in numbers])
        axes.xaxis.minorticks_off()
        axes.set_xlabel(f"{result.unit} of {result.tokens_per_scene} tokens")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    figure.axes[0].set_title(f"one block on {result.device}", fontsize="medium")
    figure.axes[1].set_title("forward (solid), with gradients (dashed)", fontsize="medium")
    figure.axes[0].legend(fontsize="small")
    return figure


def training_figure(metrics: pathlib.Path) -> Figure | None:
    """Losses and TTT diagnostics over the updates in a metrics.jsonl; None without it."""
    if not metrics.is_file():
        return None
    lines = read_metrics(metrics)
    diagnostics = _diagnostics(lines)
    figure = Figure(figsize=(10, 3.5), layout="constrained")
    panels = figure.subplots(1, 2 if diagnostics else 1, squeeze=False)[0]
    kinds = [
        (kind, style, found)
        for kind, style in (("train", "-"), ("validation", "o--"))
        if (found := [line for line in lines if kind in line])
    ]
    of_tokens = any(name in found[0][kind] for kind, _, found in kinds for name in ("text", "audio"))
    drawn = (("text", "tab:green"), ("audio", "tab:blue")) if of_tokens else (("loss", "tab:blue"),)
    for kind, style, found in kinds:
        for name, color in drawn:
            if name in found[0][kind]:
                values = [np.mean(line[kind][name]) for line in found]
                label = f"{kind} {name}"
                panels[0].plot([line["step"] for line in found], values, style, color=color, label=label, ms=3)
    panels[0].set_ylabel("NLL [nats per token]" if of_tokens else "loss")
    if diagnostics:
        for name, points in diagnostics.items():
            panels[1].plot(*zip(*points, strict=True), label=name)
        panels[1].set_title("TTT layers")
    for axes in panels:
        axes.set_xlabel("update")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="x-small")
    return figure


def _diagnostics(lines) -> dict[str, list[tuple[int, float]]]:
    """Name -> (update, value), averaged over the layers that report it."""
    points: dict[str, list[tuple[int, float]]] = {}
    for line in (line for line in lines if "diagnostics" in line):
        by_name: dict[str, list[float]] = {}
        for path, value in line["diagnostics"].items():
            by_name.setdefault(path.rsplit("/", 1)[-1].replace("_", " "), []).append(value)
        for name, values in by_name.items():
            points.setdefault(name, []).append((line["step"], float(np.mean(values))))
    return points
