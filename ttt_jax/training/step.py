"""One update: loss, gradients, AdamW; and the loss and diagnostics alone. Pure functions of (state, batch)."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ttt_jax.models.moshi import lora as low_rank
from ttt_jax.training.config import ExperimentConfig
from ttt_jax.training.initial import initial_parameters
from ttt_jax.training.objective import Batch, Objective, objective_of
from ttt_jax.training.optimizer import make_optimizer
from ttt_jax.training.parameters import Trained, put_back, trained_part


class TrainState(NamedTuple):
    """Everything that a checkpoint must hold to go on bit-exactly; the batch follows from (seed, step)."""

    step: jax.Array  # int32: updates done
    params: Any  # the model's parameter tree: what is trained in float32, the rest as `precision.frozen` says
    optimizer: optax.OptState
    carry: Any = ()  # of every row, such as Moshi's state where recordings are followed, leaves [B, ...]
    lora: Any = None  # low-rank factors to be merged into `params`, None unless the run trains such


def init_state(config: ExperimentConfig, given: Any = None) -> TrainState:
    """A fresh state; the parameters follow from `config.seed` and from `given`, see `initial_parameters`."""
    params, lora = initial_parameters(config, given)
    optimizer = make_optimizer(config.optimizer).init(trained_part(params, lora, config.optimizer.train))
    carry = objective_of(config).init_carry(params)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer, carry, lora)


def model_params(config: ExperimentConfig, params: Any, lora: Any) -> Any:
    """A plain model: `params`, with the low-rank factors, if any, merged into them."""
    return low_rank.merge(params, lora, config.lora.scaling) if lora else params


def train_step(config: ExperimentConfig, state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
    """One update, and the metrics of the parameters it started from.

    The rows may be read in `optimizer.accumulate` groups, one after the other: the gradient is the same, that of the
    loss over all rows.
    """
    objective = objective_of(config)
    weights = objective.loss_weights(batch)
    trained = trained_part(state.params, state.lora, config.optimizer.train)
    gradients = jax.grad(functools.partial(_loss, config, objective, state.params, weights), has_aux=True)
    groups = config.optimizer.accumulate
    if groups == 1:
        total, (sums, carry) = gradients(trained, batch, state.carry)
    else:

        def add(accumulated, group):
            gradient, (sums, carry) = gradients(trained, *group)
            return jax.tree.map(jnp.add, accumulated, (gradient, sums)), carry

        split = jax.tree.map(lambda x: _groups(x, groups), (batch, state.carry))
        zeros = (jax.tree.map(jnp.zeros_like, trained), objective.zero_sums())
        (total, sums), carry = jax.lax.scan(add, zeros, split)
        carry = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:]), carry)
    updates, optimizer = make_optimizer(config.optimizer).update(total, state.optimizer, trained)
    trained: Any = optax.apply_updates(trained, updates)
    metrics = objective.metrics(sums) | {"gradient_norm": optax.tree.norm(total)}
    return TrainState(state.step + 1, put_back(state.params, trained), optimizer, carry, trained.lora), metrics


def evaluate(config: ExperimentConfig, params: Any, batch: Batch, lora: Any = None) -> dict[str, jax.Array]:
    """The objective's metrics of a batch, "loss" among them; for Moshi the loss and the unweighted NLLs.

    Args:
        config: The experiment.
        params: The model's parameters.
        batch: Rows that all start afresh.
        lora: Low-rank factors beside the parameters, or None.
    """
    objective = objective_of(config)
    return objective.metrics(objective.read(_variables(config, params, lora), batch, ())[0])


def diagnostics(
    config: ExperimentConfig, params: Any, batch: Batch, carry: Any = (), lora: Any = None
) -> dict[str, jax.Array]:
    """What the layers sow under "diagnostics", as `{"path/of/layer/name": scalar}`; empty for a model without TTT.

    Read are the rows that an update reads at one time, so that it takes no more memory: one of `optimizer.accumulate`
    groups.
    """
    batch, carry = jax.tree.map(lambda x: _groups(x, config.optimizer.accumulate)[0], (batch, carry))
    sown = objective_of(config).diagnostics(_variables(config, params, lora), batch, carry)
    leaves = jax.tree.leaves_with_path(sown, is_leaf=lambda leaf: isinstance(leaf, tuple))
    return {"/".join(str(key.key) for key in path): jnp.mean(jnp.stack(values)) for path, values in leaves}


def _loss(config: ExperimentConfig, objective: Objective, params, weights, trained: Trained, batch: Batch, carry):
    """Loss of some rows, as a part of that of all rows, which weigh `weights`; gradients are for `trained`."""
    variables = _variables(config, put_back(params, trained), trained.lora)
    sums, carry = objective.read(variables, batch, carry)
    return objective.loss(sums, weights), (sums, carry)


def _groups(x: jax.Array, count: int) -> jax.Array:
    """`[B, ...]` to `[count, B / count, ...]`.

    Group g is rows g, g + count, ...: rows that lie together on a device are then in different groups, and every device
    has some of each.
    """
    return x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)


def _variables(config: ExperimentConfig, params, lora) -> dict[str, Any]:
    return {"params": params} | (low_rank.collection(lora, config.lora.scaling) if lora else {})


@jax.jit
def all_finite(tree) -> jax.Array:
    """Whether every number of a pytree is finite (scalar bool)."""
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]).all()
