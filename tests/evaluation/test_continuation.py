"""Continuations keep the prompt, hear the other speaker in step, and follow the model's own likelihoods."""

import numpy as np
import soundfile

from ttt_jax.data.tokens import TokenInfo
from ttt_jax.evaluation.continuation import continue_recording, spoken_text, write_wav
from ttt_jax.evaluation.scoring import score_recordings


def test_prompt_is_kept_and_the_rest_is_the_models_own(config, params, recordings):
    codes = np.where(recordings[0] < 0, 0, recordings[0])
    continued = continue_recording(config, params, codes, prompt_frames=9, num_frames=8, temperature=0.0)
    assert continued.tokens.shape == (3, 17)
    np.testing.assert_array_equal(continued.tokens[:, :9], codes[:3, :9])
    # Greedy tokens are the likeliest ones: no other token in their place scores better, given the same past.
    spoken = np.concatenate([continued.tokens, codes[3:, :17]])
    for stream in range(3):
        for frame in (9, 13):
            variants = [spoken.copy() for _ in range(config.card)]
            for token, variant in enumerate(variants):
                variant[stream, frame] = token
            scores = [s[stream, frame] for s in score_recordings(config, params, [spoken, *variants], chunk_frames=17)]
            assert scores[0] <= min(scores[1:]) + 1e-5


def test_a_recording_without_text_gets_none(config, params, recordings):
    codes = np.where(recordings[0] < 0, 0, recordings[0])
    codes[0] = -1
    continued = continue_recording(config, params, codes, prompt_frames=9, num_frames=8)
    np.testing.assert_array_equal(continued.tokens[0], -1)
    assert (continued.tokens[1:] >= 0).all()


def test_sampling_follows_the_seed_and_stops_with_the_recording(config, params, recordings):
    codes = np.where(recordings[0] < 0, 0, recordings[0])
    first, again, other = (
        continue_recording(config, params, codes, prompt_frames=5, num_frames=99, seed=seed).tokens
        for seed in (0, 0, 1)
    )
    assert first.shape == (3, codes.shape[1])
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


def test_wav_is_stereo_and_frame_exact(tmp_path):
    info = TokenInfo("codec2", 12.5, 8000, 8, 512, 100)
    rng = np.random.default_rng(0)
    tokens, other = rng.integers(0, 16, (9, 5)), rng.integers(0, 16, (8, 7))
    write_wav(tmp_path / "speech.wav", tokens, other, info)
    wav, rate = soundfile.read(tmp_path / "speech.wav")
    assert (wav.shape, rate) == ((5 * 640, 2), 8000)
    assert spoken_text(tokens[0], tmp_path / "tokenizer.model") == ""
