import importlib.util
import json
import shutil
import time

import jax
import numpy as np
import pytest
import soundfile

from ttt_jax.checkpoint import load
from ttt_jax.config import from_mapping
from ttt_jax.data import prepare, reader
from ttt_jax.data.chunks import Chunk
from ttt_jax.files import only_process
from ttt_jax.training import ExperimentConfig, NonFiniteError, run, train


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


def test_a_second_run_in_a_workdir_is_refused_and_changes_nothing(mapping, workdir):
    shutil.rmtree(workdir / "checkpoints" / "60")
    before = content(workdir)
    with only_process(workdir / "lock", "training"), pytest.raises(RuntimeError, match="another process is training"):
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


def test_a_batch_that_does_not_fit_the_mesh_is_refused(mapping, tmp_path):
    mapping["mesh"] = {"data": 8}
    with pytest.raises(ValueError, match=r"config\.data\.batch_size: expected a multiple of 8 .*, got 2"):
        run(mapping, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_dataset_of_other_codebooks_is_refused(mapping, tmp_path):
    mapping["model"]["card"] = 2048
    with pytest.raises(ValueError, match=r"config\.model\.card: the dataset has 20, the config says 2048"):
        run(mapping, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_too_small_for_a_validation_split(mapping, tmp_path, capsys):
    folder, dataset, workdir = (tmp_path / name for name in ("audio", "dataset", "run"))
    folder.mkdir()
    noise = np.random.default_rng(0).standard_normal(8000 * 4) * 0.1
    for name in ("one", "two", "three"):
        soundfile.write(folder / f"{name}.wav", noise, 8000)
    prepare.make(folder, dataset)
    assert "validation" not in reader.splits(dataset)
    mapping["data"]["directory"] = str(dataset)
    mapping["model"] |= {"num_layers": 1, "ttt": None}
    mapping["optimizer"] |= {"steps": 2, "warmup_steps": 1}
    assert run(mapping, workdir) == (2, 2)
    told = [line for line in capsys.readouterr().err.splitlines() if "validation" in line]
    assert told == [f"no validation: {dataset} is too small to hold such a split"]
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train" in line] == [1, 2]
    assert all(np.isfinite(line["train"]["loss"]) for line in lines)


class Slow:
    """Chunks that take half a second each."""

    def __init__(self, chunks):
        self._chunks = chunks

    def __getitem__(self, step):
        time.sleep(0.5)
        return self._chunks[step]


def test_the_speed_is_that_of_the_updates_alone(tmp_path):
    model = {
        **{"dim": 16, "num_layers": 1, "num_heads": 2, "context": 4, "hidden_scale": 3.0},
        **{"n_q": 2, "dep_q": 1, "card": 20, "text_card": 20, "delays": (0, 0, 0)},
        **{"depformer_dim": 8, "depformer_num_layers": 1, "depformer_num_heads": 2, "depformer_dim_feedforward": None},
    }
    config = from_mapping(
        ExperimentConfig,
        {
            "data": {"directory": "", "num_frames": 24, "batch_size": 2},
            "model": model,
            "optimizer": {"steps": 6, "warmup_steps": 1},
            "log": {"every_steps": 2},
            "validation": {"every_steps": 2, "num_batches": 2},
            "mesh": {"data": 1},
        },
    )
    tokens = np.random.default_rng(0).integers(0, 20, (6, 2, 3, 25)).astype(np.int32)
    chunks = [Chunk(t, np.full(2, 24, np.int32), np.ones(2, bool)) for t in tokens]
    assert train(config, tmp_path, chunks, Slow(chunks)) == 6
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = [line["train"]["frames_per_second"] for line in lines if "train" in line]
    assert len(rates) == 3
    # With the second of a validation, two updates of 2 x 24 frames could not be faster than this.
    assert min(rates[1:]) > 2 * 2 * 24 / 1.0
