"""Against recordings of Kyutai's own implementation with random weights (float32).

`mimi_odd` has what the published sizes lack: dilated residual blocks, two semantic codebooks, three steps a frame.
"""

import dataclasses

import numpy as np
import pytest
from safetensors.numpy import load_file

from ttt_jax.convert import mimi_params
from ttt_jax.models.mimi import MimiConfig, init_decoder_state, init_encoder_state


def read(data_dir, name, published_ring):
    path = data_dir / name
    data = dict(np.load(f"{path}.npz"))
    config = MimiConfig.from_kyutai(f"{path}.json", num_codebooks=data["codes"].shape[1])
    assert data["codes"].shape[2] * config.stride >= 2 * config.context
    params = mimi_params(config, load_file(f"{path}.safetensors"))
    return dataclasses.replace(config, published_ring=published_ring), params, data


def assert_close(got, want):
    """2e-6 of the largest value: two float32 implementations that add in different orders."""
    np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max(), rtol=0)


@pytest.mark.parametrize(("name", "published_ring"), [("mimi_tiny", False), ("mimi_odd", False), ("mimi_odd", True)])
def test_whole_waveform(data_dir, apply, name, published_ring):
    config, params, data = read(data_dir, name, published_ring)
    latent = apply(config, "encode_to_latent", params, data["wav"])
    if not published_ring:  # the published stream's latent was not recorded
        assert_close(latent, data["latent"])
    codes = apply(config, "quantize", params, latent)
    np.testing.assert_array_equal(codes, data["stream_codes" if published_ring else "codes"])
    wav = apply(config, "decode", params, data["codes"])
    assert_close(wav, data["stream_decoded" if published_ring else "decoded"])
    assert np.any(data["stream_codes"] != data["codes"])


@pytest.mark.parametrize("published_ring", [False, True])
def test_frame_by_frame_past_the_context(data_dir, steps, published_ring):
    """What the published model computes in one pass, and what it does when it streams."""
    config, params, data = read(data_dir, "mimi_tiny", published_ring)
    encode, decode = steps
    encoder, decoder = init_encoder_state(config, params, 2), init_decoder_state(config, params, 2)
    codes, wav = [], []
    for t in range(data["codes"].shape[2]):
        samples = data["wav"][:, :, t * config.frame_samples : (t + 1) * config.frame_samples]
        frame, encoder = encode(config, params, encoder, samples)
        decoded, decoder = decode(config, params, decoder, data["codes"][:, :, t : t + 1])
        codes.append(frame)
        wav.append(decoded)
    codes = np.concatenate(codes, axis=2)
    np.testing.assert_array_equal(codes, data["stream_codes" if published_ring else "codes"])
    assert_close(np.concatenate(wav, axis=2), data["stream_decoded" if published_ring else "decoded"])
