"""The invariants of the whole model, TTT included."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.models.moshi import Moshi, TTTInsertion, delay, init_state, losses, token_nll
from ttt_jax.models.moshi.config import DESIGNS
from ttt_jax.models.moshi.insertion import without_ttt
from ttt_jax.models.moshi.model import Block

CLOSE = 2e-5  # float32; the inner loop of TTT divides by standard deviations
EACH_DESIGN = pytest.mark.parametrize("design", DESIGNS)
EACH_TTT = pytest.mark.parametrize(
    ("kind", "design"),
    [
        ("linear", "after_attention"),
        ("mlp", "after_attention"),
        ("linear", "before_attention"),
        ("linear", "kv_cache"),
        ("mlp", "kv_cache"),
    ],
)


def with_ttt(config, **fields):
    """The config with other TTT layers."""
    return dataclasses.replace(config, ttt=dataclasses.replace(config.ttt, **fields))


def test_no_frames_and_no_rows(config, params):
    apply = functools.partial(Moshi(config).apply, {"params": params})
    for batch, frames in ((2, 0), (0, 3), (0, 0)):
        out = apply(jnp.zeros((batch, config.num_streams, frames), jnp.int32))
        assert out.logits.shape == (batch, config.dep_q, frames, config.card)
        assert out.text_logits.shape == (batch, 1, frames, config.text_card)
        assert out.mask.shape == out.logits.shape[:3]


@EACH_DESIGN
def test_causality_by_jacobian(config, random_params, design):
    """Every frame has its own token in each stream, so a row of an embedding is a frame; zeros are exact."""
    config = with_ttt(config, design=design)
    params = random_params(config)
    frames = 11
    order = np.random.default_rng(0).permutation(frames)
    codes = jnp.asarray(np.tile(order, (1, config.num_streams, 1)), jnp.int32)
    tables = {
        "text_emb": params["text_emb"],
        "emb": params["emb"],
        "depformer_text_emb": params["depformer"]["depformer_text_emb"],
        "depformer_emb": params["depformer"]["depformer_emb"],
    }

    def summed_logits(tables):
        depformer = params["depformer"] | {name: tables[name] for name in ("depformer_text_emb", "depformer_emb")}
        out = Moshi(config).apply(
            {"params": params | {"text_emb": tables["text_emb"], "emb": tables["emb"], "depformer": depformer}}, codes
        )
        weights = jnp.linspace(-1, 1, config.card)[None, None]  # a plain sum of the logits could cancel
        text = jnp.sum(out.text_logits[0] * weights, axis=-1)
        return jnp.concatenate([text, jnp.sum(out.logits[0] * weights, axis=-1)])

    jacobian = jax.jit(jax.jacobian(summed_logits))(tables)
    by_frame = {name: np.abs(j).sum(-1)[..., order] > 0 for name, j in jacobian.items()}  # [stream, t, ..., frame]
    inputs = np.concatenate([by_frame["text_emb"][:, :, None], by_frame["emb"]], axis=2)
    depth_inputs = np.concatenate([by_frame["depformer_text_emb"][:, :, None], by_frame["depformer_emb"]], axis=2)
    delays = config.delays
    for j, t in np.ndindex(1 + config.dep_q, frames):
        predicted = t + delays[j] < frames
        for k, f in np.ndindex(config.num_streams, frames):
            assert inputs[j, t, k, f] == (predicted and f + 1 + delays[k] <= t + delays[j]), (j, t, k, f)
        for k, f in np.ndindex(config.dep_q, frames):
            assert depth_inputs[j, t, k, f] == (predicted and k < j and f + delays[k] == t + delays[j]), (j, t, k, f)


@EACH_TTT
def test_any_split_into_calls_equals_one_call(config, random_params, temporal, random_codes, kind, design):
    from_config = with_ttt(config, kind=kind, design=design)
    params = random_params(from_config)
    codes = random_codes(0, 2, 24)
    z, text_logits, state = temporal(from_config, params, codes)
    for splits in ((0, 1, 1, 4, 9, 9), (9, 4, 1, 0, 1, 9)):
        parts, carried, start = [], init_state(from_config, params, 2), 0
        for frames in splits:
            out = temporal(from_config, params, codes[:, :, start : start + frames], carried)
            parts.append(out[:2])
            carried, start = out[2], start + frames
        np.testing.assert_allclose(np.concatenate([p[0] for p in parts], axis=1), z, atol=CLOSE)
        np.testing.assert_allclose(np.concatenate([p[1] for p in parts], axis=2), text_logits, atol=CLOSE)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=CLOSE), carried, state)


@EACH_DESIGN
def test_frame_by_frame_with_sinks_equals_one_call_long_after_the_window(
    config, random_params, temporal, random_codes, design
):
    config = dataclasses.replace(with_ttt(config, sinks=1, design=design), sinks=2)
    params = random_params(config)
    codes = random_codes(0, 2, 24)
    z, text_logits, state = temporal(config, params, codes)
    carried = init_state(config, params, 2)
    assert jax.tree.map(jnp.shape, carried) == jax.tree.map(jnp.shape, state)
    for t in range(24):
        z_t, text_t, carried = temporal(config, params, codes[:, :, t : t + 1], carried)
        np.testing.assert_allclose(z_t[:, 0], z[:, t], atol=CLOSE)
        np.testing.assert_allclose(text_t[:, :, 0], text_logits[:, :, t], atol=CLOSE)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=CLOSE), carried, state)


@EACH_DESIGN
def test_rows_lengths_and_resets_are_exact(config, random_params, temporal, random_codes, design):
    """Ragged calls with rubbish beyond each row's length equal, row by row, that row alone in one call."""
    config = with_ttt(config, design=design)
    params = random_params(config)
    rng = np.random.default_rng(0)
    state = init_state(config, params, 2)
    history = [np.zeros((config.num_streams, 0), np.int32)] * 2
    for call in range(6):
        codes = np.asarray(random_codes(call, 2, 4))
        length, reset = rng.integers(0, 5, 2), rng.random(2) < 0.3
        z, _, state = temporal(config, params, codes, state, jnp.asarray(length, jnp.int32), jnp.asarray(reset))
        for row in range(2):
            kept = history[row][:, :0] if reset[row] else history[row]
            history[row] = np.concatenate([kept, codes[row, :, : length[row]]], axis=1)
            frames = history[row].shape[1]
            alone = np.pad(history[row], ((0, 0), (0, 24 - frames)))[None]  # one shape, one compilation
            expected, _, _ = temporal(config, params, alone)
            np.testing.assert_allclose(
                z[row, : length[row]], expected[0, frames - length[row] : frames], atol=CLOSE, err_msg=f"{call} {row}"
            )


def test_an_empty_row_keeps_its_state_bit_for_bit(config, params, temporal, random_codes):
    _, _, state = temporal(config, params, random_codes(0, 2, 7))
    _, _, after = temporal(config, params, random_codes(1, 2, 4), state, jnp.array([4, 0], jnp.int32))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b[1]), state, after)


def test_chunked_depth_equals_the_whole_pass(config, params, random_codes, temporal):
    codes = random_codes(0, 2, 9)
    whole = jax.jit(Moshi(config).apply)({"params": params}, codes)
    delayed = delay(codes, config.delays, config.initial_tokens)
    z, text_logits, _ = temporal(config, params, delayed[:, :, :-1])
    depth = jax.jit(functools.partial(Moshi(config).apply, method="depth"))
    logits = depth({"params": params}, z, delayed[:, : 1 + config.dep_q, 1:])
    assert logits.shape == (2, config.dep_q, 9, config.card)
    np.testing.assert_allclose(text_logits, whole.text_logits, atol=CLOSE)
    for k, shift in enumerate(config.delays[1 : 1 + config.dep_q]):
        np.testing.assert_allclose(logits[:, k, shift:], whole.logits[:, k, : 9 - shift], atol=CLOSE)


def test_parameters_hold_no_state(config):
    """Nothing but parameters is created, and none has a size of the batch, the sequence or a cache."""
    trees = []
    for batch, frames, context in ((1, 2, 4), (3, 7, 9)):
        c = dataclasses.replace(config, context=context, ttt=dataclasses.replace(config.ttt, context=context))
        codes = jax.ShapeDtypeStruct((batch, c.num_streams, frames), jnp.int32)
        variables = jax.eval_shape(Moshi(c).init, jax.random.key(0), codes)
        assert set(variables) == {"params"}
        trees.append(jax.tree.map(lambda x: x.shape, variables["params"]))
    assert trees[0] == trees[1]


@EACH_TTT
def test_every_parameter_gets_a_gradient(config, random_codes, kind, design):
    """At step 0 an inserted TTT layer trains through wo alone; after one update everything trains."""
    c = with_ttt(config, kind=kind, design=design)
    codes = random_codes(0, 4, 24)
    # Every token must occur for its embedding to be trained; the initial ones do by themselves.
    codes = jnp.asarray(np.arange(codes.size).reshape(codes.shape) % config.card, jnp.int32)
    params = jax.jit(Moshi(c).init)(jax.random.key(0), codes)["params"]
    grad = jax.jit(jax.grad(lambda p: losses(Moshi(c).apply({"params": p}, codes), codes).total))
    first = grad(params)
    without = {jax.tree_util.keystr(path) for path, g in jax.tree_util.tree_leaves_with_path(first) if not np.any(g)}
    ttt = {
        f"['layers_1']['ttt']{jax.tree_util.keystr(path)}"
        for path, _ in jax.tree_util.tree_leaves_with_path(params["layers_1"]["ttt"])
    }
    outside = {"['layers_1']['gate']"}
    if design == "after_attention":
        outside |= {"['layers_1']['norm_ttt']['alpha']"}
    assert without == ttt - {"['layers_1']['ttt']['wo']['kernel']"} | outside
    second = grad(jax.tree.map(lambda p, g: p - 0.1 * g, params, first))
    for path, g in jax.tree_util.tree_leaves_with_path(second):
        assert np.any(g), jax.tree_util.keystr(path)
        assert np.all(np.isfinite(g)), jax.tree_util.keystr(path)


@EACH_TTT
def test_insertion_leaves_the_logits_bit_equal(config, random_params, random_codes, temporal, kind, design):
    plain = dataclasses.replace(config, ttt=None)
    insertion = TTTInsertion(layers=(0, 1), design=design, kind=kind, mini_batch_size=3)
    extended = dataclasses.replace(config, ttt=insertion)
    trained = random_params(plain)
    codes = random_codes(0, 2, 13)
    inserted = jax.jit(Moshi(extended).init)(jax.random.key(0), codes)["params"]
    inserted = _overlay(inserted, trained)
    assert np.all(np.tanh(inserted["layers_0"]["gate"]) != 0)
    before = jax.jit(Moshi(plain).apply)({"params": trained}, codes)
    after = jax.jit(Moshi(extended).apply)({"params": inserted}, codes)
    jax.tree.map(np.testing.assert_array_equal, before, after)
    states = [init_state(plain, trained, 2), init_state(extended, inserted, 2)]
    for t in range(7):
        frame = codes[:, :, t : t + 1]
        z, text_logits, states[0] = temporal(plain, trained, frame, states[0])
        z_ttt, text_logits_ttt, states[1] = temporal(extended, inserted, frame, states[1])
        np.testing.assert_array_equal(z, z_ttt)
        np.testing.assert_array_equal(text_logits, text_logits_ttt)


@EACH_DESIGN
def test_closed_gates_leave_the_model_without_ttt(config, random_params, random_codes, design):
    config = with_ttt(config, design=design, attention="window", context=None)
    params = random_params(config)
    codes = random_codes(0, 2, 13)
    open_gates = jax.jit(Moshi(config).apply)({"params": params}, codes)
    closed = jax.jit(Moshi(config).apply)({"params": without_ttt(params)}, codes)
    plain = jax.jit(Moshi(dataclasses.replace(config, ttt=None)).apply)({"params": params}, codes)
    np.testing.assert_allclose(closed.text_logits, plain.text_logits, atol=1e-6)
    np.testing.assert_allclose(closed.logits, plain.logits, atol=1e-6)
    assert np.abs(open_gates.text_logits - plain.text_logits).max() > 0.01


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("sinks", [(0, None), (2, 1)])  # of the model, of the layers with TTT
def test_each_layer_attends_to_its_configured_context(config, params, layer, sinks):
    """By Jacobian of a block whose TTT is shut off by its gate, whole and frame by frame."""
    frames = 11
    config = dataclasses.replace(config, sinks=sinks[0], ttt=dataclasses.replace(config.ttt, sinks=sinks[1]))
    x = jax.random.normal(jax.random.key(0), (1, frames, config.dim))
    block = Block(config, layer)
    without_effect = params[f"layers_{layer}"]
    if layer == 1:
        without_effect = without_effect | {"gate": np.zeros(config.dim, np.float32)}
    state = init_state(config, params, 1)[layer]

    def whole(x):
        return block.apply({"params": without_effect}, x, None, None, None)[0]

    def by_frame(x):
        def step(state, frame):
            out, state = block.apply({"params": without_effect}, frame[:, None], state, None, None)
            return state, out[:, 0]

        return jnp.moveaxis(jax.lax.scan(step, state, jnp.moveaxis(x, 1, 0))[1], 0, 1)

    t, s = np.arange(frames)[:, None], np.arange(frames)[None]
    expected = (s <= t) & (((t - s < 4) if layer == 0 else (t // 3 == s // 3)) | (s < (sinks[layer] or 0)))
    for form in (whole, by_frame):
        jacobian = jax.jit(jax.jacobian(lambda x, form=form: form(x)[0, :, ::5]))(x)
        np.testing.assert_array_equal(np.abs(jacobian).sum((1, 2, 4)) > 0, expected)


def test_minus_one_embeds_nothing_and_is_masked(config, params, random_codes, temporal):
    codes = np.array(random_codes(0, 1, 8))
    codes[:, :, 3] = -1
    out = jax.jit(Moshi(config).apply)({"params": params}, codes)
    assert not np.any(out.mask[:, :, 3])
    assert not np.any(out.text_mask[:, :, 3])
    assert np.all(out.text_mask[:, :, 4])
    spoiled = params | {name: np.full_like(params[name], np.nan) for name in ("emb", "text_emb")}
    z, _, _ = temporal(config, spoiled, np.full_like(codes, -1))
    np.testing.assert_array_equal(z, temporal(config, params, np.full_like(codes, -1))[0])


def test_remat_changes_nothing(config, params, random_codes):
    codes = random_codes(0, 2, 9)

    def loss(config):
        return jax.jit(jax.value_and_grad(lambda p: losses(Moshi(config).apply({"params": p}, codes), codes).total))

    plain, remat = loss(config)(params), loss(dataclasses.replace(config, remat=True))(params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-4), plain, remat)


@EACH_DESIGN
def test_bfloat16_keeps_float32_parameters_and_fast_weights(config, random_params, random_codes, temporal, design):
    config = with_ttt(config, design=design)
    params = random_params(config)
    narrow = dataclasses.replace(config, dtype="bfloat16")
    codes = random_codes(0, 2, 9)
    z, text_logits, state = temporal(narrow, params, codes, init_state(narrow, params, 2))
    assert z.dtype == state[0].attention.keys.dtype == jnp.bfloat16
    assert text_logits.dtype == jnp.float32
    fast = state[1].ttt.ttt
    assert {x.dtype for x in jax.tree.leaves(fast)} == {jnp.dtype("float32"), jnp.dtype("int32")}
    for leaf in fast.weights:  # nor rounded to bfloat16 and back
        assert np.any(leaf != leaf.astype(jnp.bfloat16).astype(jnp.float32))
    wide = jax.jit(Moshi(config).apply)({"params": params}, codes)
    got = jax.jit(Moshi(narrow).apply)({"params": params}, codes)
    assert got.logits.dtype == jnp.float32
    assert np.abs(got.logits - wide.logits).mean() < 0.05 * np.abs(wide.logits).mean()
    made = jax.eval_shape(Moshi(narrow).init, jax.random.key(0), codes)
    assert {x.dtype for x in jax.tree.leaves(made)} == {jnp.dtype("float32")}


@EACH_DESIGN
def test_diagnostics_are_sown_on_demand(config, random_params, random_codes, design):
    config = with_ttt(config, design=design)
    params = random_params(config)
    apply = jax.jit(functools.partial(Moshi(config).apply, mutable=["diagnostics"]))
    _, sown = apply({"params": params}, random_codes(0, 1, 9))
    sown = sown["diagnostics"]
    assert set(sown) == {"layers_1"}
    expected = np.abs(np.tanh(params["layers_1"]["gate"])).mean()
    np.testing.assert_allclose(sown["layers_1"]["gate_size"][0], expected, rtol=1e-6)
    assert {"step_size_saturation", "fast_weight_drift"} <= set(sown["layers_1"]["ttt"])


def test_codes_are_checked_at_the_door(config, params, random_codes):
    codes = np.array(random_codes(0, 1, 4))
    codes[0, 2, 3] = config.card + 1
    with pytest.raises(ValueError, match=r"codes\[0, 2, 3\] = 21 is outside"):
        Moshi(config).apply({"params": params}, codes)
    with pytest.raises(ValueError, match="codes must have shape"):
        jax.jit(Moshi(config).apply)({"params": params}, codes[:, :3])


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jitted", "eager"])
def test_chunks_are_checked_at_the_door(config, params, random_codes, wrap):
    codes = random_codes(0, 2, 4)
    z = jnp.zeros((2, 4, config.dim))
    temporal, depth = (
        wrap(functools.partial(Moshi(config).apply, {"params": params}, method=method))
        for method in ("temporal", "depth")
    )
    with pytest.raises(ValueError, match=r"delayed must have shape \[B, 5, T\] .*n_q = 4.* got \(2, 3, 4\)"):
        temporal(codes[:, :3])
    with pytest.raises(ValueError, match=r"delayed must have shape .* got \(2, 5\)"):
        temporal(codes[:, :, 0])
    with pytest.raises(ValueError, match=r"delayed must be integers .* got float32"):
        temporal(codes.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"state must hold a LayerState per layer \(num_layers = 2\), got 1 entries"):
        temporal(codes, init_state(config, params, 2)[:1])
    for wrong in (z[..., 1:], z[0], z.astype(jnp.int32)):
        with pytest.raises(ValueError, match=r"z must be floating of shape \[B, T, dim = 16\]"):
            depth(wrong, codes[:, :3])
    for wrong in (codes, codes[:, :2], codes[:1, :3], codes[:, :3, 1:]):
        with pytest.raises(ValueError, match=r"tokens must have shape \[2, 3, 4\] .*dep_q = 2"):
            depth(z, wrong)
    with pytest.raises(ValueError, match=r"tokens must be integers .* got float32"):
        depth(z, codes[:, :3].astype(jnp.float32))


def test_likelihoods_are_aligned(trained, process):
    """Shifting the targets by a frame either way must cost a trained model dearly."""
    config, params = trained
    codes = process(99)
    out = jax.jit(Moshi(config).apply)({"params": params}, codes)
    targets = codes[:, 1 : 1 + config.dep_q]

    def nll(targets):
        inside = slice(2, -3)
        return float(jnp.mean(token_nll(out.logits, targets)[:, :, inside]))

    aligned, late, early = nll(targets), nll(jnp.roll(targets, 1, 2)), nll(jnp.roll(targets, -1, 2))
    assert aligned < 0.05  # the text token gives both codebooks away, but only those of its own frame
    assert min(late, early) > aligned + 1.0


def _overlay(tree, values):
    """`tree` with every leaf that `values` has."""
    if not isinstance(values, dict):
        return values
    return {k: _overlay(v, values[k]) if k in values else v for k, v in tree.items()}
