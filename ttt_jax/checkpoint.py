"""Model checkpoints: an Orbax directory with the parameters as "params" and the model's config in its metadata."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp
from absl import logging

from ttt_jax.config import from_mapping
from ttt_jax.models.moshi import MoshiConfig

PARAMS = "params"
CHECKPOINTS = "checkpoints"
MODELS = {"moshi": MoshiConfig}


def model_metadata(config: Any) -> dict[str, Any]:
    """What a checkpoint's metadata says of its model: `{"model": name, "config": fields}`, JSON-serializable."""
    names = {cls: name for name, cls in MODELS.items()}
    return {"model": names[type(config)], "config": dataclasses.asdict(config)}


def save_model(directory: str | pathlib.Path, config: Any, params: Any) -> None:
    """Writes a model that `load` reads. The directory appears whole or not at all.

    Args:
        directory: Must not exist yet.
        config: The model's config, a dataclass (`MoshiConfig`).
        params: Its parameter tree.

    Raises:
        FileExistsError: `directory` exists.
    """
    directory = pathlib.Path(directory).absolute()
    if directory.exists():
        raise FileExistsError(f"{directory} exists; choose another directory or remove it first.")
    directory.parent.mkdir(parents=True, exist_ok=True)
    ocp.save_checkpointables(str(directory), {PARAMS: params}, custom_metadata=model_metadata(config))


def load(directory: str | pathlib.Path) -> tuple[Any, Any]:
    """Reads a model: its config and its parameters, on the default device.

    Args:
        directory: A workdir of train.py (its newest checkpoint), one checkpoint in it, or what `save_model` wrote.

    Returns:
        The config (`MoshiConfig`) and the parameter tree in the saved dtypes.

    Raises:
        FileNotFoundError: No checkpoint there.
        ValueError: The checkpoint cannot be read.
    """
    directory = pathlib.Path(directory).absolute()
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} does not exist; expected a workdir of train.py or a checkpoint.")
    if (directory / CHECKPOINTS).is_dir():
        paths = step_directories(directory / CHECKPOINTS)
        if not paths:
            raise FileNotFoundError(f"{directory} holds no finished checkpoint yet; run train.py until it saves one.")
        return first_readable(paths, _load_model)[1]
    if not (directory / PARAMS).is_dir():
        raise FileNotFoundError(f"{directory} is neither a workdir of train.py nor a checkpoint.")
    return first_readable([directory], _load_model)[1]


def read_metadata(path: pathlib.Path) -> tuple[Any, Any]:
    """The model's config and the shapes and dtypes of its parameters, as one checkpoint's metadata tells them.

    Raises:
        ValueError: The metadata is damaged, or was not written by this library.
    """
    metadata = ocp.checkpointables_metadata(str(path))
    saved: Any = metadata.custom_metadata
    if not isinstance(saved, dict) or saved.get("model") not in MODELS:
        raise ValueError(f"{path}: its metadata names none of the models {list(MODELS)}.")
    if metadata.metadata[PARAMS] is None:
        raise ValueError(f"{path}: the metadata of its parameters cannot be read.")
    return from_mapping(MODELS[saved["model"]], saved["config"], f"{path.name}.config"), metadata.metadata[PARAMS]


def step_directories(root: pathlib.Path) -> list[pathlib.Path]:
    """The finished checkpoints below `root`, newest step first (an unfinished one has another name)."""
    return sorted((path for path in root.iterdir() if path.name.isdecimal()), key=lambda p: int(p.name), reverse=True)


def first_readable[T](paths: Iterable[pathlib.Path], read: Callable[[pathlib.Path], T]) -> tuple[pathlib.Path, T]:
    """Reads the first checkpoint that can be read, and warns of each that cannot.

    Raises:
        ValueError: None can be read.
    """
    paths = list(paths)
    error = None
    for path in paths:
        try:
            return path, read(path)
        # Orbax, TensorStore, the JSON parser and the file system each raise their own types for a damaged file.
        except Exception as caught:
            logging.warning("DAMAGED CHECKPOINT %s cannot be read: %s", path, _first_line(caught))
            error = caught
    names = ", ".join(map(str, paths))
    raise ValueError(f"no readable checkpoint; tried {names}. Restore one from a copy, or start anew.") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def _load_model(path: pathlib.Path) -> tuple[Any, Any]:
    config, shapes = read_metadata(path)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), shapes)
    return config, ocp.load(str(path), abstract, checkpointable_name=PARAMS)
