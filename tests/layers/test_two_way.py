"""`TTTBidirectional` on one-dimensional sequences."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ttt_jax
from ttt_jax.layers.ttt import TTTConfig
from ttt_jax.layers.two_way import TTTBidirectional

WIDTH, C, T = 8, 3, 7
CONFIG = TTTConfig.video_dit("linear", WIDTH, 2, mini_batch_size=C)
BLOCK = TTTBidirectional(CONFIG, segment=4, overlap=1, dtype=jnp.float64)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def make(block=BLOCK, batch=3):
    """Parameters far from their initial values, and an input."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((batch, T, WIDTH)))
    shapes = jax.eval_shape(lambda: block.init(jax.random.key(0), x))["params"]
    return jax.tree.map(lambda s: jnp.asarray(0.5 * rng.standard_normal(s.shape)), shapes), x


def test_a_row_with_a_length_is_that_row_alone_whatever_lies_beyond():
    params, x = make()
    length = np.asarray([5, T, 0])
    beyond = np.arange(T)[None, :, None] >= length[:, None, None]
    apply = jax.jit(BLOCK.apply)
    y = apply({"params": params}, jnp.where(beyond, jnp.nan, x), length)
    assert np.all(np.where(beyond, y, 0) == 0)
    for row, n in enumerate(length[:2]):
        np.testing.assert_allclose(y[row, :n], apply({"params": params}, x[row : row + 1, :n])[0], atol=1e-12)


def test_a_narrow_length_of_a_long_row():
    """200 frames are more than int8 counts."""
    params, _ = make()
    x = np.random.default_rng(1).standard_normal((1, 200, WIDTH))
    narrow, wide = (BLOCK.apply({"params": params}, x, np.array([100], dtype)) for dtype in (np.int8, np.int32))
    np.testing.assert_array_equal(narrow, wide)


def test_reversing_time_swaps_the_two_passes():
    """Segments of one frame, so that attention has no direction of its own."""
    block = TTTBidirectional(CONFIG, segment=1, dtype=jnp.float64)
    params, x = make(block)
    swapped = params | {
        "gate_forward_audio": params["gate_backward_audio"],
        "gate_backward_audio": params["gate_forward_audio"],
    }
    apply = jax.jit(block.apply)
    for direction in ("forward", "backward"):
        silent = {f"gate_{direction}_audio": jnp.zeros(WIDTH)}
        other = {f"gate_{'backward' if direction == 'forward' else 'forward'}_audio": jnp.zeros(WIDTH)}
        y = apply({"params": params | silent}, x)
        np.testing.assert_allclose(apply({"params": swapped | other}, x[:, ::-1])[:, ::-1], y, atol=1e-12)


def test_every_frame_sees_every_other_one_and_every_parameter_gets_a_gradient():
    params, x = make(batch=1)

    @jax.jit
    def apply(params, x):
        def loss(params):
            y = BLOCK.apply({"params": params}, x)
            return jnp.sum(y**2), y

        return jax.grad(loss, has_aux=True)(params)

    gradients, y = apply(params, x)
    for frame in (0, T // 2, T - 1):
        _, moved = apply(params, x.at[:, frame].add(0.5))
        assert np.all(np.abs(moved - y).max(axis=(0, 2)) > 1e-9)
    still = [jax.tree_util.keystr(path) for path, g in jax.tree.leaves_with_path(gradients) if not np.any(g)]
    assert still == []


def test_gates_start_where_they_are_told():
    block = TTTBidirectional(CONFIG, segment=4, gate_init=0.3)
    params = jax.jit(block.init)(jax.random.key(0), jnp.zeros((1, 1, WIDTH)))["params"]
    for direction in ("forward", "backward"):
        np.testing.assert_array_equal(params[f"gate_{direction}_audio"], np.full(WIDTH, 0.3, np.float32))
    assert ttt_jax.TTTBidirectional is TTTBidirectional


@pytest.mark.parametrize(
    ("changes", "x", "message"),
    [
        ({}, np.zeros((1, T, WIDTH + 1)), r"x: expected an array of shape \[B, T, width = 8\], got \(1, 7, 9\)"),
        ({}, [0.0], "x: expected an array of shape .*, got list"),
        ({"config": TTTConfig.ttt_lm("linear", WIDTH, 2)}, np.zeros((1, T, WIDTH)), "config: expected a bidirectional"),
        ({"gate_init": 0.0}, np.zeros((1, T, WIDTH)), "gate_init: expected a number that is not 0"),
        ({"overlap": 4}, np.zeros((1, T, WIDTH)), "overlap must be < segment = 4"),
    ],
)
def test_bad_calls_are_named(changes, x, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BLOCK, **changes).init(jax.random.key(0), x)
