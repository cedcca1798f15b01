import importlib.util
import json
import shutil

import jax
import numpy as np
import pytest

from ttt_jax.checkpoint import load
from ttt_jax.training import NonFiniteError, run


@pytest.fixture
def mapping(dataset, tiny_config_path) -> dict:
    spec = importlib.util.spec_from_file_location("tiny", tiny_config_path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.data.directory = str(dataset)
    return config.to_dict()


@pytest.fixture
def workdir(undisturbed, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(undisturbed.workdir, tmp_path / "run")


def content(directory) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_finished_run_is_left_as_it_is(mapping, workdir):
    before = content(workdir / "checkpoints")
    assert run(mapping, workdir) == (60, 60)
    assert content(workdir / "checkpoints") == before


def test_a_workdir_of_another_config_is_refused_and_left_as_it_is(mapping, workdir):
    mapping["optimizer"]["learning_rate"] = 0.5
    before = content(workdir)
    with pytest.raises(ValueError, match=r"optimizer\.learning_rate: 0\.01 -> 0\.5"):
        run(mapping, workdir)
    assert content(workdir) == before


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(mapping, workdir, cached_compilation):
    # The run diverges after step 49, from a learning rate that its config is made to agree with.
    for step in ("56", "60"):
        shutil.rmtree(workdir / "checkpoints" / step)
    stored = json.loads((workdir / "config.json").read_text())
    stored["optimizer"]["learning_rate"] = mapping["optimizer"]["learning_rate"] = 1e30
    (workdir / "config.json").write_text(json.dumps(stored))
    with pytest.raises(
        NonFiniteError, match=r"loss at step 51 is (nan|inf).*last good checkpoint is \S*checkpoints/49\."
    ):
        run(mapping, workdir)
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["49"]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(load(workdir)[1]))
    steps = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 50


def test_a_dataset_of_other_codebooks_is_refused(mapping, tmp_path):
    mapping["model"]["card"] = 2048
    with pytest.raises(ValueError, match=r"config\.model\.card: the dataset has 20, the config says 2048"):
        run(mapping, tmp_path / "run")
    assert not (tmp_path / "run").exists()
