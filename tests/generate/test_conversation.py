"""Against Kyutai's own loop, and rows that pause and start anew."""

import dataclasses

import jax
import numpy as np
import pytest

from ttt_jax.generate import Configs, Sampling, conversation_step, generate, init_conversation
from ttt_jax.generate.conversation import advance

FRAME = 1920
GREEDY = Sampling(0.0, 0, 0.0, 0)


@pytest.fixture(scope="module")
def user(data_dir):
    """Two rows of 20 frames, more than the 12 that attention sees."""
    return 3 * np.load(data_dir / "mimi_tiny.npz")["wav"][:, 0]


@pytest.fixture(scope="module")
def talk(golden_moshi, mimi):
    """`generate` without sampling, with Mimi's published streaming."""
    config, params = mimi
    published = dataclasses.replace(config, published_ring=True), params
    return lambda wav, **options: generate(golden_moshi, published, wav, sampling=GREEDY, **options)


@pytest.fixture(scope="module")
def said(talk, user):
    return talk(user)


def test_what_kyutais_loop_says(said, data_dir):
    """`moshi.run_inference` fed the same frames: wav in, Mimi, Moshi, Mimi, wav out."""
    golden = np.load(data_dir / "generate_tiny.npz")
    wav, text = said
    assert (wav.shape, wav.dtype, text.shape, text.dtype) == ((2, 20 * FRAME), np.float32, (2, 20), np.int32)
    np.testing.assert_array_equal(text[0], golden["text"])
    np.testing.assert_allclose(wav[0], golden["wav"], atol=1e-5)  # of 0.2; float32 sums in another order


def test_rows_are_apart_and_hear(said, talk, user):
    assert (said[0][0] != said[0][1]).any()
    wav, text = talk(user[::-1])
    np.testing.assert_allclose(wav, said[0][::-1], atol=1e-6)  # rows lie in memory otherwise, and are added otherwise
    np.testing.assert_array_equal(text, said[1][::-1])


def test_the_last_frame_is_filled_with_silence(talk, user):
    cut = user[:, : 3 * FRAME - 500]
    wav, text = talk(cut[:, None])
    assert (wav.shape, text.shape) == ((2, 1, 3 * FRAME), (2, 3))
    np.testing.assert_array_equal(wav[:, 0], talk(np.pad(cut, ((0, 0), (0, 500))))[0])
    assert talk(user[:, :0])[0].shape == (2, 0)


def frames(wav):
    return wav.reshape(2, -1, FRAME)


def test_inactive_frames_are_as_if_cut_out(said, talk, user):
    active = np.ones((2, 20), bool)
    active[1, [0, 1, 5, 6, 7, 13]] = False
    wav, text = talk(user, active=active)
    np.testing.assert_array_equal(wav[0], said[0][0])
    assert (frames(wav)[1, ~active[1]] == 0).all()
    assert (text[1, ~active[1]] == -2).all()
    heard = np.stack([frames(user)[0, :14], frames(user)[1, active[1]]]).reshape(2, -1)
    alone, alone_text = talk(heard)
    np.testing.assert_array_equal(frames(wav)[1, active[1]], frames(alone)[1])
    np.testing.assert_array_equal(text[1, active[1]], alone_text[1])


def test_reset_starts_a_new_conversation(said, talk, user):
    reset, active = np.zeros((2, 20), bool), np.ones((2, 20), bool)
    reset[1, 7] = True
    active[1, 7] = False  # so that it begins with frame 8
    wav, text = talk(user, reset=reset, active=active)
    np.testing.assert_array_equal(wav[0], said[0][0])
    np.testing.assert_array_equal(frames(wav)[1, :7], frames(said[0])[1, :7])
    alone, alone_text = talk(user[:, 8 * FRAME :])
    np.testing.assert_array_equal(frames(wav)[1, 8:], frames(alone)[1])
    np.testing.assert_array_equal(text[1, 8:], alone_text[1])


def test_a_step_on_its_own(golden_moshi, mimi, said, user):
    """A server's loop: the first frame is not heard, so what comes then is what `generate` gives."""
    config = dataclasses.replace(mimi[0], published_ring=True)
    configs, params = Configs.of(golden_moshi[0], config), (golden_moshi[1], mimi[1])
    conversation = init_conversation(configs, params, 2)
    noise = np.random.default_rng(1).standard_normal((2, 1, FRAME)).astype(np.float32)
    given = {"active": np.ones(2, bool), "reset": np.zeros(2, bool), "condition": None}
    for i, frame in enumerate([noise, *np.moveaxis(user.reshape(2, 20, 1, FRAME), 1, 0)]):
        wav, tokens, conversation = advance(configs, params, conversation, frame, sampling=GREEDY, **given)
        assert (wav.shape, tokens.shape) == ((2, 1, FRAME), (2, 9))
        if i == 0:
            assert (np.asarray(tokens) == -2).all()
            assert (np.asarray(wav) == 0).all()
        else:
            np.testing.assert_array_equal(wav[:, 0], frames(said[0])[:, i - 1])


def test_a_conversation_begins_where_the_parameters_lie(golden_moshi, mimi):
    """Also in a model whose state holds none of them: else the second step would compile anew."""
    conversation = init_conversation(Configs.of(golden_moshi[0], mimi[0]), (golden_moshi[1], mimi[1]), 1)
    assert all(leaf.committed for leaf in jax.tree.leaves(conversation))


def test_bad_input(golden_moshi, mimi, user):
    with pytest.raises(
        ValueError, match=r"wav must be floating of shape \[B, S\] or \[B, 1, S\], got float32 \(38400,\)"
    ):
        generate(golden_moshi, mimi, user[0])
    with pytest.raises(ValueError, match=r"wav must be floating .*, got int64"):
        generate(golden_moshi, mimi, np.zeros((1, FRAME), int))
    with pytest.raises(ValueError, match=r"active must be bool of shape \(2, 20\), got bool \(2,\)"):
        generate(golden_moshi, mimi, user, active=np.ones(2, bool))
    with pytest.raises(ValueError, match=r"reset must be bool of shape \(2, 20\), got int64 \(2, 20\)"):
        generate(golden_moshi, mimi, user, reset=np.ones((2, 20), int))
    with pytest.raises(ValueError, match=r"its codes lie in \[0, 64\), the model's in \[0, 32\)"):
        Configs.of(golden_moshi[0], dataclasses.replace(mimi[0], bins=64))
    with pytest.raises(ValueError, match="at least 8 codebooks, as many as the model has, got 6"):
        Configs.of(golden_moshi[0], dataclasses.replace(mimi[0], n_q=6, num_codebooks=6))
    configs, params = Configs.of(golden_moshi[0], mimi[0]), (golden_moshi[1], mimi[1])
    conversation = init_conversation(configs, params, 2)
    with pytest.raises(ValueError, match=r"user_wav must have shape \(2, 1, 1920\), .* got \(2, 1920\)"):
        conversation_step(configs, params, conversation, np.zeros((2, FRAME), np.float32))
