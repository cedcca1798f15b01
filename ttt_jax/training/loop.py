"""The training loop: resume, update, report, save, stop."""

import contextlib
import functools
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import tqdm
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ttt_jax.signals import StopRequest
from ttt_jax.training import distributed, sharding
from ttt_jax.training import step as steps
from ttt_jax.training.checkpoints import Checkpoints, NonFiniteError, restore_latest
from ttt_jax.training.config import ExperimentConfig
from ttt_jax.training.initial import read_init_from
from ttt_jax.training.metrics import MetricsFile
from ttt_jax.training.objective import Batch, Batches, objective_of
from ttt_jax.training.parameters import trained_part
from ttt_jax.training.tensorboard import TensorBoard

Speak = Callable[[Any], tuple[np.ndarray, int]]
"""Parameters -> speech [samples] or [samples, channels] in [-1, 1], and its sample rate in Hz."""


def train(
    config: ExperimentConfig,
    workdir: pathlib.Path,
    training: Batches,
    validation: Batches | None,
    speak: Speak | None = None,
) -> int:
    """Trains to `config.optimizer.steps` updates, going on from the newest readable checkpoint in `workdir`.

    Every process of a run calls this; they work on `config.mesh` together and stop together.

    Policy: update i reads batch i - 1 and nothing else but the state, so a killed run that is started again ends with
    the parameters of an undisturbed one. A checkpoint is written after the metrics up to its step.

    Args:
        config: The experiment.
        workdir: Gets `checkpoints/`, `metrics.jsonl` and `tensorboard/`; of this run alone.
        training: Batches to train on, of the rows that `local_rows` gives this process.
        validation: Batches of fresh rows, whose first `config.validation.num_batches` are scored; None: there is no
            validation, whatever the config says. Of the same rows.
        speak: Makes what is heard in TensorBoard every `config.log.audio_every_steps`; None: nothing is.

    Returns:
        The updates done: fewer than asked for after SIGTERM or SIGINT, which save and stop.

    Raises:
        NonFiniteError: The loss or the parameters are not finite; names the step and the last good checkpoint.
        ValueError: The mesh does not fit the devices, or the batch the mesh.
    """
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch_size(mesh, config.data.batch_size, config.optimizer.accumulate)
    with jax.set_mesh(mesh), StopRequest() as stop:
        functions = Functions(config, mesh)
        state = restore_latest(workdir, functions.abstract_state)
        if state is None:
            state = functions.init(read_init_from(config, mesh))
        start = int(state.step)
        with Checkpoints(workdir, config) as checkpoints, MetricsFile(workdir / "metrics.jsonl", start) as metrics:
            _announce(config, state, mesh)
            with (
                _board(config, workdir, start) as board,
                _Reporter(config, metrics, board, checkpoints, start) as reporter,
            ):
                wishes = distributed.Wishes(mesh, stop=lambda: stop.requested, save=lambda: checkpoints.is_late)
                return _updates(config, state, functions, (training, validation, speak), checkpoints, reporter, wishes)


def _board(config: ExperimentConfig, workdir: pathlib.Path, start: int):
    is_written = config.log.tensorboard and distributed.is_first()
    return TensorBoard(workdir, start) if is_written else contextlib.nullcontext()


class Functions:
    """The run's compiled functions, from and to arrays that lie on the mesh as the rules say."""

    def __init__(self, config: ExperimentConfig, mesh: Mesh):
        init = functools.partial(steps.init_state, config)
        shapes = jax.eval_shape(init)
        state, replicated = sharding.state_shardings(mesh, config.model, shapes), NamedSharding(mesh, PartitionSpec())
        self.abstract_state = jax.tree.map(
            lambda s, to: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=to), shapes, state
        )
        # Donated, so that there are never two copies of the parameters.
        self.init = jax.jit(init, donate_argnums=0, out_shardings=state)
        self._diagnostics = jax.jit(functools.partial(steps.diagnostics, config), out_shardings=replicated)
        self.evaluate = jax.jit(functools.partial(steps.evaluate, config), out_shardings=replicated)
        self._model_params = jax.jit(functools.partial(steps.model_params, config))
        update = functools.partial(steps.train_step, config)
        self._train_step = jax.jit(update, donate_argnums=0, out_shardings=(state, replicated))
        self._put = functools.partial(sharding.put_rows, mesh, batch_size=config.data.batch_size)
        self._updates: dict[tuple[tuple[int, ...], ...], Any] = {}

    def put(self, batch: Batch) -> Batch:
        """The whole batch, of which this process gives the rows that lie on its devices."""
        return self._put(batch)

    def is_compiled(self, batch: Batch) -> bool:
        """Whether `update` is ready for a batch of this size."""
        return _shapes(batch) in self._updates

    def compile(self, batch: Batch) -> None:
        """Makes `update` ready, so that the measured speed does not contain it."""
        self._updates[_shapes(batch)] = self.lower(batch).compile()

    def lower(self, batch: Batch) -> jax.stages.Lowered:
        """`update` for batches of this size, or of these shapes, before it is compiled."""
        return self._train_step.lower(self.abstract_state, batch)

    def model_params(self, state: steps.TrainState) -> Any:
        """A plain model; a copy only where low-rank factors are to be merged."""
        return self._model_params(state.params, state.lora) if state.lora else state.params

    def diagnose(self, state: steps.TrainState, batch: Batch) -> dict[str, jax.Array]:
        """Diagnostics of what the update that reads `batch` next reads first."""
        return self._diagnostics(state.params, batch, state.carry, state.lora)

    def update(self, state: steps.TrainState, batch: Batch) -> tuple[steps.TrainState, dict]:
        """`train_step`; `state` is given up."""
        return self._updates[_shapes(batch)](state, batch)


def _shapes(batch: Batch) -> tuple[tuple[int, ...], ...]:
    return tuple(leaf.shape for leaf in jax.tree.leaves(batch))


def _updates(config, state, functions, sources, checkpoints, reporter, wishes) -> int:
    training, validation, speak = sources
    objective = objective_of(config)
    last = config.optimizer.steps
    step = int(state.step)
    wish = wishes.ask()
    while step < last and not wish.stop:
        step += 1
        local = training[step - 1]
        num_units = objective.units(local) * config.data.batch_size // len(jax.tree.leaves(local)[0])
        batch = functions.put(local)
        if not functions.is_compiled(batch):
            with reporter.pause():
                functions.compile(batch)
        if _is_multiple(step, config.log.diagnostics_every_steps):
            with reporter.pause():
                reporter.write(step, "diagnostics", functions.diagnose(state, batch))
        state, metrics = functions.update(state, batch)
        reporter.push(step, metrics, num_units)
        if validation is not None and _validation_is_due(config, step):
            with reporter.pause():
                reporter.write(step, "validation", _validate(config, functions, state, validation))
        if speak is not None and _is_multiple(step, config.log.audio_every_steps):
            with reporter.pause():
                reporter.listen(step, *speak(functions.model_params(state)))
        wish = wishes.ask()
        if wish.save or _is_multiple(step, config.checkpoint.every_steps):
            with reporter.pause():
                reporter.sync()
                checkpoints.save(step, state)
            wishes.forget()
    reporter.sync()
    if step > (checkpoints.latest_step or 0):
        checkpoints.save(step, state)
    return step


def _is_multiple(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _validation_is_due(config: ExperimentConfig, step: int) -> bool:
    every = config.validation.every_steps
    return _is_multiple(step, every) or (every > 0 and step == config.optimizer.steps)


def _validate(config, functions, state, batches: Batches) -> dict[str, Any]:
    scores = [
        functions.evaluate(state.params, functions.put(batches[i]), state.lora)
        for i in range(config.validation.num_batches)
    ]
    return jax.tree.map(lambda *values: np.mean(jax.device_get(values), axis=0), *scores)


def _announce(config: ExperimentConfig, state: steps.TrainState, mesh: Mesh) -> None:
    if not distributed.is_first():
        return
    trained = trained_part(state.params, state.lora, config.optimizer.train)
    numbers = [sum(leaf.size for leaf in jax.tree.leaves(tree)) / 1e6 for tree in (trained, state.params)]
    parameters = "training {:.1f} M of {:.1f} M parameters".format(*numbers)
    done = int(state.step)
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    device = f"{mesh.size} of {jax.device_count()} x {mesh.devices.flat[0].device_kind} ({axes})"
    resumed = f"resuming after step {done}" if done else "starting"
    print(f"{resumed} of {config.optimizer.steps}: {parameters} on {device}; compiling", file=sys.stderr)


class _Reporter:
    """Progress bar and metrics, read one update late so that the device always has work queued."""

    def __init__(
        self,
        config: ExperimentConfig,
        metrics: MetricsFile,
        board: TensorBoard | None,
        checkpoints: Checkpoints,
        start: int,
    ):
        self._config = config
        self._objective = objective_of(config)
        self._metrics = metrics
        self._board = board
        self._checkpoints = checkpoints
        self._pending: tuple[int, dict, int] | None = None
        self._bar = tqdm.tqdm(
            initial=start,
            total=config.optimizer.steps,
            unit="step",
            dynamic_ncols=True,
            disable=not distributed.is_first(),
        )
        self._units = 0
        self._logged_at = time.perf_counter()

    def __enter__(self) -> "_Reporter":
        return self

    def __exit__(self, *exception) -> None:
        self._bar.close()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Reports every update so far; what then happens inside does not count as training time."""
        self._flush()
        begun = time.perf_counter()
        yield
        self._logged_at += time.perf_counter() - begun
        self._bar.unpause()

    def push(self, step: int, metrics: dict, num_units: int) -> None:
        """Reports the update before this one, and keeps this one's metrics for later."""
        self._flush()
        self._pending = (step, metrics, num_units)

    def write(self, step: int, kind: str, values: dict) -> None:
        """Writes further metrics of `step`, after those of the update itself."""
        self._flush()
        values = jax.device_get(values)
        self._write(step, kind, values)
        if self._board is not None and kind == "validation":
            figure = self._objective.figure(values)
            if figure is not None:
                self._board.image(step, "validation/losses", figure)

    def listen(self, step: int, wav: np.ndarray, sample_rate_hz: int) -> None:
        """Writes what the model says after `step`."""
        if self._board is not None:
            self._board.audio(step, "continuation", wav, sample_rate_hz)

    def sync(self) -> None:
        """Returns when everything pushed is on the disk."""
        self._flush()
        self._metrics.sync()

    def _flush(self) -> None:
        if self._pending is None:
            return
        step, metrics, num_units = self._pending
        self._pending = None
        self._units += num_units
        loss = float(metrics["loss"])
        if not np.isfinite(loss):
            raise NonFiniteError(f"The loss at step {step} is {loss}. {self._checkpoints.advice()}")
        self._bar.update()
        if _is_multiple(step, self._config.log.every_steps):
            self._log(step, jax.device_get(metrics))

    def _write(self, step: int, kind: str, values: dict) -> None:
        self._metrics.write(step, kind, values)
        if self._board is not None:
            self._board.scalars(step, {kind: values})

    def _log(self, step: int, metrics: dict) -> None:
        now = time.perf_counter()
        rate, unit = self._units / (now - self._logged_at), self._objective.unit
        self._units, self._logged_at = 0, now
        self._write(step, "train", {**metrics, f"{unit}_per_second": rate})
        self._bar.set_postfix_str(f"loss {float(metrics['loss']):.3f}, {rate:.0f} {unit}/s")
