"""Against recordings of Kyutai's own implementation with random weights (float32)."""

import functools

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from ttt_jax.convert import moshi_params
from ttt_jax.models.moshi import Moshi, MoshiConfig, init_stream, stream_step_with_logits


@pytest.fixture(scope="module", params=["moshi_tiny", "moshi_tiny_schedule"])
def golden(request):
    path = request.path.parents[2] / "data" / request.param
    config = MoshiConfig.from_kyutai(f"{path}.json")
    params = moshi_params(config, load_file(f"{path}.safetensors"))
    return config, params, dict(np.load(f"{path}.npz"))


def assert_close(got, want):
    """1e-4 relative to the largest value: two float32 implementations that add in different orders."""
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max(), rtol=0)


def test_whole_sequence(golden):
    config, params, data = golden
    out = jax.jit(Moshi(config).apply)({"params": params}, data["codes"])
    np.testing.assert_array_equal(out.mask, data["mask"])
    np.testing.assert_array_equal(out.text_mask, data["text_mask"])
    assert_close(out.logits, data["logits"])
    assert_close(out.text_logits, data["text_logits"])


def test_temporal_transformer(golden):
    config, params, data = golden
    apply = jax.jit(functools.partial(Moshi(config).apply, method="temporal"))
    z, text_logits, _ = apply({"params": params}, data["ft_codes"])
    assert_close(z, data["ft_out"])
    assert_close(text_logits, data["ft_text_logits"])


def test_greedy_stream_past_the_window(golden):
    config, params, data = golden
    frames = data["gen_user"].shape[2]
    assert frames > 2 * config.context
    stream = init_stream(config, params, data["gen_user"].shape[0])
    step = jax.jit(functools.partial(stream_step_with_logits, config), donate_argnums=1)
    tokens, text_logits = [], []
    for t in range(frames):
        out, stream, logits = step(params, stream, data["gen_user"][:, :, t])
        tokens.append(out)
        text_logits.append(logits.text_logits)
    np.testing.assert_array_equal(np.stack(tokens, axis=2), data["gen_out"])
    assert_close(np.stack(text_logits, axis=2), data["gen_text_logits"])
