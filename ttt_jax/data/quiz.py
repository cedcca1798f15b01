"""Facts told and asked for aloud, one after the other: pairs (`ttt_jax.data.pairs`) that have to be heard.

    python -m ttt_jax.data.quiz --output=DIR

The other speaker says a key and its value ("red four"), the main speaker repeats it; later the other says the key alone
("red?") and the main speaker answers with both ("red four"). There is nothing else, so this lies between pairs, which
need no hearing, and conversations (`ttt_jax.data.conversations`), where little of what is said is ever asked for. Keys
and values are drawn anew each time, and each fact is asked for once; gaps are about as frequent in each octave.
An answer is one utterance, so how its key sounds tells a little of its value: without a memory 16 to 25 % are right,
not 10 (README.md).

Voices are those of conversations, other ones in test recordings. Each recording follows from (seed, index) alone. A
rerun of the same command resumes. Exit codes: 0 done, 1 an error.
"""

import dataclasses
import functools
import pathlib
import tempfile

import numpy as np
from absl import flags

from ttt_jax import programs
from ttt_jax.data import dialogue, pairs, pipeline, text
from ttt_jax.data.codecs import Codec2
from ttt_jax.data.conversations import Conversation
from ttt_jax.data.splits import split_of
from ttt_jax.data.topics import MAIN, OTHER

KEYS = ("red", "blue", "green", "black", "white", "yellow", "brown", "orange", "purple", "silver", "pink", "golden")
PAUSES_S = (0.1, 0.2)
EXCHANGE_S = 1.5
"""How long an exchange of either kind is with its pauses, on average: measured."""


@dataclasses.dataclass(frozen=True)
class Outline:
    """Which quiz to hold: about how long, with how many keys and after which gaps."""

    seed: int
    index: int
    seconds: float
    keys: int
    min_gap_s: float
    max_gap_s: float

    @property
    def name(self) -> str:
        """The recording's id."""
        return f"quiz-{self.seed}-{self.index:05d}"

    @property
    def split(self) -> str:
        """The split that it belongs to."""
        return split_of(self.index)

    @property
    def minutes(self) -> float:
        """About how long it is."""
        return self.seconds / 60

    @property
    def version(self) -> str:
        """Of what is said, beside the name."""
        return f"{self.seconds} {self.keys} {self.min_gap_s} {self.max_gap_s}"

    def script(self) -> dialogue.Script:
        """Write the quiz."""
        rng = np.random.default_rng((self.seed, self.index))
        voices = dialogue.draw_voices(rng, self.split)
        turns: list[dialogue.Turn] = []
        facts: list[dict] = []

        def say(speaker: str, words: tuple[str, ...], marked: int, fact: int, role: str) -> None:
            mark = dialogue.Mark(marked, marked, {"fact": fact, "role": role})
            turns.append(dialogue.Turn(speaker, words, float(rng.choice(PAUSES_S)), (mark,)))

        sizes = {"seconds": self.seconds, "keys": self.keys}
        for event in events(rng, **sizes, min_gap_s=self.min_gap_s, max_gap_s=self.max_gap_s):
            key = KEYS[event.key]
            if event.value is not None:
                facts.append({**pairs.fact(pairs.VALUES[event.value]), "answer": f"{key} {{value}}."})
            fact = facts[event.fact]
            told = tuple(fact["answer"].format(value=fact["value"]).split())
            if event.value is not None:
                say(OTHER, told, 1, event.fact, "mention")
                say(MAIN, told, 1, event.fact, "mention")
            else:
                say(OTHER, (f"{key}?",), 0, event.fact, "question")
                say(MAIN, told, 1, event.fact, "answer")
        metadata = {
            "split": self.split,
            "voices": {speaker: dataclasses.asdict(voice) for speaker, voice in voices.items()},
            "facts": facts,
        }
        return dialogue.Script(voices, tuple(turns), metadata)


def events(
    rng: np.random.Generator, *, seconds: float, keys: int, min_gap_s: float, max_gap_s: float
) -> list[pairs.Event]:
    """`pairs.events` in milliseconds, each event as long as an exchange is on average.

    Raises:
        ValueError: a size that cannot be.
    """
    if not 1 <= keys <= len(KEYS):
        raise ValueError(f"keys: expected an integer in [1, {len(KEYS)}], got {keys}")
    for name, value, least in (
        ("min_gap_s", min_gap_s, EXCHANGE_S + 0.001),
        ("max_gap_s", max_gap_s, min_gap_s),
        ("seconds", seconds, EXCHANGE_S + min_gap_s + 0.001),
    ):
        if not least <= value < float("inf"):
            raise ValueError(f"{name}: expected at least {least:g}, got {value:g}")
    frames, min_gap, max_gap, per_event = (round(1000 * s) for s in (seconds, min_gap_s, max_gap_s, EXCHANGE_S))
    return pairs.events(rng, frames=frames, keys=keys, min_gap=min_gap, max_gap=max_gap, frames_per_event=per_event)


def make(
    output: pathlib.Path,
    *,
    recordings: int,
    seed: int = 0,
    seconds: float = 36.0,
    keys: int = 8,
    min_gap_s: float = 1.75,
    max_gap_s: float = 24.0,
    workers: int = 1,
) -> None:
    """Writes the dataset or goes on writing it; arguments are the program's flags.

    Raises:
        ValueError: a size that cannot be, or the directory was begun with other ones.
    """
    if recordings < 3:
        raise ValueError(f"recordings: expected an integer >= 3, one for each split, got {recordings}")
    sizes = {"seconds": seconds, "keys": keys, "min_gap_s": min_gap_s, "max_gap_s": max_gap_s}
    events(np.random.default_rng(0), **sizes)  # errors, before anything is written
    outlines = [Outline(seed, index, **sizes) for index in range(recordings)]
    splits = {outline.name: outline.split for outline in outlines}
    settings = {"program": "ttt_jax.data.quiz", "recordings": recordings, "seed": seed, **sizes}
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = pathlib.Path(directory) / "tokenizer.model"
        tokenizer.write_bytes(text.tokenizer_of_words((*KEYS, *pairs.VALUES)))
        plan = pipeline.Plan(output, settings, Codec2(), tokenizer, vocab_size=0, workers=workers)
        pipeline.build(plan, [Conversation(o, None) for o in outlines], lambda ids: {i: splits[i] for i in ids})


def define_flags() -> dict[str, flags.FlagHolder]:
    """The program's flags, defined only where it runs as one."""
    holders = (
        flags.DEFINE_string("output", None, "Directory of the dataset.", required=True),
        flags.DEFINE_integer("recordings", 2400, "Recordings, in all splits together.", lower_bound=3),
        flags.DEFINE_integer("seed", 0, "Seed of the whole dataset.", lower_bound=0),
        flags.DEFINE_float("seconds", 36.0, "About how long a recording is.", lower_bound=0.0),
        flags.DEFINE_integer("keys", 8, "Keys; as many facts wait for their questions at most.", lower_bound=1),
        flags.DEFINE_float("min_gap_s", 1.75, "About the least seconds from a fact to its answer.", lower_bound=0.0),
        flags.DEFINE_float("max_gap_s", 24.0, "About the most seconds from a fact to its answer.", lower_bound=0.0),
        flags.DEFINE_integer("workers", None, "Recordings at a time; by default one a core.", lower_bound=1),
    )
    return {holder.name: holder for holder in holders}


def main(holders: dict[str, flags.FlagHolder]) -> None:
    """Run the program."""
    values = {name: holder.value for name, holder in holders.items()}
    values["output"] = pathlib.Path(values["output"])
    values["workers"] = values["workers"] or pipeline.default_workers(Codec2.name)
    make(**values)


if __name__ == "__main__":
    from ttt_jax.data import quiz  # under its own name, so that other processes can unpickle its classes

    holders = quiz.define_flags()
    flags.adopt_module_key_flags(quiz)  # for --help
    programs.run(functools.partial(quiz.main, holders))
