"""Groups of runs are summarized run by run, and results that do not belong together are refused."""

import json
import math
import re
import subprocess
import sys

import pytest

from ttt_jax.evaluation.compare import compare, difference, parse_groups, summary

RECALL = {
    "split": "test",
    "num_answers": 40,
    "window_frames": 125,
    "reach_windows": 5.95,
    "gap_edges_windows": [0, 1, 4],
    "chance": 0.1,
}
POSITIONS = {"split": "test", "num_frames": 900, "context_frames": 125, "frame_rate_hz": 12.5, "edges": [0, 125, 900]}


def estimate(mean):
    return {"mean": mean, "low": None, "high": None, "num_tokens": 0 if mean is None else 9, "num_recordings": 3}


def write_run(run, level, **changes):
    """Recall of `level`, `level` + 0.1 and nothing by gap, twice that as audio; NLL of 3 - `level`. Decoys differ."""
    run.mkdir(parents=True)
    recall, positions = [], []
    for memory in ("off", "carried"):
        for name, factor in (("text", 1), ("audio", 2)):
            shift = 0 if memory == "carried" else 5
            both = [
                {"accuracy": estimate(x), "margin": estimate(x)}
                for x in (factor * level + shift, factor * level + 0.1 + shift, None)
            ]
            for group in ("all", "heard facts"):
                buckets = both if group == "all" else both[::-1]
                where = {"memory": memory, "modality": name, "group": group}
                recall.append({**where, "by_gap": buckets, "beyond_window": buckets[1]})
            for frames in ("silent", "all"):
                nll = [estimate(3 - level + shift + (frames == "silent"))] * 2
                where = {"memory": memory, "streams": name, "frames": frames}
                positions.append({**where, "buckets": nll, "beyond_context": nll[1]})
    (run / "recall.json").write_text(json.dumps({**RECALL, "curves": recall, **changes}))
    (run / "nll_by_position.json").write_text(json.dumps({**POSITIONS, "curves": positions}))


@pytest.fixture
def runs(tmp_path):
    for name, level in (("a0", 0.3), ("a1", 0.5), ("b0", 0.1)):
        write_run(tmp_path / name, level)
    return tmp_path


def test_groups_have_means_and_spreads_over_their_runs(runs):
    result = compare({"with TTT": [runs / "a0", runs / "a1"], "without": [runs / "b0"]})
    curves = {(c.group, c.what): c for c in [*result.recall, *result.nll]}
    assert len(curves) == 2 * (2 * 2 + 2)
    accuracy = curves["with TTT", "audio accuracy"]
    assert [b.mean for b in accuracy.buckets[:2]] == pytest.approx([0.8, 0.9])
    assert [b.deviation for b in accuracy.buckets[:2]] == pytest.approx([0.2 * math.sqrt(2)] * 2)
    assert accuracy.buckets[0].values == pytest.approx([0.6, 1.0])
    assert math.isnan(accuracy.buckets[2].mean)
    assert accuracy.beyond_window == accuracy.buckets[1]
    nll = curves["without", "text NLL"]
    assert nll.beyond_window.mean == pytest.approx(2.9)
    assert math.isnan(nll.beyond_window.deviation)
    assert result.position_edges_s == [0, 10, 72]
    text = curves["with TTT", "text margin"].beyond_window
    mean, error = difference(text, text)
    assert (mean, error) == pytest.approx((0, 0.1 * math.sqrt(2)))
    assert "text NLL beyond one window, with TTT less without: -0.3000 (too few runs for an error)." in summary(result)


def test_program_writes_what_it_promises(runs):
    command = [
        sys.executable, "-m", "ttt_jax.evaluation.compare", f"--output={runs / 'out'}",
        f"--group=with TTT={runs / 'a0'},{runs / 'a1'}", f"--group=without={runs / 'b0'}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((runs / "out" / "compare.json").read_text())
    assert result["groups"]["without"] == [str(runs / "b0")]
    assert (runs / "out" / "recall.png").stat().st_size > 10_000
    assert (runs / "out" / "nll_by_position.png").stat().st_size > 10_000
    assert "1 to 4" in done.stdout


def test_a_missing_result_names_the_command_that_makes_it(runs):
    (runs / "a1" / "recall.json").unlink()
    command = f"make it with `python eval.py --workdir={runs / 'a1'} --benchmark=recall,nll_by_position`"
    with pytest.raises(FileNotFoundError, match=re.escape(command)):
        compare({"with TTT": [runs / "a0", runs / "a1"]})


def test_what_does_not_belong_together_is_refused(runs):
    write_run(runs / "c0", 0.2, gap_edges_windows=[0, 2, 4])
    with pytest.raises(ValueError, match=re.escape("expected gap_edges_windows [0, 1, 4] as in")):
        compare({"a": [runs / "a0"], "c": [runs / "c0"]})
    assert parse_groups(["with TTT=a,b", "x=c"]).keys() == {"with TTT", "x"}
    for wrong in (["a"], ["a="], ["a=,"], ["=b"], ["a=b", "a=c"]):
        with pytest.raises(ValueError, match="--group: expected NAME=RUN"):
            parse_groups(wrong)
