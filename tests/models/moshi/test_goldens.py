"""Against recordings of Kyutai's own implementation with random weights (float32).

`moshi_personaplex` is its model driven in the order of NVIDIA's generator: given codes of a stream that the depth
transformer predicts are what it reads in their place.
"""

import functools
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from ttt_jax.convert import moshi_params
from ttt_jax.models.moshi import Moshi, MoshiConfig, condition_vector, init_stream, stream_step_with_logits


def read(data_dir, name):
    path = data_dir / name
    config = MoshiConfig.from_kyutai(f"{path}.json")
    params = moshi_params(config, load_file(f"{path}.safetensors"))
    return config, params, dict(np.load(f"{path}.npz"))


@pytest.fixture(scope="module", params=["moshi_tiny", "moshi_tiny_schedule"])
def golden(request, data_dir):
    return read(data_dir, request.param)


@pytest.fixture(scope="module")
def hibiki(data_dir):
    """With its conditions' vector, the value of each by row."""
    config, params, data = read(data_dir, "moshi_hibiki")
    rows = json.loads(str(data["conditions"]))
    conditions = {name: [row[name] for row in rows] for name in rows[0]}
    return config, params, data, condition_vector(config, params, conditions)


@pytest.fixture(scope="module")
def speech_to_text(data_dir):
    return read(data_dir, "moshi_stt")


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


def converse(config, params, user, **options):
    """Tokens `[B, 1 + dep_q, T]` and what they were drawn from, of a greedy stream."""
    stream = init_stream(config, params, user.shape[0])
    step = jax.jit(functools.partial(stream_step_with_logits, config), donate_argnums=1)
    steps = []
    for t in range(user.shape[2]):
        tokens, stream, logits = step(params, stream, user[:, :, t], **options)
        steps.append((tokens, logits))
    return jax.tree.map(lambda *x: np.stack(x, axis=2), *steps)


def test_greedy_stream_past_the_window(golden):
    config, params, data = golden
    assert data["gen_user"].shape[2] > 2 * config.context
    tokens, logits = converse(config, params, data["gen_user"])
    np.testing.assert_array_equal(tokens, data["gen_out"])
    assert_close(logits.text_logits, data["gen_text_logits"])


def test_hibikis_conditions(hibiki):
    _, _, data, condition = hibiki
    assert_close(condition, data["condition"])


def test_hibiki_with_low_rank_embeddings_and_conditions(hibiki):
    config, params, data, condition = hibiki
    out = jax.jit(Moshi(config).apply)({"params": params}, data["codes"], condition)
    np.testing.assert_array_equal(out.mask, data["mask"])
    assert_close(out.logits, data["logits"])
    assert_close(out.text_logits, data["text_logits"])
    assert data["gen_user"].shape[2] > 2 * config.context
    tokens, logits = converse(config, params, data["gen_user"], condition=condition)
    np.testing.assert_array_equal(tokens, data["gen_out"])
    assert_close(logits.text_logits, data["gen_text_logits"])


def test_speech_to_text_without_a_depth_transformer(speech_to_text):
    config, params, data = speech_to_text
    variables = {"params": params}
    out = jax.jit(Moshi(config).apply)(variables, data["codes"])
    assert out.logits.shape == (2, 0, data["codes"].shape[2], config.card)
    np.testing.assert_array_equal(out.text_mask, data["text_mask"])
    assert_close(out.text_logits, data["text_logits"])
    assert_close(Moshi(config).apply(variables, data["z"], method="extra_heads"), data["extra_heads"])


def test_speech_to_text_streams_past_the_window(speech_to_text):
    config, params, data = speech_to_text
    assert data["gen_user"].shape[2] > 2 * config.context
    tokens, logits = converse(config, params, data["gen_user"])
    np.testing.assert_array_equal(tokens, data["gen_out"])
    assert_close(logits.text_logits, data["gen_text_logits"])
    assert logits.logits.shape[1:] == (0, data["gen_user"].shape[2], config.card)
    assert_close(jax.nn.softmax(logits.extra_heads), data["gen_extra"])


def test_personaplex_with_given_user_codes(data_dir):
    """Ours hears a frame in the call that brings it, NVIDIA's in the next one; the second row's user falls silent."""
    config, params, data = read(data_dir, "moshi_personaplex")
    tokens, logits = converse(config, params, data["gen_user"])
    np.testing.assert_array_equal(tokens[:, :, :-1], data["gen_out"])
    assert_close(logits.text_logits[:, 0, :-1], data["gen_text_logits"])
    own = slice(0, config.voice_q)  # of the user's, NVIDIA's depth transformer reads the first before it is spoken
    assert_close(logits.logits[:, own, :-1], data["gen_logits"][:, own])
