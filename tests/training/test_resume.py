"""A run that is killed and resumed ends as an undisturbed one: the real train.py, in processes of its own."""

import os
import random
import shutil
import signal
import time

import jax
import numpy as np

from ttt_jax.checkpoint import load

STEPS = 60
SEED = 20


def assert_same_result(run, undisturbed):
    assert run.deterministic_lines() == undisturbed.deterministic_lines()
    parameters, expected = load(run.workdir)[1], load(undisturbed.workdir)[1]
    jax.tree.map(np.testing.assert_array_equal, parameters, expected)


def has_checkpoint(run) -> bool:
    return any(name.isdecimal() for name in run.checkpoint_names())


def kill(process):
    process.kill()
    process.communicate()


def test_the_undisturbed_run_logs_every_step_and_learns(undisturbed):
    train = [line for line in undisturbed.lines() if "train" in line]
    assert [line["step"] for line in train] == list(range(1, STEPS + 1))
    assert [line["step"] for line in undisturbed.lines() if "validation" in line] == [25, 50, 60]
    diagnostics = [line for line in undisturbed.lines() if "diagnostics" in line]
    assert [line["step"] for line in diagnostics] == [10, 20, 30, 40, 50, 60]
    names = {name.rsplit("/", 1)[-1] for name in diagnostics[0]["diagnostics"]}
    assert {"gate_size", "step_size_saturation", "fast_weight_drift", "inner_loss_after"} <= names
    assert len(train[0]["train"]["audio"]) == 8
    assert train[-1]["train"]["loss"] < train[0]["train"]["loss"] - 1
    assert undisturbed.checkpoint_names() == ["49", "56", "60"]


def test_killed_at_any_moment_it_ends_with_the_same_parameters(new_run, undisturbed):
    rng = random.Random(SEED)

    def is_writing(step):
        return lambda: any(name.startswith(f"{step}.") for name in new_run.checkpoint_names())

    def is_beyond(step):
        return lambda: has_checkpoint(new_run) and new_run.last_step() >= step

    moments = [(is_writing(7), 0.0), (is_beyond(9), 0.1), (is_writing(28), 0.0), (is_beyond(38), 0.2)]
    for moment, longest_wait_seconds in moments:
        process = new_run.start()
        new_run.wait(process, moment)
        time.sleep(rng.uniform(0, longest_wait_seconds))
        finished = [name for name in new_run.checkpoint_names() if name.isdecimal()][-2:]
        kill(process)
        assert set(finished) <= set(new_run.checkpoint_names())
    code, output = new_run.finish()
    assert code == 0, output
    assert "resuming after step" in output
    assert_same_result(new_run, undisturbed)


def test_killed_while_following_recordings_it_ends_with_the_same_parameters(new_follow_run, undisturbed_follow):
    run = new_follow_run
    for step in (9, 31):  # in the middle of recordings: the state carried so far is in the checkpoint
        process = run.start()
        run.wait(process, lambda step=step: has_checkpoint(run) and run.last_step() >= step)
        kill(process)
    code, output = run.finish()
    assert code == 0, output
    assert "resuming after step" in output
    assert_same_result(run, undisturbed_follow)


def test_sigterm_saves_exits_0_and_resumes(new_run, undisturbed):
    process = new_run.start()
    new_run.wait(process, lambda: new_run.last_step() >= 10)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "run the same command to resume" in output
    step = new_run.last_step()
    assert 10 <= step < STEPS
    assert str(step) in new_run.checkpoint_names()
    code, output = new_run.finish()
    assert code == 0, output
    assert f"resuming after step {step} of {STEPS}" in output
    assert_same_result(new_run, undisturbed)


def test_a_truncated_newest_checkpoint_falls_back_to_the_one_before(new_run, undisturbed):
    shutil.copytree(undisturbed.workdir, new_run.workdir)
    newest = new_run.workdir / "checkpoints" / str(STEPS)
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    code, output = new_run.finish()
    assert code == 0, output
    assert f"DAMAGED CHECKPOINT {newest}" in output
    assert f"resuming after step 56 of {STEPS}" in output
    assert_same_result(new_run, undisturbed)


def test_a_config_typo_on_the_command_line_is_named(new_run):
    code, output = new_run.finish("--config.optimizer.lerning_rate=1.0")
    assert code != 0
    assert "learning_rate" in output
    assert not new_run.workdir.exists()
