import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.config import from_mapping
from ttt_jax.data.chunks import Chunk
from ttt_jax.models import moshi
from ttt_jax.training.config import ExperimentConfig
from ttt_jax.training.step import (
    all_finite,
    diagnostics,
    evaluate,
    init_state,
    train_step,
)

CODES = np.random.default_rng(0).integers(0, 20, (2, 5, 10)).astype(np.int32)
DELAYS, INITIAL = (0, 0, 1, 0, 1), (20,) * 5


def chunk_of(codes) -> Chunk:
    """A batch of fresh rows."""
    tokens = np.stack([moshi.delayed_positions(row, 0, row.shape[1] + 1, DELAYS, INITIAL) for row in codes])
    return Chunk(tokens, np.full(len(codes), codes.shape[2], np.int32), np.ones(len(codes), bool))


CHUNK = chunk_of(CODES)


@pytest.fixture(scope="module")
def config() -> ExperimentConfig:
    model = {
        **{"dim": 16, "num_layers": 1, "num_heads": 2, "context": 4, "hidden_scale": 3.0},
        **{"n_q": 4, "dep_q": 2, "card": 20, "text_card": 20, "delays": DELAYS},
        **{"depformer_dim": 8, "depformer_num_layers": 1, "depformer_num_heads": 2, "depformer_dim_feedforward": None},
        "ttt": {"layers": (0,), "kind": "mlp", "mini_batch_size": 4},
    }
    return from_mapping(
        ExperimentConfig,
        {
            "data": {"directory": "", "num_frames": 10, "batch_size": 2},
            "model": model,
            "optimizer": {"learning_rate": 1e-2, "steps": 30, "warmup_steps": 2},
        },
    )


@pytest.fixture(scope="module")
def state(config):
    return jax.jit(lambda: init_state(config))()


@pytest.fixture(scope="module")
def update(config):
    return jax.jit(lambda state, chunk: train_step(config, state, chunk))


def test_training_lowers_the_loss_and_evaluation_in_between_changes_nothing(config, state, update):
    score = jax.jit(lambda params, chunk: evaluate(config, params, chunk))
    diagnose = jax.jit(lambda params, chunk: diagnostics(config, params, chunk))
    alone, watched = state, state
    losses = []
    for _ in range(20):
        alone, metrics = update(alone, CHUNK)
        losses.append(float(metrics["loss"]))
        before = jax.tree.map(np.array, watched)
        score(watched.params, chunk_of(CODES[:, :, ::-1]))
        sown = diagnose(watched.params, CHUNK)
        jax.tree.map(np.testing.assert_array_equal, watched, before)
        watched, _ = update(watched, CHUNK)
    jax.tree.map(np.testing.assert_array_equal, alone, watched)
    assert int(alone.step) == 20
    assert losses[-1] < losses[0] - 0.5
    assert all(np.isfinite(value) for value in sown.values())
    assert sown["layers_0/gate_size"] > 0


def test_after_one_update_every_parameter_gets_a_gradient(config, state, update):
    state, _ = update(state, CHUNK)
    gradients = jax.jit(jax.grad(lambda params: evaluate(config, params, CHUNK)["loss"]))(state.params)
    for path, gradient in jax.tree.leaves_with_path(gradients):
        assert np.any(gradient != 0), jax.tree_util.keystr(path)


def test_the_loss_weights_reach_the_loss(config, state):
    def score(**weights):
        weighted = from_mapping(ExperimentConfig, {**vars(config), "loss": weights})
        return jax.jit(lambda params: evaluate(weighted, params, CHUNK))(state.params)

    light = score(first_codebook_weight=1.0, text_padding_weight=1.0)
    heavy = score(first_codebook_weight=1e6, text_padding_weight=1.0)
    np.testing.assert_allclose(heavy["loss"] - light["text"], light["audio"][0], rtol=1e-3)
    assert not np.isclose(light["loss"], heavy["loss"], rtol=1e-3)
    np.testing.assert_allclose(heavy["audio"], light["audio"], rtol=1e-6)


def test_the_loss_is_that_of_the_whole_model(config, state):
    """Reading delayed positions gives the loss of `Moshi.__call__` on the codes."""
    output = jax.jit(moshi.Moshi(config.model).apply)({"params": state.params}, CODES)
    weights = {"first_codebook_weight": 100.0, "text_padding_weight": 0.5}
    expected = moshi.losses(output, jnp.asarray(CODES), text_padding_ids=config.model.text_padding_ids, **weights)
    got = jax.jit(lambda params: evaluate(config, params, CHUNK))(state.params)
    np.testing.assert_allclose(got["loss"], expected.total, rtol=1e-6)
    np.testing.assert_allclose(got["audio"], expected.audio_nll, rtol=1e-6)


def test_all_finite_sees_one_bad_number(state):
    assert all_finite(state)
    broken = state.params | {"text_linear": state.params["text_linear"].at[0, 0].set(np.inf)}
    assert not all_finite(state._replace(params=broken))
