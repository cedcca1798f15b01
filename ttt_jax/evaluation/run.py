"""From a trained model's directory to result files, plots and the report."""

import dataclasses
import json
import math
import pathlib
from typing import Any

import numpy as np

from ttt_jax.checkpoint import load
from ttt_jax.data.reader import TokenDataset, open_dataset, splits
from ttt_jax.data.tokens import TOKENIZER_FILE
from ttt_jax.evaluation import plots, report
from ttt_jax.evaluation.continuation import continue_recording, spoken_text, write_wav
from ttt_jax.evaluation.nll_by_position import NLLByPosition, nll_by_position
from ttt_jax.files import write_atomically
from ttt_jax.models.moshi import MoshiConfig

BENCHMARKS = ("nll_by_position",)
PROMPT_SECONDS, CONTINUATION_SECONDS = 20.0, 20.0


def run(
    model: pathlib.Path, benchmarks: list[str], *, data: pathlib.Path | None, split: str, output: pathlib.Path | None
) -> pathlib.Path:
    """Run benchmarks on a model and write `<benchmark>.json`, plots, a wav and `report.html`.

    Args:
      model: a workdir of train.py, or a checkpoint.
      benchmarks: names out of `BENCHMARKS`.
      data: token dataset; None takes the one that the workdir's config names.
      split: of the dataset.
      output: directory for the results, made if missing; None is `model`.

    Returns:
      The report's path.

    Raises:
      ValueError: an unknown benchmark, no dataset named, or one that does not fit the model. FileNotFoundError: no
        model or no dataset there.
    """
    unknown = [name for name in benchmarks if name not in BENCHMARKS]
    if unknown or not benchmarks:
        raise ValueError(
            f"--benchmark: expected names out of {', '.join(BENCHMARKS)}, got {', '.join(unknown) or 'none'}."
        )
    config, params = load(model)
    data = data or _training_data(model)
    train, held_out = open_dataset(data, "train"), open_dataset(data, split)
    validation = open_dataset(data, "validation") if "validation" in splits(data) else None
    result = nll_by_position(config, params, held_out, train, validation, split=split)
    output = output or model
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(
        output / "nll_by_position.json", json.dumps(_plain(dataclasses.asdict(result)), indent=1, allow_nan=False)
    )
    wav, note = _continuation(config, params, held_out, data, output)
    return _report(model, result, output, wav, note)


def _training_data(model: pathlib.Path) -> pathlib.Path:
    path = model / "config.json"
    if not path.is_file():
        raise ValueError(f"--data: {model} has no config.json that names its dataset; pass --data=DIR.")
    return pathlib.Path(json.loads(path.read_text(encoding="utf-8"))["data"]["directory"])


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


def _report(
    model: pathlib.Path, result: NLLByPosition, output: pathlib.Path, wav: pathlib.Path, note: str
) -> pathlib.Path:
    figures = {"NLL by position": plots.nll_figure(result), "Streams": plots.streams_figure(result)}
    training = plots.training_figure(model / "metrics.jsonl")
    if training is not None:
        figures["Training"] = training
    for heading, name in (("NLL by position", "nll_by_position.png"), ("Streams", "streams.png")):
        write_atomically(output / name, report.png(figures[heading]))
    path = output / "report.html"
    report.write_report(
        path, result, figures, title=f"{model.name}: {result.split} recordings", audio=wav, audio_note=note
    )
    print(report.text_table(report.STREAM_COLUMNS, report.stream_rows(result)))
    print("\n".join(report.summary(result)))
    return path


def _plain(value: Any) -> Any:
    """JSON has no NaN: null where there is no number."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
