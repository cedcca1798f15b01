import time

import numpy as np
import pytest

from ttt_jax.data import dialogue, processes, speech
from ttt_jax.data.speech import Voice, word_starts

VOICE = Voice("en-us+f4", 175, 50)


def test_events_give_their_words_starts():
    assert word_starts(["ab", "c", "def"], [(0, 100), (3, 500), (5, 900)], 2000).tolist() == [100, 500, 900]


def test_words_spoken_as_one_share_the_time_by_their_letters():
    # "for the" has one event: its 8 letters (spaces counted) take 800 samples, so "the" starts 400 after "for".
    assert word_starts(["for", "the", "door"], [(0, 0), (8, 800)], 2000).tolist() == [0, 400, 800]


def test_an_event_in_a_word_that_has_one_belongs_to_the_next():
    assert word_starts(["I", "live", "in", "Rome"], [(0, 0), (2, 10), (3, 20), (10, 30)], 99).tolist() == [
        0,
        10,
        20,
        30,
    ]


def test_without_events_all_share_the_time():
    assert word_starts(["ab", "cd"], [], 600).tolist() == [0, 300]


def test_word_times_match_the_sound():
    """Commas leave silence in front of the words, so their true starts can be heard."""
    words = ["red,", "apple,", "blue,", "garden,", "code,", "music."]
    utterance = speech.espeak().say(words, VOICE)
    loud = np.abs(utterance.wav)
    rate = speech.espeak().sample_rate_hz
    assert len(utterance.spans) == len(words)
    for (_, end), (start, _) in zip(utterance.spans[:-1], utterance.spans[1:], strict=True):
        assert start > end
        assert loud[end:start].max() <= 64 / 32768
    for start, end in utterance.spans:
        assert loud[start:end].mean() > 0.02
        assert loud[start : start + rate // 20].max() > 64 / 32768  # sound sets in within 50 ms
    assert utterance.spans[0, 0] == 0
    assert utterance.spans[-1, 1] == len(utterance.wav)


def test_times_grow_along_running_speech():
    words = [
        "by",
        "the",
        "way,",
        "the",
        "code",
        "for",
        "my",
        "door",
        "is",
        "four",
        "seven",
        "one",
        "nine",
        "and",
        "I",
        "live",
        "in",
        "the",
        "old",
        "house",
        "of",
        "my",
        "sister.",
    ]
    utterance = speech.espeak().say(words, VOICE)
    starts, ends = utterance.spans.T
    assert (np.diff(starts) > 0).all()
    assert (ends > starts).all()
    assert (ends[:-1] <= starts[1:]).all()


def test_bad_input():
    with pytest.raises(ValueError, match="none named 'xx-nowhere'"):
        speech.espeak().say(["hello"], Voice("xx-nowhere", 175, 50))
    with pytest.raises(ValueError, match=r"no sound|could not speak"):
        speech.espeak().say(["..."], VOICE)


BREATHY = "en-us+f5"  # its breath is noise, which espeak-ng seeds with the second unless told otherwise
VOICES = (BREATHY, *dialogue.TRAIN_VOICES, *dialogue.TEST_VOICES)


def _speak(name, path):
    words = ["hello,", "my", "name", "is", "Anna."]
    utterances = [speech.espeak().say(words, Voice(voice, 175, 50)) for voice in (name, VOICE.name, name)]
    np.savez(path, *[u.wav for u in utterances], *[u.spans for u in utterances])


def test_a_fresh_process_always_says_the_same(tmp_path):
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        tasks = [(name, _speak, (name, tmp_path / folder / f"{name}.npz")) for name in VOICES]
        assert sorted(processes.run_in_fresh_processes(tasks, 2)) == sorted(VOICES)
        time.sleep(1.0)  # into another second
    for name in VOICES:
        first, second = (np.load(tmp_path / folder / f"{name}.npz") for folder in ("first", "second"))
        for key in first.files:
            np.testing.assert_array_equal(first[key], second[key], err_msg=name)
