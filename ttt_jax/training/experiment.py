"""From a plain config mapping and a directory to a trained model."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

from ttt_jax.config import from_mapping
from ttt_jax.data.reader import batches, open_dataset
from ttt_jax.training.config import ExperimentConfig, claim_workdir, with_vocabulary
from ttt_jax.training.loop import train

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
    claim_workdir(workdir, config)
    crops = functools.partial(batches, batch_size=config.data.batch_size, num_frames=config.data.num_frames)
    validation = None
    if config.validation.every_steps:
        validation = crops(open_dataset(config.data.directory, "validation"), seed=VALIDATION_SEED)
    return train(config, workdir, crops(training, seed=config.seed), validation), config.optimizer.steps
