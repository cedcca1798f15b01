"""Tokenize a folder of audio files.

    python -m ttt_jax.data.prepare --audio=DIR --output=DIR --codec=codec2

Every wav, flac, ogg, opus and mp3 below DIR becomes one recording. Stereo is one speaker per channel, the left one the
main speaker; mono is the main speaker alone. `NAME.json` beside `NAME.wav` gives word times in moshi-finetune's layout
and fills the text stream; without any, the text stream is missing (-1) and no tokenizer is made.

`--beam_options="--runner=FlinkRunner ..."` does the work on a cluster, with the same result (docs/beam.md).

Splits follow from the files' names. Exit codes: 0 done; 3 done, but some files were skipped (listed at the end); 1 an
error. A rerun of the same command resumes.
"""

import functools
import hashlib
import os
import pathlib
import sys

from absl import app, flags

from ttt_jax.data import audio, pipeline, text
from ttt_jax.data.codecs import Codec2


class AudioFile:
    """One file on disk, a `pipeline.Source`."""

    def __init__(self, folder: pathlib.Path, path: pathlib.Path):
        self.path = path
        self.id = path.relative_to(folder).as_posix()
        self.alignments = path.with_suffix(".json")
        self.cost = float(path.stat().st_size)
        files = [path, self.alignments] if self.alignments.is_file() else [path]
        self.version = " ".join(f"{f.suffix} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files)

    def read(self, codec: Codec2) -> pipeline.Speech:
        """Stream its audio."""
        channels = audio.num_channels(self.path)
        words = None
        if self.alignments.is_file():
            try:
                words = text.read_alignments(self.alignments)
            except ValueError as error:
                raise audio.BadRecordingError(str(error)) from error
        blocks = audio.read_blocks(self.path, codec.sample_rate_hz)
        return pipeline.Speech(blocks, lambda: words, lambda: {"file": self.id, "channels": channels})


def split_by_name(ids: list[str], *, seed: int, test_fraction: float, validation_fraction: float) -> dict[str, str]:
    """Split of each file by a hash of its name; with two files or more, train and test get at least one each."""
    place = {i: int(hashlib.sha256(f"{seed}/{i}".encode()).hexdigest()[:13], 16) / 16**13 for i in ids}

    def split(where: float) -> str:
        if where < test_fraction:
            return "test"
        return "validation" if where < test_fraction + validation_fraction else "train"

    splits = {i: split(where) for i, where in place.items()}
    ordered = sorted(ids, key=place.__getitem__)
    if "train" not in splits.values():
        splits[ordered[-1]] = "train"
    if "test" not in splits.values() and len(ids) > 1:
        splits[ordered[0]] = "test"
    return splits


def make(
    audio_folder: pathlib.Path,
    output: pathlib.Path,
    *,
    codec: str = "codec2",
    tokenizer: pathlib.Path | None = None,
    vocab_size: int = 4000,
    test_fraction: float = 0.1,
    validation_fraction: float = 0.05,
    seed: int = 0,
    workers: int = 1,
    beam_options: str | None = None,
) -> dict[str, str]:
    """What the program does, as a function; arguments are its flags. Returns the skipped files and why."""
    audio_folder = audio_folder.absolute()  # workers elsewhere have another current directory
    if not audio_folder.is_dir():
        raise ValueError(f"audio: expected a folder of audio files, {audio_folder} is none")
    if test_fraction < 0 or validation_fraction < 0 or test_fraction + validation_fraction >= 1:
        raise ValueError(
            "test_fraction, validation_fraction: expected two shares >= 0 that leave some for training, "
            f"got {test_fraction} and {validation_fraction}"
        )
    sources = [
        AudioFile(audio_folder, path)
        for path in sorted(audio_folder.rglob("*"))
        if path.suffix.lower() in audio.SUFFIXES and path.is_file() and output.resolve() not in path.resolve().parents
    ]
    if not sources:
        raise ValueError(f"audio: expected files ending in {', '.join(audio.SUFFIXES)}, {audio_folder} holds none")
    settings = {
        "program": "ttt_jax.data.prepare",
        "audio": str(audio_folder.resolve()),
        "codec": codec,
        "tokenizer": None if tokenizer is None else str(tokenizer),
        "vocab_size": vocab_size,
        "test_fraction": test_fraction,
        "validation_fraction": validation_fraction,
        "seed": seed,
    }
    plan = pipeline.Plan(output, settings, codec, tokenizer, vocab_size, workers, beam_options)
    fractions = {"test_fraction": test_fraction, "validation_fraction": validation_fraction}
    return pipeline.build(plan, sources, lambda ids: split_by_name(ids, seed=seed, **fractions))


def define_flags() -> dict[str, flags.FlagHolder]:
    """The program's flags, defined only where it runs as one: both data programs may be imported together."""
    holders = (
        flags.DEFINE_string("audio", None, "Folder of audio files, searched with its subfolders.", required=True),
        flags.DEFINE_string("output", None, "Directory of the dataset.", required=True),
        flags.DEFINE_string("codec", "codec2", "Audio codec."),
        flags.DEFINE_string("tokenizer", None, "Sentencepiece model to use instead of training one."),
        flags.DEFINE_integer("vocab_size", 4000, "Upper limit of a trained tokenizer's vocabulary."),
        flags.DEFINE_float("test_fraction", 0.1, "Share of the files for the test split."),
        flags.DEFINE_float("validation_fraction", 0.05, "Share of the files for the validation split."),
        flags.DEFINE_integer("seed", 0, "Another seed splits the files differently."),
        flags.DEFINE_integer("workers", os.cpu_count() or 1, "Processes at a time, without Beam.", lower_bound=1),
        flags.DEFINE_string("beam_options", None, "Work as an Apache Beam pipeline with these flags of Beam's."),
    )
    return {holder.name: holder for holder in holders}


def main(holders: dict[str, flags.FlagHolder], argv: list[str]) -> None:
    """Run the program."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    values = {name: holder.value for name, holder in holders.items()}
    folder, output = pathlib.Path(values.pop("audio")), pathlib.Path(values.pop("output"))
    values["tokenizer"] = pathlib.Path(values["tokenizer"]) if values["tokenizer"] else None
    try:
        skipped = make(folder, output, **values)
    except (ValueError, RuntimeError, ImportError) as error:
        sys.exit(f"error: {error}")
    if skipped:
        print(f"{len(skipped)} files were skipped:", file=sys.stderr)
        for name, reason in skipped.items():
            print(f"  {name}: {reason}", file=sys.stderr)
        sys.exit(pipeline.EXIT_SKIPPED)


if __name__ == "__main__":
    from ttt_jax.data import prepare  # under its own name, so that other processes can unpickle its classes

    app.run(functools.partial(prepare.main, prepare.define_flags()))
