"""From a plain config mapping and a directory to a trained model."""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from ttt_jax.checkpoint import has_checkpoint
from ttt_jax.config import from_mapping
from ttt_jax.data.chunks import Chunks, Crops, Stages, Walks
from ttt_jax.data.codecs import codec_of
from ttt_jax.data.reader import TokenDataset, open_dataset, splits
from ttt_jax.data.tokens import TokenInfo
from ttt_jax.models.moshi import MoshiConfig
from ttt_jax.training import distributed, sharding
from ttt_jax.training.config import ExperimentConfig, Stage, claim_workdir, with_vocabulary
from ttt_jax.training.initial import check_init_from
from ttt_jax.training.loop import Speak, train

VALIDATION = "validation"
VALIDATION_SEED = 0


Speaker = Callable[[MoshiConfig, Any, np.ndarray, TokenInfo], tuple[np.ndarray, int]]
"""(model, parameters, a recording [1 + n_q, T], its dataset) -> what `loop.Speak` returns."""


def run(mapping: Mapping[str, Any], workdir: pathlib.Path, speaker: Speaker | None = None) -> tuple[int, int]:
    """Trains the experiment that `mapping` describes, or goes on with it.

    Args:
        mapping: Fields of `ExperimentConfig`, nested as it is; the model's vocabulary comes from the dataset.
        workdir: The run's directory, made if missing.
        speaker: Makes the model speak, for `config.log.audio_every_steps`.

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
    sharding.check_batch_size(sharding.make_mesh(config.mesh), config.data.batch_size, config.optimizer.accumulate)
    validation = None
    if config.validation.every_steps and VALIDATION in splits(config.data.directory):
        held_out = open_dataset(config.data.directory, VALIDATION)
        validation = _chunks(config, held_out, Crops, num_frames=config.data.num_frames, seed=VALIDATION_SEED)
    elif config.validation.every_steps:
        print(f"no validation: {config.data.directory} is too small to hold such a split", file=sys.stderr)
    chunks = training_chunks(config, training)
    speak = _speak(config, speaker)
    distributed.check_same(repr(config).encode(), "config")
    if not has_checkpoint(workdir):
        check_init_from(config)
    # Last, so that a start that fails leaves nothing behind.
    claim_workdir(workdir, config)
    return train(config, workdir, chunks, validation, speak), config.optimizer.steps


def _speak(config: ExperimentConfig, speaker: Speaker | None) -> Speak | None:
    """The model going on with the longest validation recording."""
    if speaker is None or config.log.audio_every_steps == 0 or VALIDATION not in splits(config.data.directory):
        return None
    if jax.process_count() > 1:  # the parameters are spread over hosts
        return None
    held_out = open_dataset(config.data.directory, VALIDATION)
    codec_of(held_out.info)  # now, rather than when it is to speak
    codes = held_out[int(np.argmax(held_out.num_frames))].codes
    return lambda params: speaker(config.model, params, codes, held_out.info)


def training_chunks(config: ExperimentConfig, dataset: TokenDataset) -> Chunks:
    """What each update of the experiment reads: the stages of its curriculum, then the data section's own sizes."""
    data = config.data
    stages = []
    for stage in (*data.stages, Stage(config.optimizer.steps, data.num_frames, data.recording_frames)):
        if data.mode == "follow":
            frames = stage.num_frames * data.gradient_chunks
            make = functools.partial(Walks, num_frames=frames, recording_frames=stage.recording_frames)
        else:
            make = functools.partial(Crops, num_frames=stage.num_frames)
        stages.append((stage.steps, _chunks(config, dataset, make, seed=config.seed)))
    return Stages(stages)


def _chunks(config: ExperimentConfig, dataset: TokenDataset, make: Callable[..., Chunks], **options: Any) -> Chunks:
    """Chunks of the rows that this process trains on."""
    model, rows = config.model, config.data.batch_size
    return make(
        dataset,
        batch_size=rows,
        delays=model.delays,
        initial=model.initial_tokens,
        rows=sharding.local_rows(sharding.make_mesh(config.mesh), rows),
        **options,
    )
