"""Tokenize a folder of audio files, or those that a jsonl file lists.

    python -m ttt_jax.data.prepare --audio=DIR --output=DIR --codec=codec2
    python -m ttt_jax.data.prepare --dataset=FILE.jsonl --tokenizer=FILE.model --output=DIR --codec=mimi --mimi=DIR

Every wav, flac, ogg, opus and mp3 below DIR becomes one recording, at any sample rate: they are resampled to the
codec's. Stereo is one speaker per channel, the left one the main speaker; mono is the main speaker alone. `NAME.json`
beside `NAME.wav` gives word times in moshi-finetune's layout and fills the text stream, as moshi-finetune fills it;
without any, the text stream is missing (-1) and no tokenizer is made.

With --dataset the files are those of a dataset of moshi-finetune: a row {"path": ..., "duration": seconds} each, paths
relative to the jsonl file, and word times beside every one of them.

`--beam_options="--runner=FlinkRunner ..."` does the work on a cluster, with the same result (docs/beam.md).

Splits follow from the files' names. Exit codes: 0 done; 3 done, but some files were skipped (listed at the end); 1 an
error. A rerun of the same command resumes.
"""

import functools
import hashlib
import json
import math
import pathlib
import sys
from typing import Any

from absl import flags

from ttt_jax import programs
from ttt_jax.data import audio, pipeline, text
from ttt_jax.data.codecs import CODECS, Codec, get_codec

DURATION_TOLERANCE_S = 0.5  # rows may be rounded to whole seconds


class AudioFile:
    """One file on disk, a `pipeline.Source`.

    Args:
        name: its id in the dataset.
        path: of the file.
        row: whether a jsonl file lists it, which promises that it is there, with word times beside it.
        duration_s: what that row says of its length.
    """

    def __init__(self, name: str, path: pathlib.Path, *, row: bool = False, duration_s: float | None = None):
        self.path, self.id = path, name
        self.row, self.duration_s = row, duration_s
        self.alignments = path.with_suffix(".json")
        files = [file for file in (path, self.alignments) if file.is_file()]
        self.cost = float(path.stat().st_size) if path in files else 0.0
        self.version = " ".join(f"{f.suffix} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files)

    def read(self, codec: Codec) -> pipeline.Speech:
        """Stream its audio."""
        if self.row:
            self._check_row()
        channels = audio.num_channels(self.path)
        words = None
        if self.alignments.is_file():
            try:
                words = text.read_alignments(self.alignments)
            except ValueError as error:
                raise audio.BadRecordingError(str(error)) from error
        blocks = audio.read_blocks(self.path, codec.sample_rate_hz)
        return pipeline.Speech(blocks, lambda: words, lambda: {"file": self.id, "channels": channels})

    def _check_row(self) -> None:
        for what, file in (("audio", self.path), ("word times", self.alignments)):
            if not file.is_file():
                raise audio.BadRecordingError(f"no {what} at {file}")
        seconds = audio.duration_s(self.path)
        if self.duration_s is not None and abs(seconds - self.duration_s) > DURATION_TOLERANCE_S:
            raise audio.BadRecordingError(f"lasts {seconds:.2f} s, its row says {self.duration_s:.2f} s")


def files_below(folder: pathlib.Path, output: pathlib.Path) -> list[AudioFile]:
    """The audio files of a folder and its subfolders, but for what lies in `output`; ValueError if there are none."""
    folder = folder.absolute()  # workers elsewhere have another current directory
    if not folder.is_dir():
        raise ValueError(f"audio: expected a folder of audio files, {folder} is none")
    found = [
        AudioFile(path.relative_to(folder).as_posix(), path)
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in audio.SUFFIXES and path.is_file() and output.resolve() not in path.resolve().parents
    ]
    if not found:
        raise ValueError(f"audio: expected files ending in {', '.join(audio.SUFFIXES)}, {folder} holds none")
    return found


def files_listed(jsonl: pathlib.Path) -> list[AudioFile]:
    """The files of a dataset of moshi-finetune, one a row.

    Raises:
        ValueError: no file there, no rows, or a row that is not JSON, has no path, names a file again or has a duration
            that is none; names the line.
    """
    jsonl = jsonl.absolute()
    if not jsonl.is_file():
        raise ValueError(f"dataset: expected a jsonl file of recordings, there is none at {jsonl}")
    files: dict[str, AudioFile] = {}
    for number, line in enumerate(jsonl.read_bytes().splitlines(), 1):
        if line.strip():
            row = _row(line, f"dataset: {jsonl} line {number}")
            name = row["path"]
            if name in files:
                raise ValueError(f"dataset: {jsonl} line {number} names {name!r} again; expected every file once")
            files[name] = AudioFile(name, jsonl.parent / name, row=True, duration_s=row.get("duration"))
    if not files:
        raise ValueError(f"dataset: expected rows of recordings, {jsonl} holds none")
    return list(files.values())


def _row(line: bytes, where: str) -> dict[str, Any]:
    expected = '{"path": "NAME.wav", "duration": seconds}'
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error}); expected {expected}. Was the file cut short?") from error
    if not isinstance(row, dict) or not isinstance(row.get("path"), str) or not row["path"]:
        raise ValueError(f"{where} has no path; expected {expected}, got {line.decode(errors='replace')[:100]}")
    duration = row.get("duration")
    if duration is None:
        return row
    if isinstance(duration, bool) or not isinstance(duration, int | float) or not 0 <= duration < math.inf:
        raise ValueError(f"{where}: expected a duration in seconds, got {duration!r}")
    return row


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
    audio_folder: pathlib.Path | None,
    output: pathlib.Path,
    *,
    dataset: pathlib.Path | None = None,
    codec: str = "codec2",
    mimi: str | None = None,
    num_codebooks: int | None = None,
    tokenizer: pathlib.Path | None = None,
    vocab_size: int = 4000,
    test_fraction: float = 0.1,
    validation_fraction: float = 0.05,
    seed: int = 0,
    workers: int = 1,
    beam_options: str | None = None,
) -> dict[str, str]:
    """What the program does, as a function; arguments are its flags. Returns the skipped files and why."""
    if test_fraction < 0 or validation_fraction < 0 or test_fraction + validation_fraction >= 1:
        raise ValueError(
            "test_fraction, validation_fraction: expected two shares >= 0 that leave some for training, "
            f"got {test_fraction} and {validation_fraction}"
        )
    if audio_folder is not None and dataset is None:
        sources = files_below(audio_folder, output)
    elif dataset is not None and audio_folder is None:
        sources = files_listed(dataset)
    else:
        raise ValueError("audio, dataset: expected one of the two, a folder of audio files or a jsonl file of paths")
    opened = get_codec(codec, mimi, num_codebooks)
    settings = {
        "program": "ttt_jax.data.prepare",
        "audio": None if audio_folder is None else str(audio_folder.resolve()),
        "dataset": None if dataset is None else str(dataset.resolve()),
        "codec": codec,
        "mimi": opened.directory,
        "num_codebooks": num_codebooks,
        "tokenizer": None if tokenizer is None else str(tokenizer),
        "vocab_size": vocab_size,
        "test_fraction": test_fraction,
        "validation_fraction": validation_fraction,
        "seed": seed,
    }
    plan = pipeline.Plan(output, settings, opened, tokenizer, vocab_size, workers, beam_options, late_pieces="drop")
    fractions = {"test_fraction": test_fraction, "validation_fraction": validation_fraction}
    return pipeline.build(plan, sources, lambda ids: split_by_name(ids, seed=seed, **fractions))


def define_flags() -> dict[str, flags.FlagHolder]:
    """The program's flags, defined only where it runs as one: both data programs may be imported together."""
    holders = (
        flags.DEFINE_string("audio", None, "Folder of audio files, searched with its subfolders."),
        flags.DEFINE_string("dataset", None, "Or a jsonl file that lists them, as moshi-finetune reads it."),
        flags.DEFINE_string("output", None, "Directory of the dataset.", required=True),
        flags.DEFINE_enum("codec", "codec2", CODECS, "Audio codec."),
        flags.DEFINE_string("mimi", None, "Directory of the converted Mimi that --codec=mimi takes."),
        flags.DEFINE_integer("num_codebooks", None, "Codebooks of Mimi to use; by default what its checkpoint says."),
        flags.DEFINE_string("tokenizer", None, "Sentencepiece model to use instead of training one."),
        flags.DEFINE_integer("vocab_size", 4000, "Upper limit of a trained tokenizer's vocabulary."),
        flags.DEFINE_float("test_fraction", 0.1, "Share of the files for the test split."),
        flags.DEFINE_float("validation_fraction", 0.05, "Share of the files for the validation split."),
        flags.DEFINE_integer("seed", 0, "Another seed splits the files differently."),
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
    for name in ("audio", "dataset", "output", "tokenizer"):
        values[name] = pathlib.Path(values[name]) if values[name] else None
    values["workers"] = values["workers"] or pipeline.default_workers(values["codec"])
    skipped = make(values.pop("audio"), values.pop("output"), **values)
    if skipped:
        print(f"{len(skipped)} files were skipped:", file=sys.stderr)
        for name, reason in skipped.items():
            print(f"  {name}: {reason}", file=sys.stderr)
        sys.exit(pipeline.EXIT_SKIPPED)


if __name__ == "__main__":
    from ttt_jax.data import prepare  # under its own name, so that other processes can unpickle its classes

    holders = prepare.define_flags()
    flags.adopt_module_key_flags(prepare)  # for --help
    programs.run(functools.partial(prepare.main, holders))
