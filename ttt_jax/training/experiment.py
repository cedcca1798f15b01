"""From a plain config mapping and a directory to a trained model."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from ttt_jax.checkpoint import has_checkpoint
from ttt_jax.config import from_mapping
from ttt_jax.data.codecs import codec_of
from ttt_jax.data.reader import open_dataset, splits
from ttt_jax.data.tokens import TokenInfo
from ttt_jax.files import only_process
from ttt_jax.models.moshi import MoshiConfig
from ttt_jax.training import distributed, sharding
from ttt_jax.training.config import ExperimentConfig, claim_workdir
from ttt_jax.training.held_out import VALIDATION
from ttt_jax.training.initial import check_init_from
from ttt_jax.training.loop import Speak, train
from ttt_jax.training.objective import objective_of, objective_type

Speaker = Callable[[MoshiConfig, Any, np.ndarray, TokenInfo], tuple[np.ndarray, int]]
"""(model, parameters, a recording [1 + n_q, T], its dataset) -> what `loop.Speak` returns."""


def run(mapping: Mapping[str, Any], workdir: pathlib.Path, speaker: Speaker | None = None) -> tuple[int, int]:
    """Trains the experiment that `mapping` describes, or goes on with it.

    Args:
        mapping: Fields of `ExperimentConfig`, nested as it is; a Moshi's vocabulary comes from the dataset.
        workdir: The run's directory, made if missing.
        speaker: Makes the model speak, for `config.log.audio_every_steps`.

    Returns:
        The updates done and the updates asked for.

    Raises:
        ValueError, TypeError: A bad config, one that contradicts the dataset, or a workdir of another config.
        FileNotFoundError: No dataset; names the command that makes one.
        NonFiniteError: See `train`.
        RuntimeError: Another run is training in `workdir`.
    """
    # Before the data, so that a typo is told even without a dataset.
    config = from_mapping(ExperimentConfig, mapping)
    config = objective_type(config).with_dataset(config, mapping.get("model") or {})
    sharding.check_batch_size(sharding.make_mesh(config.mesh), config.data.batch_size, config.optimizer.accumulate)
    training, validation = objective_of(config).batches()
    speak = _speak(config, speaker)
    distributed.check_same(repr(config).encode(), "config")
    if not has_checkpoint(workdir):
        check_init_from(config)
    # Last, so that a start that fails leaves nothing behind.
    with _only_run(workdir):
        claim_workdir(workdir, config)
        return train(config, workdir, training, validation, speak), config.optimizer.steps


@contextlib.contextmanager
def _only_run(workdir: pathlib.Path) -> Iterator[None]:
    """Two at a time would destroy each other's checkpoints."""
    with contextlib.ExitStack() as held:
        error = None
        if distributed.is_first():
            workdir.mkdir(parents=True, exist_ok=True)
            try:
                held.enter_context(only_process(workdir / "lock", f"training in {workdir}"))
            except RuntimeError as caught:
                error = caught
        if not distributed.everywhere(error is None):
            raise error or RuntimeError(f"another run is training in {workdir}.")
        yield


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
