"""Scores of whole recordings: chunked = streamed frame by frame = one pass; each frame before the state learns it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.evaluation.scoring import score_recordings, without_ttt
from ttt_jax.models.moshi import Moshi, init_stream, stream_step_with_logits, token_nll

CLOSE = {"rtol": 0, "atol": 2e-5}  # float32 logits of order 1 through two layers


def score(config, params, recordings, chunk_frames=5, **options):
    return score_recordings(config, params, recordings, chunk_frames=chunk_frames, batch_size=3, **options)


def test_chunks_equal_one_frame_at_a_time_by_stream_step(config, params, recordings):
    codes = recordings[0]
    frames, own = codes.shape[1], 1 + config.dep_q
    step = jax.jit(functools.partial(stream_step_with_logits, config, params))
    padded = np.pad(codes, ((0, 0), (0, config.max_delay)), constant_values=-1)
    stream, streamed = init_stream(config, params, 1), np.full((own, frames), np.nan, np.float32)
    for t in range(frames + config.max_delay):
        at = t - np.asarray(config.delays[:own])
        forced = np.where(at >= 0, padded[np.arange(own), np.clip(at, 0, None)], 0)
        user = padded[None, own:, max(t - 1, 0)]  # the user's frame of the first call is never heard
        _, stream, logits = step(stream, jnp.asarray(user), forced=jnp.asarray(forced[None]))
        nll = [token_nll(logits.text_logits[0], forced[:1]), token_nll(logits.logits[0], forced[1:])]
        for k, (value, frame) in enumerate(zip(np.concatenate(nll), at, strict=True)):
            if 0 <= frame < frames and codes[k, frame] >= 0:
                streamed[k, frame] = value
    np.testing.assert_allclose(score(config, params, recordings)[0], streamed, **CLOSE)


def test_chunks_equal_one_teacher_forced_pass_where_that_one_reaches(config, params, recordings):
    codes = recordings[0]
    output = Moshi(config).apply({"params": params}, codes[None])
    nll = np.concatenate(
        [token_nll(output.text_logits, codes[None, :1]), token_nll(output.logits, codes[None, 1:3])], 1
    )
    mask = np.concatenate([output.text_mask, output.mask], axis=1)[0]
    scored = score(config, params, recordings)[0]
    np.testing.assert_allclose(scored[mask], nll[0][mask], **CLOSE)
    assert np.isnan(scored[codes[:3] < 0]).all()
    assert not np.isnan(scored[codes[:3] >= 0]).any()  # delayed streams to the very last frame


@pytest.mark.parametrize("chunk_frames", [1, 7, 40])
def test_chunks_and_neighbours_change_nothing(config, params, recordings, chunk_frames):
    together = score(config, params, recordings, chunk_frames)
    assert [s.shape for s in together] == [(3, 23), (3, 1), (3, 9), (3, 0)]
    for codes, scores in zip(recordings, together, strict=True):
        np.testing.assert_allclose(scores, score(config, params, [codes])[0], **CLOSE)


def test_recordings_without_frames_have_no_scores(config, params, recordings):
    together = dataclasses.replace(config, delays=(0,) * config.num_streams)
    assert [s.shape for s in score(together, params, [recordings[3], recordings[3]])] == [(3, 0), (3, 0)]


def test_a_frame_is_scored_before_the_state_learns_it(config, params, recordings):
    """Changing a frame may change its own score, never one before it; the frames after it do change.

    A stream that is delayed by d frames is predicted d frames later, so its frames count from there.
    """
    before = score(config, params, recordings)[0]
    changed = recordings[0].copy()
    changed[:, 12] = (changed[:, 12] + 7) % 20
    after = score(config, params, [changed])[0]
    for k, shift in enumerate(config.delays[:3]):
        np.testing.assert_allclose(after[k, : 12 - shift], before[k, : 12 - shift], **CLOSE)
    assert np.abs(after[:, 13:] - before[:, 13:]).max() > 1e-3


def test_own_tokens_are_predicted_not_read(config, params, recordings):
    """The softmax over a frame's text sums to one over all tokens put there: the score cannot have seen the token."""
    variants = []
    for token in range(config.text_card):
        codes = recordings[0][:, :12].copy()
        codes[0, 11] = token
        variants.append(codes)
    total = sum(np.exp(-s[0, 11]) for s in score(config, params, variants))
    np.testing.assert_allclose(total, 1, rtol=1e-5)


def test_ablations_switch_off_what_they_say(config, params, recordings):
    codes = recordings[:1]
    carried, reset, off = (score(config, params, codes, memory=m)[0] for m in ("carried", "reset", "off"))
    first_chunk = 5 - config.max_delay  # every stream's first frames lie in the first chunk
    np.testing.assert_allclose(reset[:, :first_chunk], carried[:, :first_chunk], **CLOSE)
    assert np.nanmax(np.abs(reset - carried)[:, 5:]) > 1e-3
    assert np.nanmax(np.abs(off - carried)) > 1e-3
    without = {**params, "layers_1": {**params["layers_1"], "gate": jnp.zeros(config.dim)}}
    np.testing.assert_allclose(off, score(config, without, codes)[0], **CLOSE)
    whole = score(config, params, codes, chunk_frames=30, memory="reset")[0]
    np.testing.assert_allclose(whole, carried, **CLOSE)


def test_parameters_are_left_alone(config, params, recordings):
    copies = jax.tree.map(np.array, params)
    score(config, params, recordings)
    jax.tree.map(np.testing.assert_array_equal, params, copies)
    gates = [path for path, _ in jax.tree.leaves_with_path(without_ttt(params)) if path[-1].key == "gate"]
    assert len(gates) == 1


def test_bad_arguments_are_named(config, params, recordings):
    with pytest.raises(ValueError, match="memory: expected one of"):
        score(config, params, recordings, memory="none")
    with pytest.raises(ValueError, match="chunk_frames: expected an int >= 1, got 0"):
        score(config, params, recordings, chunk_frames=0)
