"""Processes joined by `jax.distributed` are one run: the real train.py, each process with a device of its own."""

import shutil
import signal
import socket
import subprocess

import jax
import numpy as np
import pytest

from ttt_jax.checkpoint import load
from ttt_jax.training import distributed

STEPS = 10  # exchanging gradients is what takes time here, and compiling
SHORT = (
    *(f"--config.optimizer.steps={STEPS}", "--config.validation.every_steps=5"),
    *("--config.log.diagnostics_every_steps=0", "--noconfig.log.tensorboard"),
)


def start(run, *second: str) -> list[subprocess.Popen]:
    """Starts both processes, the second with further flags."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    joined = (f"--coordinator=localhost:{port}", "--num_processes=2", "--config.mesh.data=1", "--config.mesh.fsdp=2")
    return [run.start(*SHORT, *joined, f"--process_id={n}", *others) for n, others in ((0, ()), (1, second))]


def finish(processes) -> list[str]:
    """Their outputs, once both have ended well."""
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return outputs


@pytest.fixture(scope="module")
def two(tmp_path_factory, make_follow_run):
    """An undisturbed run of two processes."""
    run = make_follow_run(tmp_path_factory.mktemp("two"))
    outputs = finish(start(run))
    assert "on 2 of 2 x cpu (data 1, fsdp 2, tensor 1)" in outputs[0]
    assert "finished" not in outputs[1]
    assert "frames/s" not in outputs[1]  # one progress bar
    return run


@pytest.fixture(scope="module")
def one(tmp_path_factory, make_follow_run):
    """The same run of one process."""
    run = make_follow_run(tmp_path_factory.mktemp("one"))
    code, output = run.finish(*SHORT)
    assert code == 0, output
    return run


def losses(run, kind) -> dict[int, float]:
    return {line["step"]: line[kind]["loss"] for line in run.lines() if kind in line}


def test_two_processes_train_as_one(two, one):
    assert [line["step"] for line in two.lines() if "train" in line] == list(range(1, STEPS + 1))
    for kind in ("train", "validation"):
        got, want = losses(two, kind), losses(one, kind)
        assert got.keys() == want.keys()
        # Float32 sums in another order, and what 20 updates made of it: measured 4.2e-7.
        np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=1e-5)


def test_tensorboard_can_be_turned_off(one):
    assert not (one.workdir / "tensorboard").exists()


def test_sigterm_to_one_process_stops_both_at_one_step_and_both_resume(two, tmp_path, make_follow_run):
    run = make_follow_run(tmp_path / "run")
    processes = start(run)
    run.wait(processes[0], lambda: run.last_step() >= 3)
    processes[1].send_signal(signal.SIGTERM)
    outputs = finish(processes)
    step = run.last_step()
    assert 3 <= step < STEPS
    assert f"stopped; run the same command to resume after step {step} of {STEPS}" in outputs[0]
    assert run.checkpoint_names()[-1] == str(step)
    alone = make_follow_run(shutil.copytree(run.workdir, tmp_path / "alone"))

    outputs = finish(start(run))
    assert f"resuming after step {step} of {STEPS}" in outputs[0]
    assert run.deterministic_lines() == two.deterministic_lines()
    jax.tree.map(np.testing.assert_array_equal, load(run.workdir)[1], load(two.workdir)[1])

    code, output = alone.finish(*SHORT)
    assert code == 0, output
    assert f"resuming after step {step} of {STEPS}" in output
    np.testing.assert_allclose(list(losses(alone, "train").values()), list(losses(two, "train").values()), rtol=1e-5)


def test_processes_of_different_configs_are_refused(tmp_path, make_follow_run):
    run = make_follow_run(tmp_path / "run")
    for process in start(run, "--config.seed=4"):
        output, _ = process.communicate(timeout=300)
        assert process.returncode != 0
        assert "config: expected the same in all 2 processes" in output
    assert not run.workdir.exists()


def test_the_flags_go_together():
    with pytest.raises(ValueError, match=r"--num_processes, --process_id: missing; --coordinator, .* given together"):
        distributed.join("localhost:1")


def test_one_process_asks_nobody():
    assert distributed.is_first()
    assert distributed.everywhere(True)
    assert not distributed.everywhere(False)
    assert distributed.of_first([3, 1]) == [3, 1]
    distributed.check_same(b"config", "config")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    wishes = distributed.Wishes(mesh, stop=lambda: True, save=lambda: False)
    assert wishes.ask() == (True, False)
