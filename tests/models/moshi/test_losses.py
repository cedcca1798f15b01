import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.models.moshi import MoshiOutput, losses, token_nll


def example(seed=0):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 5, (2, 4, 6)).astype(np.int32)
    codes[:, 1:3, 4] = -1
    mask = codes >= 0
    mask[:, 2, -1] = False
    logits = rng.normal(size=(2, 2, 6, 5)).astype(np.float32)
    text_logits = rng.normal(size=(2, 1, 6, 7)).astype(np.float32)
    return MoshiOutput(*map(jnp.asarray, (logits, mask[:, 1:3], text_logits, mask[:, :1]))), codes


def plain_nll(logits, target):
    return np.log(np.exp(np.float64(logits)).sum()) - np.float64(logits)[target]


def test_weighted_means_equal_a_loop_over_tokens():
    out, codes = example()
    got = losses(out, jnp.asarray(codes), first_codebook_weight=3.0, text_padding_weight=0.25, text_padding_ids=(3, 0))
    sums, weights = {"text": 0.0, "audio": 0.0}, {"text": 0.0, "audio": 0.0}
    for b, t in np.ndindex(2, 6):
        weight = 0.25 if codes[b, 0, t] in (0, 3) else 1.0
        sums["text"] += weight * plain_nll(out.text_logits[b, 0, t], codes[b, 0, t])
        weights["text"] += weight
        for k in range(2):
            if out.mask[b, k, t]:
                weight = 3.0 if k == 0 else 1.0
                sums["audio"] += weight * plain_nll(out.logits[b, k, t], codes[b, k + 1, t])
                weights["audio"] += weight
    np.testing.assert_allclose(got.text, sums["text"] / weights["text"], rtol=1e-5)
    np.testing.assert_allclose(got.audio, sums["audio"] / weights["audio"], rtol=1e-5)
    np.testing.assert_allclose(got.total, got.text + got.audio, rtol=1e-6)
    np.testing.assert_array_equal(got.num_audio_tokens, [10, 8])
    np.testing.assert_array_equal(got.num_text_tokens, 12)
    nll = np.array(
        [[[plain_nll(out.logits[b, k, t], codes[b, k + 1, t]) for t in range(6)] for k in range(2)] for b in range(2)]
    )
    expected = (nll * np.asarray(out.mask)).sum((0, 2)) / np.array([10, 8])
    np.testing.assert_allclose(got.audio_nll, expected, rtol=1e-5)


def test_masked_tokens_do_not_matter_even_as_nan():
    out, codes = example()
    spoiled = out._replace(logits=jnp.where(out.mask[..., None], out.logits, jnp.nan))
    jax.tree.map(np.testing.assert_array_equal, losses(out, codes), losses(spoiled, codes))


def test_no_text_at_all_is_a_text_loss_of_zero():
    out, codes = example()
    got = losses(out._replace(text_mask=jnp.zeros_like(out.text_mask)), jnp.asarray(codes))
    assert got.text == got.text_nll == 0
    assert np.isfinite(got.total)


def test_gradient_is_softmax_minus_target():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)), jnp.float32)
    grad = jax.grad(lambda x: token_nll(x, jnp.array([0, 4, 2])).sum())(logits)
    np.testing.assert_allclose(grad, jax.nn.softmax(logits) - np.eye(5)[[0, 4, 2]], atol=1e-6)
