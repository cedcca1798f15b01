"""AdamW with a learning rate, schedule and decay for each group of parameters."""

from typing import Any

import jax
import optax

from ttt_jax.models.moshi import lora
from ttt_jax.training.config import GROUPS, OptimizerConfig
from ttt_jax.training.parameters import group_of

NEVER_DECAYED = ("b1", "b2", "ln_scale", "ln_bias")
"""Parameters of [heads, ...] that are biases and norms all the same: the inner model's."""


def learning_rate_schedule(config: OptimizerConfig, group: str = "base") -> optax.Schedule:
    """Learning rate of each update: linear to the group's peak at `warmup_steps` updates, then its schedule to `steps`.

    Args:
        config: The run's optimizer.
        group: "base", "ttt" or "gates".
    """
    own: Any = config.group(group)
    peak, warmup, steps = config.learning_rate * own.learning_rate_factor, own.warmup_steps, config.steps
    final = peak * own.final_learning_rate_fraction
    if own.schedule == "cosine":
        schedule = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, decay_steps=steps, end_value=final)
    else:
        end = peak if own.schedule == "constant" else final
        after = optax.linear_schedule(peak, end, steps - warmup)
        schedule = optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])
    # optax counts updates from 0, where the warm-up is still 0: the first update would do nothing.
    return lambda count: schedule(count + 1)


def decay_mask(params: Any) -> Any:
    """True for the parameters that are decayed: matrices; not norms, biases, gates nor the inner model's biases."""

    def is_decayed(path, param):
        is_matrix = sum(size > 1 for size in param.shape) >= 2 or path[-1].key in lora.FACTORS  # of rank 1 too
        return is_matrix and path[-1].key not in NEVER_DECAYED

    return jax.tree.map_with_path(is_decayed, params)


def groups(params: Any) -> Any:
    """The name of each parameter's group, as a tree of strings."""
    return jax.tree.map_with_path(
        lambda path, _: group_of(jax.tree_util.keystr(path, simple=True, separator="/")), params
    )


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW after clipping by the one global norm, for a tree of just the parameters that are trained."""

    def decay_and_scale(group: str) -> optax.GradientTransformation:
        own: Any = config.group(group)
        return optax.chain(
            optax.add_decayed_weights(own.weight_decay, decay_mask),
            optax.scale_by_learning_rate(learning_rate_schedule(config, group)),
        )

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b1=config.b1, b2=config.b2),
        optax.partition({name: decay_and_scale(name) for name in GROUPS}, groups),
    )
