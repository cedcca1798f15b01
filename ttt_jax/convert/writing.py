"""Writing others' files as their tensors come; the safetensors package writes only what is in memory as a whole."""

import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ttt_jax.convert.fused import fused_name
from ttt_jax.convert.mimi import mimi_table
from ttt_jax.convert.moshi import moshi_table
from ttt_jax.convert.table import Rule, Table
from ttt_jax.convert.tensors import DTYPES
from ttt_jax.convert.video_dit import cogvideox_table, ttt_video_dit_table
from ttt_jax.models.mimi import MimiConfig
from ttt_jax.models.moshi import MoshiConfig
from ttt_jax.models.video_dit import VideoDiTConfig

ALIGNMENT = 8
MODEL_FILE = "model.safetensors"
COGVIDEOX_FILE = "diffusion_pytorch_model.safetensors"
FUSED, CURRENT, TTT_VIDEO_DIT, DIFFUSERS = "fused", "current", "ttt_video_dit", "diffusers"
"""Names of tensors: of Kyutai's released files and of their code, of TTT-Video-DiT, and of CogVideoX in diffusers."""


class Entry(NamedTuple):
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


def entries_of(rule: Rule, dtype: np.dtype, fused: bool) -> list[Entry]:
    """The tensors of a leaf, attention projections under the name of released files if `fused`."""
    name = fused_name(rule) if fused else None
    if name is not None:
        return [Entry(name, (len(rule.names) * rule.shape[0], *rule.shape[1:]), dtype)]
    return [Entry(name, rule.shape, dtype) for name in rule.names]


def constant_entries(table: Table) -> list[Entry]:
    """The tensors that are no parameters."""
    return [Entry(name, constant.shape, constant.dtype) for name, constant in table.constants.items()]


class Naming(NamedTuple):
    """How a model is laid out for the code of others."""

    table: Table
    fused: bool  # attention projections under the name of released files
    file: str  # of the weights
    config: dict[str, Any]  # what config.json holds


def naming_of(config: Any, names: str | None) -> Naming:
    """The layout of a model.

    Args:
        config: The model's.
        names: "fused" or "current" for Moshi and Mimi, "ttt_video_dit" or "diffusers" for a Video-DiT; None is the
            first of the two.

    Raises:
        ValueError: The config is of another model, or has no such names.
    """
    known = (TTT_VIDEO_DIT, DIFFUSERS) if isinstance(config, VideoDiTConfig) else (FUSED, CURRENT)
    names = known[0] if names is None else names
    if names not in known:
        raise ValueError(f"--names: expected one of {known} for this model, got {names!r}")
    if names == DIFFUSERS:
        return Naming(cogvideox_table(config), False, COGVIDEOX_FILE, config.to_cogvideox())
    if names == TTT_VIDEO_DIT:
        return Naming(ttt_video_dit_table(config), False, MODEL_FILE, config.to_ttt_video_dit())
    if not isinstance(config, MoshiConfig | MimiConfig):
        raise ValueError(f"expected a Moshi, a Mimi or a Video-DiT, got a {type(config).__name__}")
    table = moshi_table(config) if isinstance(config, MoshiConfig) else mimi_table(config)
    return Naming(table, names == FUSED, MODEL_FILE, config.to_kyutai())


def write_file(
    path: pathlib.Path,
    entries: Sequence[Entry],
    values: Iterable[np.ndarray],
    written: Callable[[int], object] = lambda nbytes: None,
) -> None:
    """Writes the file: the header's length (8 bytes, little-endian), the header in JSON, the tensors.

    Args:
        path: Of the file; what a killed call left of it does not open.
        entries: The tensors in their order.
        values: Their values, in the same order.
        written: Is told the bytes of every tensor when it has been written.

    Raises:
        ValueError: A value is not what its entry says.
    """
    kinds = {dtype: name for name, dtype in DTYPES.items()}
    header, end = {}, 0
    for entry in entries:
        begin, end = end, end + entry.nbytes
        header[entry.name] = {"dtype": kinds[entry.dtype], "shape": entry.shape, "data_offsets": (begin, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry, value in zip(entries, values, strict=True):
            if (value.shape, value.dtype) != (entry.shape, entry.dtype):
                raise ValueError(f"{entry.name}: {value.dtype}{list(value.shape)} is not what was announced: {entry}")
            file.write(np.ascontiguousarray(value).tobytes())
            written(entry.nbytes)
        file.flush()
        os.fsync(file.fileno())
