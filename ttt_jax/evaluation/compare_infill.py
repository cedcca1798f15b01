"""Compare groups of runs that differ in their seeds by the NLL of masked spans, mean and spread per group.

    python -m ttt_jax.evaluation.compare_infill --output=DIR --group='with TTT=runs/a0,runs/a1' --group=without=runs/b0

Each run is a directory in which `eval.py --benchmark=infill` has left infill.json. Writes compare_infill.json into DIR.
Differences are against the last group.
"""

import dataclasses
import functools
import pathlib
from typing import Any

from absl import flags

from ttt_jax import programs
from ttt_jax.evaluation import compare
from ttt_jax.evaluation.compare import Spread, define_flags, difference, main, spread
from ttt_jax.evaluation.report import text_table
from ttt_jax.evaluation.results import write_result
from ttt_jax.files import read_json

MEASURES = {"model": "all masked tokens", "seen": "segment partly visible", "unseen": "segment masked as a whole"}
SAME = ("split", "num_recordings", "num_frames", "spans", "segment")
"""What runs must agree on to be compared."""


@dataclasses.dataclass(frozen=True)
class InfillComparison:
    """NLL in nats per masked token.

    Attributes:
      groups: name -> directories of its runs.
      nll: name of the group -> name of the measure in `MEASURES` -> over its runs.
      unigram: measure -> NLL by the unigram table.
    """

    groups: dict[str, list[str]]
    nll: dict[str, dict[str, Spread]]
    unigram: dict[str, float]


def compare_infill(groups: dict[str, list[pathlib.Path]]) -> InfillComparison:
    """Read the runs' infill.json.

    Raises:
      FileNotFoundError: a run has none; names the command that makes it.
      ValueError: runs were scored on other spans.
    """
    results = {run: _read(run) for runs in groups.values() for run in runs}
    first, *others = results.items()
    for run, result in others:
        differing = [name for name in SAME if result[name] != first[1][name]]
        if differing:
            raise ValueError(
                f"--group: {first[0]} and {run} differ in {', '.join(differing)}; evaluate all runs with the same "
                "--split and --max_recordings, on the same dataset, and only models of the same model.segment."
            )
    nll = {
        name: {measure: spread(results[run][measure] for run in runs) for measure in MEASURES}
        for name, runs in groups.items()
    }
    table = first[1]
    unigram = dict(
        zip(MEASURES, (table[key]["mean"] for key in ("unigram", "seen_unigram", "unseen_unigram")), strict=True)
    )
    return InfillComparison({name: list(map(str, runs)) for name, runs in groups.items()}, nll, unigram)


def _read(run: pathlib.Path) -> dict[str, Any]:
    path = run / "infill.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; run `python eval.py --workdir={run} --benchmark=infill`.")
    return read_json(path)


def summary(result: InfillComparison) -> str:
    """Means and standard deviations between runs, and the differences in words."""
    rows = [
        [
            f"{name} ({len(result.groups[name])} runs)",
            *(f"{nll[m].mean:.4f} +- {nll[m].deviation:.4f}" for m in MEASURES),
        ]
        for name, nll in result.nll.items()
    ]
    table = text_table(
        ["nats per masked token", *MEASURES.values()],
        [*rows, ["unigram", *map("{:.4f}".format, result.unigram.values())]],
    )
    *others, last = result.nll
    lines = []
    for name in others:
        for measure, words in MEASURES.items():
            mean, error = difference(result.nll[name][measure], result.nll[last][measure])
            lines.append(f"{name} against {last}, {words}: {mean:+.4f} nats (standard error {error:.4f}).")
    return "\n".join([table, "", *lines])


def make(groups: dict[str, list[pathlib.Path]], output: pathlib.Path) -> None:
    """Compare, write the result into `output` and print the table."""
    result = compare_infill(groups)
    output.mkdir(parents=True, exist_ok=True)
    write_result(output / "compare_infill.json", result)
    print(summary(result))
    print(output / "compare_infill.json")


if __name__ == "__main__":
    holders = define_flags()
    flags.adopt_module_key_flags(compare)  # for --help
    programs.run(functools.partial(main, make, holders))
