"""Answers come with the right gaps and counts, and candidates stand exactly where the recorded answer stands."""

import numpy as np
import planted
import pytest

from ttt_jax.data import conversations, quiz
from ttt_jax.data.reader import open_dataset
from ttt_jax.data.text import RESERVED_IDS, load_tokenizer
from ttt_jax.data.tokens import TOKENIZER_FILE
from ttt_jax.evaluation.answers import find_answers


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return planted.write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="module")
def recording(tokenizer):
    return planted.dataset(tokenizer)[0]


@pytest.fixture(scope="module")
def answers(recording, tokenizer):
    return find_answers(recording, planted.INFO, tokenizer, synthesize=True)


def test_gaps_and_mentions_count_earlier_answers_but_nothing_after_the_question(answers):
    np.testing.assert_allclose([a.gap_s for a in answers], [2.5 - 0.9, 4.6 - 2.9, 5.2 - 3.5])
    assert [a.num_mentions for a in answers] == [1, 2, 2]
    assert [a.held_out for a in answers] == [False, False, True]
    assert [a.heard for a in answers] == [False, False, True]
    assert [a.frame for a in answers] == [25, 46, 52]  # the fact that was never mentioned is left out


def test_the_right_candidate_is_the_recorded_text(recording, answers, tokenizer):
    for answer, value in zip(answers, ("aba", "aba", "ab ba"), strict=True):
        text, scored = answer.text.codes[0, 0], answer.text.scored[0, 0]
        last = np.flatnonzero(scored)[-1] + 1
        np.testing.assert_array_equal(text[:last], recording.codes[0, answer.frame : answer.frame + last])
        assert (text[last:] == -1).all()
        assert tokenizer.decode([int(piece) for piece in text[scored]]) == value
        assert not answer.text.scored[:, 1:].any()


def test_distractors_start_where_the_value_starts(recording, answers, tokenizer):
    late = answers[0].text
    lead = int(np.flatnonzero(late.scored[0, 0])[0])
    assert lead > 0  # the word before reaches into the answer: given, not scored
    for way in range(3):
        assert np.flatnonzero(late.scored[way, 0])[0] == lead
        np.testing.assert_array_equal(late.codes[way, 0, :lead], recording.codes[0, 25 : 25 + lead])
        assert (late.codes[way, 0, :lead] >= RESERVED_IDS).all()
    words = answers[2].text
    pieces = [tokenizer.encode(word) for word in ("bab", "aabb")]
    second = max(4, len(pieces[0]))  # the value's words start in frames 52 and 56
    np.testing.assert_array_equal(words.codes[1, 0, : len(pieces[0])], pieces[0])
    np.testing.assert_array_equal(words.codes[1, 0, second : second + len(pieces[1])], pieces[1])
    assert words.scored[1, 0].sum() == sum(map(len, pieces))


def test_only_what_is_scored_is_given(recording, answers):
    for answer in answers:
        before = recording.codes[3:, answer.frame - 1, None]
        assert (answer.text.codes[:, 1:3] == -1).all()
        assert (answer.recorded.codes[:, 0] == -1).all()
        end = answer.frame + answer.recorded.codes.shape[2]
        np.testing.assert_array_equal(answer.recorded.codes[0, 1:3], recording.codes[1:3, answer.frame : end])
        assert answer.recorded.scored[:, 1:].all()
        for candidates in (answer.text, answer.recorded):
            held = np.broadcast_to(before, candidates.codes[0, 3:].shape)
            assert all(np.array_equal(way[3:], held) for way in candidates.codes)


def test_without_a_spelled_value_or_voices_there_are_no_candidates(recording, tokenizer, answers):
    codes = recording.codes.copy()
    codes[0] = 3
    assert [
        a.text for a in find_answers(recording._replace(codes=codes), planted.INFO, tokenizer, synthesize=True)
    ] == [None] * 3
    assert [a.text for a in find_answers(recording, planted.INFO, None, synthesize=True)] == [None] * 3
    assert [a.audio for a in answers] == [None] * 3
    assert find_answers(recording._replace(metadata={}), planted.INFO, tokenizer, synthesize=True) == []


@pytest.mark.parametrize("source", ["conversations", "quiz"])
def test_synthesized_answers_sound_as_the_recording_does(tmp_path, source):
    """Spoken anew by the same voice at the same place in a frame, the right answer has nearly the recorded codes."""
    if source == "conversations":
        conversations.make(tmp_path / "data", hours=0.03, seed=5, min_minutes=0.5, max_minutes=0.6, workers=2)
    else:
        quiz.make(tmp_path / "data", recordings=3, seed=5, seconds=10.0, max_gap_s=4.0, workers=2)
    test = open_dataset(tmp_path / "data", "test")
    tokenizer = load_tokenizer(tmp_path / "data" / TOKENIZER_FILE)
    answers = [a for r in test for a in find_answers(r, test.info, tokenizer, synthesize=True)]
    assert answers
    for answer in answers:
        recorded = answer.recorded.codes[0, 1:9]
        assert answer.audio.codes.shape[:2] == (10, 17)
        assert answer.audio.codes.shape[2] >= recorded.shape[1] - 1
        frames = min(recorded.shape[1], answer.audio.codes.shape[2])
        agree = (answer.audio.codes[:, 1:9, :frames] == recorded[None, :, :frames]).mean((1, 2))
        assert agree[0] > 0.7
        assert agree[1:].mean() < 0.4
        assert (answer.audio.codes[:, 0] == -1).all()
        assert answer.audio.scored[:, 1:].all()
        # Scored over the same frames: behind the shorter ones there is silence, the same codes in each.
        last = answer.audio.codes[:, 1:9, -1]
        assert max(np.unique(last, axis=0, return_counts=True)[1]) >= 2
