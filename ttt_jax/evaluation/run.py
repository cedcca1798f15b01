"""From a trained model's directory to result files, plots and the report."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from ttt_jax.checkpoint import load
from ttt_jax.data.codecs import codec_of
from ttt_jax.data.reader import TokenDataset, open_dataset, splits
from ttt_jax.data.tokens import TOKENIZER_FILE
from ttt_jax.evaluation import plots
from ttt_jax.evaluation.block_speed import video_speed
from ttt_jax.evaluation.continuation import continue_recording, spoken_text, write_wav
from ttt_jax.evaluation.infill import Spans, infill_nll
from ttt_jax.evaluation.nll_by_position import nll_by_position
from ttt_jax.evaluation.recall import recall
from ttt_jax.evaluation.report import Section, as_text, write_report
from ttt_jax.evaluation.results import write_result
from ttt_jax.evaluation.sections import (
    block_sections,
    infill_sections,
    nll_sections,
    recall_sections,
    speed_sections,
)
from ttt_jax.evaluation.speed import speed
from ttt_jax.files import read_json
from ttt_jax.models.infill import InfillConfig
from ttt_jax.models.moshi import MoshiConfig
from ttt_jax.models.video_dit import VideoDiTConfig

CONFIG_FILE = "config.json"
PROMPT_SECONDS, CONTINUATION_SECONDS = 20.0, 20.0


@dataclasses.dataclass(frozen=True)
class SceneSizes:
    """What a Video-DiT's block is measured on; see `video_speed`."""

    max_scenes: int = 32
    patches: tuple[int, int] = (8, 8)
    text_tokens: int = 16


@dataclasses.dataclass(frozen=True)
class Job:
    """What a benchmark is run on, and where its results go.

    Attributes:
      model: directory of the model.
      config: of the model.
      params: its parameter tree.
      data: token dataset; None takes the one that the workdir's config names.
      split: of the dataset.
      output: directory for the results, made when there are some.
      baseline: directory of a model to compare with, or None.
      max_frames: of speed's stream.
      max_recordings: of the split that are scored; None scores all.
      scenes: of a video, that speed measures a block on.
    """

    model: pathlib.Path
    config: Any
    params: Any
    data: pathlib.Path | None
    split: str
    output: pathlib.Path
    baseline: pathlib.Path | None
    max_frames: int
    max_recordings: int | None
    scenes: SceneSizes

    @functools.cached_property
    def dataset(self) -> pathlib.Path:
        """Directory of the dataset."""
        return self.data or _training_data(self.model)

    @functools.cached_property
    def held_out(self) -> TokenDataset:
        """What is scored."""
        recordings = open_dataset(self.dataset, self.split)
        codec_of(recordings.info)  # now, rather than after hours of scoring
        return recordings if self.max_recordings is None else recordings.first(self.max_recordings)

    def write(self, name: str, result: Any) -> None:
        """Write a benchmark's result, a dataclass, as `<name>.json`."""
        self.output.mkdir(parents=True, exist_ok=True)
        write_result(self.output / f"{name}.json", result)


def run(
    model: pathlib.Path,
    benchmarks: list[str],
    *,
    data: pathlib.Path | None,
    split: str,
    output: pathlib.Path | None,
    baseline: pathlib.Path | None = None,
    max_frames: int = 100_000,
    max_recordings: int | None = None,
    scenes: SceneSizes = SceneSizes(),
) -> pathlib.Path:
    """Run benchmarks on a model and write `<benchmark>.json`, plots, a wav and `report.html`.

    Args:
      model: a workdir of train.py, or a checkpoint.
      benchmarks: names out of `BENCHMARKS`.
      data: token dataset; None takes the one that the workdir's config names.
      split: of the dataset.
      output: directory for the results, made if missing; None is `model`.
      baseline: another model on the same dataset, for recall to compare with.
      max_frames: of the stream that speed measures, and the most tokens of its sequences.
      max_recordings: the first ones of the split are scored; None scores all.
      scenes: what the speed of a Video-DiT is measured on.

    Returns:
      The report's path.

    Raises:
      ValueError: an unknown benchmark, one that such a model does not have, no dataset named, or one that does not fit
        the model. FileNotFoundError: no model or no dataset there.
    """
    unknown = [name for name in benchmarks if name not in BENCHMARKS]
    if unknown or not benchmarks:
        raise ValueError(
            f"--benchmark: expected names out of {', '.join(BENCHMARKS)}, got {', '.join(unknown) or 'none'}."
        )
    config, params = load(model)
    functions = [_function(name, model, config) for name in benchmarks]
    job = Job(model, config, params, data, split, output or model, baseline, max_frames, max_recordings, scenes)
    sections = [section for function in functions for section in function(job)]
    training = plots.training_figure(model / "metrics.jsonl")
    shown = [] if training is None else [Section("Training", figures={"training": training})]
    title = model.name if isinstance(config, VideoDiTConfig) else f"{model.name}: {split} recordings"
    path = write_report(job.output, title, [*sections, *shown])
    print(as_text(sections))
    return path


def _function(name: str, model: pathlib.Path, config: Any) -> Callable[[Job], list[Section]]:
    """A benchmark for the kind of model there is."""
    if type(config) not in BENCHMARKS[name]:
        kind = type(config)
        others = [other for other, kinds in BENCHMARKS.items() if kind in kinds]
        raise ValueError(
            f"--benchmark: {model} holds a {kind.__name__.removesuffix('Config')}, which has "
            f"{', '.join(others) or 'no benchmarks'}, got {name}."
        )
    return BENCHMARKS[name][type(config)]


def _nll_by_position(job: Job) -> list[Section]:
    train, held_out = open_dataset(job.dataset, "train"), job.held_out
    validation = open_dataset(job.dataset, "validation") if "validation" in splits(job.dataset) else None
    result = nll_by_position(job.config, job.params, held_out, train, validation, split=job.split)
    job.write("nll_by_position", result)
    wav, note = _continuation(job.config, job.params, held_out, job.dataset, job.output)
    return [*nll_sections(result), Section("Continuation", [note], audio=wav)]


def _recall(job: Job) -> list[Section]:
    baseline = None if job.baseline is None else load(job.baseline)
    tokenizer = job.dataset / TOKENIZER_FILE
    result = recall(job.config, job.params, job.held_out, tokenizer, split=job.split, baseline=baseline)
    job.write("recall", result)
    return recall_sections(result)


def _speed(job: Job) -> list[Section]:
    result = speed(job.config, job.params, max_frames=job.max_frames)
    job.write("speed", result)
    return speed_sections(result)


def _video_speed(job: Job) -> list[Section]:
    result = video_speed(job.config, **dataclasses.asdict(job.scenes))
    job.write("speed", result)
    return block_sections(result)


def _infill(job: Job) -> list[Section]:
    data = _training_config(job.model)["data"] if (job.model / CONFIG_FILE).is_file() else {}
    names = {field.name for field in dataclasses.fields(Spans)}
    spans = Spans(**{name: value for name, value in data.items() if name in names})
    train = open_dataset(job.dataset, "train")
    result = infill_nll(job.config, job.params, job.held_out, train, spans, split=job.split)
    job.write("infill", result)
    return infill_sections(result)


BENCHMARKS: dict[str, dict[type, Callable[[Job], list[Section]]]] = {
    "nll_by_position": {MoshiConfig: _nll_by_position},
    "recall": {MoshiConfig: _recall},
    "infill": {InfillConfig: _infill},
    "speed": {MoshiConfig: _speed, VideoDiTConfig: _video_speed},
}


def _training_data(model: pathlib.Path) -> pathlib.Path:
    if not (model / CONFIG_FILE).is_file():
        raise ValueError(f"--data: {model} has no {CONFIG_FILE} that names its dataset; pass --data=DIR.")
    return pathlib.Path(_training_config(model)["data"]["directory"])


def _training_config(model: pathlib.Path) -> dict[str, Any]:
    return read_json(model / CONFIG_FILE)


def _continuation(
    config: MoshiConfig, params: Any, held_out: TokenDataset, data: pathlib.Path, output: pathlib.Path
) -> tuple[pathlib.Path, str]:
    """The model goes on with the longest held-out recording; returns the wav and what to listen for."""
    info = held_out.info
    recording = held_out[int(np.argmax(held_out.num_frames))]
    seconds = recording.codes.shape[1] / info.frame_rate_hz
    prompt_s = min(PROMPT_SECONDS, seconds / 2)
    continued = continue_recording(
        config,
        params,
        recording.codes,
        prompt_frames=round(prompt_s * info.frame_rate_hz),
        num_frames=round(CONTINUATION_SECONDS * info.frame_rate_hz),
    )
    wav = output / "continuation.wav"
    write_wav(wav, continued.tokens, recording.codes[1 + info.num_codebooks :], info)
    prompt, said = (
        spoken_text(tokens, data / TOKENIZER_FILE)
        for tokens in (continued.tokens[0, : continued.prompt_frames], continued.tokens[0, continued.prompt_frames :])
    )
    note = (
        f"Left: {recording.id}'s main speaker for {prompt_s:g} s, from then on the model. "
        "Right: the other speaker as recorded."
    )
    if prompt or said:
        note += f' Heard: "{prompt}" The model goes on: "{said}"'
    return wav, note
