"""TTTLayer: causal and splittable through convolutions and RoPE, exact rows, the Video-DiT preset by its equations."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.layers.ttt import TTTConfig, TTTLayer, init_layer_state
from ttt_jax.ttt import TTTLinearParams, ttt_linear, ttt_mlp

WIDTH, C = 8, 4
PRESETS = {
    "mamba": TTTConfig.ttt_lm("linear", WIDTH, 2, mini_batch_size=C),
    "mamba_mlp": TTTConfig.ttt_lm("mlp", WIDTH, 2, mini_batch_size=C),
    "base": TTTConfig.ttt_lm("linear", WIDTH, 2, mini_batch_size=C, backbone="base"),
    "video_dit_causal": TTTConfig.video_dit("linear", WIDTH, 2, mini_batch_size=C, causal=True),
    "video_dit_mlp": TTTConfig.video_dit("mlp", WIDTH, 2, mini_batch_size=C),
}
CAUSAL = [name for name, config in PRESETS.items() if config.causal]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def make(name, num_tokens, batch_size=3, seed=0):
    """A layer with parameters far from their initial values, its apply function, and an input."""
    config = PRESETS[name]
    layer = TTTLayer(config, dtype=jnp.float64)
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((batch_size, num_tokens, WIDTH)))
    shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), x))["params"]
    params = jax.tree.map(lambda s: jnp.asarray(0.4 * rng.standard_normal(s.shape)), shapes)
    params["inner"]["ln_scale"] += 1
    if "token_scale_offset" in params:
        params["token_scale_offset"] *= 0.1  # more would switch whole positions off
    return params, jax.jit(partial(layer.apply, {"params": params})), x


def assert_close(a, b, tolerance=1e-11):
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("name", CAUSAL)
def test_no_output_depends_on_a_later_token(name):
    _, apply, x = make(name, 2 * C + 2, batch_size=1)
    jacobian = jax.jit(jax.jacobian(lambda x: apply(x)[0]))(x)
    reached = np.abs(jacobian).sum(axis=(0, 2, 3, 5))
    assert np.all(np.triu(reached, 1) == 0)
    assert np.all(reached[np.tril_indices(2 * C + 2)] > 0)


@pytest.mark.parametrize("name", CAUSAL)
def test_any_split_gives_the_same_outputs_and_state(name):
    params, apply, x = make(name, 3 * C + 1)
    whole = apply(x)
    fresh = init_layer_state(PRESETS[name], params, 3, jnp.float64)
    for split in ([5, 5, 11], list(range(1, 3 * C + 1))):
        state, outs = fresh, []
        for start, stop in zip([0, *split], [*split, 3 * C + 1], strict=True):
            out, state = apply(x[:, start:stop], state)
            outs.append(out)
        assert_close((jnp.concatenate(outs, axis=1), state), whole)


@pytest.mark.parametrize("name", PRESETS)
def test_length_and_reset_are_exact(name):
    _, apply, x = make(name, 2 * C)
    before = apply(make(name, C, seed=1)[2])[1]
    length, reset = jnp.asarray([C + 1, 2, 0]), jnp.asarray([False, True, True])
    beyond = jnp.arange(2 * C)[None] >= length[:, None]
    y, state = apply(jnp.where(beyond[..., None], jnp.nan, x), before, length=length, reset=reset)
    _, fresh = apply(x[:, :0])
    for row, n in enumerate(length):
        started = fresh if reset[row] else before
        alone = jax.tree.map(lambda s, row=row: s[row : row + 1], started)
        expected_y, expected_state = apply(x[row : row + 1, :n], alone)
        assert_close(y[row : row + 1, :n], expected_y)
        assert_close(jax.tree.map(lambda s, row=row: s[row : row + 1], state), expected_state)
        np.testing.assert_array_equal(y[row, n:], 0)


@pytest.mark.parametrize("name", PRESETS)
def test_gradients_are_finite_beyond_length_and_reach_every_parameter(name):
    layer = TTTLayer(PRESETS[name], dtype=jnp.float64)
    params, _, x = make(name, 2 * C)
    x = x.at[1, 3:].set(jnp.nan)

    def objective(params, x):
        return jnp.sum(jnp.sin(layer.apply({"params": params}, x, length=jnp.asarray([2 * C, 3, C]))[0]))

    grad_params, grad_x = jax.jit(jax.grad(objective, argnums=(0, 1)))(params, x)
    for path, gradient in jax.tree.leaves_with_path(grad_params):
        assert np.all(np.isfinite(gradient)), jax.tree_util.keystr(path)
        assert np.any(np.asarray(gradient) != 0), jax.tree_util.keystr(path)
    np.testing.assert_array_equal(grad_x[1, 3:], 0)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_video_dit_preset_follows_its_equations(kind):
    """Dalal et al. 2025, spelled out: biases, L2-normalised and rotated q and k, the LayerNorm-shaped target, 1/C."""
    config = TTTConfig.video_dit(kind, WIDTH, 2, mini_batch_size=C)
    layer = TTTLayer(config, dtype=jnp.float64)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 2 * C, WIDTH))
    positions = np.tile([5, 0, 3, 3, 9, 1, 2, 7], (2, 1))
    shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), x))["params"]
    p = jax.tree.map(lambda s: 0.4 * rng.standard_normal(s.shape), shapes)

    def heads(name):
        return (x @ p[name]["kernel"] + p[name]["bias"]).reshape(2, 2 * C, 2, WIDTH // 2)

    def placed(vectors):
        vectors = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
        angles = positions[:, :, None, None] * 1e4 ** (-2 * np.arange(2) / 4)
        turned = (vectors[..., 0::2] + 1j * vectors[..., 1::2]) * np.exp(1j * angles)
        return np.stack([turned.real, turned.imag], axis=-1).reshape(vectors.shape)

    q, k, difference = placed(heads("wq")), placed(heads("wk")), heads("wv")
    difference = difference - k
    normalized = (difference - difference.mean(-1, keepdims=True)) / (difference.std(-1, ddof=1, keepdims=True) + 1e-8)
    inner = p["inner"]
    v = k + inner["ln_scale"] * normalized + inner["ln_bias"]
    base_lr = {"linear": 1.0, "mlp": 0.1}[kind]
    lr = base_lr / (1 + np.exp(-(x @ p["step_size"]["kernel"] + p["step_size"]["bias"]))) / (WIDTH // 2)
    inner_params = TTTLayer(config, dtype=jnp.float64).apply({"params": p}, method=lambda layer: layer.inner())
    operation = {"linear": ttt_linear, "mlp": ttt_mlp}[kind]
    with jax.numpy_rank_promotion("allow"):
        out, _ = operation(
            inner_params,
            *map(jnp.asarray, (q, k, v, lr)),
            mini_batch_size=C,
            causal=False,
            eps=1e-8,
            implementation="reference",
        )
    out = np.asarray(out).reshape(2, 2 * C, WIDTH)
    out = (out - out.mean(-1, keepdims=True)) / np.sqrt(out.var(-1, keepdims=True) + 1e-6)
    out = out * p["post_norm"]["scale"] + p["post_norm"]["bias"]
    expected = out @ p["wo"]["kernel"] + p["wo"]["bias"]
    y, _ = layer.apply({"params": p}, x, positions=positions)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-11)


def test_bfloat16_activations_keep_a_float32_state():
    config = PRESETS["mamba"]
    layer = TTTLayer(config, dtype=jnp.bfloat16)
    x = jnp.ones((2, C + 1, WIDTH), jnp.bfloat16)
    variables = layer.init(jax.random.key(0), x)
    assert {p.dtype for p in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert set(variables) == {"params"}
    y, state = layer.apply(variables, x)
    assert y.dtype == jnp.bfloat16
    assert {s.dtype for s in jax.tree.leaves(state)} == {jnp.dtype("float32"), jnp.dtype("int32")}


def test_zero_init_outputs_zero_and_lets_wo_learn():
    layer = TTTLayer(PRESETS["mamba"], zero_init=True)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, C, WIDTH)), jnp.float32)
    params = layer.init(jax.random.key(0), x)["params"]
    grads = jax.grad(lambda p: jnp.sum(jnp.sin(layer.apply({"params": p}, x)[0] + 1)))(params)
    np.testing.assert_array_equal(layer.apply({"params": params}, x)[0], 0)
    assert {
        name for name, g in grads.items() if np.any(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(g)]))
    } == {"wo"}


@pytest.mark.parametrize("width", [64, 256])
def test_a_tokens_query_finds_its_key_from_the_start_where_that_is_asked_for(width):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 256, width)))

    def projections(associative_init):
        """q, k, v [256, width] of a fresh layer."""
        layer = TTTLayer(TTTConfig.ttt_lm("linear", width, 2), dtype=jnp.float64, associative_init=associative_init)
        variables = layer.init(jax.random.key(0), x)
        q, k, v, _ = layer.apply(variables, x, None, None, method="_projections")
        return [np.asarray(part).reshape(256, width) for part in (q, k, v)]

    def likeness(q, k):
        """[query, key], cosines."""
        q, k = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (q, k))
        return q @ k.T

    q, k, v = projections(associative_init=True)
    np.testing.assert_allclose([q.std(), k.std(), v.std()], 1, atol=0.15)
    alike = likeness(q, k)
    assert (alike.argmax(axis=1) == np.arange(256)).all()
    assert np.diag(alike).mean() > 0.8
    q, k, v = projections(associative_init=False)
    np.testing.assert_allclose(v.std(), 0.02 * width**0.5, rtol=0.05)
    assert abs(np.diag(likeness(q, k)).mean()) < 0.2


def test_a_token_scale_of_zero_is_no_trap():
    """What the last one is worth is learned from where it is 0: upwards, if that lowers the loss, and never down."""
    params, _, x = make("mamba", 3 * C)
    layer = TTTLayer(dataclasses.replace(PRESETS["mamba"], liftable_token_scale=True), dtype=jnp.float64)

    @jax.jit
    def slope(offset, sign):
        """Of a loss by the last token scale's offset."""

        def loss(offset):
            given = params | {"token_scale_offset": params["token_scale_offset"].at[-1].set(offset)}
            return sign * jnp.sum(jnp.sin(layer.apply({"params": given}, x)[0]))

        return jax.value_and_grad(loss)(offset)

    at_zero = -1 / C
    (_, above), (value, clamped), (_, other) = (
        slope(at_zero + 1e-9, 1.0),
        slope(at_zero - 0.1, 1.0),
        slope(at_zero, -1.0),
    )
    lifting, sinking = sorted([(above, clamped), (-above, other)])  # descent on one of the two losses lifts it
    np.testing.assert_allclose(lifting[1], lifting[0], rtol=1e-5)
    assert sinking[1] == 0
    assert slope(at_zero, 1.0)[0] == value  # the value is that of max(0, x)


def test_diagnostics_are_sown_only_on_request():
    params, _, x = make("mamba", 3 * C)
    layer = TTTLayer(PRESETS["mamba"], dtype=jnp.float64)
    _, sown = layer.apply({"params": params}, x, mutable=["diagnostics"])
    values = {name: float(value[0]) for name, value in sown["diagnostics"].items()}
    assert set(values) == {
        "step_size_saturation", "fast_weight_drift", "inner_loss_initial", "inner_loss_before", "inner_loss_after",
        "last_token_scale",
    }  # fmt: skip
    np.testing.assert_allclose(values["last_token_scale"], max(0, 1 / C + float(params["token_scale_offset"][-1])))
    assert values["fast_weight_drift"] > 0
    assert values["inner_loss_after"] < values["inner_loss_before"]
    params["step_size"]["bias"] += 100
    _, sown = layer.apply({"params": params}, x, mutable=["diagnostics"])
    assert float(sown["diagnostics"]["step_size_saturation"][0]) == 1


@pytest.mark.parametrize("start", [0, 1])
def test_diagnostics_are_means_over_real_tokens(start):
    """Whatever the padding, and wherever in a mini-batch a call begins."""
    params, _, x = make("mamba", 3 * C)
    params["step_size"]["kernel"] *= 3
    layer = TTTLayer(PRESETS["mamba"], dtype=jnp.float64)
    state = layer.apply({"params": params}, x[:, :start])[1] if start else None

    def diagnose(rows, num_tokens, length=None):
        of_rows = jax.tree.map(lambda leaf: leaf[rows], state)
        _, sown = layer.apply(
            {"params": params}, x[rows, start:num_tokens], of_rows, length=length, mutable=["diagnostics"]
        )
        means = sown["diagnostics"].keys() - {"fast_weight_drift", "last_token_scale"}
        return {name: float(sown["diagnostics"][name][0]) for name in means}

    lengths = (1, C, 0)
    padded = diagnose(slice(None), 3 * C, jnp.asarray(lengths))
    alone = [diagnose(slice(row, row + 1), start + length) for row, length in enumerate(lengths) if length]
    assert 0 < padded["step_size_saturation"] < 1
    for name, value in padded.items():
        expected = np.average([found[name] for found in alone], weights=lengths[:2])
        np.testing.assert_allclose(value, expected, rtol=1e-12, err_msg=name)
    nothing = diagnose(slice(None), 3 * C, jnp.zeros(3, jnp.int32))
    assert set(nothing.values()) == {0.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "num_heads: .* width 8 in 3 heads"),
        ({"num_heads": 8}, "even size"),
        ({"mini_batch_size": 0}, "mini_batch_size: expected an int >= 1, got 0"),
        ({"kind": "conv"}, "kind: expected 'linear' or 'mlp', got 'conv'"),
        ({"base_lr": 0.0}, "base_lr: expected a number > 0"),
        ({"base_lr": "x"}, "base_lr: expected a number > 0, got 'x'"),
    ],
)
def test_bad_configs_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PRESETS["mamba"], **changes)


def test_positions_of_a_video_are_those_of_its_three_axes():
    config = TTTConfig.video_dit("linear", 32, 2, mini_batch_size=C)
    layer = TTTLayer(config, dtype=jnp.float64)
    rng = np.random.default_rng(0)
    x, positions = rng.standard_normal((2, 3, 32)), rng.integers(0, 9, (1, 3, 3))
    params = jax.jit(layer.init)(jax.random.key(0), x)

    @jax.jit
    def apply(positions):
        return layer.apply(params, x, positions=positions)[0]

    y, nowhere = apply(positions), apply(np.zeros_like(positions))
    np.testing.assert_array_equal(apply(np.tile(positions, (2, 1, 1))), y)
    for axis in range(3):
        moved = positions.copy()
        moved[0, 1, axis] += 3
        assert np.abs(apply(moved) - y).max() > 1e-6
    np.testing.assert_array_equal(apply(np.zeros((1, 3), int)), nowhere)  # nothing turns, along one axis or three


def make_memory(num_tokens, batch_size=2):
    """A layer without projections in front with random parameters, and q, k, v [B, T, H, D]."""
    layer = TTTLayer(PRESETS["base"], dtype=jnp.float64)
    rng = np.random.default_rng(0)
    qkv = jnp.asarray(rng.standard_normal((3, batch_size, num_tokens, 2, WIDTH // 2)))
    leaves = jnp.ones((batch_size, num_tokens), bool)
    shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), *qkv, leaves, method="remember"))["params"]
    params = jax.tree.map(lambda s: jnp.asarray(0.4 * rng.standard_normal(s.shape)), shapes)
    params["inner"]["ln_scale"] += 1
    params["token_scale_offset"] *= 0.1
    return params, jax.jit(partial(layer.apply, {"params": params}, method="remember")), qkv


def test_a_memory_of_attention_follows_its_equations():
    params, remember, (q, k, v) = make_memory(2 * C + 1)
    assert set(params) == {"wo", "step_size", "post_norm", "token_scale_offset", "inner"}
    leaves = jnp.arange(2 * C + 1)[None] >= jnp.asarray([[3], [0]])
    y, state = remember(q, k, v, leaves)
    weights = jax.tree.map(np.asarray, params)
    steps = np.asarray(k).reshape(2, 2 * C + 1, WIDTH) @ weights["step_size"]["kernel"] + weights["step_size"]["bias"]
    lr = jnp.asarray(1 / (1 + np.exp(-steps)) / (WIDTH // 2) * np.asarray(leaves)[..., None])
    q, k = (x / jnp.sqrt(jnp.mean(jnp.square(x), -1, keepdims=True)) for x in (q, k))  # of length sqrt(D)
    scale = jnp.asarray(np.maximum(1 / np.arange(1, C + 1) + weights["token_scale_offset"], 0))
    inner = TTTLinearParams(**params["inner"])
    out, expected = ttt_linear(inner, q, k, v, lr, mini_batch_size=C, token_scale=scale)
    out = np.asarray(out).reshape(2, 2 * C + 1, WIDTH)
    out = (out - out.mean(-1, keepdims=True)) / np.sqrt(out.var(-1, keepdims=True) + 1e-6)
    out = out * weights["post_norm"]["scale"] + weights["post_norm"]["bias"]
    assert_close((y, state.ttt), (out @ weights["wo"]["kernel"], expected), 1e-9)


def test_a_memory_of_attention_is_exact_by_row():
    """NaN where nothing is real, what does not leave, and another row change nothing."""
    _, remember, (q, k, v) = make_memory(2 * C + 1)
    leaves = jnp.arange(2 * C + 1)[None] >= jnp.asarray([[2], [4]])
    kept = jnp.arange(2 * C + 1)[None] < jnp.asarray([[C + 2], [0]])
    rubbish = [jnp.where(kept[..., None, None], x, jnp.nan) for x in (q, k, v)]
    y, state = remember(*rubbish, leaves, length=jnp.asarray([C + 2, 0]))
    alone, expected = remember(*(x[:1, : C + 2] for x in (q, k, v)), leaves[:1, : C + 2])
    assert_close(y[:1, : C + 2], alone)
    assert not np.any(y[0, C + 2 :])
    assert not np.any(y[1])
    assert_close(jax.tree.map(lambda x: x[:1], state), expected)
    other, _ = remember(q, k.at[:, :2].add(1), v.at[:, :2].add(1), leaves)
    assert_close(other, remember(q, k, v, leaves)[0])
    grads = jax.grad(lambda x: jnp.sum(remember(*x, leaves, length=jnp.asarray([C + 2, 0]))[0]))(rubbish)
    assert all(np.all(np.isfinite(g)) for g in grads)


def test_bad_calls_of_a_memory_are_named():
    _, remember, (q, k, v) = make_memory(C)
    leaves = jnp.ones((2, C), bool)
    with pytest.raises(ValueError, match=r"q: expected shape \[B, T, H, D\] with H, D = 2, 4, got \(2, 4, 4, 2\)"):
        remember(q.swapaxes(2, 3), k, v, leaves)
    with pytest.raises(ValueError, match=r"v: expected shape \(2, 4, 2, 4\) like q's, got \(2, 3, 2, 4\)"):
        remember(q, k, v[:, 1:], leaves)
    with pytest.raises(ValueError, match=r"leaves: expected shape \(2, 4\) like q's, got \(4,\)"):
        remember(q, k, v, leaves[0])
    for name in ("mamba", "video_dit_causal"):
        with pytest.raises(ValueError, match="config: expected ttt_lm's with backbone='base'"):
            TTTLayer(PRESETS[name]).init(jax.random.key(0), q, k, v, leaves, method="remember")


def test_lengths_resets_and_positions_may_be_lists():
    for name, positions in (("mamba", None), ("video_dit_causal", [[2, 3]] * 3)):
        _, apply, x = make(name, 2)
        _, state = apply(x)
        options = {"length": [2, 1, 2], "reset": [True, False, False], "positions": positions}
        arrays = {key: None if value is None else jnp.asarray(value) for key, value in options.items()}
        # Not jitted: jit would make arrays of the numbers in the lists.
        params, layer = make(name, 2)[0], TTTLayer(PRESETS[name], dtype=jnp.float64)
        listed = layer.apply({"params": params}, x, state, **options)
        assert_close(listed, apply(x, state, **arrays))


def test_bad_calls_are_named():
    params, _, x = make("mamba", C)
    layer = TTTLayer(PRESETS["mamba"])
    with pytest.raises(ValueError, match=r"x: expected shape \[B, T, width = 8\], got \(3, 4, 7\)"):
        layer.apply({"params": params}, x[..., :7])
    with pytest.raises(ValueError, match="positions: expected None"):
        layer.apply({"params": params}, x, positions=jnp.zeros((3, C), jnp.int32))
    bidirectional = TTTLayer(TTTConfig.video_dit("linear", WIDTH, 2))
    for shape in ((2, C), (3, C - 1), (3, C, 2), ()):
        with pytest.raises(ValueError, match=r"positions: expected shape \[B or 1, T\] or \[B or 1, T, 3\]"):
            bidirectional.init(jax.random.key(0), x, positions=jnp.zeros(shape, jnp.int32))
    with pytest.raises(ValueError, match="state: expected the TTTLayerState"):
        layer.apply({"params": params}, x, state=1)
    _, state = layer.apply({"params": params}, x)
    with pytest.raises(ValueError, match=r"state.conv_inputs: expected shape \(2, 3, 8\), got \(3, 3, 8\)"):
        layer.apply({"params": params}, x[:2], state)
    _, other = bidirectional.init_with_output(jax.random.key(0), x)[0]
    with pytest.raises(ValueError, match=r"state.conv_inputs: expected shape \(3, 3, 8\), got None"):
        layer.apply({"params": params}, x, other)
    with pytest.raises(ValueError, match="x: expected an array, got list"):
        layer.apply({"params": params}, [0.0])
    with pytest.raises(ValueError, match=r"length: expected integers of shape \[B\] = \(3,\), got int.* \(2,\)"):
        layer.apply({"params": params}, x, length=[1, 2])
    with pytest.raises(ValueError, match=r"reset: expected bool of shape \[B\] = \(3,\), got int"):
        layer.apply({"params": params}, x, reset=[0, 1, 0])
    with pytest.raises(ValueError, match="backbone: expected"):
        TTTConfig.ttt_lm("linear", WIDTH, 2, backbone="xlstm")
