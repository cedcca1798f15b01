"""The model that fills masked spans: what it sees, what it does not, and that all of it is trained."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.models.infill import Infill, InfillConfig, first_masked, masked_nll

CONFIG = InfillConfig(
    num_codebooks=2, card=7, text_card=5, dim=16, num_layers=2, num_heads=2, segment=4, mini_batch_size=3
)
WITHOUT = dataclasses.replace(CONFIG, ssm_layer=None)
T = 12


def example(batch=2):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, [[5], [7], [7]], (batch, 3, T)).astype(np.int32)
    masked = np.zeros((batch, T), bool)
    masked[:, 2:8] = True  # the second segment as a whole
    return codes, masked


def parameters(config, scale=0.3):
    """Far from the initial values."""
    codes, masked = example()
    shapes = jax.eval_shape(Infill(config).init, jax.random.key(0), codes, masked)["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda s: jnp.asarray(scale * rng.standard_normal(s.shape), s.dtype), shapes)


def logits(config, params, *inputs):
    return np.asarray(jax.jit(Infill(config).apply)({"params": params}, *inputs))


def test_a_masked_segment_hears_both_sides_through_ttt_alone():
    """Row 0 is as it was, in the others a code of the first frame, of the last, and of a masked frame is another."""
    codes, masked = (np.concatenate([x[:1]] * 4) for x in example())
    for row, frame in ((1, 0), (2, T - 1), (3, 5)):
        codes[row, 1, frame] = (codes[row, 1, frame] + 1) % 7
    for config, reaches in ((CONFIG, True), (WITHOUT, False)):
        out = logits(config, parameters(config), codes, masked)
        change = np.abs(out[1:, :, 4:8] - out[:1, :, 4:8]).max(axis=(1, 3))
        assert np.all(change[:2] > 1e-5) == reaches
        assert np.any(change[:2] != 0) == reaches
        assert np.all(out[3] == out[0])


def test_what_lies_beyond_a_rows_length_never_matters():
    params, (codes, masked) = parameters(CONFIG), example()
    codes[1], masked[1] = codes[0], masked[0]
    codes[1, :, 9:] = -1
    masked[1, 9:] = True
    out = logits(CONFIG, params, codes, masked, np.array([9, 9]))
    np.testing.assert_array_equal(out[0, :, :9], out[1, :, :9])
    alone = logits(CONFIG, params, codes[:1, :, :9], masked[:1, :9])
    np.testing.assert_allclose(out[0, :, :9], alone[0], atol=2e-5)


@pytest.mark.parametrize("config", [CONFIG, WITHOUT], ids=["with TTT", "without"])
def test_every_parameter_gets_a_gradient(config):
    params, (codes, masked) = parameters(config), example()
    frames = first_masked(jnp.asarray(masked), 6)

    def loss(params):
        nll, _ = masked_nll(
            Infill(config).apply({"params": params}, codes, masked, None, frames), codes, masked, frames
        )
        return nll.sum()

    for path, gradient in jax.tree.leaves_with_path(jax.jit(jax.grad(loss))(params)):
        # Softmax does not see what is added to all keys of a query.
        if jax.tree_util.keystr(path, simple=True, separator="/").endswith("k_norm/bias"):
            continue
        assert np.any(gradient != 0), path


def test_the_likelihood_is_of_masked_tokens_at_their_frames():
    codes, masked = example()
    codes[0, 1, 3] = -1
    frames = first_masked(jnp.asarray(masked), 8)  # two more than there are
    assert frames[0].tolist() == [2, 3, 4, 5, 6, 7, 0, 1]
    everything = np.random.default_rng(0).standard_normal((2, 2, T, 7)).astype(np.float32)
    nll, counted = masked_nll(jnp.asarray(everything[:, :, frames[0]]), codes, masked, frames)
    everything = jax.nn.log_softmax(everything)
    for row, book, n in np.ndindex(2, 2, 8):
        token, frame = codes[row, 1 + book, frames[row, n]], int(frames[row, n])
        assert counted[row, book, n] == (n < 6 and token >= 0)
        expected = -everything[row, book, frame, token] if counted[row, book, n] else 0
        np.testing.assert_allclose(nll[row, book, n], expected, atol=1e-5)


def test_only_the_logits_asked_for_and_a_missing_token_adds_nothing():
    codes, masked = example()
    codes[1], masked[1] = codes[0], masked[0]
    codes[0, :, 0] = -1
    config, frames = dataclasses.replace(WITHOUT, num_layers=1), np.array([[9, 0]] * 2, np.int32)
    params = parameters(config)
    out = logits(config, params, codes, masked, None, frames)
    np.testing.assert_allclose(out, logits(config, params, codes, masked)[:, :, [9, 0]], atol=1e-5)
    assert np.any(out[0, :, 1] != out[1, :, 1])
    zeroed = params | {name: jnp.zeros_like(params[name]) for name in ("text_embedding", "embedding")}
    bare = logits(config, zeroed, codes, masked, None, frames)
    np.testing.assert_array_equal(bare[0], bare[1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dim": 6}, r"dim: expected a multiple of 2 \* num_heads = 4, .* got 6"),
        ({"overlap": 4}, "overlap: expected 0 <= overlap < segment = 4, got 4"),
        ({"ssm_layer": "linear"}, "ssm_layer: expected one of .*'ttt_linear'.*, got 'linear'"),
        ({"gating_alpha_init": 0.0}, "gating_alpha_init: expected not 0"),
        ({"card": 0}, "card: expected at least 1, got 0"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **fields)


def test_bad_inputs_are_named():
    codes, masked = example()
    for inputs, message in (
        (
            (codes[:, :2], masked),
            r"codes: expected integers \[B, 1 \+ num_codebooks = 3, T\], .* got int32 \[2, 2, 12\]",
        ),
        ((codes, masked[:, :5]), r"masked: expected bool \[2, 12\], as codes has them, got bool \[2, 5\]"),
        ((codes, masked.astype(np.int32)), r"masked: expected bool"),
        ((codes, masked, np.zeros(2, np.float32)), r"length: expected integers \[2\], .* got float32 \[2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            Infill(CONFIG).apply({"params": {}}, *inputs)
