"""Results of benchmarks as JSON files that other languages read too."""

import dataclasses
import json
import math
import pathlib
from typing import Any

from ttt_jax.files import write_atomically


def write_result(path: pathlib.Path, result: Any) -> None:
    """Write a dataclass as JSON; JSON has no NaN, so null stands where there is no number."""
    write_atomically(path, json.dumps(_plain(dataclasses.asdict(result)), indent=1, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
