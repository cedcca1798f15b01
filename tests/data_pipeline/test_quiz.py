"""A quiz: what is asked for was told before, both aloud; the benchmark finds the answers in what was tokenized."""

import dataclasses

import numpy as np
import pytest

from ttt_jax.data import dialogue, pairs, quiz
from ttt_jax.data.reader import open_dataset
from ttt_jax.data.text import load_tokenizer
from ttt_jax.evaluation.answers import find_answers

SIZES = {"seconds": 12.0, "keys": 4, "min_gap_s": 1.75, "max_gap_s": 8.0}


def outline(index, **changed):
    return quiz.Outline(3, index, **{**SIZES, **changed})


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("quiz") / "dataset"
    quiz.make(directory, recordings=3, seed=3, workers=2, **SIZES)
    return directory


@pytest.mark.parametrize("index", range(4))
def test_the_answer_is_the_value_last_told_with_the_key(index):
    told, waiting, asked = {}, set(), []
    turns = outline(index, seconds=120.0, keys=12).script().turns
    for first, second in zip(turns[::2], turns[1::2], strict=True):
        assert (first.speaker, second.speaker) == ("other", "main")
        (question,), (answer,) = first.marks, second.marks
        assert question.label["fact"] == answer.label["fact"]
        roles = question.label["role"], answer.label["role"]
        if roles == ("mention", "mention"):
            key, value = first.words
            assert key not in waiting
            assert second.words == first.words
            assert (first.words[question.first], second.words[answer.first]) == (value, value)
            waiting.add(key)
            told[key] = value, question.label["fact"]
        else:
            assert roles == ("question", "answer")
            key = first.words[0].removesuffix("?")
            assert second.words[0] == key
            assert (second.words[answer.first], answer.label["fact"]) == told[key]
            waiting.remove(key)
            asked.append(answer.label["fact"])
    assert len(set(asked)) == len(asked) > 30


def test_voices_of_test_recordings_are_their_own():
    for index in range(40):
        names = {voice.name for voice in outline(index).script().voices.values()}
        assert len(names) == 2
        assert names <= set(dialogue.TEST_VOICES if outline(index).split == "test" else dialogue.TRAIN_VOICES)


def test_gaps_are_about_what_was_asked_for(directory):
    """Told in estimated seconds: an exchange lasts half a second more or less than that."""
    dataset = open_dataset(directory, "train")
    tokenizer = load_tokenizer(directory / "tokenizer.model")
    recording = dataset[0]
    answers = find_answers(recording, dataset.info, tokenizer, synthesize=False)
    assert recording.codes.shape[1] / 12.5 == pytest.approx(SIZES["seconds"], rel=0.25)
    assert len(answers) >= 2
    for answer in answers:
        assert 0.3 < answer.gap_s < 1.5 * SIZES["max_gap_s"]


def test_the_benchmark_finds_the_answers_as_text_where_they_are_spoken(directory):
    tokenizer = load_tokenizer(directory / "tokenizer.model")
    for split in ("train", "validation", "test"):
        dataset = open_dataset(directory, split)
        recording = dataset[0]
        answered = [event for event in recording.metadata["spoken"] if event["role"] == "answer"]
        answers = find_answers(recording, dataset.info, tokenizer, synthesize=False)
        assert [answer.frame for answer in answers] == [event["start_frame"] for event in answered]
        for answer, event in zip(answers, answered, strict=True):
            value = recording.metadata["facts"][event["fact"]]["value"]
            assert tokenizer.decode([int(recording.codes[0, answer.frame])]) == value
            assert answer.text is not None
            assert len(answer.text.codes) == len(pairs.VALUES)
        silence = recording.codes[1:9, 0]  # the other begins
        assert (recording.codes[1:9] != silence[:, None]).any(0).sum() > 4 * len(answered)


def test_a_recording_follows_from_the_seed_and_its_index(directory, tmp_path):
    again = tmp_path / "again"
    quiz.make(again, recordings=4, seed=3, **SIZES)
    for split in ("train", "validation", "test"):
        one, other = (open_dataset(path, split)[0] for path in (directory, again))
        assert one.id == other.id
        np.testing.assert_array_equal(one.codes, other.codes)
    assert outline(1).script() != dataclasses.replace(outline(1), seed=4).script()
    assert outline(1).script() != outline(2).script()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"keys": 0}, r"keys: expected an integer in \[1, 12\], got 0"),
        ({"keys": 13}, r"keys: expected an integer in \[1, 12\], got 13"),
        ({"min_gap_s": 1.0}, r"min_gap_s: expected at least 1.501, got 1"),
        ({"max_gap_s": 1.7}, r"max_gap_s: expected at least 1.75, got 1.7"),
        ({"seconds": 2.0}, r"seconds: expected at least 3.251, got 2"),
        ({"recordings": 2}, r"recordings: expected an integer >= 3, one for each split, got 2"),
    ],
)
def test_sizes_that_cannot_be_are_refused_and_nothing_is_written(changed, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        quiz.make(tmp_path / "dataset", **{"recordings": 3, **SIZES, **changed})
    assert not list(tmp_path.iterdir())
