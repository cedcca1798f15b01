"""One error that lists everything wrong with a checkpoint's tensors."""

from collections.abc import Mapping
from typing import Any


def check_tensors(expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Any]) -> None:
    """Compare names and shapes with what a model needs.

    Raises:
      ValueError: lists every missing, unexpected or misshapen tensor.
    """
    missing = [f"{name} {list(expected[name])}" for name in sorted(expected.keys() - tensors.keys())]
    unexpected = [f"{name} {list(tensors[name].shape)}" for name in sorted(tensors.keys() - expected.keys())]
    misshapen = [
        f"{name}: expected {list(shape)}, got {list(tensors[name].shape)}"
        for name, shape in sorted(expected.items())
        if name in tensors and tuple(tensors[name].shape) != tuple(shape)
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    problems = [f"{kind} ({len(names)}): " + "; ".join(names) for kind, names in kinds.items() if names]
    if problems:
        raise ValueError(
            "the tensors do not fit the config; is it the config of this checkpoint?\n" + "\n".join(problems)
        )
