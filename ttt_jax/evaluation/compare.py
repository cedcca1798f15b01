"""Compare groups of runs that differ in their seeds: recall by gap and NLL by position, mean and spread per group.

    python -m ttt_jax.evaluation.compare --output=DIR --group='with TTT=runs/a0,runs/a1' --group=without=runs/b0,runs/b1

Each run is a directory in which eval.py has left recall.json and nll_by_position.json. Writes compare.json, recall.png
and nll_by_position.png into DIR. Differences are against the last group.
"""

import dataclasses
import functools
import itertools
import math
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from absl import flags
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ttt_jax import programs
from ttt_jax.evaluation.plots import bucket_middles, recall_panels
from ttt_jax.evaluation.report import save_figure, text_table
from ttt_jax.evaluation.results import write_result
from ttt_jax.files import read_json

BENCHMARKS = ("recall", "nll_by_position")
MEASURES = ("accuracy", "margin")


@dataclasses.dataclass(frozen=True)
class Spread:
    """One number over the runs of a group.

    Attributes:
      mean: of the runs.
      deviation: standard deviation between runs; NaN with one run.
      values: of each run; NaN where a run has none.
    """

    mean: float
    deviation: float
    values: list[float]


@dataclasses.dataclass(frozen=True)
class Curve:
    """What one group reaches in one respect, bucket by bucket and beyond the attention window."""

    group: str
    what: str  # "text accuracy", "audio margin", "text NLL", ...
    buckets: list[Spread]
    beyond_window: Spread


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The result.

    Attributes:
      groups: name -> directories of its runs.
      gap_edges_windows: where buckets of gaps begin, in attention windows; the last has no end.
      reach_windows: how far back all layers' windows reach together, the longest of all runs.
      chance: accuracy of a guess.
      recall: accuracy and margin [nats] by gap, as text and as audio, of all answers, with the state carried.
      position_edges_s: bucket borders of positions, in seconds.
      window_s: the attention window.
      nll: NLL in nats per token by position, of text and of audio, over all frames, with the state carried.
    """

    groups: dict[str, list[str]]
    gap_edges_windows: list[float]
    reach_windows: float
    chance: float
    recall: list[Curve]
    position_edges_s: list[float]
    window_s: float
    nll: list[Curve]


def compare(groups: dict[str, list[pathlib.Path]]) -> Comparison:
    """Read every run's results and summarize them by group.

    Raises:
      FileNotFoundError: a run lacks a result; says which command makes it.
      ValueError: no groups, or results that cannot be held against each other.
    """
    if not groups or not all(groups.values()):
        raise ValueError("--group: expected at least one group with at least one run.")
    results = {
        name: {benchmark: [_read(run, benchmark) for run in runs] for benchmark in BENCHMARKS}
        for name, runs in groups.items()
    }
    recalls = [result for its in results.values() for result in its["recall"]]
    positions = [result for its in results.values() for result in its["nll_by_position"]]
    _check_alike(recalls, ("split", "num_answers", "window_frames", "gap_edges_windows"))
    _check_alike(positions, ("split", "num_frames", "context_frames", "frame_rate_hz", "edges"))
    rate = positions[0]["frame_rate_hz"]
    return Comparison(
        groups={name: [str(run) for run in runs] for name, runs in groups.items()},
        gap_edges_windows=recalls[0]["gap_edges_windows"],
        reach_windows=max(result["reach_windows"] for result in recalls),
        chance=recalls[0]["chance"],
        recall=[
            _recall_curve(name, its["recall"], modality, measure)
            for modality in ("text", "audio")
            for measure in MEASURES
            for name, its in results.items()
        ],
        position_edges_s=[edge / rate for edge in positions[0]["edges"]],
        window_s=positions[0]["context_frames"] / rate,
        nll=[
            _nll_curve(name, its["nll_by_position"], streams)
            for streams in ("text", "audio")
            for name, its in results.items()
        ],
    )


def _read(run: pathlib.Path, benchmark: str) -> dict[str, Any]:
    path = run / f"{benchmark}.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; make it with `python eval.py --workdir={run} --benchmark={','.join(BENCHMARKS)}`."
        )
    return {"path": str(path), **read_json(path)}


def _check_alike(results: Sequence[dict[str, Any]], names: Iterable[str]) -> None:
    """All runs were evaluated on the same recordings, cut in the same way."""
    first = results[0]
    for result in results[1:]:
        for name in names:
            if result[name] != first[name]:
                raise ValueError(
                    f"{result['path']}: expected {name} {first[name]} as in {first['path']}, got {result[name]}; "
                    "evaluate all runs on the same data with the same attention window."
                )


def _recall_curve(group: str, results, modality: str, measure: str) -> Curve:
    curves = [_only(r["curves"], memory="carried", modality=modality, group="all") for r in results]
    buckets = zip(*([bucket[measure] for bucket in curve["by_gap"]] for curve in curves), strict=True)
    beyond = [curve["beyond_window"][measure] for curve in curves]
    return Curve(group, f"{modality} {measure}", [spread(bucket) for bucket in buckets], spread(beyond))


def _nll_curve(group: str, results, streams: str) -> Curve:
    curves = [_only(r["curves"], memory="carried", streams=streams, frames="all") for r in results]
    buckets = zip(*(curve["buckets"] for curve in curves), strict=True)
    beyond = [curve["beyond_context"] for curve in curves]
    return Curve(group, f"{streams} NLL", [spread(bucket) for bucket in buckets], spread(beyond))


def _only(curves, **wanted):
    return next(curve for curve in curves if all(curve[key] == value for key, value in wanted.items()))


def spread(estimates: Iterable[dict[str, Any]]) -> Spread:
    """Over runs, of estimates as eval.py writes them: null where there is no number."""
    values = [math.nan if e["mean"] is None else e["mean"] for e in estimates]
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return Spread(float(np.mean(values)), deviation, values)


def difference(one: Spread, other: Spread) -> tuple[float, float]:
    """Difference of the means and its standard error, from the spreads between runs."""
    error = math.sqrt(one.deviation**2 / len(one.values) + other.deviation**2 / len(other.values))
    return one.mean - other.mean, error


def summary(result: Comparison) -> str:
    """Tables of every respect by bucket, and the differences beyond the window in words."""
    gaps, ends = result.gap_edges_windows, result.position_edges_s
    of_gap = [f"{a:g} to {b:g}" for a, b in itertools.pairwise(gaps)] + [f"{gaps[-1]:g} or more"]
    of_position = [f"{a:.1f} to {b:.1f} s" for a, b in itertools.pairwise(ends)]
    parts = [_table(what, "gap [windows]", of_gap, curves) for what, curves in _by_respect(result.recall).items()]
    parts += [_table(what, "position", of_position, curves) for what, curves in _by_respect(result.nll).items()]
    names = list(result.groups)
    lines = []
    for curves in _by_respect([*result.recall, *result.nll]).values():
        for curve in curves[:-1]:
            mean, error = difference(curve.beyond_window, curves[-1].beyond_window)
            lines.append(
                f"{curve.what} beyond one window, {curve.group} less {names[-1]}: {mean:+.4f}"
                + (
                    f" with a standard error of {error:.4f}."
                    if math.isfinite(error)
                    else " (too few runs for an error)."
                )
            )
    return "\n\n".join([*parts, "\n".join(lines)])


def _table(what: str, by: str, names: Sequence[str], curves: Sequence[Curve]) -> str:
    shown = [i for i in range(len(names)) if any(math.isfinite(c.buckets[i].mean) for c in curves)]
    rows = [[names[i], *(_cell(c.buckets[i]) for c in curves)] for i in shown]
    rows.append(["beyond one window", *(_cell(c.beyond_window) for c in curves)])
    return text_table([f"{what} by {by}", *(curve.group for curve in curves)], rows)


def _cell(spread: Spread) -> str:
    if math.isnan(spread.mean):
        return "none"
    return f"{spread.mean:.3f}" + ("" if math.isnan(spread.deviation) else f" +- {spread.deviation:.3f}")


def _by_respect(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
    return {what: [c for c in curves if c.what == what] for what in dict.fromkeys(c.what for c in curves)}


def recall_figure(result: Comparison) -> Figure:
    """Accuracy and margin by gap, as text and as audio where there are such answers, one line a group.

    Bars are deviations, dots are runs.
    """
    edges = np.asarray(result.gap_edges_windows)
    answered = {c.what.split()[0] for c in result.recall if any(math.isfinite(b.mean) for b in c.buckets)}
    figure, panels = recall_panels(answered, edges, result.reach_windows, result.chance)
    curves = _by_respect(result.recall)
    for modality, axes in panels.items():
        for panel, measure in zip(axes, MEASURES, strict=True):
            _draw(panel, bucket_middles(edges), curves[f"{modality} {measure}"])
    _add_legend(figure)
    return figure


def nll_figure(result: Comparison) -> Figure:
    """NLL by position of text and of audio, one line a group, and below it the difference from the last group."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    edges = np.asarray(result.position_edges_s)
    middles = (edges[:-1] + edges[1:]) / 2
    for column, curves in enumerate(_by_respect(result.nll).values()):
        _draw(axes[0, column], middles, curves)
        last = curves[-1]
        _draw(axes[1, column], middles, [_less(curve, last) for curve in curves])
        axes[0, column].set_title(curves[0].what)
        axes[1, column].set_xlabel("position in the recording [s]")
        for each in axes[:, column]:
            each.axvline(result.window_s, color="black", linestyle=":", linewidth=0.8)
            each.set_xscale("log")
            each.grid(alpha=0.3)
    axes[0, 0].set_ylabel("NLL [nats per token]")
    axes[1, 0].set_ylabel(f"NLL less that of {last.group} [nats per token]")
    _add_legend(figure)
    return figure


def _add_legend(figure: Figure) -> None:
    """Above all axes, where it hides no run."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))


def _less(curve: Curve, reference: Curve) -> Curve:
    """The curve with each bucket's mean of the reference taken off."""

    def shifted(one: Spread, other: Spread) -> Spread:
        return Spread(one.mean - other.mean, one.deviation, [value - other.mean for value in one.values])

    buckets = [shifted(one, other) for one, other in zip(curve.buckets, reference.buckets, strict=True)]
    return dataclasses.replace(curve, buckets=buckets)


def _draw(axes: Axes, x: np.ndarray, curves: Sequence[Curve]) -> None:
    for n, curve in enumerate(curves):
        there = np.array([math.isfinite(bucket.mean) for bucket in curve.buckets])
        at = (x * 1.03 ** (n - (len(curves) - 1) / 2))[there]  # side by side
        buckets = [bucket for bucket in curve.buckets if math.isfinite(bucket.mean)]
        spread = np.nan_to_num([bucket.deviation for bucket in buckets])
        axes.errorbar(at, [b.mean for b in buckets], spread, marker="o", capsize=3, color=f"C{n}", label=curve.group)
        for place, bucket in zip(at, buckets, strict=True):
            axes.plot([place] * len(bucket.values), bucket.values, ".", color=f"C{n}", alpha=0.5, markersize=4)


def parse_groups(texts: Sequence[str]) -> dict[str, list[pathlib.Path]]:
    """`NAME=RUN,RUN,...` each; ValueError says what is wrong."""
    groups: dict[str, list[pathlib.Path]] = {}
    for text in texts:
        name, equals, runs = text.partition("=")
        found = [pathlib.Path(run) for run in runs.split(",") if run]
        if not (name and equals and found) or name in groups:
            raise ValueError(f"--group: expected NAME=RUN,RUN,... with a name of its own, got {text!r}.")
        groups[name] = found
    return groups


def make(groups: dict[str, list[pathlib.Path]], output: pathlib.Path) -> None:
    """Compare, write everything into `output` and print the tables."""
    result = compare(groups)
    output.mkdir(parents=True, exist_ok=True)
    write_result(output / "compare.json", result)
    save_figure(output / "recall.png", recall_figure(result))
    save_figure(output / "nll_by_position.png", nll_figure(result))
    print(summary(result))
    print(output / "compare.json")


def define_flags() -> tuple[flags.FlagHolder, flags.FlagHolder]:
    """The program's flags, defined only where it runs as one."""
    return (
        flags.DEFINE_multi_string("group", None, "NAME=RUN,RUN,...: runs that differ in their seeds.", required=True),
        flags.DEFINE_string("output", None, "Directory for the results.", required=True),
    )


def main(
    make: Callable[[dict[str, list[pathlib.Path]], pathlib.Path], None],
    holders: tuple[flags.FlagHolder, flags.FlagHolder],
) -> None:
    """Run a program that compares groups of runs, of which `make` writes the result into a directory."""
    group, output = holders
    make(parse_groups(group.value), pathlib.Path(output.value))


if __name__ == "__main__":
    programs.run(functools.partial(main, make, define_flags()))
