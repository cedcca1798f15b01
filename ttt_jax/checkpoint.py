"""Model checkpoints: an Orbax directory with the parameters as "params" and the model's config in its metadata.

Converted ones hold them as "state", the name that Orbax gives what is written bit by bit. Those of a run that trains
low-rank factors hold these apart, as "lora"; `load` merges them into the parameters.
"""

import dataclasses
import functools
import pathlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict

from ttt_jax.config import from_mapping
from ttt_jax.files import new_directory, new_path
from ttt_jax.layers.ttt import TTTConfig
from ttt_jax.models.infill import InfillConfig
from ttt_jax.models.mimi import MimiConfig
from ttt_jax.models.moshi import MoshiConfig, lora
from ttt_jax.models.video_dit import VideoDiTConfig

PARAMS = "params"
CONVERTED = "state"
LORA = "lora"
CHECKPOINTS = "checkpoints"
MODELS = {
    **{"moshi": MoshiConfig, "mimi": MimiConfig, "ttt_layer": TTTConfig},
    **{"video_dit": VideoDiTConfig, "infill": InfillConfig},
}


class ModelMetadata(NamedTuple):
    """What a checkpoint's metadata says of its model."""

    config: Any
    name: str  # of the parameters in the checkpoint, "params" or "state"
    params: Any  # shape and dtype of each parameter, in its place
    lora: Any  # the same for low-rank factors that belong to them, None without
    lora_scaling: float
    saved: dict[str, Any]  # all of it


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
        config: The model's config, a dataclass (`MoshiConfig`, `VideoDiTConfig`, `TTTConfig`, ...).
        params: Its parameter tree.

    Raises:
        FileExistsError: `directory` exists.
    """
    directory = new_path(directory)
    ocp.save_checkpointables(str(directory), {PARAMS: params}, custom_metadata=model_metadata(config))


GROUP_BYTES = 2**28
"""About what `save_leaves` holds in memory, unless a single leaf is larger."""

CHUNK_BYTES = 2**26
"""What converted checkpoints are stored in, so that a device reads little more than its part of a parameter."""


def save_leaves(
    directory: str | pathlib.Path,
    config: Any,
    leaves: Iterable[tuple[str, np.ndarray]],
    files: Mapping[str, pathlib.Path],
    **metadata: Any,
) -> None:
    """Writes a model that `load` reads as its parameters come, a few in memory at a time.

    The directory appears whole, at the end, or not at all.

    Args:
        directory: Must not exist yet.
        config: The model's config.
        leaves: Path, such as "layers_0/gate", and parameter.
        files: Name to file, to be copied into the directory.
        **metadata: Further entries of the checkpoint's metadata, JSON-serializable.

    Raises:
        FileExistsError: `directory` exists.
    """
    metadata = model_metadata(config) | metadata
    context = ocp.Context()
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    with new_directory(directory) as staging, context:
        whole = staging / "whole"
        for group in _groups(leaves):
            ocp.partial.save(str(whole), unflatten_dict(group, sep="/"), custom_metadata=metadata)
        ocp.partial.finalize(str(whole))
        for part in whole.iterdir():
            part.rename(staging / part.name)
        whole.rmdir()
        for name, file in files.items():
            shutil.copyfile(file, staging / name)


def _groups(leaves: Iterable[tuple[str, np.ndarray]]) -> Iterable[dict[str, np.ndarray]]:
    group, size = {}, 0
    for path, leaf in leaves:
        if group and size + leaf.nbytes > GROUP_BYTES:
            yield group
            group, size = {}, 0
        group[path] = leaf
        size += leaf.nbytes
        del leaf  # else it would stay until the next one is made
    yield group


def load(directory: str | pathlib.Path, shardings: Callable[[Any], Any] | None = None) -> tuple[Any, Any]:
    """Reads a model: its config and its parameters, on the default device or laid out by `shardings`.

    Args:
        directory: A workdir of train.py (its newest checkpoint), one checkpoint in it, or what `save_model` wrote.
        shardings: A parameter tree of shapes (and of shapes of low-rank factors, in the same places) to the shardings
            to read them in: each device reads its part alone.

    Returns:
        The config (one of the types in `MODELS`) and the parameter tree in
        the saved dtypes.

    Raises:
        FileNotFoundError: No checkpoint there.
        ValueError: The checkpoint cannot be read.
    """
    return _read_newest(directory, functools.partial(_load_model, shardings=shardings or _on_first_device))


def load_shapes(directory: str | pathlib.Path) -> tuple[Any, Any]:
    """What `load` would read, with the shape and dtype of each parameter in its place; the errors are the same."""
    metadata = _read_newest(directory, read_metadata)
    return metadata.config, metadata.params


def load_config(directory: str | pathlib.Path, kind: str, argument: str) -> Any:
    """The config of the model that a program's argument names.

    Args:
        directory: as `load` reads it.
        kind: what the model has to be, "moshi" or "mimi".
        argument: named in errors.

    Raises:
        ValueError: there is no model, or one of another kind.
    """
    try:
        config, _ = load_shapes(directory)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(
            f"{argument}: {error} Kyutai's weights become one by `python -m ttt_jax.convert --source={kind} "
            "--input=kyutai/moshiko-pytorch-bf16 --output=DIR`"
        ) from error
    if not isinstance(config, MODELS[kind]):
        expected, got = (model.__name__.removesuffix("Config") for model in (MODELS[kind], type(config)))
        raise ValueError(f"{argument}: expected a {expected}, {directory} holds a {got}")
    return config


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
    return ModelMetadata(config, params, metadata.metadata[params], factors, scaling, saved)


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
        except MemoryError:
            raise
        # Orbax, TensorStore, the JSON parser and the file system each raise their own types for a damaged file.
        except Exception as caught:
            if "RESOURCE_EXHAUSTED" in str(caught):
                raise MemoryError(f"{path} does not fit the memory: {_first_line(caught)}") from caught
            logging.warning("DAMAGED CHECKPOINT %s cannot be read: %s", path, _first_line(caught))
            error = caught
    names = ", ".join(map(str, paths))
    raise ValueError(f"no readable checkpoint; tried {names}. Restore one from a copy, or start anew.") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def _load_model(path: pathlib.Path, shardings: Callable[[Any], Any]) -> tuple[Any, Any]:
    metadata = read_metadata(path)
    where = shardings(metadata.params)
    params = _load_arrays(path, metadata.name, metadata.params, where)
    if metadata.lora:
        factors = _load_arrays(path, LORA, metadata.lora, shardings(metadata.lora))
        # Donated, so that there are never two copies of the parameters.
        merge = jax.jit(lora.merge, static_argnums=2, donate_argnums=0, out_shardings=where)
        params = merge(params, factors, metadata.lora_scaling)
    return metadata.config, params


def _on_first_device(shapes: Any) -> Any:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda leaf: device, shapes)


class Leaves:
    """The parameters that `load` would give, read one at a time as NumPy arrays.

    Attributes:
        path: Of the checkpoint.
        config: The model's config.
        shapes: Path, such as "layers_0/gate", to what has the `shape` and `dtype` of the parameter.
        metadata: All that the checkpoint's metadata says.
    """

    def __init__(self, path: pathlib.Path):
        saved = read_metadata(path)
        self.config = saved.config
        self.shapes: dict[str, Any] = flatten_dict(saved.params, sep="/")
        self.metadata = saved.saved
        self.path = path
        self._name, self._scaling = saved.name, saved.lora_scaling
        self._factors: dict[str, Any] = flatten_dict(saved.lora or {}, sep="/")

    def read(self, path: str) -> np.ndarray:
        """One parameter, low-rank factors merged."""
        leaf = self._read(self._name, self.shapes, path)
        if f"{path}/A" not in self._factors:
            return leaf
        factors = {name: self._read(LORA, self._factors, f"{path}/{name}") for name in lora.FACTORS}
        return np.asarray(lora.merge({"kernel": leaf}, {"kernel": factors}, self._scaling)["kernel"])

    def _read(self, name: str, shapes: dict[str, Any], path: str) -> np.ndarray:
        wanted: dict[str, Any] = {other: ocp.PLACEHOLDER for other in shapes}
        shape = shapes[path]
        wanted[path] = np.broadcast_to(np.zeros((), shape.dtype), shape.shape)  # says: NumPy, this shape and dtype
        loaded: Any = ocp.load(str(self.path), unflatten_dict(wanted, sep="/"), checkpointable_name=name)
        return np.asarray(flatten_dict(loaded, sep="/")[path])


def open_leaves(directory: str | pathlib.Path) -> Leaves:
    """Opens a model to read its parameters one at a time; arguments and errors are those of `load`."""
    return _read_newest(directory, Leaves)


def _load_arrays(path: pathlib.Path, name: str, shapes: Any, shardings: Any) -> Any:
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )
    return ocp.load(str(path), abstract, checkpointable_name=name)
