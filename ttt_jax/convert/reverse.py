"""A checkpoint of this library back to Kyutai's safetensors and config, for users of their code."""

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
from ttt_jax.convert.table import Rule, Table, take_apart
from ttt_jax.convert.writing import Entry, constant_entries, entries_of, table_of, write_file
from ttt_jax.data.tokens import TOKENIZER_FILE
from ttt_jax.files import new_directory
from ttt_jax.models.moshi.insertion import is_inserted

TTT_FILE = "ttt.safetensors"


class _Reversal(NamedTuple):
    leaves: Leaves
    table: Table
    dtype: np.dtype | None
    fused: bool

    def entries(self, rule: Rule) -> list[Entry]:
        """The tensors that the leaf becomes."""
        dtype = np.dtype(self.leaves.shapes[rule.path].dtype) if self.dtype is None else self.dtype
        return entries_of(rule, dtype, self.fused)

    def tensors(self, rule: Rule) -> Iterator[np.ndarray]:
        """Their values."""
        leaf = self.leaves.read(rule.path)
        leaf = leaf if self.dtype is None else leaf.astype(self.dtype)
        parts = (part for _, part in take_apart(rule, leaf))
        yield from parts if len(self.entries(rule)) == len(rule.names) else [np.concatenate(list(parts))]

    def ttt_entries(self) -> list[Entry]:
        """The parameters of TTT layers, by their paths here."""
        shapes = {path: leaf for path, leaf in self.leaves.shapes.items() if is_inserted(path)}
        return [Entry(path, leaf.shape, np.dtype(leaf.dtype)) for path, leaf in shapes.items()]


def reverse(directory: str | pathlib.Path, output: pathlib.Path, *, dtype: str | None, names: str | None) -> None:
    """Writes `model.safetensors` and `config.json` into `output`, which appears whole or not at all.

    TTT layers, which Kyutai's code does not know, go into `ttt.safetensors` by their paths here.

    Args:
        directory: A checkpoint of Moshi or Mimi, or a workdir of train.py; low-rank factors are merged.
        output: Must not exist.
        dtype: Of the tensors; None as stored.
        names: "fused" as in released files, "current" as in Kyutai's code; None as the model came, else "fused".

    Raises:
        FileExistsError: `output` exists.
        ValueError: The checkpoint holds no Moshi or Mimi, or cannot be read.
    """
    reversal = _open(directory, dtype, names)
    rules, ttt = reversal.table.rules, reversal.ttt_entries()
    entries = [entry for rule in rules for entry in reversal.entries(rule)]
    entries += constant_entries(reversal.table)
    with new_directory(output) as staging:
        with _bar(sum(entry.nbytes for entry in (*entries, *ttt))) as bar:
            tensors = (tensor for rule in rules for tensor in reversal.tensors(rule))
            values = itertools.chain(tensors, reversal.table.constants.values())
            write_file(staging / sources.MOSHI_FILE, entries, values, bar.update)
            if ttt:
                write_file(staging / TTT_FILE, ttt, (reversal.leaves.read(entry.name) for entry in ttt), bar.update)
        if (tokenizer := reversal.leaves.path / TOKENIZER_FILE).is_file():
            shutil.copyfile(tokenizer, staging / sources.TOKENIZER_FILE)
        (staging / sources.CONFIG_FILE).write_text(json.dumps(reversal.leaves.config.to_kyutai(), indent=1) + "\n")


def describe(directory: str | pathlib.Path, *, dtype: str | None, names: str | None) -> Iterator[str]:
    """What `reverse` would write, a line each leaf; its errors are the same."""
    reversal = _open(directory, dtype, names)
    total = 0
    for rule in reversal.table.rules:
        entries = reversal.entries(rule)
        total += sum(entry.nbytes for entry in entries)
        others = f" .. {entries[-1].name} ({len(entries)})" if len(entries) > 1 else ""
        yield f"{rule.path} -> {entries[0].name}{others} {entries[0].dtype.name}{list(entries[0].shape)}"
    ttt = reversal.ttt_entries()
    for entry in ttt:
        yield f"{entry.name} -> {TTT_FILE} {entry.dtype.name}{list(entry.shape)}"
    total += sum(entry.nbytes for entry in (*constant_entries(reversal.table), *ttt))
    yield f"{len(reversal.table.rules)} parameters and {len(ttt)} of TTT: {total / 1e6:.1f} MB"


def _open(directory: str | pathlib.Path, dtype: str | None, names: str | None) -> _Reversal:
    leaves = open_leaves(directory)
    table = table_of(leaves.config)
    expected = {rule.path: rule.leaf_shape for rule in table.rules}
    check_tensors(expected, {path: leaf for path, leaf in leaves.shapes.items() if not is_inserted(path)})
    fused = (names or leaves.metadata.get("names", "fused")) == "fused"
    return _Reversal(leaves, table, None if dtype is None else np.dtype(dtype), fused)


def _bar(total: int) -> tqdm.tqdm:
    return tqdm.tqdm(total=total, unit="B", unit_scale=True, dynamic_ncols=True, file=sys.stderr)
