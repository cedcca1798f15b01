"""bfloat16 activations and frozen parameters: training works, and what must stay float32 does."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from ttt_jax.checkpoint import load, save_model
from ttt_jax.config import from_mapping
from ttt_jax.data.chunks import Chunk
from ttt_jax.models.moshi import Moshi, MoshiConfig, delayed_positions
from ttt_jax.training import train
from ttt_jax.training.checkpoints import restore_latest
from ttt_jax.training.config import (
    CheckpointConfig,
    DataConfig,
    ExperimentConfig,
    LogConfig,
    MeshConfig,
    Precision,
)
from ttt_jax.training.parameters import is_trained
from ttt_jax.training.step import init_state, train_step

DELAYS, INITIAL = (0, 0, 1), (20,) * 3


@pytest.fixture(scope="module")
def config() -> ExperimentConfig:
    model = {
        **{"dim": 16, "num_layers": 1, "num_heads": 2, "context": 4, "hidden_scale": 3.0},
        **{"n_q": 2, "dep_q": 2, "card": 20, "text_card": 20, "delays": DELAYS},
        **{"depformer_dim": 8, "depformer_num_layers": 1, "depformer_num_heads": 2, "depformer_dim_feedforward": None},
        "ttt": {"layers": (0,), "mini_batch_size": 4},
    }
    mapping = {
        "data": {"directory": "", "num_frames": 8, "batch_size": 2, "mode": "follow"},
        "model": model,
        "optimizer": {"learning_rate": 1e-2, "steps": 30, "warmup_steps": 0, "train": "lora"},
        "lora": {"rank": 2},
        "precision": {"activations": "bfloat16"},
    }
    return from_mapping(ExperimentConfig, mapping)


def test_bfloat16_activations_train_and_all_that_is_kept_is_float32(config):
    rows = np.random.default_rng(0).integers(0, 20, (2, 3, 9)).astype(np.int32)
    tokens = np.stack([delayed_positions(row, 0, 9, DELAYS, INITIAL) for row in rows])
    chunk = Chunk(tokens, np.full(2, 8, np.int32), np.ones(2, bool))
    state = jax.jit(functools.partial(init_state, config))()
    update = jax.jit(functools.partial(train_step, config))
    losses = []
    for _ in range(25):
        state, metrics = update(state, chunk)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.5
    assert {value.dtype for value in metrics.values()} == {jnp.dtype(jnp.float32)}
    for tree in (state.params, state.lora, state.optimizer, [layer.ttt for layer in state.carry]):
        floats = [leaf.dtype for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        assert len(floats) > 0
        assert set(floats) == {jnp.dtype(jnp.float32)}
    assert state.carry[0].attention.keys.dtype == jnp.bfloat16  # or else nothing was tested


def test_the_policy_sets_the_models_dtype_and_may_not_be_contradicted(config):
    assert config.model.dtype == "bfloat16"
    half = MoshiConfig(dtype="bfloat16")
    assert ExperimentConfig(DataConfig(""), half, precision=Precision(activations="bfloat16")).model == half
    with pytest.raises(ValueError, match=r"model\.dtype: expected float32, as precision\.activations sets it"):
        ExperimentConfig(DataConfig(""), half)


def chunks(config: ExperimentConfig) -> list[Chunk]:
    rng, result = np.random.default_rng(1), []
    for i in range(config.optimizer.steps):
        rows = rng.integers(0, 20, (2, 3, 9)).astype(np.int32)
        tokens = np.stack([delayed_positions(row, 0, 9, DELAYS, INITIAL) for row in rows])
        result.append(Chunk(tokens, np.full(2, 8, np.int32), np.full(2, i % 2 == 0)))
    return result


@pytest.fixture(scope="module")
def published(config, tmp_path_factory):
    """A model without TTT in bfloat16, and where it is saved."""
    model = dataclasses.replace(config.model, ttt=None)
    params = jax.jit(lambda: Moshi(model).init(jax.random.key(3), np.zeros((1, 3, 2), np.int32)))()["params"]
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    directory = tmp_path_factory.mktemp("published") / "model"
    save_model(directory, model, params)
    return directory, params


@pytest.fixture(scope="module")
def fine_tuned(config, published, tmp_path_factory):
    """Runs on two devices that train the attention and TTT, by the dtype of the rest: config, workdir and metrics."""
    results = {}
    for frozen in ("float32", "bfloat16"):
        run = dataclasses.replace(
            config,
            init_from=str(published[0]),
            optimizer=dataclasses.replace(config.optimizer, train="qkvo", steps=4),
            precision=Precision(frozen=frozen, activations="bfloat16"),
            checkpoint=CheckpointConfig(every_steps=2, every_seconds=0),
            log=LogConfig(every_steps=1, diagnostics_every_steps=0),
            mesh=MeshConfig(data=1, fsdp=2),
        )
        workdir = tmp_path_factory.mktemp(frozen)
        train(run, workdir, chunks(run), None)
        lines = [json.loads(line)["train"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        results[frozen] = run, workdir, [{**line, "frames_per_second": 0} for line in lines]
    return results


def by_path(tree) -> dict[str, jax.Array]:
    return {"/".join(path): leaf for path, leaf in flatten_dict(tree).items()}


def test_what_is_frozen_in_bfloat16_trains_as_in_float32_and_stays(fine_tuned, published):
    wide, narrow = (fine_tuned[frozen] for frozen in ("float32", "bfloat16"))
    assert narrow[2] == wide[2]
    got, want, base = by_path(load(narrow[1])[1]), by_path(load(wide[1])[1]), by_path(published[1])
    for name, leaf in got.items():
        np.testing.assert_array_equal(leaf, want[name], err_msg=name)
        if is_trained(name, "qkvo"):
            assert leaf.dtype == jnp.float32
            continue
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_array_equal(leaf, base[name], err_msg=name)
    assert np.any(got["layers_0/self_attn/in_proj"] != base["layers_0/self_attn/in_proj"])


def test_a_run_with_frozen_parts_resumes_bit_exactly_without_what_it_started_from(fine_tuned, published, tmp_path):
    config, workdir, metrics = fine_tuned["bfloat16"]
    resumed = tmp_path / "run"
    shutil.copytree(workdir, resumed)
    shutil.rmtree(resumed / "checkpoints" / "4")
    gone = published[0].rename(published[0].with_name("gone"))
    try:
        assert train(config, resumed, chunks(config), None) == 4
    finally:
        gone.rename(published[0])
    abstract = jax.eval_shape(functools.partial(init_state, config))
    states = [restore_latest(directory, abstract) for directory in (resumed, workdir)]
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert states[0].params["text_emb"].dtype == jnp.bfloat16
    lines = [json.loads(line)["train"] for line in (resumed / "metrics.jsonl").read_text().splitlines()]
    assert [{**line, "frames_per_second": 0} for line in lines] == metrics
