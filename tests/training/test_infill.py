"""Infill through train.py's own function, from a dataset to a checkpoint and its score."""

import json

import jax
import numpy as np
import pytest

from ttt_jax.checkpoint import load
from ttt_jax.config import from_mapping
from ttt_jax.data.spans import MaskedBatch
from ttt_jax.evaluation.run import run as evaluate
from ttt_jax.models.infill import InfillConfig
from ttt_jax.training import ExperimentConfig, run
from ttt_jax.training.objective import objective_of
from ttt_jax.training.step import evaluate as score
from ttt_jax.training.step import init_state, train_step


@pytest.fixture
def mapping(dataset):
    return {
        "objective": "infill",
        "data": {
            **{"directory": str(dataset), "num_frames": 32, "batch_size": 2},
            **{"masked_share": 0.25, "shortest_span": 4, "longest_span": 12},
        },
        "model": {"dim": 16, "num_layers": 1, "num_heads": 2, "segment": 8, "ssm_layer": None},
        "optimizer": {"learning_rate": 1e-2, "steps": 4, "warmup_steps": 1},
        "log": {"every_steps": 1, "tensorboard": False},
        "validation": {"every_steps": 4, "num_batches": 2},
        "mesh": {"data": 1},
    }


def test_a_run_has_a_checkpoint_that_is_scored(mapping, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    assert run(mapping, workdir) == (4, 4)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train"]["loss"] for line in lines if "train" in line]
    assert losses == pytest.approx([np.log(20)] * 4, abs=0.2)
    validation = next(line["validation"] for line in lines if "validation" in line)
    assert len(validation["audio"]) == 16
    assert validation["loss"] == pytest.approx(np.mean(validation["audio"]), abs=1e-5)
    config, _ = load(workdir)
    assert isinstance(config, InfillConfig)
    assert config.num_codebooks == 16
    monkeypatch.setattr("ttt_jax.evaluation.run.codec_of", lambda info: None)  # a codec has no such vocabulary
    evaluate(workdir, ["infill"], data=None, split="validation", output=None)
    result = json.loads((workdir / "infill.json").read_text())
    assert result["spans"] == {"num_frames": 32, "masked_share": 0.25, "shortest_span": 4, "longest_span": 12}
    assert result["model"]["num_tokens"] == 16 * (8 + 7)  # of crops of 32 and 28 frames
    assert abs(result["model"]["mean"] - validation["loss"]) < 0.3
    assert "masked spans" not in (workdir / "report.html").read_text().split("<h1>")[0]


def test_the_loss_is_the_mean_over_masked_tokens_of_all_rows(mapping):
    config = from_mapping(ExperimentConfig, mapping)
    objective = objective_of(config)
    params = jax.jit(objective.init_parameters)(jax.random.key(0))
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 20, (2, 17, 32)).astype(np.int32)
    codes[0, 3, :] = -1
    masked = np.zeros((2, 32), bool)
    masked[0, :8], masked[1, 5:8] = True, True
    batch = MaskedBatch(codes, masked, np.array([32, 32], np.int32))
    apart = [jax.tree.map(lambda x, row=row: x[row : row + 1], batch) for row in (0, 1)]
    read = jax.jit(objective.read)
    sums = [read({"params": params}, row, ())[0] for row in apart]
    weights = objective.loss_weights(batch)
    assert weights == 8 * 15 + 3 * 16
    loss = sum(objective.loss(one, weights) for one in sums)
    whole = jax.jit(score, static_argnums=0)(config, params, batch)["loss"]
    np.testing.assert_allclose(loss, whole, rtol=1e-6)
    assert [int(one.num_tokens.sum()) for one in sums] == [8 * 15, 3 * 16]
    assert jax.tree.map(lambda s: (s.shape, s.dtype), objective.batch_shapes()) == jax.tree.map(
        lambda x: (x.shape, x.dtype), batch
    )
    state, step = jax.jit(init_state, static_argnums=0)(config), jax.jit(train_step, static_argnums=0)
    losses = []
    for _ in range(4):
        state, metrics = step(config, state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.05  # the same batch again and again
