"""The split that validation scores."""

import sys
from collections.abc import Iterable

from ttt_jax.training.config import ExperimentConfig

VALIDATION = "validation"
VALIDATION_SEED = 0


def is_validated(config: ExperimentConfig, splits: Iterable[str]) -> bool:
    """Whether the run validates; says so where it is to, but the dataset has no such split among its `splits`."""
    if not config.validation.every_steps:
        return False
    if VALIDATION in splits:
        return True
    print(f"no validation: {config.data.directory} is too small to hold such a split", file=sys.stderr)
    return False
