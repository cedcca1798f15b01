"""A checkpoint of this library back to the safetensors and config of those whose model it is, for their code."""

import itertools
import json
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import tqdm

from ttt_jax.checkpoint import Leaves, open_leaves
from ttt_jax.convert import sources
from ttt_jax.convert.checks import check_tensors
from ttt_jax.convert.table import Rule, take_apart
from ttt_jax.convert.writing import Entry, Naming, constant_entries, entries_of, naming_of, write_file
from ttt_jax.data.tokens import TOKENIZER_FILE
from ttt_jax.files import new_directory
from ttt_jax.models.moshi import insertion as moshi_insertion
from ttt_jax.models.video_dit import VideoDiTConfig
from ttt_jax.models.video_dit import insertion as video_dit_insertion

TTT_FILE = "ttt.safetensors"


class _Reversal(NamedTuple):
    leaves: Leaves
    naming: Naming
    dtype: np.dtype | None
    ttt: list[str]  # paths of what the naming does not know, which came with TTT

    def entries(self, rule: Rule) -> list[Entry]:
        """The tensors that the leaf becomes."""
        dtype = np.dtype(self.leaves.shapes[rule.path].dtype) if self.dtype is None else self.dtype
        return entries_of(rule, dtype, self.naming.fused)

    def tensors(self, rule: Rule) -> Iterator[np.ndarray]:
        """Their values."""
        leaf = self.leaves.read(rule.path)
        leaf = leaf if self.dtype is None else leaf.astype(self.dtype)
        parts = (part for _, part in take_apart(rule, leaf))
        yield from parts if len(self.entries(rule)) == len(rule.names) else [np.concatenate(list(parts))]

    def ttt_entries(self) -> list[Entry]:
        """The parameters of TTT layers, by their paths here."""
        shapes = {path: self.leaves.shapes[path] for path in self.ttt}
        return [Entry(path, leaf.shape, np.dtype(leaf.dtype)) for path, leaf in shapes.items()]


def reverse(directory: str | pathlib.Path, output: pathlib.Path, *, dtype: str | None, names: str | None) -> None:
    """Writes the weights and `config.json` into `output`, which appears whole or not at all.

    The weights are `model.safetensors`, or what diffusers calls them. TTT layers that the code of others does not know
    go into `ttt.safetensors` by their paths here.

    Args:
        directory: A checkpoint of Moshi, Mimi or Video-DiT, or a workdir of train.py; low-rank factors are merged.
        output: Must not exist.
        dtype: Of the tensors; None as stored.
        names: Those that `naming_of` takes; None as the model came, else the first ones there.

    Raises:
        FileExistsError: `output` exists.
        ValueError: The checkpoint holds none of these models, cannot be read, or has no such names.
    """
    reversal = _open(directory, dtype, names)
    table, ttt = reversal.naming.table, reversal.ttt_entries()
    entries = [entry for rule in table.rules for entry in reversal.entries(rule)]
    entries += constant_entries(table)
    with new_directory(output) as staging:
        with _bar(sum(entry.nbytes for entry in (*entries, *ttt))) as bar:
            tensors = (tensor for rule in table.rules for tensor in reversal.tensors(rule))
            values = itertools.chain(tensors, table.constants.values())
            write_file(staging / reversal.naming.file, entries, values, bar.update)
            if ttt:
                write_file(staging / TTT_FILE, ttt, (reversal.leaves.read(entry.name) for entry in ttt), bar.update)
        if (tokenizer := reversal.leaves.path / TOKENIZER_FILE).is_file():
            shutil.copyfile(tokenizer, staging / sources.TOKENIZER_FILE)
        (staging / sources.CONFIG_FILE).write_text(json.dumps(reversal.naming.config, indent=1) + "\n")


def describe(directory: str | pathlib.Path, *, dtype: str | None, names: str | None) -> Iterator[str]:
    """What `reverse` would write, a line each leaf; its errors are the same."""
    reversal = _open(directory, dtype, names)
    total, table = 0, reversal.naming.table
    for rule in table.rules:
        entries = reversal.entries(rule)
        total += sum(entry.nbytes for entry in entries)
        others = f" .. {entries[-1].name} ({len(entries)})" if len(entries) > 1 else ""
        yield f"{rule.path} -> {entries[0].name}{others} {entries[0].dtype.name}{list(entries[0].shape)}"
    ttt = reversal.ttt_entries()
    for entry in ttt:
        yield f"{entry.name} -> {TTT_FILE} {entry.dtype.name}{list(entry.shape)}"
    total += sum(entry.nbytes for entry in (*constant_entries(table), *ttt))
    yield f"{len(table.rules)} parameters and {len(ttt)} of TTT: {total / 1e6:.1f} MB"


def _open(directory: str | pathlib.Path, dtype: str | None, names: str | None) -> _Reversal:
    leaves = open_leaves(directory)
    naming = naming_of(leaves.config, names or leaves.metadata.get("names"))
    insertion = video_dit_insertion if isinstance(leaves.config, VideoDiTConfig) else moshi_insertion
    expected = {rule.path: rule.leaf_shape for rule in naming.table.rules}
    ttt = [path for path in leaves.shapes if insertion.is_inserted(path) and path not in expected]
    check_tensors(expected, {path: leaf for path, leaf in leaves.shapes.items() if path not in ttt})
    return _Reversal(leaves, naming, None if dtype is None else np.dtype(dtype), ttt)


def _bar(total: int) -> tqdm.tqdm:
    return tqdm.tqdm(total=total, unit="B", unit_scale=True, dynamic_ncols=True, file=sys.stderr)
