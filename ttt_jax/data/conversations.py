"""Synthesize long two-speaker conversations with planted facts, and tokenize them.

    python -m ttt_jax.data.conversations --hours=8 --seed=0 --output=DIR

Each recording follows from (seed, index) alone, whatever the number of workers. Exit codes: 0 done, 1 an
error. A rerun of the same command resumes. `--beam_options` does the work on a cluster (docs/beam.md).
"""

import functools
import os
import pathlib

import numpy as np
import soundfile
import soxr
from absl import flags

from ttt_jax import programs
from ttt_jax.data import dialogue, pipeline, text
from ttt_jax.data.codecs import CODECS, Codec, get_codec
from ttt_jax.data.speech import espeak


class Conversation:
    """One synthesized recording, a `pipeline.Source`."""

    def __init__(self, plan: dialogue.Plan, wav: pathlib.Path | None):
        self.plan = plan
        self.wav = wav
        self.id = plan.name
        self.version = plan.version
        self.cost = plan.minutes

    def read(self, codec: Codec) -> pipeline.Speech:
        """Synthesize it block by block."""
        script = self.plan.script()
        recorder = _Recorder(script, codec)
        blocks = recorder.blocks()
        if self.wav is not None:
            blocks = _keep(blocks, self.wav, codec.sample_rate_hz)
        return pipeline.Speech(blocks, lambda: recorder.words["main"], recorder.metadata)


class _Recorder:
    """Speaks a script turn by turn, each speaker in a channel of its own, and notes when everything was said."""

    def __init__(self, script: dialogue.Script, codec: Codec):
        self.script = script
        self.rate = codec.sample_rate_hz
        self.frame_rate = codec.frame_rate_hz
        self.words: dict[str, list[text.Word]] = {"main": [], "other": []}
        self.spoken: list[dict] = []
        self.samples = 0

    def blocks(self):
        """Float32 [2, samples], a turn and its pause each; who does not speak is digitally silent."""
        for turn in self.script.turns:
            channel = dialogue.SPEAKERS.index(turn.speaker)
            utterance = espeak().say(turn.words, self.script.voices[turn.speaker])
            wav = soxr.resample(utterance.wav, espeak().sample_rate_hz, self.rate)
            self._note(turn, utterance.spans / espeak().sample_rate_hz)
            block = np.zeros((2, len(wav) + round(turn.pause_s * self.rate)), np.float32)
            block[channel, : len(wav)] = wav
            self.samples += block.shape[1]
            yield block

    def _note(self, turn: dialogue.Turn, spans: np.ndarray) -> None:
        spans = np.round(spans + self.samples / self.rate, 4)
        bare = [word.strip(".,!?") for word in turn.words]
        self.words[turn.speaker] += [text.Word(w, float(a), float(b)) for w, (a, b) in zip(bare, spans, strict=True)]
        for mark in turn.marks:
            start, end = float(spans[mark.first, 0]), float(spans[mark.last, 1])
            frames = {"start_frame": int(start * self.frame_rate), "end_frame": int(end * self.frame_rate) + 1}
            times = {"start_s": start, "end_s": end, **frames}
            self.spoken.append({**mark.label, "speaker": turn.speaker, **times})

    def metadata(self) -> dict:
        return {**self.script.metadata, "spoken": self.spoken, "duration_s": self.samples / self.rate}


def _keep(blocks, path: pathlib.Path, sample_rate_hz: int):
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with soundfile.SoundFile(partial, "w", sample_rate_hz, 2, "PCM_16", format="WAV") as file:
        for block in blocks:
            file.write(block.T)
            yield block
    os.replace(partial, path)


def make(
    output: pathlib.Path,
    *,
    hours: float,
    seed: int,
    min_minutes: float = 5.0,
    max_minutes: float = 60.0,
    facts_per_minute: float = 0.5,
    questions_per_fact: int = 1,
    codec: str = "codec2",
    mimi: str | None = None,
    num_codebooks: int | None = None,
    tokenizer: pathlib.Path | None = None,
    vocab_size: int = 1000,
    keep_wav: int = 0,
    workers: int = 1,
    beam_options: str | None = None,
) -> None:
    """What the program does, as a function; arguments are its flags."""
    if not 0 < min_minutes <= max_minutes:
        raise ValueError(f"min_minutes: expected 0 < min_minutes <= max_minutes, got {min_minutes} and {max_minutes}")
    density = {"facts_per_minute": facts_per_minute, "questions_per_fact": questions_per_fact}
    outlines = dialogue.outlines(seed, hours, min_minutes, max_minutes, **density)
    tests = [outline.index for outline in outlines if outline.split == "test"][:keep_wav]
    wav = output.absolute() / "wav"
    sources = [Conversation(o, wav / f"{o.name}.wav" if o.index in tests else None) for o in outlines]
    splits = {outline.name: outline.split for outline in outlines}
    opened = get_codec(codec, mimi, num_codebooks)
    settings = {
        "program": "ttt_jax.data.conversations",
        "hours": hours,
        "seed": seed,
        "min_minutes": min_minutes,
        "max_minutes": max_minutes,
        **density,
        "codec": codec,
        "mimi": opened.directory,
        "num_codebooks": num_codebooks,
        "tokenizer": None if tokenizer is None else str(tokenizer),
        "vocab_size": vocab_size,
        "keep_wav": keep_wav,
    }
    plan = pipeline.Plan(output, settings, opened, tokenizer, vocab_size, workers, beam_options)
    pipeline.build(plan, sources, lambda ids: {i: splits[i] for i in ids})


def define_flags() -> dict[str, flags.FlagHolder]:
    """The program's flags, defined only where it runs as one: both data programs may be imported together."""
    holders = (
        flags.DEFINE_float("hours", 8.0, "Hours of conversation, in all splits together.", lower_bound=0.0),
        flags.DEFINE_integer("seed", 0, "Seed of the whole dataset.", lower_bound=0),
        flags.DEFINE_string("output", None, "Directory of the dataset.", required=True),
        flags.DEFINE_enum("codec", "codec2", CODECS, "Audio codec."),
        flags.DEFINE_string("mimi", None, "Directory of the converted Mimi that --codec=mimi takes."),
        flags.DEFINE_integer("num_codebooks", None, "Codebooks of Mimi to use; by default what its checkpoint says."),
        flags.DEFINE_float("min_minutes", 5.0, "Shortest recording.", lower_bound=0.05),
        flags.DEFINE_float("max_minutes", 60.0, "Longest recording.", lower_bound=0.05),
        flags.DEFINE_float("facts_per_minute", 0.5, "Facts planted per minute, at most 24.", lower_bound=0.0),
        flags.DEFINE_integer("questions_per_fact", 1, "How often each fact is asked for.", lower_bound=1),
        flags.DEFINE_integer("vocab_size", 1000, "Upper limit of the tokenizer's vocabulary."),
        flags.DEFINE_string("tokenizer", None, "Sentencepiece model to use instead of training one."),
        flags.DEFINE_integer("keep_wav", 0, "Test recordings whose audio is kept in OUTPUT/wav.", lower_bound=0),
        flags.DEFINE_integer(
            "workers",
            None,
            "Recordings at a time, without Beam; by default one a core, with mimi at "
            "most 4: this process then encodes on its device, other processes read.",
            lower_bound=1,
        ),
        flags.DEFINE_string("beam_options", None, "Work as an Apache Beam pipeline with these flags of Beam's."),
    )
    return {holder.name: holder for holder in holders}


def main(holders: dict[str, flags.FlagHolder]) -> None:
    """Run the program."""
    values = {name: holder.value for name, holder in holders.items()}
    values["output"] = pathlib.Path(values["output"])
    values["tokenizer"] = pathlib.Path(values["tokenizer"]) if values["tokenizer"] else None
    values["workers"] = values["workers"] or pipeline.default_workers(values["codec"])
    make(**values)


if __name__ == "__main__":
    from ttt_jax.data import conversations  # under its own name, so that other processes can unpickle its classes

    holders = conversations.define_flags()
    flags.adopt_module_key_flags(conversations)  # for --help
    programs.run(functools.partial(conversations.main, holders))
