"""What `optimizer.train` leaves alone stays as it is, to the bit, and costs nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ttt_jax.config import from_mapping
from ttt_jax.data.chunks import Chunk
from ttt_jax.models import moshi
from ttt_jax.training.config import TRAIN_MODES, ExperimentConfig
from ttt_jax.training.initial import initial_parameters
from ttt_jax.training.optimizer import make_optimizer
from ttt_jax.training.parameters import is_trained, trained_part
from ttt_jax.training.step import TrainState, init_state, train_step

DELAYS, INITIAL = (0, 0, 1, 0, 1), (20,) * 5
CODES = np.random.default_rng(0).integers(0, 20, (3, 2, 5, 10)).astype(np.int32)


def chunk_of(codes) -> Chunk:
    tokens = np.stack([moshi.delayed_positions(row, 0, row.shape[1] + 1, DELAYS, INITIAL) for row in codes])
    return Chunk(tokens, np.full(len(codes), codes.shape[2], np.int32), np.ones(len(codes), bool))


def make(train: str) -> ExperimentConfig:
    model = {
        **{"dim": 16, "num_layers": 1, "num_heads": 2, "context": 4, "hidden_scale": 3.0},
        **{"n_q": 4, "dep_q": 2, "card": 20, "text_card": 20, "delays": DELAYS},
        **{"depformer_dim": 8, "depformer_num_layers": 1, "depformer_num_heads": 2, "depformer_dim_feedforward": None},
        "ttt": {"layers": (0,), "mini_batch_size": 4},
    }
    optimizer = {"learning_rate": 1e-2, "steps": 30, "warmup_steps": 0, "weight_decay": 0.5, "train": train}
    optimizer["accumulate"] = 2 if train == "lora" else 1  # zeros to add to only where there are gradients
    mapping = {
        "data": {"directory": "", "num_frames": 10, "batch_size": 2},
        "model": model,
        "optimizer": optimizer,
        "lora": {"rank": 2},
    }
    return from_mapping(ExperimentConfig, mapping)


def by_path(tree) -> dict:
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


@functools.cache
def fresh_parameters():
    return jax.jit(functools.partial(initial_parameters, make("lora")))()


def fresh(config) -> TrainState:
    """`init_state`, which is the same for all modes but for the optimizer's; compiled once."""
    params, lora = fresh_parameters()
    lora = lora if config.optimizer.train == "lora" else None
    optimizer = make_optimizer(config.optimizer).init(trained_part(params, lora, config.optimizer.train))
    state = TrainState(jnp.int32(0), params, optimizer, (), lora)
    expected = jax.eval_shape(functools.partial(init_state, config))
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, expected)
    return state


@functools.cache
def trained(train: str) -> tuple[TrainState, TrainState]:
    """A fresh state, and the one after three updates: the second is the first in which all that is new has a gradient.

    At the start wo and B are zero, so that nothing behind them has one.
    """
    config = make(train)
    start = state = fresh(config)
    update = jax.jit(functools.partial(train_step, config))
    for codes in CODES:
        state, _ = update(state, chunk_of(codes))
    return start, state


@pytest.mark.parametrize("train", TRAIN_MODES)
def test_what_is_not_trained_is_bit_identical_and_what_is_moves(train):
    start, end = trained(train)
    before = by_path(start.params)
    for name, leaf in by_path(end.params).items():
        changed = np.asarray(leaf) != np.asarray(before[name])
        assert changed.any() if is_trained(name, train) else not changed.any(), name
    assert (train == "lora") == (end.lora is not None)
    for old, new in zip(jax.tree.leaves(start.lora), jax.tree.leaves(end.lora), strict=True):
        assert np.any(old != new)


@pytest.mark.parametrize("train", TRAIN_MODES)
def test_only_what_is_trained_has_moments_and_all_of_it_gets_a_gradient(train):
    _, end = trained(train)
    moments = optax.tree.get(end.optimizer, "mu"), optax.tree.get(end.optimizer, "nu")
    shapes = {name: leaf.shape for name, leaf in by_path(trained_part(end.params, end.lora, train)).items()}
    for tree in moments:
        assert {name: leaf.shape for name, leaf in by_path(tree).items()} == shapes
        for name, moment in by_path(tree).items():
            assert np.any(moment != 0), name
    arrays = [leaf for leaf in jax.tree.leaves(end.optimizer) if leaf.ndim]
    assert len(arrays) == 2 * len(shapes)


def test_the_gradients_of_the_others_are_not_computed():
    def flops(train):
        config = make(train)
        state = jax.eval_shape(functools.partial(init_state, config))
        return jax.jit(functools.partial(train_step, config)).lower(state, chunk_of(CODES[0])).cost_analysis()["flops"]

    everything, qkvo, ttt = (flops(train) for train in ("all", "qkvo", "ttt"))
    assert ttt < qkvo < 0.9 * everything
