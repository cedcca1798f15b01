"""What can be converted: where its weights and config are, and its tensors under the names of the model's table."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ttt_jax.convert import hub, hugging_face, mimi, moshi, ttt_lm, video_dit
from ttt_jax.convert.adapters import dequantized, with_lora_merged
from ttt_jax.convert.checks import check_tensors
from ttt_jax.convert.fused import is_fused, split_fused
from ttt_jax.convert.table import Table
from ttt_jax.convert.tensors import INDEX_SUFFIX, SUFFIX, open_tensors, read_metadata, shards
from ttt_jax.convert.writing import COGVIDEOX_FILE, CURRENT, DIFFUSERS, FUSED, MODEL_FILE, TTT_VIDEO_DIT
from ttt_jax.files import read_json
from ttt_jax.models.mimi import MimiConfig
from ttt_jax.models.moshi import MoshiConfig
from ttt_jax.models.video_dit import VideoDiTConfig
from ttt_jax.models.video_dit.published import state_dict

CONFIG_FILE = "config.json"
MIMI_FILE = "tokenizer-e351c8d8-checkpoint125.safetensors"
TRANSFORMER = "transformer"
"""Where the repositories of CogVideoX, which hold a whole pipeline, have what is converted."""
LORA_FILE = "lora.safetensors"
TOKENIZER_FILE = "tokenizer_spm_32k_3.model"
PUBLISHED_LORA_SCALING = 2.0


class Source(NamedTuple):
    """A checkpoint that has been opened; its tensors are read when they are asked for."""

    config: Any
    table: Table
    tensors: Mapping[str, Any]  # under the table's names
    names: str  # of the tensors: "fused" (as in released files), "current", "ttt_video_dit" or "diffusers"
    tokenizer: pathlib.Path | None = None  # the sentencepiece model beside the weights


class Options(NamedTuple):
    """What the caller says beside the input's path; None where the files tell."""

    config: pathlib.Path | None = None
    lora: pathlib.Path | None = None
    lora_scaling: float | None = None
    num_codebooks: int = 8


def open_source(kind: str, name: str, options: Options) -> Source:
    """Opens a checkpoint.

    Args:
        kind: "moshi", "mimi", "ttt_lm", "video_dit" or "cogvideox".
        name: Path of a safetensors file (one of several stands for all), an index or a folder, or a repository of the
            Hugging Face hub.
        options: See `Options`.

    Raises:
        ValueError: Nothing there, a damaged file, a config that cannot be read; names the flag and the likely fix.
    """
    path = pathlib.Path(name)
    if hub.is_repository(name):
        path = hub.download(name, lambda folder: wanted_of_repository(kind, folder))
    if not path.exists():
        raise ValueError(
            f"--input: {path} does not exist; expected a .safetensors file, its index or a folder with them"
        )
    if kind != "moshi" and options.lora is not None:
        raise ValueError("--lora: only Moshi has LoRA weights")
    return SOURCES[kind](path, options)


def wanted_of_repository(kind: str, folder: pathlib.Path) -> hub.Patterns:
    """Repositories of Moshi hold Mimi in a file of its own; where they tell of none, all weights are wanted."""
    raw = _read_config(None, folder / CONFIG_FILE) or {}
    mimi_file = raw.get("mimi_name") or MIMI_FILE
    holds_it_apart = "audio_encoder_config" not in raw and raw.get("model_type") != "mimi"
    if kind == "cogvideox" and (folder / TRANSFORMER).is_dir():
        return hub.Patterns([f"{TRANSFORMER}/*{SUFFIX}"], [])
    if kind == "mimi" and holds_it_apart:
        return hub.Patterns([mimi_file], [])
    return hub.Patterns(["*" + SUFFIX], [mimi_file] if kind == "moshi" else [])


def _open_moshi(path: pathlib.Path, options: Options) -> Source:
    folder = path if path.is_dir() else path.parent
    raw = _read_config(options.config, folder / CONFIG_FILE) or {}
    tensors = open_tensors(_weights(path, raw.get("moshi_name") or MODEL_FILE))
    if hugging_face.is_hugging_face(tensors):
        config = hugging_face.moshi_config(raw)
        tensors = hugging_face.moshi_tensors(config, tensors)
        return Source(config, moshi.moshi_table(config), tensors, FUSED, _tokenizer(folder, raw))
    config = MoshiConfig.from_kyutai(raw)
    table = moshi.moshi_table(config)
    names = _kyutai_names(table, tensors)
    tensors = split_fused(table, dequantized(tensors))
    beside = folder / (raw.get("lora_name") or LORA_FILE)
    lora = options.lora or (beside if raw.get("lora") and path.is_dir() and beside.is_file() else None)
    scaling = raw.get("lora_scaling", PUBLISHED_LORA_SCALING)
    if lora is not None:
        tensors, scaling = _with_lora_tensors(tensors, lora, scaling)
    scaling = scaling if options.lora_scaling is None else options.lora_scaling
    return Source(config, table, with_lora_merged(tensors, scaling), names, _tokenizer(folder, raw))


def _kyutai_names(table: Table, tensors: Mapping[str, Any]) -> str:
    return FUSED if is_fused(table, tensors) else CURRENT


def _tokenizer(folder: pathlib.Path, raw: dict[str, Any]) -> pathlib.Path | None:
    """The file that the config names, or the only one of its kind."""
    named = folder / (raw.get("tokenizer_name") or TOKENIZER_FILE)
    found = [named] if named.is_file() else sorted(folder.glob("*.model"))
    return found[0] if len(found) == 1 else None


def _with_lora_tensors(tensors: dict[str, Any], lora: pathlib.Path, scaling: float) -> tuple[dict[str, Any], float]:
    """The tensors with those of a LoRA file or folder, and the scaling that its config tells."""
    raw = _read_config(None, (lora if lora.is_dir() else lora.parent) / CONFIG_FILE) or {}
    extra = open_tensors(_weights(lora, raw.get("lora_name") or LORA_FILE))
    # A file of factors may hold whole matrices too, of parts that were trained whole: those replace the others.
    return tensors | extra, raw.get("lora_scaling", scaling)


def _open_mimi(path: pathlib.Path, options: Options) -> Source:
    folder = path if path.is_dir() else path.parent
    beside = _read_config(None, folder / CONFIG_FILE) or {}
    tensors = open_tensors(_weights(path, beside.get("mimi_name") or MIMI_FILE))
    raw = _mimi_config(folder, beside) if options.config is None else _read_config(options.config, options.config) or {}
    if hugging_face.has_codec(tensors):
        tensors = hugging_face.codec_tensors(tensors)
    if mimi.is_hugging_face(tensors):
        config = MimiConfig.from_hugging_face(raw, options.num_codebooks)
        return Source(config, mimi.mimi_table(config), mimi.mimi_from_hugging_face(config, tensors), FUSED)
    config = MimiConfig.from_kyutai(raw, options.num_codebooks)
    table = mimi.mimi_table(config)
    return Source(config, table, split_fused(table, tensors), _kyutai_names(table, tensors))


def _mimi_config(folder: pathlib.Path, beside: dict[str, Any]) -> dict[str, Any]:
    """Mimi's part of what lies beside its weights: Kyutai's folders and Hugging Face's Moshi describe a Moshi there."""
    if "audio_encoder_config" in beside:
        return beside["audio_encoder_config"]
    if "seanet" in beside or beside.get("model_type") == "mimi":
        return beside
    name = beside.get("mimi_config_name")
    return (_read_config(folder / name, folder / name) or {}) if name else {}


def _open_ttt_lm(path: pathlib.Path, options: Options) -> Source:
    tensors = open_tensors(_weights(path, MODEL_FILE))
    raw = _read_config(options.config, (path if path.is_dir() else path.parent) / CONFIG_FILE) or {}
    table = ttt_lm.ttt_lm_table(tensors)
    check_tensors(table.shapes, tensors)  # before the config is read off them
    return Source(ttt_lm.ttt_lm_config(tensors, **raw), table, tensors, CURRENT)


def _open_video_dit(path: pathlib.Path, options: Options) -> Source:
    file = _weights(path, MODEL_FILE)
    tensors = state_dict(open_tensors(file))
    raw = _read_config(options.config, file.parent / CONFIG_FILE)
    config = VideoDiTConfig.from_ttt_video_dit(read_metadata(file) if raw is None else raw, tensors)
    return Source(config, video_dit.ttt_video_dit_table(config), tensors, TTT_VIDEO_DIT)


def _open_cogvideox(path: pathlib.Path, options: Options) -> Source:
    file = _weights(path / TRANSFORMER if (path / TRANSFORMER).is_dir() else path, COGVIDEOX_FILE)
    raw = _read_config(None, file.parent / CONFIG_FILE) or {}
    if options.config is not None:
        raw |= _read_config(options.config, options.config) or {}
    config = VideoDiTConfig.from_cogvideox(raw)
    return Source(config, video_dit.cogvideox_table(config), open_tensors(file), DIFFUSERS)


def _read_config(given: pathlib.Path | None, beside: pathlib.Path) -> dict[str, Any] | None:
    path = given or beside
    if given is None and not beside.is_file():
        return None
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"--config: {error}") from error


def _weights(path: pathlib.Path, usual: str) -> pathlib.Path:
    """The file or index to read: the path itself, or in a folder the usual file, an index, or the only file or set."""
    if not path.is_dir():
        return path
    indices = sorted(path.glob("*" + INDEX_SUFFIX))
    files = sorted(path.glob("*" + SUFFIX))
    for found in ([path / usual] if (path / usual).is_file() else [], indices, files):
        if found and all(path in shards(found[0]) for path in found):
            return found[0]
    names = ", ".join(file.name for file in (*files, *indices)) or "none"
    raise ValueError(
        f"--input: expected {usual}, one index or one .safetensors file in {path}, found {names}; name the file"
    )


SOURCES: Mapping[str, Callable[[pathlib.Path, Options], Source]] = {
    "moshi": _open_moshi,
    "mimi": _open_mimi,
    "ttt_lm": _open_ttt_lm,
    "video_dit": _open_video_dit,
    "cogvideox": _open_cogvideox,
}
