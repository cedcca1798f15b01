"""From the flags of `python -m ttt_jax.generate` to its files."""

import contextlib
import dataclasses
import itertools
import math
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import sentencepiece
import tqdm

from ttt_jax.checkpoint import load, load_config
from ttt_jax.data import audio
from ttt_jax.data.text import open_tokenizer
from ttt_jax.data.tokens import TOKENIZER_FILE
from ttt_jax.generate import output
from ttt_jax.generate.conversation import KYUTAIS_SAMPLING, Configs, advance, init_conversation
from ttt_jax.generate.saved import CONVERSATION, load_conversation, save_conversation
from ttt_jax.models.mimi import MimiConfig
from ttt_jax.models.moshi import MoshiConfig, condition_vector
from ttt_jax.models.moshi.insertion import without_ttt
from ttt_jax.models.moshi.stream import Sampling
from ttt_jax.signals import StopRequest

CHANNELS = {"mix": None, "left": 0, "right": 1}
KYUTAIS_CONDITIONS = {"hibiki": {"description": "very_good"}}


@dataclasses.dataclass(frozen=True)
class Options:
    """The program's flags.

    Attributes:
        checkpoint: of Moshi, as `ttt_jax.load` reads it.
        mimi: of Mimi; None takes the folder mimi in Moshi's, or beside it.
        input: what the user says.
        output: gets what Moshi says; None for models that only write text.
        text: gets the words that it thinks of meanwhile; or None.
        words: gets them with their times; or None.
        tokenizer: sentencepiece model of the text, for `text` and `words`; None takes the checkpoint's.
        sampling: of the tokens.
        seed: of the sampling.
        channel: of a stereo input, one of `CHANNELS`.
        start_frame: frames of the input to leave out.
        frames: the most to take; None takes all.
        silence_before: seconds of silence before the input.
        silence_after: seconds of silence behind it.
        ttt: "auto" as the checkpoint is, "on" demands TTT layers, "off" switches them off.
        conditions: of models that have conditioners, value by name.
        save_state: directory for the conversation as it is at the end; or None.
        load_state: directory of one to go on with; or None.
    """

    checkpoint: pathlib.Path
    mimi: pathlib.Path | None
    input: pathlib.Path
    output: pathlib.Path | None = None
    text: pathlib.Path | None = None
    words: pathlib.Path | None = None
    tokenizer: pathlib.Path | None = None
    sampling: Sampling = KYUTAIS_SAMPLING
    seed: int = 0
    channel: str = "mix"
    start_frame: int = 0
    frames: int | None = None
    silence_before: float = 0.0
    silence_after: float = 0.0
    ttt: str = "auto"
    conditions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    save_state: pathlib.Path | None = None
    load_state: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """What a run did.

    Attributes:
        first_frame: of the input, that the run began with.
        frames: how many it took.
        frame_s: seconds that a frame lasts.
        seconds: that all of them took.
        compile_s: seconds that compiling took, before them.
        stopped: whether a signal ended it before the input did.
    """

    first_frame: int
    frames: int
    frame_s: float
    seconds: float
    compile_s: float
    stopped: bool

    def __str__(self) -> str:
        each = self.seconds / self.frames
        return (
            f"{self.frames} frames ({self.frames * self.frame_s:.2f} s) in {self.seconds:.1f} s: "
            f"{1000 * each:.1f} ms a frame, real-time factor {each / self.frame_s:.2f} (below 1 keeps up with speech); "
            f"compiled in {self.compile_s:.1f} s"
        )


def run(options: Options) -> Report:
    """What the program does.

    Raises:
        ValueError: a flag or a file does not fit; names the flag and what to do. Nothing is written then.
        audio.BadRecordingError: the input is damaged in the middle; nothing is written either.
    """
    _check_files(options)
    mimi = _mimi(options)
    configs = _read_configs(options, mimi)
    tokenizer = _read_tokenizer(options, configs.moshi)
    conditions = dict(KYUTAIS_CONDITIONS.get(configs.moshi.model_type, {})) | dict(options.conditions)
    model, codec = load(options.checkpoint)[1], load(mimi)[1]
    if options.ttt == "off":
        model = without_ttt(model)
    condition = condition_vector(configs.moshi, model, conditions) if conditions else None
    return _converse(options, configs, (model, codec), condition, tokenizer)


def _check_files(options: Options) -> None:
    """What can be told from the flags alone."""
    named: dict[pathlib.Path, str] = {}
    for flag in ("input", "tokenizer", "output", "text", "words", "save_state"):
        path = getattr(options, flag)
        if path is not None and named.setdefault(path.resolve(), flag) != flag:
            raise ValueError(f"--{flag}: {path} is the file of --{named[path.resolve()]}; choose another name")
    if options.channel not in CHANNELS:
        raise ValueError(f"--channel: expected one of {list(CHANNELS)}, got {options.channel!r}")
    if options.output is not None and options.output.suffix not in output.FORMATS:
        raise ValueError(f"--output: expected a name that ends in {', '.join(output.FORMATS)}, got {options.output}")
    if (options.text or options.words) and not _tokenizer_path(options).is_file():
        raise ValueError(
            f"--tokenizer: --text and --words need the sentencepiece model of the text, {_tokenizer_path(options)} is "
            "none; Kyutai's are called tokenizer_spm_....model"
        )
    if options.save_state is not None and options.save_state.exists():
        raise ValueError(f"--save_state: {options.save_state} exists; choose another directory or remove it first")
    if options.load_state is not None and not (options.load_state / CONVERSATION).is_dir():
        raise ValueError(f"--load_state: {options.load_state} holds no conversation that --save_state wrote")
    if not options.input.is_file():
        raise ValueError(f"--input: there is no file at {options.input}")
    try:
        channels = audio.num_channels(options.input)
    except audio.BadRecordingError as error:
        raise ValueError(f"--input: {options.input}: {error}") from error
    if channels == 1 and options.channel == "right":
        raise ValueError(f"--channel: {options.input} has one channel only, leave the flag out")


def _mimi(options: Options) -> pathlib.Path:
    """Where Mimi is."""
    if options.mimi is not None:
        return options.mimi
    places = [options.checkpoint / "mimi", options.checkpoint.absolute().parent / "mimi"]
    for place in places:
        if place.is_dir():
            return place
    raise ValueError(
        f"--mimi: expected a converted Mimi, there is none in {' or '.join(map(str, places))}; make one with "
        "`python -m ttt_jax.convert --source=mimi --input=FILE --output=DIR`"
    )


def _read_configs(options: Options, mimi: pathlib.Path) -> Configs:
    """The models' configs, checked before any weights are read."""
    model = load_config(options.checkpoint, "moshi", "--checkpoint")
    configs = Configs.of(model, load_config(mimi, "mimi", "--mimi"))
    if options.ttt == "on" and not model.ttt_layers:
        raise ValueError(
            f"--ttt=on: {options.checkpoint} has no TTT layers. Insert some when converting, with "
            "`python -m ttt_jax.convert --source=moshi --ttt=CONFIG`, or when training, with model.ttt and init_from"
        )
    if model.voice_q and options.output is None:
        raise ValueError("--output: expected the name of a sound file, got none")
    if not model.voice_q and options.output is not None:
        raise ValueError(f"--output: {options.checkpoint} only writes text; leave the flag out")
    if not model.voice_q and not (options.text or options.words):
        raise ValueError(f"--text: {options.checkpoint} only writes text; name a file for it with --text or --words")
    return configs


def _read_tokenizer(options: Options, config: MoshiConfig) -> sentencepiece.SentencePieceProcessor | None:
    if not (options.text or options.words):
        return None
    tokenizer = open_tokenizer(_tokenizer_path(options))
    if tokenizer.get_piece_size() != config.text_card:
        raise ValueError(
            f"--tokenizer: {_tokenizer_path(options)} has {tokenizer.get_piece_size()} pieces, the model text_card = "
            f"{config.text_card}; use the model's own"
        )
    return tokenizer


def _tokenizer_path(options: Options) -> pathlib.Path:
    return options.tokenizer or options.checkpoint / TOKENIZER_FILE


def _converse(
    options: Options, configs: Configs, params: tuple[Any, Any], condition: jax.Array | None, tokenizer
) -> Report:
    given: dict[str, Any] = {"sampling": options.sampling, "condition": condition}
    saved = None if options.load_state is None else load_conversation(options.load_state, configs, params)
    silence = np.zeros((1, 1, configs.mimi.frame_samples), np.float32)
    began = time.perf_counter()
    # Moshi does not hear the first frame of a conversation, so this one takes that place, and compiles.
    *_, conversation = advance(configs, params, init_conversation(configs, params, 1, options.seed), silence, **given)
    jax.block_until_ready(conversation)
    compile_s = time.perf_counter() - began
    conversation = conversation if saved is None else saved
    with contextlib.ExitStack() as files, StopRequest() as stop:
        sinks = _Sinks(files, options, configs, tokenizer)
        bar = files.enter_context(_bar(options, configs.mimi))
        began = time.perf_counter()
        for count, frame in enumerate(_frames(options, configs.mimi), start=1):
            sound, tokens, conversation = advance(configs, params, conversation, frame[None, None], **given)
            sinks.push(sound, tokens)
            bar.update()
            _tell_speed(bar, (time.perf_counter() - began) / count, 1 / configs.mimi.frame_rate)
            if stop.requested:
                break
        sinks.flush()
        seconds = time.perf_counter() - began
        if not sinks.frames:
            raise ValueError(f"--start_frame: {options.input} has no frame {options.start_frame}")
        sinks.finish()
        if options.save_state is not None:
            save_conversation(options.save_state, configs, params, conversation)
    frame_s = 1 / configs.mimi.frame_rate
    return Report(options.start_frame, sinks.frames, frame_s, seconds, compile_s, stop.requested)


class _Sinks:
    """Where a frame goes, one late so that the device always has work queued."""

    def __init__(self, files: contextlib.ExitStack, options: Options, configs: Configs, tokenizer):
        rate = configs.mimi.frame_rate
        self.frames = 0
        self._first = options.start_frame
        self._pending: tuple[jax.Array, jax.Array] | None = None
        self._words = None if tokenizer is None else output.Words(tokenizer, rate)
        self._sound, self._texts = None, []
        for path in filter(None, (options.output, options.text, options.words)):
            path.parent.mkdir(parents=True, exist_ok=True)
        if options.output is not None:
            samples = _num_frames(options, configs.mimi) * configs.mimi.frame_samples
            self._sound = files.enter_context(output.SoundFile(options.output, configs.mimi.sample_rate, samples))
        if options.text is not None:
            self._texts.append(files.enter_context(output.TextFile(options.text)))
        if options.words is not None:
            self._texts.append(files.enter_context(output.WordsFile(options.words)))

    def push(self, sound: jax.Array, tokens: jax.Array) -> None:
        """Writes the frame before this one."""
        self.flush()
        self._pending = sound, tokens

    def flush(self) -> None:
        """Writes the last frame."""
        if self._pending is None:
            return
        sound, tokens = self._pending
        self._pending = None
        if self._sound is not None:
            self._sound.write(np.asarray(sound[0, 0]))
        if self._words is not None:
            self._write(self._words.push(int(tokens[0, 0]), self._first + self.frames))
        self.frames += 1

    def finish(self) -> None:
        """Ends the files and gives them their names."""
        if self._words is not None:
            self._write(self._words.finish())
        for file in filter(None, (self._sound, *self._texts)):
            file.finish()

    def _write(self, words) -> None:
        for file, word in itertools.product(self._texts, words):
            file.write(word)


def _frames(options: Options, config: MimiConfig) -> Iterator[np.ndarray]:
    """The frames that the run takes, float32 `[frame_samples]`."""
    silence = np.zeros(config.frame_samples, np.float32)
    before, after = _silent_frames(options, config)
    spoken = input_frames(options.input, config.sample_rate, config.frame_samples, options.channel)
    everything = itertools.chain(itertools.repeat(silence, before), spoken, itertools.repeat(silence, after))
    stop = None if options.frames is None else options.start_frame + options.frames
    return itertools.islice(everything, options.start_frame, stop)


def _silent_frames(options: Options, config: MimiConfig) -> tuple[int, int]:
    before, after = (math.ceil(s * config.frame_rate) for s in (options.silence_before, options.silence_after))
    return before, after


def input_frames(path: pathlib.Path, sample_rate_hz: int, frame_samples: int, channel: str) -> Iterator[np.ndarray]:
    """A sound file as one channel at `sample_rate_hz`, in frames float32 `[frame_samples]`; at least one.

    Two channels are averaged, or one is taken; the last frame ends in zeros.
    """
    pending, number = np.zeros(0, np.float32), 0
    for block in audio.read_blocks(path, sample_rate_hz):
        chosen = CHANNELS[channel]
        mono = block.mean(axis=0) if chosen is None else block[chosen]
        pending = np.concatenate([pending, mono])
        whole = len(pending) // frame_samples
        yield from pending[: whole * frame_samples].reshape(whole, frame_samples)
        pending, number = pending[whole * frame_samples :], number + whole
    if len(pending) or number == 0:
        yield np.pad(pending, (0, frame_samples - len(pending)))


def _num_frames(options: Options, config: MimiConfig) -> int:
    """About how many frames the run will take."""
    spoken = math.ceil(audio.duration_s(options.input) * config.frame_rate)
    left = max(0, spoken + sum(_silent_frames(options, config)) - options.start_frame)
    return left if options.frames is None else min(left, options.frames)


def _bar(options: Options, config: MimiConfig) -> tqdm.tqdm:
    total = _num_frames(options, config)
    return tqdm.tqdm(total=total, desc="talking", unit="frame", dynamic_ncols=True, file=sys.stderr)


def _tell_speed(bar: tqdm.tqdm, each: float, frame_s: float) -> None:
    bar.set_postfix_str(f"{1000 * each:.1f} ms a frame, real-time factor {each / frame_s:.2f}", refresh=False)
