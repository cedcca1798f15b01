"""What every implementation of the operation must do: equations, causality, splits, rows, dtypes, gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from ttt_cases import IMPLEMENTATIONS, OPERATIONS, C, assert_trees_close, cut, make_params, make_tokens

import ttt_jax
from ttt_jax.ttt import inner

TIGHT = 1e-12  # float64 rounding over some hundred additions

implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
kinds = pytest.mark.parametrize("kind", ["linear", "mlp"])
causalities = pytest.mark.parametrize("causal", [True, False])


def jitted(kind, implementation="scan", causal=True, **options):
    return jax.jit(
        partial(OPERATIONS[kind], mini_batch_size=C, causal=causal, implementation=implementation, **options)
    )


def naive(kind, params, q, k, v, lr, causal, token_scale, eps=1e-6):
    """The equations spelled out for one row and head, gradients by jax.grad: independent of the library's code."""

    def layer_norm(x):
        return params.ln_scale * (x - jnp.mean(x)) / jnp.sqrt(jnp.var(x) + eps) + params.ln_bias

    def f(theta, x):
        if kind == "linear":
            return layer_norm(x @ theta[0] + theta[1])
        return layer_norm(jax.nn.gelu(x @ theta[0] + theta[1], approximate=True) @ theta[2] + theta[3])

    @jax.jit
    def gradient(theta, k, v):
        return jax.grad(lambda theta: 0.5 * jnp.sum((f(theta, k) - (v - k)) ** 2))(theta)

    theta, outs = params.fast_weights, []
    for start in range(0, len(q), C):
        stop = min(start + C, len(q))
        gradients = [jax.tree.map(lambda g, s=lr[j]: s * g, gradient(theta, k[j], v[j])) for j in range(start, stop)]
        total = jax.tree.map(lambda *g: sum(g), *gradients)
        for i in range(start, stop):
            seen = jax.tree.map(lambda *g: sum(g), *gradients[: i - start + 1]) if causal else total
            outs.append(q[i] + f(jax.tree.map(lambda w, g, s=token_scale[i - start]: w - s * g, theta, seen), q[i]))
        theta = jax.tree.map(lambda w, g: w - token_scale[-1] * g, theta, total)
    return jnp.stack(outs)


@implementations
@kinds
@causalities
def test_follows_the_equations(kind, implementation, causal):
    params, tokens = make_params(kind), make_tokens(2 * C + 3)
    token_scale = jnp.asarray([0.9, 0.5, 0.4, 0.2]) if causal else jnp.asarray([0.3, 0.2, 0.25, 0.2])
    out, _ = jitted(kind, implementation, causal)(params, *tokens, token_scale=token_scale)
    one_head = jax.tree.map(lambda x: x[1], params)
    expected = naive(kind, one_head, *(x[0, :, 1] for x in tokens), causal, token_scale)
    np.testing.assert_allclose(out[0, :, 1], expected, rtol=0, atol=TIGHT)


@kinds
@causalities
def test_all_implementations_agree_with_their_gradients(kind, causal):
    params, tokens = make_params(kind), make_tokens(3 * C + 1)
    state = jitted(kind)(params, *make_tokens(C + 2, seed=5))[1]
    length, reset = jnp.asarray([3 * C, 2]), jnp.asarray([False, True])
    token_scale = jnp.asarray([0.9, 0.5, 0.4, 0.2])
    cotangent = make_tokens(3 * C + 1, seed=9)[0]

    def objective(params, tokens, token_scale, weights, gradient, implementation):
        given = state._replace(weights=weights, gradient=gradient)
        out, final = OPERATIONS[kind](
            params,
            *tokens,
            mini_batch_size=C,
            causal=causal,
            token_scale=token_scale,
            state=given,
            length=length,
            reset=reset,
            remat_every=2,
            implementation=implementation,
        )
        leaves = jax.tree.leaves((final.weights, final.gradient))
        return jnp.sum(out * cotangent) + sum(jnp.sum(jnp.sin(x)) for x in leaves), (out, final)

    results = [
        jax.jit(partial(jax.value_and_grad(objective, argnums=(0, 1, 2, 3, 4), has_aux=True), implementation=name))(
            params, tokens, token_scale, state.weights, state.gradient
        )
        for name in IMPLEMENTATIONS
    ]
    assert_trees_close(results[1], results[0], 1e-11)  # second derivatives of the LayerNorm amplify rounding
    assert all(np.any(np.asarray(g) != 0) for g in jax.tree.leaves(results[1][1]))


@kinds
def test_hand_derived_gradients_are_those_of_the_loss(kind):
    params = make_params(kind, num_heads=1)
    q, k, v, _ = (x[0, :, 0] for x in make_tokens(C))
    ln = inner.LayerNormParams(params.ln_scale, params.ln_bias, 1e-6)
    weights = tuple(w[0] for w in params.fast_weights)
    model = inner.LINEAR if kind == "linear" else inner.MLP

    def loss(weights):
        return jnp.sum((inner.layer_norm(model.predict(weights, k), ln) - (v - k)) ** 2) / 2

    tokens = inner.Tokens(q, k, v - k, jnp.ones((C, 1)), jnp.ones((C, 1)))
    assert_trees_close(model.dual(weights, None, tokens, ln, True).gradient, jax.grad(loss)(weights), TIGHT)


@implementations
@kinds
def test_causal_outputs_never_depend_on_later_tokens(kind, implementation):
    params, tokens = make_params(kind), make_tokens(2 * C + 2, batch_size=1)
    jacobians = jax.jit(
        jax.jacobian(lambda t: OPERATIONS[kind](params, *t, mini_batch_size=C, implementation=implementation)[0])
    )(tokens)
    for jacobian in jacobians:  # [1, T, H, D, 1, T, ...]
        reached = np.abs(jacobian).reshape(1, 2 * C + 2, 8, 1, 2 * C + 2, -1).sum(axis=(0, 2, 3, 5))
        assert np.all(np.triu(reached, 1) == 0)
    assert np.all(np.tril(np.abs(jacobians[1]).sum(axis=(0, 2, 3, 4, 6, 7)))[np.tril_indices(2 * C + 2)] > 0)


@implementations
@kinds
def test_noncausal_outputs_see_their_whole_mini_batch_and_no_later_one(kind, implementation):
    params, tokens = make_params(kind), make_tokens(2 * C, batch_size=1)
    operation = partial(OPERATIONS[kind], mini_batch_size=C, causal=False, implementation=implementation)
    jacobian = jax.jit(jax.jacobian(lambda k: operation(params, tokens[0], k, *tokens[2:])[0]))(tokens[1])
    reached = np.abs(jacobian).sum(axis=(0, 2, 3, 4, 6, 7)) > 0
    mini_batch = np.arange(2 * C) // C
    np.testing.assert_array_equal(reached, mini_batch[:, None] >= mini_batch[None, :])


@kinds
@pytest.mark.parametrize("num_tokens", range(3 * C + 2))
def test_every_length_equals_the_reference(kind, num_tokens):
    params, tokens = make_params(kind), make_tokens(num_tokens)
    assert_trees_close(jitted(kind)(params, *tokens), jitted(kind, "reference")(params, *tokens), TIGHT)


@implementations
@kinds
def test_any_split_gives_the_same_outputs_and_state(kind, implementation):
    params, num_tokens = make_params(kind), 4 * C + 3
    tokens = make_tokens(num_tokens)
    operation = jitted(kind, implementation)
    whole = operation(params, *tokens)
    rng = np.random.default_rng(0)
    splits = [np.sort(rng.integers(0, num_tokens + 1, size=n)) for n in (1, 3, 5)] + [np.arange(num_tokens)]
    for split in splits:
        state, outs = ttt_jax.init_state(params, 2), []
        for start, stop in zip([0, *split], [*split, num_tokens], strict=True):
            out, state = operation(params, *cut(tokens, start, stop), state=state)
            outs.append(out)
        assert_trees_close((jnp.concatenate(outs, axis=1), state), whole, TIGHT)


@kinds
def test_split_gives_the_same_gradients(kind):
    params, tokens = make_params(kind), make_tokens(2 * C + 3)
    cotangent = make_tokens(2 * C + 3, seed=4)[0]

    def whole(params, tokens):
        return jnp.sum(OPERATIONS[kind](params, *tokens, mini_batch_size=C)[0] * cotangent)

    def split(params, tokens):
        first, state = OPERATIONS[kind](params, *cut(tokens, 0, C + 1), mini_batch_size=C)
        second, _ = OPERATIONS[kind](params, *cut(tokens, C + 1, None), mini_batch_size=C, state=state)
        return jnp.sum(jnp.concatenate([first, second], axis=1) * cotangent)

    gradients = (jax.jit(jax.grad(f, argnums=(0, 1)))(params, tokens) for f in (split, whole))
    assert_trees_close(*gradients, 1e-11)  # second derivatives of the LayerNorm amplify rounding


@implementations
@kinds
def test_noncausal_splits_at_whole_mini_batches_and_commits_what_was_pending(kind, implementation):
    params, tokens = make_params(kind), make_tokens(3 * C + 2)
    operation = jitted(kind, implementation, causal=False)
    whole, whole_state = operation(params, *tokens)
    first, state = operation(params, *cut(tokens, 0, 2 * C))
    second, state = operation(params, *cut(tokens, 2 * C, None), state=state)
    assert_trees_close((jnp.concatenate([first, second], axis=1), state), (whole, whole_state), TIGHT)
    np.testing.assert_array_equal(whole_state.count, 0)

    causal_state = jitted(kind)(params, *cut(tokens, 0, C + 2))[1]
    _, committed = operation(params, *cut(tokens, 0, 0), state=causal_state)
    expected = tuple(w - g / C for w, g in zip(causal_state.weights, causal_state.gradient, strict=True))
    assert_trees_close(committed.weights, expected, TIGHT)
    np.testing.assert_array_equal(committed.count, 0)


@implementations
@kinds
@causalities
def test_length_is_exact_and_what_lies_beyond_never_matters(kind, implementation, causal):
    params, tokens = make_params(kind), make_tokens(2 * C + 3, batch_size=4)
    length = jnp.asarray([2 * C + 3, C + 1, 0, 99])
    beyond = jnp.arange(2 * C + 3)[None] >= length[:, None]
    poisoned = tuple(jnp.where(beyond.reshape(beyond.shape + (1,) * (x.ndim - 2)), jnp.nan, x) for x in tokens)
    operation = jitted(kind, implementation, causal)
    state = jitted(kind)(params, *make_tokens(C + 2, batch_size=4, seed=3))[1]
    out, final = operation(params, *poisoned, state=state, length=length)
    for row, n in enumerate((2 * C + 3, C + 1, 0, 2 * C + 3)):
        alone = jax.tree.map(lambda x, row=row: x[row : row + 1], (tokens, state))
        expected = operation(params, *cut(alone[0], 0, n), state=alone[1])
        assert_trees_close(
            (out[row : row + 1, :n], jax.tree.map(lambda x, row=row: x[row : row + 1], final)), expected, TIGHT
        )
        np.testing.assert_array_equal(out[row, n:], 0)

    def objective(params, tokens):
        out, final = operation(params, *tokens, state=state, length=length)
        return jnp.sum(jnp.sin(out)) + sum(jnp.sum(jnp.sin(x)) for x in final.weights)

    grad_params, grad_tokens = jax.jit(jax.grad(objective, argnums=(0, 1)))(params, poisoned)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grad_params))
    assert all(np.all(np.asarray(g)[np.asarray(beyond)] == 0) for g in grad_tokens)


@implementations
@kinds
def test_reset_restarts_exactly_the_named_rows_even_at_length_zero(kind, implementation):
    params, tokens = make_params(kind), make_tokens(C + 1, batch_size=3)
    operation = jitted(kind, implementation)
    state = operation(params, *make_tokens(C + 2, batch_size=3, seed=3))[1]
    broken = jax.tree.map(lambda x: x.at[0].set(jnp.nan) if x.dtype == jnp.float64 else x, state)
    reset, length = jnp.asarray([True, True, False]), jnp.asarray([C + 1, 0, C + 1])
    out, final = operation(params, *tokens, state=broken, length=length, reset=reset)
    fresh, fresh_final = operation(params, *tokens, length=length)
    kept, kept_final = operation(params, *tokens, state=state, length=length)
    for row, (expected, expected_state) in enumerate([(fresh, fresh_final), (fresh, fresh_final), (kept, kept_final)]):
        picked = jax.tree.map(lambda x, row=row: x[row], (out, final))
        assert_trees_close(picked, jax.tree.map(lambda x, row=row: x[row], (expected, expected_state)), TIGHT)


@implementations
def test_rows_are_independent(implementation):
    params, tokens = make_params("mlp"), make_tokens(C + 2, batch_size=3)
    operation = jitted("mlp", implementation)
    out, state = operation(params, *tokens)
    changed = operation(params, *(x.at[1].multiply(1.5) for x in tokens))
    for row in (0, 2):
        assert_trees_close(*(jax.tree.map(lambda x, row=row: x[row], r) for r in (changed, (out, state))), 0)
    assert not np.allclose(changed[0][1], out[1])


@implementations
@pytest.mark.parametrize("causal", [True, False])
def test_no_rows(implementation, causal):
    params, tokens = make_params("mlp"), make_tokens(C + 2, batch_size=0)
    out, state = jitted("mlp", implementation, causal)(params, *tokens)
    assert out.shape == tokens[0].shape
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, ttt_jax.init_state(params, 0))


@kinds
def test_checkpoints_change_nothing(kind):
    params, tokens = make_params(kind), make_tokens(5 * C + 1)  # six mini-batches

    def gradient(remat_every):
        def objective(params, tokens):
            out, _ = OPERATIONS[kind](params, *tokens, mini_batch_size=C, remat_every=remat_every)
            return jnp.sum(jnp.sin(out))

        return jax.jit(jax.grad(objective, argnums=(0, 1)))(params, tokens)

    plain = gradient(6)
    for remat_every in (3, 4):
        assert_trees_close(gradient(remat_every), plain, 1e-11)


def test_checkpoints_bound_the_memory_of_the_backward_pass():
    params, tokens = make_params("linear", dim=16), make_tokens(64 * C, dim=16)

    def temporary_bytes(remat_every):
        f = jax.grad(lambda p: jnp.sum(ttt_jax.ttt_linear(p, *tokens, mini_batch_size=C, remat_every=remat_every)[0]))
        return jax.jit(f).lower(params).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(8) < temporary_bytes(64) / 2


@implementations
@kinds
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_state_is_float32_and_outputs_keep_the_inputs_dtype(kind, implementation, dtype):
    params, (q, k, v, lr) = make_params(kind), make_tokens(C + 1)
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    out, state = jitted(kind, implementation)(params, q, k, v, lr.astype(jnp.float32))
    assert out.dtype == jnp.dtype(dtype)
    assert {x.dtype for x in jax.tree.leaves((state.weights, state.gradient))} == {jnp.dtype("float32")}
    assert state.count.dtype == jnp.int32
    exact, _ = jitted(kind, implementation)(params, *(x.astype(jnp.float64) for x in (q, k, v, lr)))
    # One rounding of the output; everything before it is float32.
    np.testing.assert_allclose(out.astype(jnp.float64), exact, rtol=float(jnp.finfo(dtype).eps), atol=1e-4)


@kinds
def test_state_drift_over_1000_mini_batches_of_bfloat16_is_bounded(kind):
    """float32 accumulation of bfloat16 tokens stays near float64; a bfloat16 state would be off by tens of percent."""
    params, (q, k, v, lr) = make_params(kind, dim=8), make_tokens(1000 * C, batch_size=1, dim=8)
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    out, state = jitted(kind)(params, q, k, v, lr.astype(jnp.float32))
    wide = (x.astype(jnp.float64) for x in (q, k, v, lr.astype(jnp.float32)))
    exact_out, exact = jitted(kind, "reference")(params, *wide)
    for got, expected in zip(state.weights, exact.weights, strict=True):
        drift = np.linalg.norm(np.float64(got) - expected) / np.linalg.norm(expected)
        assert drift < 1e-4
    np.testing.assert_allclose(out.astype(jnp.float64), exact_out, rtol=2**-8, atol=1e-3)


@kinds
@pytest.mark.parametrize("implementation", ["scan", "reference"])
def test_works_under_vmap_scan_remat_and_shard_map(kind, implementation):
    params, tokens = make_params(kind), make_tokens(2 * C + 1, batch_size=8)
    operation = partial(OPERATIONS[kind], mini_batch_size=C, implementation=implementation)
    out, state = jax.jit(operation)(params, *tokens)

    mapped = jax.jit(jax.vmap(lambda t: operation(params, *(x[None] for x in t))[0][0]))(tokens)
    np.testing.assert_allclose(mapped, out, rtol=0, atol=TIGHT)

    def one_token(state, token):
        out, state = jax.checkpoint(operation)(params, *(x[:, None] for x in token), state=state)
        return state, out[:, 0]

    scanned_state, scanned = jax.jit(partial(jax.lax.scan, one_token))(
        ttt_jax.init_state(params, 8), tuple(jnp.moveaxis(x, 1, 0) for x in tokens)
    )
    assert_trees_close((jnp.moveaxis(scanned, 0, 1), scanned_state), (out, state), TIGHT)

    mesh = jax.make_mesh((4, 2), ("data", "heads"), axis_types=(AxisType.Auto, AxisType.Auto))
    by_head, by_row = P("heads"), P("data", None, "heads")
    row_state = ttt_jax.TTTState(*((tuple(P("data", "heads") for _ in state.weights),) * 2), P("data"))
    sharded = jax.jit(
        jax.shard_map(operation, mesh=mesh, in_specs=(by_head,) + (by_row,) * 4, out_specs=(by_row, row_state))
    )
    assert_trees_close(sharded(params, *tokens), (out, state), TIGHT)


@kinds
def test_losses_are_those_of_the_equations(kind):
    params, tokens = make_params(kind), make_tokens(2 * C + 3)
    _, k, v, _ = tokens
    operation, losses = jitted(kind), jax.jit(partial(ttt_jax.ttt_loss, mini_batch_size=C))
    model = inner.LINEAR if kind == "linear" else inner.MLP
    ln = inner.LayerNormParams(params.ln_scale[None, :, None], params.ln_bias[None, :, None], 1e-6)

    def error(weights, start, stop):
        keys, values = (jnp.moveaxis(x[:, start:stop], 2, 1) for x in (k, v))
        return jnp.mean((inner.layer_norm(model.predict(weights, keys), ln) - (values - keys)) ** 2, axis=(-1, -2))

    got = losses(params, *tokens)
    state = ttt_jax.init_state(params, 2)
    initial = state.weights
    for n, (start, stop) in enumerate([(0, C), (C, 2 * C), (2 * C, 2 * C + 3)]):
        before = state.weights
        _, state = operation(params, *cut(tokens, start, stop), state=state)
        after = tuple(w - g / C for w, g in zip(state.weights, state.gradient, strict=True))
        expected = [error(weights, start, stop) for weights in (initial, before, after)]
        assert_trees_close([x[..., n] for x in got], expected, TIGHT)

    middle = jitted(kind)(params, *cut(tokens, 0, C + 1))[1]
    continued = losses(params, *cut(tokens, C + 1, 2 * C + 3), state=middle, length=jnp.asarray([C + 2, C - 1]))
    assert continued.before.shape == (2, 2, 3)
    expected = error(middle.weights, C + 1, 2 * C)
    np.testing.assert_allclose(continued.before[..., 0], expected, rtol=0, atol=TIGHT)
    np.testing.assert_array_equal(continued.before[1, :, 1:], 0)
    assert np.all(np.asarray(continued.before[0, :, 1]) > 0)


def test_a_longer_memory_lowers_the_inner_loss():
    """The point of it all: after reading the same pairs again and again, the inner model predicts them better."""
    params = make_params("linear", dim=8)
    q, k, v, lr = make_tokens(C, dim=8)
    repeated = tuple(jnp.tile(x, (1, 20) + (1,) * (x.ndim - 2)) for x in (q, k, v, 10 * lr))
    losses = jax.jit(partial(ttt_jax.ttt_loss, mini_batch_size=C))(params, *repeated)
    assert np.all(losses.before[..., -1] < 0.5 * losses.before[..., 0])
    np.testing.assert_allclose(losses.initial[..., -1], losses.initial[..., 0])
    assert np.all(losses.after[..., 0] < losses.before[..., 0])
