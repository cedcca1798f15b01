"""From a plain config mapping and a directory to a trained model."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from ttt_jax.config import from_mapping
from ttt_jax.data import TokenDataset, batches, open_dataset
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
    training = _open(config.data.directory, "train")
    validation = _open(config.data.directory, "validation")
    model = with_vocabulary(mapping.get("model", {}), training.info)
    config = dataclasses.replace(config, model=model)
    claim_workdir(workdir, config)
    shape = {"batch_size": config.data.batch_size, "num_frames": config.data.num_frames}
    done = train(
        config,
        workdir,
        batches(training, seed=config.seed, **shape),
        batches(validation, seed=VALIDATION_SEED, **shape),
    )
    return done, config.optimizer.steps


def _open(directory: str, split: str) -> TokenDataset:
    if not pathlib.Path(directory).is_dir():
        raise FileNotFoundError(
            f"config.data.directory: no dataset in {directory!r}. Make one with\n"
            f"  python -m ttt_jax.data.conversations --hours=4 --seed=0 --output={directory}\n"
            f"  python -m ttt_jax.data.prepare --audio=FOLDER --output={directory} --codec=codec2"
        )
    return open_dataset(directory, split)
