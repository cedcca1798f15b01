"""Pairs: what is asked for was told, once, in time, and can be known from the recording alone; all of it is there."""

import numpy as np
import pytest

from ttt_jax.data import pairs
from ttt_jax.data.reader import open_dataset
from ttt_jax.data.text import load_tokenizer
from ttt_jax.evaluation.answers import find_answers

SIZES = {"frames": 600, "keys": 5, "min_gap": 4, "max_gap": 64}
OWN, KEYS, CODES = slice(1, 9), 9, 10


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pairs") / "dataset"
    pairs.make(directory, recordings=21, seed=3, **SIZES)
    return directory


@pytest.fixture(scope="module")
def tokenizer(directory):
    return load_tokenizer(directory / "tokenizer.model")


@pytest.mark.parametrize("seed", range(4))
def test_each_fact_is_asked_for_once_in_time_and_no_key_means_two(seed):
    waiting, asked = {}, []
    happening = pairs.events(np.random.default_rng(seed), **SIZES)
    for event in happening:
        assert 0 <= event.frame < SIZES["frames"] - 1
        assert 0 <= event.key < SIZES["keys"]
        if event.value is None:
            told = waiting.pop(event.key)
            assert event.fact == told.fact
            asked.append(event.frame + 1 - told.frame)
        else:
            assert event.key not in waiting
            waiting[event.key] = event
    assert len({event.frame for event in happening}) == len(happening)
    assert min(asked) >= SIZES["min_gap"]
    assert max(asked) <= SIZES["max_gap"] + pairs.FRAMES_PER_EVENT * SIZES["keys"]
    assert [event.fact for event in happening if event.value is not None] == list(range(len(asked) + len(waiting)))


def test_gaps_are_as_often_in_each_octave():
    happening = pairs.events(np.random.default_rng(0), frames=100_000, keys=64, min_gap=4, max_gap=256)
    told = {event.fact: event.frame for event in happening if event.value is not None}
    gaps = [event.frame + 1 - told[event.fact] for event in happening if event.value is None]
    counts = np.histogram(gaps, 2.0 ** np.arange(3, 8))[0]  # but at the ends, where whole frames are coarse
    np.testing.assert_allclose(counts / counts.sum(), 1 / 4, atol=0.012)


def test_the_benchmark_finds_every_answer_and_a_table_of_what_was_told_knows_it(directory, tokenizer):
    dataset = open_dataset(directory, "train")
    for number in range(3):
        recording = dataset[number]
        keys, values = recording.codes[KEYS], recording.codes[CODES]
        questions = np.flatnonzero(values == pairs.QUESTION)
        answers = find_answers(recording, dataset.info, tokenizer, synthesize=False)
        assert [answer.frame - 1 for answer in answers] == questions.tolist()
        assert len(answers) > 100
        table, answer_of = {}, {answer.frame: answer for answer in answers}
        for frame in range(recording.codes.shape[1]):
            if frame in answer_of:
                answer = answer_of[frame]
                told, value = table[keys[frame - 1]]
                assert answer.text is not None
                assert answer.text.codes[:, 0, 0].tolist()[0] == recording.codes[0, frame]
                assert tokenizer.decode([int(recording.codes[0, frame])]) == pairs.VALUES[value]
                assert answer.gap_s * 12.5 == pytest.approx(frame - told - 1)  # from the end of the frame that told it
                assert (answer.heard, answer.num_mentions, len(answer.text.codes)) == (True, 1, len(pairs.VALUES))
                assert answer.text.scored.sum(axis=(1, 2)).tolist() == [1] * len(pairs.VALUES)
            if 0 <= values[frame] < pairs.QUESTION:
                table[keys[frame]] = frame, values[frame]
        assert (recording.codes[OWN] == -1).all()
        assert (recording.codes[CODES + 1 :] == -1).all()
        np.testing.assert_array_equal(keys >= 0, values >= 0)


def test_a_recording_follows_from_the_seed_and_its_index(directory, tmp_path):
    assert [len(open_dataset(directory, split)) for split in ("train", "validation", "test")] == [18, 2, 1]
    pairs.make(tmp_path / "longer", recordings=25, seed=3, **SIZES)
    pairs.make(tmp_path / "other", recordings=3, seed=4, **SIZES)
    codes = [open_dataset(path, "test")[0].codes for path in (directory, tmp_path / "longer", tmp_path / "other")]
    np.testing.assert_array_equal(codes[0], codes[1])
    assert (codes[0] != codes[2]).any()
    assert (codes[0] != open_dataset(tmp_path / "longer", "test")[1].codes).any()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"keys": 0}, r"keys: expected an integer in \[1, 512\].*got 0"),
        ({"keys": 513}, r"keys: expected an integer in \[1, 512\].*got 513"),
        ({"min_gap": 2}, r"min_gap: expected an integer >= 3, got 2"),
        ({"max_gap": 3}, r"max_gap: expected an integer >= 4, got 3"),
        ({"frames": 6}, r"frames: expected an integer >= 7, got 6"),
        ({"recordings": 2}, r"recordings: expected an integer >= 3, one for each split, got 2"),
    ],
)
def test_sizes_that_cannot_be_are_refused_and_nothing_is_written(changed, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        pairs.make(tmp_path / "dataset", **{**SIZES, **changed})
    assert not list(tmp_path.iterdir())


def test_a_dataset_that_is_there_is_kept(directory):
    with pytest.raises(FileExistsError, match="exists; choose another directory"):
        pairs.make(directory, **SIZES)


def test_a_guess_among_the_values_that_wait_is_right_in_28_percent():
    """What a memory of values without keys is worth: more than chance, and far less than knowing."""
    right = []
    for number in range(100):
        waiting = {}
        for event in pairs.events(np.random.default_rng((0, number)), frames=128, keys=8, min_gap=4, max_gap=64):
            if event.value is not None:
                waiting[event.fact] = event.value
            else:
                values = list(waiting.values())
                right.append(values.count(waiting.pop(event.fact)) / len(values))
    assert np.mean(right) == pytest.approx(0.28, abs=0.01)
