"""The run's metrics.jsonl: one JSON object per line, in step order, none twice or missing after a kill."""

import json
import os
import pathlib
from typing import Any

import jax
import numpy as np

from ttt_jax.files import write_atomically
from ttt_jax.training import distributed


class MetricsFile:
    """Appends lines `{"step": n, kind: {...}}`; a context manager. Only the first process writes.

    Opening it for a run that goes on after update `step` drops what a killed run wrote beyond it, since those updates
    are done again.
    """

    def __init__(self, path: pathlib.Path, step: int):
        if not distributed.is_first():
            path = pathlib.Path(os.devnull)
        elif path.exists():
            write_atomically(path, "".join(line for line in path.read_text().splitlines(True) if _is_kept(line, step)))
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()

    def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
        """Appends one line; `values` may hold NumPy scalars and arrays."""
        plain = jax.tree.map(lambda value: np.asarray(value).tolist(), values)
        self._file.write(json.dumps({"step": step, kind: plain}) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Returns when the lines are on the disk."""
        if distributed.is_first():
            os.fsync(self._file.fileno())


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, of a run that may have been killed, or goes on: without a torn last one."""
    lines = (_parsed(line) for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line is not None]


def _is_kept(line: str, step: int) -> bool:
    # A checkpoint is written after the lines of its step, so a torn line is of a later one.
    parsed = _parsed(line)
    return parsed is not None and parsed["step"] <= step


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
