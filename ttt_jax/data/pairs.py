"""Facts that take one frame to tell and one to ask for: what a memory is worth where nothing else has to be learned.

    python -m ttt_jax.data.pairs --output=DIR

Where a model does not recall what conversations (`ttt_jax.data.conversations`) plant, its memory may be too small, or
it has not learned to find facts in speech. Here it need not: the other speaker's first codebook names a key and the
second its value, both in one frame; later the key comes again with `QUESTION`, and the value is the main speaker's word
in the frame after. Keys and values are drawn anew each time, so what is asked for cannot be known but from the
recording, and each fact is asked for once, `min_gap` to `max_gap` frames after it was told, as often in each octave.

The codes are in Codec2's ranges and all others -1: there is nothing to hear. Each recording follows from (seed, index)
alone. Exit codes: 0 done, 1 an error.
"""

import functools
import heapq
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from ttt_jax import programs
from ttt_jax.data import text, tokens
from ttt_jax.data.codecs import Codec2, info_of
from ttt_jax.data.splits import numbers_by_split
from ttt_jax.files import new_directory, write_atomically

VALUES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
"""Each is one token of the text stream."""
QUESTION = len(VALUES)
"""In the codebook of values."""
FRAMES_PER_EVENT = 2
"""A fact or a question, and the frame after it."""


class Event(NamedTuple):
    """A fact as it is told (it has a value), or the question about it."""

    frame: int
    key: int
    value: int | None
    fact: int  # counted from 0 as they are told


def events(
    rng: np.random.Generator,
    *,
    frames: int,
    keys: int,
    min_gap: int,
    max_gap: int,
    frames_per_event: int = FRAMES_PER_EVENT,
) -> list[Event]:
    """What a recording tells and asks, in order of time, the last answer in its last frame at the latest.

    Args:
        rng: draws keys, values and gaps.
        frames: of the recording.
        keys: that there are; a key that waits for its question is not told again, so as many facts wait at most.
        min_gap: least frames from a fact to its answer, at least `frames_per_event` + 1.
        max_gap: most frames, but where two questions were due at once: then one is late.
        frames_per_event: which events begin at multiples of.

    Raises:
        ValueError: a size that cannot be.
    """
    for name, value, least in (
        ("keys", keys, 1),
        ("min_gap", min_gap, frames_per_event + 1),
        ("max_gap", max_gap, min_gap),
        ("frames", frames, frames_per_event + min_gap + 1),
    ):
        if value < least:
            raise ValueError(f"{name}: expected an integer >= {least}, got {value}")
    found: list[Event] = []
    waiting: list[tuple[int, int, int]] = []  # when a question is due, its key and fact
    free, told = list(range(keys)), 0
    for frame in range(0, frames + 1 - frames_per_event, frames_per_event):
        if waiting and waiting[0][0] <= frame:
            _, key, fact = heapq.heappop(waiting)
            found.append(Event(frame, key, None, fact))
            free.append(key)
        elif free:
            key = free.pop(int(rng.integers(len(free))))
            found.append(Event(frame, key, int(rng.integers(len(VALUES))), told))
            gap = np.exp(rng.uniform(np.log(min_gap), np.log(max_gap)))
            heapq.heappush(waiting, (frame + round(gap) - 1, key, told))  # the answer comes a frame later
            told += 1
    return found


def fact(value: str) -> dict[str, Any]:
    """A fact as `ttt_jax.data.conversations` notes it; all other values are its distractors."""
    others = [other for other in VALUES if other != value]
    return {"kind": "pair", "owner": "other", "value": value, "held_out": False, "distractors": others}


def recording(number: int, happening: list[Event], frames: int, tokenizer) -> tokens.Recording:
    """The streams of what happens, and its facts and times as `ttt_jax.data.conversations` notes them."""
    rate = Codec2.frame_rate_hz
    codes = np.full((1 + 2 * Codec2.num_codebooks, frames), tokens.MISSING, np.int32)
    key_codes, value_codes = codes[1 + Codec2.num_codebooks : 3 + Codec2.num_codebooks]
    facts: list[dict[str, Any]] = []
    spoken: list[dict[str, Any]] = []
    words: list[text.Word] = []

    def note(event: Event, role: str, speaker: str, frame: int) -> None:
        times = {"start_s": frame / rate, "end_s": (frame + 1) / rate, "start_frame": frame, "end_frame": frame + 1}
        spoken.append({"fact": event.fact, "role": role, "speaker": speaker, **times})

    for event in happening:
        key_codes[event.frame] = event.key
        if event.value is not None:
            value_codes[event.frame] = event.value
            facts.append(fact(VALUES[event.value]))
            note(event, "mention", "other", event.frame)
        else:
            value_codes[event.frame] = QUESTION
            answer = event.frame + 1
            words.append(text.Word(facts[event.fact]["value"], answer / rate, (answer + 1) / rate))
            note(event, "question", "other", event.frame)
            note(event, "answer", "main", answer)
    codes[0] = text.text_stream(words, tokenizer, frames, rate)
    return tokens.Recording(f"pairs-{number:05d}", codes, {"facts": facts, "spoken": spoken})


def make(
    output: str | pathlib.Path,
    *,
    recordings: int = 8000,
    seed: int = 0,
    frames: int = 128,
    keys: int = 8,
    min_gap: int = 4,
    max_gap: int = 64,
) -> None:
    """Writes the dataset; see `events` for the arguments. It appears whole or not at all.

    Raises:
        FileExistsError: `output` exists.
        ValueError: a size that cannot be.
    """
    from ttt_jax.data.builder import TokenRecordings, write_records  # imports TFDS, which takes seconds
    from ttt_jax.data.pipeline import quiet

    if not 1 <= keys <= Codec2.card:
        raise ValueError(f"keys: expected an integer in [1, {Codec2.card}], the codes of a codebook, got {keys}")
    if recordings < 3:
        raise ValueError(f"recordings: expected an integer >= 3, one for each split, got {recordings}")
    sizes = {"frames": frames, "keys": keys, "min_gap": min_gap, "max_gap": max_gap}
    events(np.random.default_rng(0), **sizes)  # errors, before anything is written
    with new_directory(output) as staging, quiet():
        (staging / tokens.TOKENIZER_FILE).write_bytes(text.tokenizer_of_words(VALUES))
        tokenizer = text.load_tokenizer(staging / tokens.TOKENIZER_FILE)
        info = info_of(Codec2(), tokenizer.get_piece_size())

        def example(name: str) -> dict[str, Any]:
            happening = events(np.random.default_rng((seed, int(name))), **sizes)
            made = recording(int(name), happening, frames, tokenizer)
            tokens.check_codes(made.codes, info, f"recording {made.id!r}")
            return {"id": made.id, "codes": made.codes.T, "metadata": json.dumps(made.metadata)}

        records = numbers_by_split(recordings)
        write_records(staging, TokenRecordings, records=records, make_example=example, num_streams=info.num_streams)
        lengths = {split: [frames] * len(names) for split, names in records.items()}
        write_atomically(staging / tokens.INFO_FILE, tokens.info_to_json(info, lengths))
    print(f"{output}: {', '.join(f'{len(names)} {split}' for split, names in records.items())} recordings")


def define_flags() -> dict[str, flags.FlagHolder]:
    """The program's flags, defined only where it runs as one."""
    holders = (
        flags.DEFINE_string("output", None, "Directory of the dataset.", required=True),
        flags.DEFINE_integer("recordings", 8000, "Recordings, in all splits together.", lower_bound=3),
        flags.DEFINE_integer("seed", 0, "Seed of the whole dataset.", lower_bound=0),
        flags.DEFINE_integer("frames", 128, "Frames of a recording.", lower_bound=1),
        flags.DEFINE_integer("keys", 8, "Keys; as many facts wait for their questions at most.", lower_bound=1),
        flags.DEFINE_integer("min_gap", 4, "Least frames from a fact to its answer.", lower_bound=1),
        flags.DEFINE_integer("max_gap", 64, "Most frames from a fact to its answer.", lower_bound=1),
    )
    return {holder.name: holder for holder in holders}


def main(holders: dict[str, flags.FlagHolder]) -> None:
    """Run the program."""
    make(**{name: holder.value for name, holder in holders.items()})


if __name__ == "__main__":
    programs.run(functools.partial(main, define_flags()))
