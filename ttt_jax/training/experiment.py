"""From a plain config mapping and a directory to a trained model."""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from ttt_jax.config import from_mapping
from ttt_jax.data.reader import batches, open_dataset, splits
from ttt_jax.training.config import ExperimentConfig, claim_workdir, with_vocabulary
from ttt_jax.training.loop import train

VALIDATION = "validation"
VALIDATION_SEED = 0


def run(mapping: Mapping[str, Any], workdir: pathlib.Path) -> tuple[int, int]:
    """Trains the experiment that `mapping` describes, or goes on with it.

    Args:
        mapping: Fields of `ExperimentConfig`, nested as it is; the model's vocabulary comes from the dataset.
        workdir: The run's directory, made if missing.

    Returns:
        The updates done and the updates asked for.

    Raises:
        ValueError, TypeError: A bad config, one that contradicts the dataset, or a workdir of another config.
        FileNotFoundError: No dataset; names the command that makes one.
        NonFiniteError: See `train`.
    """
    # Before the data, so that a typo is told even without a dataset.
    config = from_mapping(ExperimentConfig, mapping)
    training = open_dataset(config.data.directory, "train")
    model = with_vocabulary(mapping.get("model", {}), training.info)
    config = dataclasses.replace(config, model=model)
    crops = functools.partial(batches, batch_size=config.data.batch_size, num_frames=config.data.num_frames)
    validation = None
    if config.validation.every_steps and VALIDATION in splits(config.data.directory):
        validation = crops(open_dataset(config.data.directory, VALIDATION), seed=VALIDATION_SEED)
    elif config.validation.every_steps:
        print(f"no validation: {config.data.directory} is too small to hold such a split", file=sys.stderr)
    training_batches = crops(training, seed=config.seed)
    # Last, so that a start that fails leaves nothing behind.
    claim_workdir(workdir, config)
    return train(config, workdir, training_batches, validation), config.optimizer.steps
