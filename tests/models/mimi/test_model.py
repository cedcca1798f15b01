"""The invariants of whole waveforms, and of any way to cut them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.models.mimi import Mimi, decode_step, encode_step, init_decoder_state, init_encoder_state


def jacobian(config, params, method, x, weighted):
    """Which of the outputs along the last axis depend on which of x's inputs along its last axis, exact zeros aside."""

    def outputs(x):
        out = Mimi(config).apply({"params": params}, x, method=method)
        return jnp.sum(out[0] * weighted[:, None], axis=0)

    return np.abs(jax.jit(jax.jacobian(outputs))(x)).sum(axis=(1, 2)) > 0


def test_a_frame_of_latent_sees_its_own_samples_and_earlier_ones(config, params, random_wav):
    frames, samples = 7, config.frame_samples
    weights = jnp.linspace(-1, 1, config.dimension)  # a plain sum could cancel
    seen = jacobian(config, params, "encode_to_latent", random_wav(0, 1, frames * samples), weights)
    for t in range(frames):
        assert seen[t, t * samples : (t + 1) * samples].all()
        assert not seen[t, (t + 1) * samples :].any()
        assert t == 0 or seen[t, (t - 1) * samples]


def test_a_sample_hears_its_own_frame_and_earlier_ones(config, params):
    frames, samples = 7, config.frame_samples
    latent = np.random.default_rng(0).normal(size=(1, config.dimension, frames)).astype(np.float32)
    heard = jacobian(config, params, "decode_latent", latent, jnp.ones(1))
    for s in range(frames * samples):
        assert heard[s, s // samples]
        assert not heard[s, s // samples + 1 :].any()


def test_any_split_into_calls_equals_one_call(config, params, random_wav, random_codes):
    """In float64, where rounding does not hide a difference."""
    splits = (1, 0, 5, 5, 1, 1, 5, 5, 1)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        wav, codes = random_wav(0, 2, sum(splits) * config.frame_samples), random_codes(0, 2, sum(splits))
        apply = functools.partial(Mimi(config).apply, {"params": params})
        whole = [jax.jit(functools.partial(apply, method=m))(x) for m, x in (("encode", wav), ("decode", codes))]
        encode, decode = (jax.jit(functools.partial(step, config)) for step in (encode_step, decode_step))
        encoder, decoder = init_encoder_state(config, params, 2), init_decoder_state(config, params, 2)
        parts, start = ([], []), 0
        for frames in splits:
            stop = start + frames
            samples = wav[:, :, start * config.frame_samples : stop * config.frame_samples]
            encoded, encoder = encode(params, encoder, samples)
            decoded, decoder = decode(params, decoder, codes[:, :, start:stop])
            parts[0].append(encoded)
            parts[1].append(decoded)
            start = stop
        np.testing.assert_array_equal(np.concatenate(parts[0], axis=2), whole[0])
        np.testing.assert_allclose(np.concatenate(parts[1], axis=2), whole[1], atol=1e-13)
        assert whole[1].dtype == np.float64
    assert len(np.unique(whole[0])) > config.bins // 2


def test_a_last_frame_that_is_not_full_ends_in_zeros(config, params, apply, random_wav):
    wav = random_wav(1, 2, 3 * config.frame_samples)
    wav[:, :, -5:] = 0
    whole = apply(config, "encode", params, wav)
    np.testing.assert_array_equal(apply(config, "encode", params, wav[:, :, :-5]), whole)
    assert whole.shape == (2, config.num_codebooks, 3)
    there_and_back = jax.eval_shape(functools.partial(apply, config, "__call__"), params, wav[:, :, :-5])
    assert there_and_back.shape == (2, 1, wav.shape[2] - 5)


def test_rows_are_independent(config, params, apply, random_wav, random_codes):
    wav, codes = random_wav(2, 2, 3 * config.frame_samples), random_codes(2, 2, 3)
    other_wav, other_codes = wav.copy(), codes.copy()
    other_wav[0], other_codes[0] = np.nan, -1
    for method, x, other in (("encode", wav, other_wav), ("decode", codes, other_codes)):
        np.testing.assert_array_equal(
            apply(config, method, params, x)[1], apply(config, method, params, other)[1], err_msg=method
        )


def test_codes_are_the_nearest_entries_of_what_is_left_over(config, params, apply):
    """Against residual quantization written out; fewer codebooks are the first ones."""
    latent = np.random.default_rng(3).normal(size=(2, config.dimension, 9)).astype(np.float32)
    codes, total = [], 0
    for part, levels in (("semantic", 1), ("acoustic", 3)):
        p = jax.tree.map(np.asarray, params["quantizer"][part])
        rest, chosen = np.einsum("bdt,de->bte", latent, p["input_proj"][0]), 0
        for level in range(levels):
            entries = p["embedding_sum"][level] / np.maximum(p["cluster_usage"][level], 1e-5)[:, None]
            nearest = np.argmin(np.sum((rest[:, :, None] - entries) ** 2, axis=-1), axis=-1)
            codes.append(nearest)
            rest, chosen = rest - entries[nearest], chosen + entries[nearest]
        total = total + np.einsum("bte,ed->bdt", chosen, p["output_proj"][0])
    codes = np.stack(codes, axis=1)
    assert np.any(codes == 0)  # the entry that nothing was ever assigned to
    for used in range(1, config.n_q + 1):
        used_config = dataclasses.replace(config, num_codebooks=used)
        np.testing.assert_array_equal(apply(used_config, "quantize", params, latent), codes[:, :used])
    latent = apply(dataclasses.replace(config, num_codebooks=4), "dequantize", params, codes)
    np.testing.assert_allclose(latent, total, atol=1e-5)


def test_a_frame_that_lacks_a_code_is_silent_and_its_latent_zero(config, params, apply, random_codes):
    codes = random_codes(4, 2, 6)
    holes = codes.copy()
    holes[0, 1, 2], holes[1, :, 4] = -1, -1
    latent = np.array(apply(config, "dequantize", params, codes))
    latent[0, :, 2], latent[1, :, 4] = 0, 0
    expected = np.array(apply(config, "decode_latent", params, latent)).reshape(2, 6, -1)
    assert np.all(np.abs(expected).max(-1) > 0)
    expected[0, 2], expected[1, 4] = 0, 0
    np.testing.assert_array_equal(apply(config, "decode", params, holes).reshape(2, 6, -1), expected)
    holes[0, 1, 2], holes[1, 0, 4] = config.bins, -7
    np.testing.assert_array_equal(apply(config, "decode", params, holes).reshape(2, 6, -1), expected)


def test_the_parameters_do_not_depend_on_how_many_codebooks_are_used(config):
    trees = []
    for used in (1, config.n_q):
        model = Mimi(dataclasses.replace(config, num_codebooks=used))
        trees.append(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1, config.frame_samples))))
    assert trees[0] == trees[1]


def test_bad_input_names_the_argument(config, params, random_codes):
    run = functools.partial(Mimi(config).apply, {"params": params})
    codes = random_codes(0, 2, 3)
    for wav in (np.zeros((2, 40), np.float32), np.zeros((2, 2, 40), np.float32), np.zeros((2, 1, 40), np.int16), [0.0]):
        with pytest.raises(ValueError, match=r"wav must be floating in \[-1, 1\] of shape \[B, 1, S\]"):
            run(wav, method="encode")
    for bad in (codes[:, :2], codes.astype(np.float32), codes[0]):
        with pytest.raises(ValueError, match=r"codes must be integers of shape \[B, num_codebooks = 3, T\]"):
            run(bad, method="decode")
    codes[1, 2, 0] = config.bins
    with pytest.raises(ValueError, match=r"codes\[1, 2, 0\] = 16 is outside \[-1, 16\) of codebook 2; 1 such"):
        run(codes, method="decode")
