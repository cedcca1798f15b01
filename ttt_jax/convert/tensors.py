"""Tensors that are read from their files when they are asked for, one at a time."""

import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
_SHARD = re.compile(r"(.*)-\d{5}-of-(\d{5})\.safetensors")


class Tensor:
    """Shape, dtype, and a way to read some rows: `numpy.asarray(tensor)` reads them all, `tensor[2:4]` makes a part.

    Args:
        shape: Of the tensor.
        dtype: Of its elements.
        read: Rows `start .. stop - 1` as an array, (start, stop) -> [stop - start, ...].
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any, read: Callable[[int, int], np.ndarray]):
        self.shape = tuple(shape)
        self.dtype = np.dtype(dtype)
        self._read = read

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        array = self._read(0, self.shape[0] if self.shape else 0)
        return array if dtype is None else array.astype(dtype, copy=False)

    def __getitem__(self, rows: slice) -> "Tensor":
        start, stop, _ = rows.indices(self.shape[0])
        return Tensor((stop - start, *self.shape[1:]), self.dtype, lambda a, b: self._read(start + a, start + b))


def computed(shape: tuple[int, ...], dtype: Any, compute: Callable[[], np.ndarray]) -> Tensor:
    """A tensor that is computed from others when it is read."""
    return Tensor(shape, dtype, lambda start, stop: compute()[start:stop] if shape else compute())


def open_file(path: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, by name.

    Raises:
        ValueError: The file is missing, cut short or no safetensors file.
    """
    if not path.is_file():
        raise ValueError(f"--input: {path} does not exist")
    try:
        with safe_open(path, framework="np") as file:
            described = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            kinds = {name: (part.get_shape(), part.get_dtype()) for name, part in described.items()}
    except SafetensorError as error:
        hint = "" if path.suffix == SUFFIX else " Kyutai's and Hugging Face's weights end in .safetensors."
        raise ValueError(
            f"--input: {path} is cut short or no safetensors file ({error}); download it again.{hint}"
        ) from (error)
    unknown = sorted({kind for _, kind in kinds.values()} - DTYPES.keys())
    if unknown:
        raise ValueError(f"--input: {path} holds tensors of the types {unknown}, expected some of {sorted(DTYPES)}")
    return {name: _in_file(path, name, tuple(shape), kind) for name, (shape, kind) in kinds.items()}


def _in_file(path: pathlib.Path, name: str, shape: tuple[int, ...], kind: str) -> Tensor:
    def read(start: int, stop: int) -> np.ndarray:
        # Opened anew each time: the pages of a mapped file count as memory until it is closed.
        with safe_open(path, framework="np") as file:
            return file.get_slice(name)[start:stop] if shape else file.get_tensor(name)

    return Tensor(shape, DTYPES[kind], read)


def open_index(path: pathlib.Path) -> dict[str, Tensor]:
    """The tensors that an index names, in the files beside it.

    Raises:
        ValueError: It is no index, a file that it names is missing or damaged, or lacks a tensor that it names.
    """
    try:
        where = json.loads(path.read_text())["weight_map"]
        files = {name: open_file(path.parent / name) for name in sorted(set(where.values()))}
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"--input: {path} is no index of safetensors files ({error!r})") from error
    lacking = [f"{tensor} in {file}" for tensor, file in sorted(where.items()) if tensor not in files[file]]
    if lacking:
        raise ValueError(f"--input: {path} names tensors that its files lack: {'; '.join(lacking)}")
    return {tensor: files[file][tensor] for tensor, file in where.items()}


def shards(path: pathlib.Path) -> list[pathlib.Path]:
    """The files that belong together with this one by their names, NAME-00001-of-00003.safetensors and so on."""
    match = _SHARD.fullmatch(path.name)
    if match is None:
        return [path]
    name, count = match.groups()
    return [path.with_name(f"{name}-{number:05}-of-{count}{SUFFIX}") for number in range(1, int(count) + 1)]


def open_tensors(path: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, of all the files that belong together with it, or of an index of several.

    Raises:
        ValueError: A file is missing or damaged, or two have a tensor of the same name.
    """
    if path.name.endswith(INDEX_SUFFIX):
        return open_index(path)
    tensors: dict[str, Tensor] = {}
    for file in shards(path):
        found = open_file(file)
        twice = sorted(found.keys() & tensors.keys())
        if twice:
            raise ValueError(f"--input: {file} holds tensors that the files before it hold too: {', '.join(twice)}")
        tensors |= found
    return tensors


def read_metadata(path: pathlib.Path) -> dict[str, str]:
    """What the header of a safetensors file says beside its tensors; nothing of an index."""
    if path.name.endswith(INDEX_SUFFIX):
        return {}
    with safe_open(path, framework="np") as file:
        return {name: value for name, value in (file.metadata() or {}).items() if name != "format"}


def _dtypes() -> dict[str, np.dtype]:
    import ml_dtypes

    numpy = {"F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1", "U8": "u1"}
    return {name: np.dtype(kind) for name, kind in numpy.items()} | {
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "BOOL": np.dtype(bool),
    }


DTYPES = _dtypes()
"""Those of safetensors' element types that weights come in."""
