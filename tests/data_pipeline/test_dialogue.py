import dataclasses

import numpy as np
import pytest

from ttt_jax.data import dialogue, topics
from ttt_jax.data.lexicon import LISTS


def outline(index, minutes=20.0, seed=3):
    return dialogue.Outline(seed, index, minutes, dialogue.split_of(index))


def said(script, mark, turn):
    return " ".join(script.turns[turn].words[mark.first : mark.last + 1]).strip(".,!?")


def marks(script):
    return [(i, turn, mark) for i, turn in enumerate(script.turns) for mark in turn.marks]


@pytest.mark.parametrize("index", [0, 1, 4, 7])
def test_every_fact_is_stated_then_asked_for_and_answered(index):
    script = outline(index).script()
    facts = script.metadata["facts"]
    assert len(facts) == 10
    for number, fact in enumerate(facts):
        mine = [(i, turn, mark) for i, turn, mark in marks(script) if mark.label["fact"] == number]
        roles = [mark.label["role"] for _, _, mark in mine]
        assert roles[:-2] == ["mention"] * len(roles[:-2])
        assert roles[0] == "mention"
        assert roles[-2:] == ["question", "answer"]
        for i, turn, mark in mine:
            role = mark.label["role"]
            assert turn.speaker == {"mention": fact["owner"], "question": "other", "answer": "main"}[role]
            if role != "question":
                assert said(script, mark, i) == fact["value"]
        assert fact["value"] not in fact["distractors"]
        assert len(set(fact["distractors"])) == len(fact["distractors"]) >= 5


def test_questions_come_minutes_later():
    gaps = []
    for index in range(0, 30, 6):
        script = outline(index, minutes=40.0).script()
        letters = (
            np.cumsum([sum(len(w) + 1 for w in turn.words) for turn in script.turns]) * dialogue._SECONDS_PER_LETTER
        )
        for number in range(len(script.metadata["facts"])):
            mine = [(i, m.label["role"]) for i, _, m in marks(script) if m.label["fact"] == number]
            last_mention = max(i for i, role in mine if role == "mention")
            first_mention = min(i for i, role in mine if role == "mention")
            asked = next(i for i, role in mine if role == "question")
            assert last_mention < asked
            gaps.append((letters[asked] - letters[first_mention]) / 60)
    assert np.median(gaps) > 8
    assert np.min(gaps) > 2


def test_text_depends_on_seed_and_index_alone():
    first = outline(4).script()
    outline(5).script()
    assert outline(4).script() == first
    assert outline(5).script().turns != first.turns
    assert outline(4, seed=4).script().turns != first.turns


def test_length_is_near_the_outline():
    for minutes in (1.0, 10.0, 60.0):
        turns = outline(0, minutes=minutes).script().turns
        letters = sum(len(word) + 1 for turn in turns for word in turn.words)
        seconds = letters * dialogue._SECONDS_PER_LETTER + sum(turn.pause_s for turn in turns)
        assert 60 * minutes <= seconds < 60 * minutes + 60


def test_test_recordings_have_voices_and_facts_of_their_own():
    train_words, unseen = set(), set()
    for index in range(36):
        script = outline(index).script()
        names = {voice.name for voice in script.voices.values()}
        assert len(names) == 2
        if dialogue.split_of(index) == "test":
            assert names <= set(dialogue.TEST_VOICES)
            unseen |= {fact["value"] for fact in script.metadata["facts"] if fact["held_out"]}
        else:
            assert names <= set(dialogue.TRAIN_VOICES)
            assert not any(fact["held_out"] for fact in script.metadata["facts"])
            train_words |= {word.strip(".,?!") for turn in script.turns for word in turn.words}
    assert len(unseen) > 10
    assert not unseen & train_words
    assert not set(dialogue.TEST_VOICES) & set(dialogue.TRAIN_VOICES)


def test_outlines_fill_the_hours_and_every_split():
    outlines = dialogue.outlines(0, 8.0, 5.0, 60.0)
    minutes = np.array([o.minutes for o in outlines])
    assert minutes[:-1].sum() < 480 <= minutes.sum()
    assert minutes.min() >= 5
    assert minutes.max() <= 60
    assert {o.split for o in outlines} == {"train", "validation", "test"}
    assert [o.split for o in dialogue.outlines(0, 0.0, 1.0, 1.0)] == ["train", "test"]
    longer = dialogue.outlines(0, 16.0, 5.0, 60.0)
    assert longer[: len(outlines)] == outlines


def test_every_slot_and_fact_list_exists():
    for exchanges in topics.TOPICS.values():
        for exchange in exchanges:
            for _, line in exchange:
                for slot in dialogue.re.findall(r"\{(\w+)\}", line):
                    assert slot.rstrip("2") in LISTS, slot
    assert all(fact["list"] in LISTS for fact in topics.FACTS.values())
    assert all(len(set(words)) == len(words) for words in LISTS.values())


def test_vocabulary_is_wide():
    words = {word for turn in outline(0, minutes=600.0).script().turns for word in turn.words}
    assert len({word.strip(".,?!") for word in words}) > 800
    assert dataclasses.is_dataclass(dialogue.Script)
