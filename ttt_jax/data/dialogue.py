"""What is said in a conversation: a pure function of (seed, index), independent of how it is synthesized."""

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from ttt_jax.data import topics
from ttt_jax.data.lexicon import LISTS
from ttt_jax.data.speech import Voice

SPEAKERS = (topics.MAIN, topics.OTHER)
TRAIN_VOICES = (
    "en-us+m1", "en-us+m2", "en-us+m3", "en-us+m4", "en-us+m6", "en-us+m7",
    "en-us+f1", "en-us+f4", "en-us+linda", "en-us+steph", "en-us+Annie", "en-us+Andy",
)  # fmt: skip
TEST_VOICES = ("en-us+m5", "en-us+m8", "en-us+john", "en-us+steph2", "en-us+belinda", "en-us+shelby")
RATES_WPM = (165, 175, 185)
PITCHES = (35, 45, 55, 65)
PAUSES_S = (0.24, 0.4)
_HELD_OUT_EVERY = 5  # every fifth value of a list is a fact of test recordings only, and fills no slot anywhere
_NUM_DISTRACTORS = 9
_SECONDS_PER_LETTER = 0.0555  # of text, spaces counted, at 175 words per minute; measured
_ZIPF_EXPONENT = 1.1
_FILLER_PROBABILITY = 0.3
_REPEAT_PROBABILITY = 0.3
_SHORTEST_GAP_S = 5.0  # between a statement and its further questions


class Plan(Protocol):
    """A recording that can be spoken: `Outline`, or that of another module."""

    @property
    def name(self) -> str:
        """The recording's id."""
        ...

    @property
    def version(self) -> str:
        """Changes whenever what is said under this name may have."""
        ...

    @property
    def minutes(self) -> float:
        """About how long it is."""
        ...

    def script(self) -> "Script":
        """What is said in it."""
        ...


@dataclasses.dataclass(frozen=True)
class Outline:
    """Which recording to write, how long about, for which split, and how densely facts are planted and asked for."""

    seed: int
    index: int
    minutes: float
    split: str
    facts_per_minute: float = 0.5
    questions_per_fact: int = 1

    @property
    def name(self) -> str:
        """The recording's id."""
        return f"conversation-{self.seed}-{self.index:05d}"

    @property
    def version(self) -> str:
        """Of what is said, beside the name."""
        return f"{self.minutes} {self.facts_per_minute} {self.questions_per_fact}"

    def script(self) -> "Script":
        """Write the conversation."""
        return _Writer(self).script()


@dataclasses.dataclass(frozen=True)
class Mark:
    """Words `first` to `last` of a turn carry a fact; `label` says which and in what role."""

    first: int
    last: int
    label: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Turn:
    """One speaker's words, punctuation attached, and the silence after them in seconds."""

    speaker: str
    words: tuple[str, ...]
    pause_s: float
    marks: tuple[Mark, ...] = ()


@dataclasses.dataclass(frozen=True)
class Script:
    """A whole conversation; `metadata` holds the voices, the topics and the planted facts."""

    voices: dict[str, Voice]
    turns: tuple[Turn, ...]
    metadata: dict[str, Any]


def split_of(index: int) -> str:
    """Two of twelve recordings are test, one is validation; the first two are train and test."""
    if index % 6 == 1:
        return "test"
    return "validation" if index % 12 == 4 else "train"


def outlines(seed: int, hours: float, min_minutes: float, max_minutes: float, **density) -> list[Outline]:
    """As many recordings as make up the hours, at least two; lengths are log-uniform between the limits.

    `density` is `facts_per_minute` and `questions_per_fact` of every `Outline`.
    """
    found: list[Outline] = []
    minutes = 0.0
    while minutes < 60 * hours or len(found) < 2:
        rng = np.random.default_rng((seed, len(found), 0))
        length = float(np.exp(rng.uniform(np.log(min_minutes), np.log(max_minutes))))
        found.append(Outline(seed, len(found), length, split_of(len(found)), **density))
        minutes += length
    return found


def held_out(kind: str) -> tuple[str, ...]:
    """Values of a list that only test recordings state as facts; no other text holds them."""
    return LISTS[kind][_HELD_OUT_EVERY - 1 :: _HELD_OUT_EVERY] if kind != "digit" else ()


@functools.cache
def common(kind: str) -> tuple[str, ...]:
    """The other values of a list."""
    return tuple(word for word in LISTS[kind] if word not in _all_held_out())


@functools.cache
def _all_held_out() -> frozenset[str]:
    return frozenset(w for fact in topics.FACTS.values() for w in held_out(fact["list"]))


def draw_voices(rng: np.random.Generator, split: str) -> dict[str, Voice]:
    """Each speaker's voice; test recordings have voices of their own."""
    names = TEST_VOICES if split == "test" else TRAIN_VOICES
    chosen = rng.choice(len(names), 2, replace=False)
    return {
        speaker: Voice(names[i], int(rng.choice(RATES_WPM)), int(rng.choice(PITCHES)))
        for speaker, i in zip(SPEAKERS, chosen, strict=True)
    }


class _Writer:
    def __init__(self, outline: Outline):
        self.outline = outline
        self.rng = np.random.default_rng((outline.seed, outline.index, 1))
        self.turns: list[Turn] = []
        self.seconds = 0.0

    def script(self) -> Script:
        voices = draw_voices(self.rng, self.outline.split)
        facts = self._facts()
        pending = self._appointments(facts)
        self._exchange(topics.OPENING)
        order: list[str] = []
        for name, exchange in self._small_talk():
            if self.seconds >= 60 * self.outline.minutes:
                break
            if not order or order[-1] != name:
                order.append(name)
            self._exchange(exchange)
            while pending and pending[0][0] <= self.seconds:
                _, action, number = pending.pop(0)
                action(facts[number], number)
        for _, action, number in pending:  # a last question may be due after the end of a short recording
            action(facts[number], number)
        self._exchange(topics.CLOSING)
        metadata = {
            "split": self.outline.split,
            "voices": {speaker: dataclasses.asdict(voice) for speaker, voice in voices.items()},
            "topics": order,
            "facts": facts,
        }
        return Script(voices, tuple(self.turns), metadata)

    def _facts(self) -> list[dict[str, Any]]:
        """The planted facts, each of another (kind, owner); in test recordings half of them have held-out values."""
        pairs = [(kind, owner) for kind in topics.FACTS for owner in SPEAKERS]
        count = int(np.clip(round(self.outline.facts_per_minute * self.outline.minutes), 1, len(pairs)))
        return [self._fact(*pairs[i]) for i in self.rng.permutation(len(pairs))[:count]]

    def _fact(self, kind: str, owner: str) -> dict[str, Any]:
        source = topics.FACTS[kind]["list"]
        unseen = self.outline.split == "test" and self.rng.random() < 0.5 and bool(held_out(source))
        if "words" in topics.FACTS[kind]:
            size = topics.FACTS[kind]["words"]
            many = [" ".join(self.rng.choice(common(source), size)) for _ in range(3 * _NUM_DISTRACTORS)]
            drawn = list(dict.fromkeys(many))
        else:
            groups = [held_out(source), common(source)] if unseen else [common(source)]
            drawn = [values[i] for values in groups for i in self.rng.permutation(len(values))]
        value, *distractors = drawn[: 1 + _NUM_DISTRACTORS]
        return {"kind": kind, "owner": owner, "value": value, "held_out": unseen, "distractors": distractors}

    def _appointments(self, facts: list[dict[str, Any]]) -> list[tuple]:
        """When each fact is stated, restated and asked for, in order of time.

        Facts are stated in the first 60 % and asked for later, at any distance that the recording allows; further
        questions come at log-uniform distances, so that every gap from seconds on has its share.
        """
        total = 60 * self.outline.minutes
        plan = []
        for number in range(len(facts)):
            stated = self.rng.uniform(0, 0.6 * total)
            asked = self.rng.uniform(stated + 0.25 * (total - stated), total)
            plan.append((stated, self._state, number))
            if self.rng.random() < _REPEAT_PROBABILITY:
                plan.append((self.rng.uniform(stated, asked), self._state, number))
            plan.append((asked, self._ask, number))
            for _ in range(self.outline.questions_per_fact - 1):
                gap = np.exp(self.rng.uniform(np.log(_SHORTEST_GAP_S), np.log(total - stated)))
                plan.append((stated + gap, self._ask, number))
        return sorted(plan, key=lambda item: item[0])

    def _state(self, fact: dict[str, Any], number: int) -> None:
        own = fact["owner"] == topics.MAIN
        line = topics.FACTS[fact["kind"]]["own" if own else "their"][0]
        self._say(fact["owner"], line, {"fact": number, "role": "mention"}, fact["value"])
        if own:
            self._say(topics.OTHER, topics.ACKNOWLEDGE_OWN)
        else:
            self._say(topics.MAIN, topics.ACKNOWLEDGE_THEIR)

    def _ask(self, fact: dict[str, Any], number: int) -> None:
        own = fact["owner"] == topics.MAIN
        _, question, answer = topics.FACTS[fact["kind"]]["own" if own else "their"]
        self._say(topics.OTHER, "tell me, " + question, {"fact": number, "role": "question"})
        self._say(topics.MAIN, "as I remember it, " + answer, {"fact": number, "role": "answer"}, fact["value"])

    def _small_talk(self) -> Iterator[tuple[str, tuple]]:
        """Topics in random order, again and again; their exchanges in order, some left out."""
        names = list(topics.TOPICS)
        while True:
            for i in self.rng.permutation(len(names)):
                first, *others = topics.TOPICS[names[i]]
                yield names[i], first
                for exchange in others:
                    if self.rng.random() < 0.8:
                        yield names[i], exchange

    def _exchange(self, exchange: tuple[tuple[str, str], ...]) -> None:
        filled: dict[str, str] = {}
        for speaker, line in exchange:
            self._say(speaker, re.sub(r"\{(\w+)\}", lambda match: self._slot(match[1], filled), line))

    def _slot(self, slot: str, filled: dict[str, str]) -> str:
        """The slot's word in this exchange; `tool2` is another tool than `tool`."""
        if slot not in filled:
            values = [value for value in common(slot.rstrip("2")) if value not in filled.values()]
            weights = 1 / np.arange(1, len(values) + 1) ** _ZIPF_EXPONENT
            filled[slot] = values[int(self.rng.choice(len(values), p=weights / weights.sum()))]
        return filled[slot]

    def _say(self, speaker: str, line: str, label: dict[str, Any] | None = None, value: str | None = None) -> None:
        """Add a turn; with a label, the words of `value` (else of the whole line) are marked."""
        words: list[str] = []
        if label is None and self.rng.random() < _FILLER_PROBABILITY:
            words += topics.FILLERS[int(self.rng.integers(len(topics.FILLERS)))].split()
        first = len(words)
        last = -1
        for word in line.split():
            if word.startswith("{value}") and value is not None:
                first = len(words)
                words += (value + word.removeprefix("{value}")).split()
                last = len(words) - 1
            else:
                words.append(word)
        marks = () if label is None else (Mark(first, last if last >= 0 else len(words) - 1, label),)
        pause = float(self.rng.choice(PAUSES_S))
        self.turns.append(Turn(speaker, tuple(words), pause, marks))
        self.seconds += _SECONDS_PER_LETTER * sum(len(word) + 1 for word in words) + pause
