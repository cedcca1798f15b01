"""Speed is measured on what it says it is, over every frame, and crossovers are where the lines cross."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from ttt_jax.evaluation import speed as module
from ttt_jax.evaluation.report import as_text, write_report
from ttt_jax.evaluation.results import write_result
from ttt_jax.evaluation.sections import speed_sections
from ttt_jax.evaluation.speed import (
    FULL,
    WINDOW,
    Throughput,
    crossovers,
    median_seconds,
    op_speeds,
    sequence_lengths,
    speed,
    step_speeds,
    stream_speeds,
)


@pytest.fixture(scope="module")
def result(config, params):
    return speed(config, params, max_frames=240)


def test_the_stream_is_walked_to_its_end_with_a_state_that_does_not_grow(result):
    assert [(at.start_frame, at.end_frame) for at in result.stream] == [(100, 200)]
    assert all(0 < at.low_ms <= at.ms_per_frame <= at.high_ms for at in result.stream)
    assert all(at.live_bytes > at.state_bytes > 0 for at in result.stream)


def test_positions_are_log_spaced_and_memory_is_flat(config, params, monkeypatch):
    steps = []
    counted = module.stream_step
    monkeypatch.setattr(module, "BLOCK_FRAMES", 10)

    def step(*args, **options):
        steps.append(1)  # once for each compilation: one shape throughout
        return counted(*args, **options)

    monkeypatch.setattr(module, "stream_step", step)
    measured = stream_speeds(config, params, 1234)
    assert [(at.start_frame, at.end_frame) for at in measured] == [(100, 200), (200, 500), (500, 1000), (1000, 1230)]
    assert len(steps) == 1
    assert len({at.state_bytes for at in measured}) == 1
    assert len({at.live_bytes for at in measured}) == 1


def test_operations_and_steps_are_all_there(result):
    ops = {(m.name, m.work) for m in result.ops}
    assert ops == {(n, w) for n in ("TTT-Linear", "TTT-MLP", WINDOW, FULL) for w in ("forward", "training")}
    assert {m.name for m in result.steps} == {"TTT-Linear and window", WINDOW, FULL}
    for measured in (*result.ops, *result.steps):
        assert measured.length == 240
        assert measured.tokens_per_s == pytest.approx(240 / measured.ms * 1000)
    assert {(c.name, c.work) for c in result.crossovers} == {
        ("TTT-Linear", "forward"),
        ("TTT-Linear", "training"),
        ("TTT-MLP", "forward"),
        ("TTT-MLP", "training"),
        ("TTT-Linear and window", "training"),
    }


def test_the_report_shows_it(result, tmp_path):
    sections = speed_sections(result)
    write_result(tmp_path / "speed.json", result)
    report = write_report(tmp_path, "speed", sections)
    assert json.loads((tmp_path / "speed.json").read_text())["device"] == result.device
    assert (tmp_path / "speed.png").stat().st_size > 10_000
    assert "model: full attention, training" in report.read_text()
    assert "TTT-MLP, training, against full attention: " in as_text(sections)


def test_full_attention_is_left_out_where_its_scores_would_not_fit(config, params, monkeypatch):
    monkeypatch.setattr(module, "FULL_ATTENTION_BYTES", 1)
    monkeypatch.setattr(
        module, "_throughput", lambda name, work, length, call: Throughput(name, work, length, 1.0, 1.0)
    )
    bare = dataclasses.replace(config, ttt=None)
    assert {m.name for m in step_speeds(bare, params, [8])} == {WINDOW}
    ops = op_speeds(bare, [8])
    assert FULL not in {m.name for m in ops}
    assert {c.found for c in crossovers(ops)} == {"not measured"}


def test_crossover_is_interpolated_on_logarithmic_axes():
    def lines(ttt, full, lengths=(256, 512, 1024)):
        return [
            Throughput(name, "forward", length, ms, length / ms * 1000)
            for name, times in (("TTT-Linear", ttt), (FULL, full))
            for length, ms in zip(lengths, times, strict=False)
        ]

    # Linear against quadratic in the length: equal at 512 * sqrt(2) tokens.
    between = crossovers(lines([2**0.5, 2 * 2**0.5, 4 * 2**0.5], [0.5, 2, 8]))[0]
    np.testing.assert_allclose(between.length, 512 * 2**0.5)
    assert between.found == "faster from 724 tokens on"
    never = crossovers(lines([9, 9, 9], [1, 2, 8]))[0]
    assert (never.length, never.found) == (None, "not faster within 256 to 1024 tokens")
    always = crossovers(lines([1, 1, 1], [2, 2, 8]))[0]
    assert (always.length, always.found) == (None, "faster at all lengths from 256 to 1024 tokens")
    # Full attention measured at fewer lengths: only those count.
    assert crossovers(lines([3, 3, 3], [1, 9]))[0].found == "faster from 362 tokens on"


def test_calls_are_warmed_up_and_waited_for():
    calls = []

    def call():
        calls.append(jax.numpy.zeros(()) + 1)
        return calls[-1]

    assert median_seconds(call, repeats=3) >= 0
    assert len(calls) == 2 + 3


def test_lengths_and_limits(config, params):
    assert sequence_lengths(2000) == [256, 512, 1024]
    assert sequence_lengths(200) == [200]
    with pytest.raises(ValueError, match="max_frames: expected at least 200, four blocks of calls, got 199"):
        speed(config, params, max_frames=199)
