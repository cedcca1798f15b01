"""Model checkpoints: an Orbax directory with the parameters as "params" and the model's config in its metadata.

Converted ones hold them as "state", the name that Orbax gives what is written bit by bit. Those of a run that trains
low-rank factors hold these apart, as "lora"; `load` merges them into the parameters.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import orbax.checkpoint.experimental.v1 as ocp
from absl import logging

from ttt_jax.config import from_mapping
from ttt_jax.models.moshi import MoshiConfig, lora

PARAMS = "params"
CONVERTED = "state"
LORA = "lora"
CHECKPOINTS = "checkpoints"
MODELS = {"moshi": MoshiConfig}


class ModelMetadata(NamedTuple):
    """What a checkpoint's metadata says of its model."""

    config: Any
    name: str  # of the parameters in the checkpoint, "params" or "state"
    params: Any  # shape and dtype of each parameter, in its place
    lora: Any  # the same for low-rank factors that belong to them, None without
    lora_scaling: float


def model_metadata(config: Any, lora_scaling: float | None = None) -> dict[str, Any]:
    """What a checkpoint's metadata says of its model: `{"model": name, "config": fields}`, JSON-serializable.

    Args:
        config: The model's config.
        lora_scaling: Of the low-rank factors that the checkpoint holds beside the parameters; None: it holds none.
    """
    names = {cls: name for name, cls in MODELS.items()}
    model = {"model": names[type(config)], "config": dataclasses.asdict(config)}
    return model if lora_scaling is None else model | {LORA: {"scaling": lora_scaling}}


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
    return _read_newest(directory, _load_model)


def load_shapes(directory: str | pathlib.Path) -> tuple[Any, Any]:
    """What `load` would read, with the shape and dtype of each parameter in its place; the errors are the same."""
    metadata = _read_newest(directory, read_metadata)
    return metadata.config, metadata.params


def _read_newest[T](directory: str | pathlib.Path, read: Callable[[pathlib.Path], T]) -> T:
    directory = pathlib.Path(directory).absolute()
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} does not exist; expected a workdir of train.py or a checkpoint.")
    if (directory / CHECKPOINTS).is_dir():
        paths = step_directories(directory / CHECKPOINTS)
        if not paths:
            raise FileNotFoundError(f"{directory} holds no finished checkpoint yet; run train.py until it saves one.")
        return first_readable(paths, read)[1]
    if not any((directory / name).is_dir() for name in (PARAMS, CONVERTED)):
        raise FileNotFoundError(f"{directory} is neither a workdir of train.py nor a checkpoint.")
    return first_readable([directory], read)[1]


def read_metadata(path: pathlib.Path) -> ModelMetadata:
    """Reads what one checkpoint's metadata says of its model.

    Raises:
        ValueError: The metadata is damaged, or was not written by this library.
    """
    metadata = ocp.checkpointables_metadata(str(path))
    saved: Any = metadata.custom_metadata
    if not isinstance(saved, dict) or saved.get("model") not in MODELS:
        raise ValueError(f"{path}: its metadata names none of the models {list(MODELS)}.")
    params = CONVERTED if CONVERTED in metadata.metadata else PARAMS
    for name in (params, LORA) if LORA in saved else (params,):
        if metadata.metadata.get(name) is None:
            raise ValueError(f"{path}: the metadata of its {name} cannot be read.")
    config = from_mapping(MODELS[saved["model"]], saved["config"], f"{path.name}.config")
    factors, scaling = (metadata.metadata[LORA], saved[LORA]["scaling"]) if LORA in saved else (None, 1.0)
    return ModelMetadata(config, params, metadata.metadata[params], factors, scaling)


def has_checkpoint(workdir: pathlib.Path) -> bool:
    """Whether a run has saved its state in `workdir`, damaged since or not."""
    return (workdir / CHECKPOINTS).is_dir() and len(step_directories(workdir / CHECKPOINTS)) > 0


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
    metadata = read_metadata(path)
    params = _load_arrays(path, metadata.name, metadata.params)
    if metadata.lora:
        factors = _load_arrays(path, LORA, metadata.lora)
        # Donated, so that there are never two copies of the parameters.
        params = jax.jit(lora.merge, static_argnums=2, donate_argnums=0)(params, factors, metadata.lora_scaling)
    return metadata.config, params


def _load_arrays(path: pathlib.Path, name: str, shapes: Any) -> Any:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), shapes)
    return ocp.load(str(path), abstract, checkpointable_name=name)
