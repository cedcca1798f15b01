"""bfloat16 activations: training works, and what must stay float32 does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.config import from_mapping
from ttt_jax.data.chunks import Chunk
from ttt_jax.models.moshi import MoshiConfig, delayed_positions
from ttt_jax.training.config import DataConfig, ExperimentConfig, Precision
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
