"""The checkpoints of one run: saved in the background, whole or not at all, pruned, and read back past damage."""

import pathlib
import time
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp
from absl import logging

from ttt_jax.checkpoint import (
    CHECKPOINTS,
    LORA,
    PARAMS,
    first_readable,
    model_metadata,
    read_metadata,
    step_directories,
)
from ttt_jax.training import distributed
from ttt_jax.training.config import CheckpointConfig, ExperimentConfig
from ttt_jax.training.step import TrainState, all_finite

PROGRESS = "progress"
UNREADABLE = "unreadable"


class NonFiniteError(RuntimeError):
    """The loss or the state stopped being finite."""


def restore_latest(workdir: pathlib.Path, abstract: TrainState) -> TrainState | None:
    """The newest state of a run that all processes can read; None when the run has no checkpoint yet.

    It may have been saved by another number of devices or processes. Damaged checkpoints newer than it are moved to
    `workdir`/unreadable, out of the way of the steps to come.

    Args:
        workdir: The run's directory.
        abstract: The state as `jax.ShapeDtypeStruct`s, with the shardings it is to have (default: the first device).

    Raises:
        ValueError: There are checkpoints but none can be read; nothing is moved.
    """
    workdir = workdir.absolute()
    root = workdir / CHECKPOINTS
    found = [int(path.name) for path in step_directories(root)] if root.is_dir() else []
    paths = [root / str(step) for step in distributed.of_first(found)]
    if not paths:
        return None
    readable, state = first_readable(paths, lambda path: _read_everywhere(path, abstract))
    if distributed.is_first():
        _move_away(paths[: paths.index(readable)], workdir, readable)
    distributed.everywhere(True)  # None goes on before they are moved.
    return state


def _move_away(paths: list[pathlib.Path], workdir: pathlib.Path, readable: pathlib.Path) -> None:
    for damaged in paths:
        target = workdir / UNREADABLE / f"{damaged.name}-{time.time_ns()}"
        target.parent.mkdir(exist_ok=True)
        damaged.rename(target)
        logging.warning("Moved %s to %s; the run goes on from step %s.", damaged, target, readable.name)


def _read_everywhere(path: pathlib.Path, abstract: TrainState) -> TrainState:
    """Reads a checkpoint in all processes, or raises in all of them."""
    state, error = None, None
    try:
        state = _read(path, abstract)
    except Exception as caught:  # of many types, see `first_readable`
        error = caught
    if not distributed.everywhere(error is None) or state is None:
        raise error or ValueError("another process cannot read its part")
    return state


def _read(path: pathlib.Path, abstract: TrainState) -> TrainState:
    read_metadata(path)  # What can be resumed can be loaded as a model too.
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def placed(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or device)

    def read(name, part):
        return ocp.load(str(path), jax.tree.map(placed, part), checkpointable_name=name)

    # One after the other: when one of several fails, Orbax leaves the others' coroutines unawaited.
    with distributed.alone():
        params = read(PARAMS, abstract.params)
        progress = read(PROGRESS, _progress(abstract))
        lora = read(LORA, abstract.lora) if abstract.lora else None
    state = TrainState(progress["step"], params, progress["optimizer"], progress.get("carry", ()), lora)
    if int(state.step) != int(path.name):
        raise ValueError(f"{path} holds step {int(state.step)}.")
    return state


def _progress(state: TrainState) -> dict[str, Any]:
    """All of a state but the parameters and their low-rank factors."""
    carried = {"carry": state.carry} if state.carry else {}
    return {"step": state.step, "optimizer": state.optimizer, **carried}


class Checkpoints:
    """Writes the states of a run to `workdir`/checkpoints in the background; a context manager that waits at its end.

    A checkpoint holds the parameters ("params", with the model's config in its metadata, so that `ttt_jax.load` reads
    it), low-rank factors if there are any ("lora"), and the rest of the state ("progress").
    """

    def __init__(self, workdir: pathlib.Path, config: ExperimentConfig):
        self._config = config.checkpoint
        scaling = config.lora.scaling if config.optimizer.train == "lora" else None
        self._model = model_metadata(config.model, scaling)
        self._checkpointer = ocp.training.Checkpointer(
            str(workdir.absolute() / CHECKPOINTS),
            preservation_policy=_preservation_policy(config.checkpoint),
            cleanup_tmp_directories=True,
        )
        self._saved_at_seconds = time.monotonic()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        self._checkpointer.close()

    @property
    def latest_step(self) -> int | None:
        """Step of the newest finished or begun checkpoint."""
        latest = self._checkpointer.latest
        return latest.step if latest else None

    @property
    def is_late(self) -> bool:
        """Whether `every_seconds` went by since the last save, by this process' clock."""
        seconds = self._config.every_seconds
        return seconds > 0 and time.monotonic() - self._saved_at_seconds >= seconds

    def save(self, step: int, state: TrainState) -> None:
        """Starts writing `state`, the one after update `step`; waits for the write before it to end.

        Raises:
            NonFiniteError: The state is not finite; nothing is written.
        """
        if not all_finite(state):
            raise NonFiniteError(f"The parameters after step {step} are not finite. {self.advice()}")
        self._checkpointer.save_checkpointables_async(
            step,
            {PARAMS: state.params, PROGRESS: _progress(state)} | ({LORA: state.lora} if state.lora else {}),
            force=True,
            custom_metadata=self._model,
        )
        self._saved_at_seconds = time.monotonic()

    def advice(self) -> str:
        """Which checkpoint is the last good one, for the message of a run that has to stop."""
        latest = self._checkpointer.latest
        good = f"The last good checkpoint is {latest.path}." if latest else "There was no checkpoint yet."
        return f"{good} Try a lower optimizer.learning_rate or optimizer.clip_norm in a new --workdir."


def _preservation_policy(config: CheckpointConfig) -> Any:
    policies = ocp.training.preservation_policies
    kept: list[Any] = [policies.LatestN(config.keep)]
    if config.keep_every_steps:
        kept.append(policies.EveryNSteps(config.keep_every_steps))
    return policies.AnyPreservationPolicy(kept)
