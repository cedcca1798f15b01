import gc
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.checkpoint import load
from ttt_jax.config import from_mapping
from ttt_jax.training.checkpoints import Checkpoints, NonFiniteError, restore_latest
from ttt_jax.training.config import ExperimentConfig
from ttt_jax.training.step import TrainState


def make_config(**checkpoint) -> ExperimentConfig:
    return from_mapping(ExperimentConfig, {"data": {"directory": ""}, "checkpoint": checkpoint})


def make_state(step: int) -> TrainState:
    rng = np.random.default_rng(step)
    params = {"a": {"w": jnp.asarray(rng.standard_normal((40, 50)), jnp.float32)}, "b": jnp.full(3, float(step))}
    return TrainState(jnp.int32(step), params, (jnp.int32(step), {"mu": jax.tree.map(jnp.square, params)}, ()))


ABSTRACT = jax.eval_shape(lambda: make_state(0))


def save(workdir, steps, **checkpoint):
    with Checkpoints(workdir, make_config(**checkpoint)) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step))


def assert_equal(tree, expected):
    jax.tree.map(np.testing.assert_array_equal, tree, expected)


def assert_is_step(state, step):
    assert_equal(state, make_state(step))


def test_a_fresh_workdir_has_no_state(tmp_path):
    assert restore_latest(tmp_path, ABSTRACT) is None


def test_the_newest_are_kept_and_every_so_many(tmp_path):
    save(tmp_path, range(1, 10), keep=2, keep_every_steps=4)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4", "8", "9"]
    assert_is_step(restore_latest(tmp_path, ABSTRACT), 9)
    config, params = load(tmp_path)
    assert config == make_config().model
    assert_equal(params, make_state(9).params)
    assert_equal(load(tmp_path / "checkpoints" / "4")[1], make_state(4).params)


def test_a_state_that_is_donated_right_after_is_saved_as_it_was(tmp_path):
    update = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    with Checkpoints(tmp_path, make_config()) as checkpoints:
        state = make_state(5)
        checkpoints.save(5, state)
        for _ in range(20):
            state = update(state)
    assert_is_step(restore_latest(tmp_path, ABSTRACT), 5)


def test_a_state_that_is_not_finite_is_never_written(tmp_path):
    state = make_state(2)
    with Checkpoints(tmp_path, make_config()) as checkpoints:
        checkpoints.save(1, make_state(1))
        bad = state._replace(params={**state.params, "b": jnp.array([0.0, jnp.nan, 0.0])})
        with pytest.raises(NonFiniteError, match=r"after step 2 .* last good checkpoint is .*checkpoints/1\."):
            checkpoints.save(2, bad)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


damages_checkpoints = pytest.mark.filterwarnings(
    # TensorStore reports the failed reads that Orbax did not wait for once more, to nobody.
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


@damages_checkpoints
def test_whatever_file_is_damaged_the_state_is_one_that_was_saved(tmp_path):
    original = tmp_path / "original"
    save(original, (1, 2))
    files = [p.relative_to(original) for p in (original / "checkpoints" / "2").rglob("*") if p.is_file()]
    fallen_back = []
    for number, file in enumerate(sorted(files)):
        workdir = tmp_path / str(number)
        shutil.copytree(original, workdir)
        content = (workdir / file).read_bytes()
        (workdir / file).write_bytes(content[: len(content) // 2])
        state = restore_latest(workdir, ABSTRACT)
        step = int(state.step)
        assert_is_step(state, step)
        assert (step == 1) == (workdir / "unreadable").exists(), file
        fallen_back += [file.name] * (step == 1)
        assert_equal(load(workdir)[1], make_state(step).params)
        save(workdir, (3,))
        assert_is_step(restore_latest(workdir, ABSTRACT), 3)
    gc.collect()
    assert "_CHECKPOINT_METADATA" in fallen_back
    assert len(fallen_back) > len(files) / 2


def test_a_missing_directory_inside_falls_back(tmp_path):
    save(tmp_path, (1, 2))
    shutil.rmtree(tmp_path / "checkpoints" / "2" / "progress")
    assert_is_step(restore_latest(tmp_path, ABSTRACT), 1)
    assert [path.name.split("-")[0] for path in (tmp_path / "unreadable").iterdir()] == ["2"]


def test_when_none_can_be_read_nothing_is_moved(tmp_path):
    save(tmp_path, (1, 2))
    for step in ("1", "2"):
        shutil.rmtree(tmp_path / "checkpoints" / step / "params")
    with pytest.raises(ValueError, match="no readable checkpoint"):
        restore_latest(tmp_path, ABSTRACT)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    assert not (tmp_path / "unreadable").exists()


def test_a_checkpoint_is_late_after_so_many_seconds(tmp_path):
    with Checkpoints(tmp_path, make_config(every_seconds=0.0)) as checkpoints:
        assert not checkpoints.is_late
    with Checkpoints(tmp_path, make_config(every_seconds=0.5)) as checkpoints:
        assert not checkpoints.is_late
        time.sleep(0.5)
        assert checkpoints.is_late
        checkpoints.save(1, make_state(1))
        assert not checkpoints.is_late
