"""Bad calls say which argument is wrong, what was expected and what came."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ttt_cases import C, make_params, make_tokens

import ttt_jax


def call(**changes):
    q, k, v, lr = make_tokens(C)
    arguments = {"params": make_params("linear"), "q": q, "k": k, "v": v, "lr": lr, "mini_batch_size": C} | changes
    return ttt_jax.ttt_linear(**arguments)


def make_state(count=None):
    state = ttt_jax.init_state(make_params("linear"), 2)
    return state if count is None else state._replace(count=count)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda: {"mini_batch_size": 0}, r"mini_batch_size: expected an int >= 1, got 0"),
        (lambda: {"mini_batch_size": 2.0}, r"mini_batch_size: .* got 2.0"),
        (lambda: {"mini_batch_size": True}, r"mini_batch_size: expected an int >= 1, got True"),
        (lambda: {"remat_every": True}, r"remat_every: expected an int >= 1, got True"),
        (lambda: {"eps": True}, r"eps: expected a float > 0, got True"),
        (lambda: {"q": [1.0]}, r"q: expected an array, got list. Make it one with jnp.asarray"),
        (lambda: {"v": [1.0]}, r"v: expected an array, got list"),
        (lambda: {"lr": 0.1}, r"lr: expected an array, got float"),
        (lambda: {"token_scale": [1.0] * C}, r"token_scale: expected an array, got list"),
        (lambda: {"params": make_params("linear")._replace(b1=None)}, r"params.b1: expected an array, got NoneType"),
        (lambda: {"remat_every": 0}, r"remat_every: expected an int >= 1"),
        (lambda: {"eps": 0.0}, r"eps: expected a float > 0"),
        (lambda: {"q": jnp.zeros((2, C, 2))}, r"q: expected shape \[B, T, H, D\], got \(2, 4, 2\)"),
        (lambda: {"q": jnp.zeros((2, C, 2, 4), jnp.int32)}, r"q: expected a float dtype, got int32"),
        (lambda: {"k": jnp.zeros((2, C, 2, 8))}, r"k: expected q's shape \(2, 4, 2, 4\), got \(2, 4, 2, 8\)"),
        (lambda: {"v": jnp.zeros((2, C, 2, 4), jnp.float32)}, r"v: expected q's dtype float64, got float32. Cast it"),
        (lambda: {"lr": jnp.zeros((2, C))}, r"lr: expected shape \[B, T, H\] = \(2, 4, 2\), got \(2, 4\)"),
        (lambda: {"lr": jnp.zeros((2, C, 2), jnp.bfloat16)}, r"lr: expected dtype float32 or float64, got bfloat16"),
        (lambda: {"token_scale": jnp.ones(3)}, r"token_scale: expected shape \[C\] = \(4,\), got \(3,\)"),
        (
            lambda: {"length": jnp.ones(3, jnp.int32)},
            r"length: expected integers of shape \[B\] = \(2,\), got int32 of \(3,\)",
        ),
        (lambda: {"length": jnp.ones(2)}, r"length: expected integers of shape .*, got float64"),
        (lambda: {"reset": jnp.ones(2, jnp.int32)}, r"reset: expected bool of shape .*, got int32"),
        (
            lambda: {"params": make_params("mlp", seed=2)},
            r"params: expected TTTLinearParams for ttt_linear, got TTTMLPParams",
        ),
        (
            lambda: {"params": make_params("linear", num_heads=3)},
            r"params.w1: expected shape \(2, 4, 4\) .* got \(3, 4, 4\)",
        ),
        (lambda: {"state": 3}, r"state: expected the TTTState .* got int"),
        (
            lambda: {"state": ttt_jax.init_state(make_params("linear"), 3)},
            r"state.weights: expected shapes .* Does it belong",
        ),
        (lambda: {"state": make_state()._replace(weights=(1, 2))}, r"state.weights: expected an array, got int"),
        (lambda: {"state": make_state([0, 0])}, r"state.count: expected an array, got list"),
        (lambda: {"state": make_state(jnp.zeros(3, jnp.int32))}, r"state.count: expected shape \[B\] = \(2,\)"),
        (lambda: {"state": make_state(jnp.zeros(2))}, r"state.count: expected dtype int32, got float64"),
        (
            lambda: {"state": make_state(jnp.array([C, 0], jnp.int32))},
            r"state.count: expected 0 <= count < C = 4, got \[4, 0\]. Was the state made with another mini_batch",
        ),
        (lambda: {"state": make_state(jnp.array([0, -1], jnp.int32))}, r"state.count: expected 0 <= count"),
        (lambda: {"causal": None}, r"causal: expected True or False, got None"),
        (lambda: {"causal": "no"}, r"causal: expected True or False, got 'no'"),
        (lambda: {"implementation": 3}, r"implementation: expected one of .* got 3"),
        (lambda: {"implementation": "cuda"}, r"implementation: expected one of .* got 'cuda'"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes())


def test_a_state_of_another_mini_batch_size_is_refused():
    _, state = call(**dict(zip(("q", "k", "v", "lr"), make_tokens(10), strict=True)), mini_batch_size=16)
    with pytest.raises(ValueError, match=r"0 <= count < C = 8, got \[10, 10\]"):
        call(mini_batch_size=8, state=state)
    with pytest.raises(ValueError, match=r"0 <= count < C = 8, got \[10, 10\]"):
        jax.jit(lambda: call(mini_batch_size=8, state=state))()


def test_lengths_and_resets_may_be_lists():
    state = make_state(jnp.array([1, 2], jnp.int32))
    listed = call(state=state, length=[1, 3], reset=[True, False])
    arrays = call(state=state, length=jnp.array([1, 3]), reset=jnp.array([True, False]))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, listed, arrays))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint32, np.int64, list])
def test_lengths_of_any_integer_dtype_are_clipped(dtype):
    """Numbers beyond int32 too, which JAX would wrap, and T beyond what the dtype holds."""
    tokens = dict(zip(("q", "k", "v", "lr"), make_tokens(300), strict=True))
    most = 2**40 if dtype in (np.int64, list) else np.iinfo(dtype).max
    expected = call(**tokens, length=jnp.array([min(most, 300), 100]))
    length = [most, 100] if dtype is list else np.array([most, 100], dtype)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, call(**tokens, length=length), expected))
    if most < 2**31:
        found = jax.jit(lambda length: call(**tokens, length=length))(jnp.asarray(length))
        assert jax.tree.all(jax.tree.map(partial(jnp.allclose, atol=1e-12), found, expected))


def test_lengths_may_be_lists_of_traced_numbers():
    found = jax.jit(lambda n: call(length=[n, 2]))(3)
    assert jax.tree.all(jax.tree.map(partial(jnp.allclose, atol=1e-12), found, call(length=jnp.array([3, 2]))))


def test_unsupported_implementations_say_why_and_the_next_is_tried():
    with pytest.raises(NotImplementedError, match="pallas: the default device is no CUDA GPU"):
        call(implementation="pallas")
    out, _ = call(implementation=("pallas", "scan"))
    assert jnp.array_equal(out, call(implementation="scan")[0])
    with pytest.raises(NotImplementedError, match="reports no losses"):
        ttt_jax.ttt_loss(make_params("linear"), *make_tokens(C), mini_batch_size=C, implementation="reference")


def test_a_row_with_nothing_to_read_costs_nothing():
    out, state = call(**dict(zip(("q", "k", "v", "lr"), make_tokens(0), strict=True)))
    assert out.shape == (2, 0, 2, 4)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, state, ttt_jax.init_state(make_params("linear"), 2)))
    for start in (None, state):
        losses = ttt_jax.ttt_loss(make_params("linear"), *make_tokens(0), mini_batch_size=C, state=start)
        assert {x.shape for x in losses} == {(2, 2, 0)}


def test_init_state_is_per_row_and_float32():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_params("mlp"))
    state = ttt_jax.init_state(params, 3)
    assert {x.shape[0] for x in jax.tree.leaves(state)} == {3}
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("float32"), jnp.dtype("int32")}
    for wrong in (-1, 2.0, "2"):
        with pytest.raises(ValueError, match=f"batch_size: expected an int >= 0, got {wrong!r}"):
            ttt_jax.init_state(params, wrong)
