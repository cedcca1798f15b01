"""Scores of what might have been said: those of the whole recording with it in place, from the state just before it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.evaluation.forks import Fork, score_forks
from ttt_jax.evaluation.scoring import score_recordings
from ttt_jax.models.moshi import Moshi, token_nll

CLOSE = {"rtol": 0, "atol": 2e-5}  # float32 logits of order 1 through two layers
FRAMES = (9, 0, 22, 9, 23)  # in no order, twice the same, the first and the one after the last


@pytest.fixture(scope="module")
def codes(recordings):
    return recordings[0]


@pytest.fixture(scope="module")
def forks(config):
    """Three ways each, of 1 to 9 frames, with holes in every stream."""
    rng = np.random.default_rng(2)
    made = []
    for frame, width in zip(FRAMES, (5, 9, 3, 1, 8), strict=True):
        ways = rng.integers(0, 20, (3, config.num_streams, width)).astype(np.int32)
        ways[rng.random(ways.shape) < 0.3] = -1
        made.append(Fork(frame, ways))
    return made


def score(config, params, codes, forks, **options):
    return score_forks(config, params, codes, forks, **{"reset_frames": 6, "chunk_frames": 4, **options})


def whole(config, params, codes, fork):
    """By one teacher-forced pass over the recording up to the fork, each way after it, and then nothing."""
    end = fork.frame + fork.codes.shape[2]
    spliced = np.full((len(fork.codes), config.num_streams, 36), -1, np.int32)
    spliced[:, :, : fork.frame] = codes[:, : fork.frame]
    spliced[:, :, fork.frame : end] = fork.codes
    output = teacher_forced(config, params, spliced)
    nll = [token_nll(output.text_logits, spliced[:, :1]), token_nll(output.logits, spliced[:, 1 : 1 + config.dep_q])]
    mask = np.concatenate([output.text_mask, output.mask], axis=1)
    return np.where(mask, np.concatenate(nll, axis=1), np.nan)[:, :, fork.frame : end]


@functools.partial(jax.jit, static_argnums=0)
def teacher_forced(config, params, codes):
    return Moshi(config).apply({"params": params}, codes)


def test_forks_equal_one_pass_over_the_spliced_recording(config, params, codes, forks):
    for fork, scores in zip(forks, score(config, params, codes, forks), strict=True):
        np.testing.assert_allclose(scores, whole(config, params, codes, fork), **CLOSE)


def test_text_alone_skips_the_depth_transformer_and_scores_the_same(config, params, codes, forks):
    ways = forks[0].codes.copy()
    ways[:, 1 : 1 + config.dep_q] = -1
    fork = Fork(9, ways)
    scores = score(config, params, codes, [fork])[0]
    assert np.isnan(scores[:, 1:]).all()
    np.testing.assert_allclose(scores, whole(config, params, codes, fork), **CLOSE)


def test_a_fork_is_scored_before_the_state_learns_the_recording_there(config, params, codes, forks):
    """What the recording holds from the fork's frame on is never seen, to the bit; what it holds before is."""
    before = score(config, params, codes, forks[:1])[0]
    changed = codes.copy()
    changed[:, 9:] = (changed[:, 9:] + 7) % 20
    np.testing.assert_array_equal(score(config, params, changed, forks[:1])[0], before)
    changed[:, 8] = (codes[:, 8] + 7) % 20
    assert np.nanmax(np.abs(score(config, params, changed, forks[:1])[0] - before)) > 1e-3


@pytest.mark.parametrize("chunk_frames", [1, 64])
def test_chunks_and_other_forks_change_nothing(config, params, codes, forks, chunk_frames):
    together = score(config, params, codes, forks)
    for fork, scores in zip(forks, together, strict=True):
        np.testing.assert_allclose(score(config, params, codes, [fork], chunk_frames=chunk_frames)[0], scores, **CLOSE)


def test_memories_are_those_of_score_recordings(config, params, codes):
    """The recorded tokens as a fork score what the walk through the whole recording says of them."""
    scores = {}
    for memory in ("carried", "reset", "off"):
        walked = score_recordings(config, params, [codes], chunk_frames=6, memory=memory)[0]
        # Within one span between resets: frames 13 to 15, of which the latest stream is predicted two frames later,
        # beside the text of that frame.
        fork = Fork(13, codes[None, :, 13:18])
        scores[memory] = score(config, params, codes, [fork], memory=memory)[0][0, :, :3]
        np.testing.assert_allclose(scores[memory], walked[:, 13:16], **CLOSE)
    assert np.nanmax(np.abs(scores["reset"] - scores["carried"])) > 1e-3
    assert np.nanmax(np.abs(scores["off"] - scores["carried"])) > 1e-3
    gateless = {**params, "layers_1": {**params["layers_1"], "gate": jnp.zeros(config.dim)}}
    np.testing.assert_allclose(scores["off"], score(config, gateless, codes, [fork])[0][0, :, :3], **CLOSE)


def test_parameters_are_left_alone(config, params, codes, forks):
    copies = jax.tree.map(np.array, params)
    score(config, params, codes, forks, memory="reset")
    jax.tree.map(np.testing.assert_array_equal, params, copies)


def test_bad_arguments_are_named(config, params, codes, forks):
    with pytest.raises(ValueError, match=r"forks: expected frames in \[0, 23\], the recording's, got 24"):
        score(config, params, codes, [Fork(24, forks[0].codes)])
    with pytest.raises(ValueError, match="memory: expected one of"):
        score(config, params, codes, forks, memory="none")
    with pytest.raises(ValueError, match="reset_frames: expected an int >= 1, got 0"):
        score(config, params, codes, forks, reset_frames=0)
