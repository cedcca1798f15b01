"""A run that trains low-rank factors: what it saves, what comes out, and that it resumes."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest

from ttt_jax.checkpoint import load, save_model
from ttt_jax.config import from_mapping
from ttt_jax.data.chunks import Chunk
from ttt_jax.models import moshi
from ttt_jax.training import ExperimentConfig, train
from ttt_jax.training.checkpoints import restore_latest
from ttt_jax.training.step import evaluate, init_state

DELAYS, INITIAL = (0, 0, 0), (20,) * 3
CODES = np.random.default_rng(0).integers(0, 20, (6, 2, 3, 8)).astype(np.int32)


def chunk_of(codes) -> Chunk:
    tokens = np.stack([moshi.delayed_positions(row, 0, row.shape[1] + 1, DELAYS, INITIAL) for row in codes])
    return Chunk(tokens, np.full(len(codes), codes.shape[2], np.int32), np.ones(len(codes), bool))


CHUNKS = [chunk_of(codes) for codes in CODES]


def make(init_from, **optimizer) -> ExperimentConfig:
    model = {
        **{"dim": 16, "num_layers": 1, "num_heads": 2, "context": 4, "hidden_scale": 3.0},
        **{"n_q": 2, "dep_q": 2, "card": 20, "text_card": 20, "delays": DELAYS},
        **{"depformer_dim": 8, "depformer_num_layers": 1, "depformer_num_heads": 2, "depformer_dim_feedforward": None},
        "ttt": {"layers": (0,), "mini_batch_size": 4},
    }
    mapping = {
        "data": {"directory": "", "num_frames": 8, "batch_size": 2},
        "mesh": {"data": 1},
        "model": model,
        "init_from": str(init_from),
        "optimizer": {"learning_rate": 1e-2, "steps": 6, "warmup_steps": 0, "train": "lora", **optimizer},
        "lora": {"rank": 2, "scaling": 0.5},
        "checkpoint": {"every_steps": 3, "every_seconds": 0.0},
        "log": {"every_steps": 1, "diagnostics_every_steps": 3},
        "validation": {"every_steps": 6, "num_batches": 1},
    }
    return from_mapping(ExperimentConfig, mapping)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model without TTT, and where it is saved."""
    directory = tmp_path_factory.mktemp("base") / "model"
    config = dataclasses.replace(make("").model, ttt=None)
    params = jax.jit(lambda: moshi.Moshi(config).init(jax.random.key(5), CODES[0]))()["params"]
    save_model(directory, config, params)
    return directory, config, jax.device_get(params)


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """A run from the first update to the last: its config and workdir."""
    config, workdir = make(base[0]), tmp_path_factory.mktemp("run")
    assert train(config, workdir, CHUNKS, CHUNKS) == 6
    return config, workdir


def last_state(config, workdir):
    return restore_latest(workdir, jax.eval_shape(functools.partial(init_state, config)))


def lines(workdir, kind) -> list[dict]:
    every = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in every if kind in line]


@functools.cache
def forward(config):
    return jax.jit(lambda params: moshi.Moshi(config).apply({"params": params}, CODES[0]))


def test_the_checkpoint_keeps_the_base_bit_identical_and_the_factors_apart(base, finished):
    state = last_state(*finished)
    _, _, params = base
    layer = {name: leaf for name, leaf in state.params["layers_0"].items() if name in params["layers_0"]}
    without_ttt = {**state.params, "layers_0": layer}
    jax.tree.map(np.testing.assert_array_equal, without_ttt, params)
    assert all(np.any(factor != 0) for factor in jax.tree.leaves(state.lora))


def test_what_is_loaded_is_the_merged_model_with_the_plain_config(base, finished):
    config, workdir = finished
    state = last_state(config, workdir)
    loaded, params = load(workdir)
    assert loaded == config.model
    assert jax.tree.structure(params) == jax.tree.structure(state.params)
    merged = moshi.lora.merge(state.params, state.lora, 0.5)
    logits = forward(config.model)
    jax.tree.map(np.testing.assert_array_equal, logits(params), logits(merged))
    assert not np.allclose(logits(params).logits, logits(state.params).logits, atol=1e-3)


def test_validation_scores_the_merged_model(finished):
    config, workdir = finished
    (line,) = lines(workdir, "validation")
    loss = jax.jit(functools.partial(evaluate, config))(load(workdir)[1], CHUNKS[0])["loss"]
    np.testing.assert_allclose(line["validation"]["loss"], loss, rtol=1e-6)


def test_it_resumes_bit_exactly_without_what_it_started_from(base, finished, tmp_path):
    config, workdir = finished
    resumed = tmp_path / "run"
    shutil.copytree(workdir, resumed)
    shutil.rmtree(resumed / "checkpoints" / "6")
    gone = base[0].rename(base[0].with_name("gone"))
    try:
        assert train(config, resumed, CHUNKS, CHUNKS) == 6
    finally:
        gone.rename(base[0])
    jax.tree.map(np.testing.assert_array_equal, last_state(config, resumed), last_state(config, workdir))
    for kind in ("train", "validation", "diagnostics"):
        before, after = lines(workdir, kind), lines(resumed, kind)
        for line in before + after:
            line[kind].pop("frames_per_second", None)
        assert before == after


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # TensorStore's failed reads
def test_without_its_factors_a_checkpoint_is_damaged(finished, tmp_path):
    config, workdir = finished
    damaged = tmp_path / "run"
    shutil.copytree(workdir, damaged)
    shutil.rmtree(damaged / "checkpoints" / "6" / "lora")
    _, params = load(damaged)
    jax.tree.map(np.testing.assert_array_equal, params, load(damaged / "checkpoints" / "3")[1])
    with pytest.raises(ValueError, match="no readable checkpoint"):
        load(damaged / "checkpoints" / "6")
    assert int(last_state(config, damaged).step) == 3
