"""From "audio and words" to a finished dataset: what every program that makes one shares.

Resume: each recording's tokens go to OUTPUT/.work as soon as they exist; the dataset is assembled there and moved into
OUTPUT, tokens.json last, so a directory without tokens.json is unfinished and `open_dataset` refuses it.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple, Protocol

import numpy as np
import sentencepiece
import tqdm
from absl import logging

from ttt_jax.data import beam, processes, text, tokens
from ttt_jax.data.audio import BadRecordingError
from ttt_jax.data.codecs import Codec, encode_blocks, info_of
from ttt_jax.data.splits import SPLITS
from ttt_jax.files import only_process, read_json, write_atomically

BUILD_FILE = "build.json"
RESULT_FILE = "skipped.json"
WORK_DIR = ".work"
EXIT_SKIPPED = 3
_WORDS_PER_LINE = 16
_MOST_ENCODERS = 4  # at a time on one device: each adds the activations of a block, and they share its speed


class Speech(NamedTuple):
    """One recording on its way to tokens.

    Attributes:
        blocks: float32 [channels, samples] blocks at the codec's rate; one channel, or main speaker then other.
        words: called once the blocks are used up; the main speaker's words, or None where they are unknown.
        metadata: called after `words`; JSON types only.
    """

    blocks: Iterator[np.ndarray]
    words: Callable[[], list[text.Word] | None]
    metadata: Callable[[], dict[str, Any]]


class Source(Protocol):
    """One recording to be tokenized; picklable, and read in a fresh process of its own.

    Attributes:
        id: unique, the recording's id in the dataset.
        version: changes whenever the recording's content may have.
        cost: grows with the work it takes; the costliest are begun first.
    """

    id: str
    version: str
    cost: float

    def read(self, codec: Codec) -> Speech:
        """Begin reading; BadRecordingError, here or from the blocks, skips the recording."""
        ...


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to build a dataset.

    Attributes:
        output: the dataset's directory.
        settings: every flag that the result depends on, as JSON types; a rerun must come with the same, and the same
            weights of the codec.
        codec: what tokenizes.
        tokenizer: sentencepiece model to use, or None to train one on the training words.
        vocab_size: upper limit of the trained tokenizer's vocabulary.
        workers: recordings at a time.
        beam_options: flags of an Apache Beam pipeline (`beam.pipeline_options`) that does the work in place of this
            machine's processes; None goes without Beam. The dataset is the same.
        late_pieces: of `text.text_stream`.
    """

    output: pathlib.Path
    settings: Mapping[str, Any]
    codec: Codec
    tokenizer: pathlib.Path | None
    vocab_size: int
    workers: int
    beam_options: str | None = None
    late_pieces: text.LatePieces = "wait"


def build(plan: Plan, sources: Sequence[Source], assign: Callable[[list[str]], dict[str, str]]) -> dict[str, str]:
    """Build the dataset or finish building it; nothing is done again that an earlier run did.

    Args:
        plan: where and how.
        sources: the recordings; ids are unique.
        assign: ids of the usable recordings -> split of each.

    Returns:
        id -> reason, for every recording that was skipped.

    Raises:
        ValueError: the directory holds something else, or was begun with other settings.
        ImportError: Beam is asked for and not installed.
        RuntimeError: a worker died, or another process is building here.
    """
    if plan.beam_options is not None:
        beam.pipeline_options(plan.beam_options)
    inputs = _digest(*(f"{source.id}\n{source.version}" for source in sources))
    plan.output.mkdir(parents=True, exist_ok=True)
    _claim(plan)
    if (plan.output / tokens.INFO_FILE).exists():
        result = read_json(plan.output / RESULT_FILE)
        if result["inputs"] != inputs:
            raise ValueError(
                f"{plan.output} is finished, but its input files have changed since: choose a new directory"
            )
        print(f"{plan.output} is finished already; nothing to do")
        shutil.rmtree(plan.output / WORK_DIR, ignore_errors=True)
        return result["skipped"]
    work = plan.output.absolute() / WORK_DIR  # workers elsewhere have another current directory
    work.mkdir(exist_ok=True)
    with only_process(work / "lock", f"building in {work}"):
        done, skipped = _tokenize_all(plan, sources, work)
        if not done:
            reasons = "".join(f"\n  {name}: {reason}" for name, reason in skipped.items())
            raise ValueError(f"none of the {len(sources)} recordings could be used:{reasons}")
        splits = assign(list(done))
        records = {split: [done[i] for i in done if splits[i] == split] for split in SPLITS}
        tokenizer = _make_tokenizer(plan, records["train"], work)
        _assemble(plan, records, tokenizer, work)
        write_atomically(plan.output / RESULT_FILE, json.dumps({"inputs": inputs, "skipped": skipped}, indent=1) + "\n")
        os.replace(work / tokens.INFO_FILE, plan.output / tokens.INFO_FILE)
    shutil.rmtree(work)
    total = {split: len(paths) for split, paths in records.items() if paths}
    print(f"{plan.output}: {', '.join(f'{count} {split}' for split, count in total.items())} recordings")
    return skipped


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _claim(plan: Plan) -> None:
    """Record the settings in a fresh directory, or hold them against those it was begun with."""
    path = plan.output / BUILD_FILE
    settings = json.loads(json.dumps({**plan.settings, "codec_fingerprint": plan.codec.fingerprint}))
    if not path.exists():
        others = [p.name for p in plan.output.iterdir() if not p.name.startswith(BUILD_FILE)]
        if others:
            raise ValueError(f"output: {plan.output} holds other files ({others[0]}); choose an empty or new directory")
        write_atomically(path, json.dumps(settings, indent=1) + "\n")
        return
    # Datasets begun before there was a fingerprint have none.
    begun = {"codec_fingerprint": settings["codec_fingerprint"], **read_json(path)}
    changed = [
        f"{name} was {begun.get(name)!r}, is {settings.get(name)!r}"
        for name in sorted(begun.keys() | settings.keys())
        if begun.get(name) != settings.get(name)
    ]
    if changed:
        raise ValueError(
            f"output: {plan.output} was begun with other settings ({'; '.join(changed)}); "
            "rerun with the same ones, or choose a new directory"
        )


def _tokenize_all(
    plan: Plan, sources: Sequence[Source], work: pathlib.Path
) -> tuple[dict[str, pathlib.Path], dict[str, str]]:
    """Tokenize what is not in the cache yet; id -> cached file, and id -> reason of those skipped."""
    paths = {s.id: work / f"{_digest(s.id, s.version, plan.codec.name)}.npz" for s in sources}
    if len(paths) != len(sources):
        raise ValueError("sources: expected unique ids")
    todo = sorted((s for s in sources if not paths[s.id].exists()), key=lambda s: -s.cost)
    tasks = [(source.id, _tokenize, (source, plan.codec, paths[source.id])) for source in todo]
    if plan.beam_options is not None:
        beam.run(_in_a_fresh_process, tasks, plan.beam_options)
    else:
        run = _run_here if plan.codec.shares_a_process else processes.run_in_fresh_processes
        done = len(sources) - len(tasks)
        with tqdm.tqdm(total=len(sources), initial=done, unit="recording", desc="tokenizing") as bar:
            for _ in run(tasks, plan.workers):
                bar.update()
    return _collect(paths, work)


def _collect(paths: Mapping[str, pathlib.Path], work: pathlib.Path) -> tuple[dict[str, pathlib.Path], dict[str, str]]:
    """What the workers left: id -> cached file, and id -> reason of those skipped."""
    # Listed rather than looked up: a network file system may remember that a file was not there a moment ago.
    names = {path.name for path in work.iterdir()}
    done = {name: path for name, path in paths.items() if path.name in names}
    skips = {name: _skip_file(path) for name, path in paths.items() if name not in done}
    for name, path in skips.items():
        if path.name not in names:
            raise RuntimeError(
                f"the workers left nothing about {name!r} in {work}: all of them need the output directory, as shared "
                "storage at the same path"
            )
    return done, {name: path.read_text() for name, path in skips.items()}


def _in_a_fresh_process(task: tuple[str, Callable, tuple]) -> None:
    """What a Beam worker does with a task; its threads share the worker's process, which a codec may not bear."""
    for _ in processes.run_in_fresh_processes([task], 1):
        pass


def default_workers(codec: str) -> int:
    """Recordings at a time that make sense here: one a core; of those that share a device, a few."""
    cores = os.cpu_count() or 1
    return min(cores, _MOST_ENCODERS) if codec == "mimi" else cores


def _run_here(tasks: Sequence[tuple[str, Callable, tuple]], workers: int) -> Iterator[str]:
    """`processes.run_in_fresh_processes` of `_tokenize` in threads of this process, which the codec shares.

    JAX is used in this process alone; what is read comes from processes that never touch it.
    """
    stop = threading.Event()
    with futures.ThreadPoolExecutor(workers) as pool:
        running = {
            pool.submit(_tokenize, _Elsewhere(source, stop), codec, path): name
            for name, _, (source, codec, path) in tasks
        }
        try:
            for future in futures.as_completed(running):
                future.result()
                yield running[future]
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


class _Elsewhere:
    """A source that a process of its own reads, while this one encodes; RuntimeError once `stop` is set."""

    def __init__(self, source: Source, stop: threading.Event):
        self._source, self._stop = source, stop
        self.id, self.version, self.cost = source.id, source.version, source.cost

    def read(self, codec: Codec) -> Speech:
        rest: list[_Rest] = []

        def blocks() -> Iterator[np.ndarray]:
            for item in processes.iterate_in_a_fresh_process(self.id, _sent, (self._source, codec)):
                if self._stop.is_set():
                    raise RuntimeError("stopped, since another recording failed")
                if isinstance(item, BadRecordingError):
                    raise item
                if isinstance(item, _Rest):
                    rest.append(item)
                else:
                    yield item

        return Speech(blocks(), lambda: rest[0].words, lambda: rest[0].metadata)


class _Rest(NamedTuple):
    words: list[text.Word] | None
    metadata: dict[str, Any]


def _sent(source: Source, codec: Codec) -> Iterator[np.ndarray | _Rest | BadRecordingError]:
    """What a reading process sends: blocks of audio, then what comes after them, or why the recording is bad."""
    try:
        speech = source.read(codec)
        yield from speech.blocks
        yield _Rest(speech.words(), speech.metadata())
    except BadRecordingError as error:
        yield error


def _skip_file(path: pathlib.Path) -> pathlib.Path:
    return path.with_suffix(".skipped")


def _tokenize(source: Source, codec: Codec, path: pathlib.Path) -> None:
    """Tokenize one recording into the cache, or leave the reason why it cannot be."""
    try:
        speech = source.read(codec)
        codes = encode_blocks(speech.blocks, codec)
        words = speech.words()
        metadata = speech.metadata()
    except BadRecordingError as error:
        write_atomically(_skip_file(path), str(error))
        return
    content = io.BytesIO()
    np.savez(
        content, id=source.id, codes=codes.astype(np.int16), words=json.dumps(words), metadata=json.dumps(metadata)
    )
    write_atomically(path, content.getvalue())


class _Tokenized(NamedTuple):
    id: str
    codes: np.ndarray
    words: list[text.Word] | None
    metadata: str


def _load(path: str | pathlib.Path) -> _Tokenized:
    with np.load(path) as file:
        words = json.loads(str(file["words"]))
        words = None if words is None else [text.Word(*word) for word in words]
        return _Tokenized(str(file["id"]), file["codes"], words, str(file["metadata"]))


def _make_tokenizer(plan: Plan, train: Sequence[pathlib.Path], work: pathlib.Path) -> pathlib.Path | None:
    """The tokenizer named, or one trained on the training words, or None where nothing is transcribed."""
    path = work / tokens.TOKENIZER_FILE
    if plan.tokenizer is not None:
        text.load_tokenizer(plan.tokenizer)
        write_atomically(path, plan.tokenizer.read_bytes())
        return path
    transcripts = (_load(p).words or [] for p in train)
    lines = [
        " ".join(word.text for word in words[i : i + _WORDS_PER_LINE])
        for words in transcripts
        for i in range(0, len(words), _WORDS_PER_LINE)
    ]
    if not lines:
        return None
    write_atomically(path, text.train_tokenizer(lines, plan.vocab_size))
    size = text.load_tokenizer(path).get_piece_size()
    if size < plan.vocab_size:
        print(f"the training words fill a vocabulary of {size}, below the {plan.vocab_size} asked for")
    return path


@functools.cache
def _tokenizer(path: str) -> sentencepiece.SentencePieceProcessor:
    return text.load_tokenizer(pathlib.Path(path))


def _example(tokenizer: str | None, info: tokens.TokenInfo, late_pieces: text.LatePieces, path: str) -> dict[str, Any]:
    """One record of the dataset from one cached recording."""
    tokenized = _load(path)
    num_frames = tokenized.codes.shape[1]
    codes = np.full((info.num_streams, num_frames), tokens.MISSING, np.int32)
    codes[1 : 1 + len(tokenized.codes)] = tokenized.codes
    if tokenized.words is not None and tokenizer is not None:
        rate = info.frame_rate_hz
        codes[0] = text.text_stream(tokenized.words, _tokenizer(tokenizer), num_frames, rate, late_pieces=late_pieces)
    tokens.check_codes(codes, info, f"recording {tokenized.id!r}")
    return {"id": tokenized.id, "codes": codes.T, "metadata": tokenized.metadata}


def _assemble(
    plan: Plan, records: dict[str, list[pathlib.Path]], tokenizer: pathlib.Path | None, work: pathlib.Path
) -> None:
    """Write the TFDS dataset under `work`, then move all of it into the output except tokens.json."""
    import tensorflow_datasets as tfds  # here, so that the worker processes need not load it

    from ttt_jax.data.builder import TokenRecordings, load_builder

    text_card = text.RESERVED_IDS if tokenizer is None else _tokenizer(str(tokenizer)).get_piece_size()
    info = info_of(plan.codec, text_card)
    root = work / "tfds"
    shutil.rmtree(root, ignore_errors=True)
    with quiet():
        tfds.disable_progress_bar()
        builder = TokenRecordings(
            records={split: list(map(str, paths)) for split, paths in records.items()},
            make_example=functools.partial(
                _example, None if tokenizer is None else str(tokenizer), info, plan.late_pieces
            ),
            num_streams=info.num_streams,
            use_beam=plan.beam_options is not None,
            data_dir=str(root),
        )
        options = None if plan.beam_options is None else beam.pipeline_options(plan.beam_options)
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(beam_options=options))
        written = pathlib.Path(builder.data_path)
        stored = load_builder(written)
    sources = {split: stored.as_data_source(split=split) for split in stored.info.splits}  # pyright: ignore[reportCallIssue]
    num_frames = {split: [len(record["codes"]) for record in source] for split, source in sources.items()}
    write_atomically(work / tokens.INFO_FILE, tokens.info_to_json(info, num_frames))
    if tokenizer is not None:
        os.replace(tokenizer, plan.output / tokens.TOKENIZER_FILE)
    for file in sorted(written.iterdir(), key=lambda p: p.name == "dataset_info.json"):
        os.replace(file, plan.output / file.name)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """TFDS logs and prints about downloads, of which there are none."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
