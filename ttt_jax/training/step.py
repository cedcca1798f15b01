"""One update: loss, gradients, AdamW; and the loss and diagnostics alone. Pure functions of (state, codes)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ttt_jax.models import moshi
from ttt_jax.training.config import ExperimentConfig, OptimizerConfig

NEVER_DECAYED = ("b1", "b2", "ln_scale", "ln_bias")
"""Parameters of [heads, ...] that are biases and norms all the same: the inner model's."""


class TrainState(NamedTuple):
    """Everything that a checkpoint must hold to go on bit-exactly; the batch follows from (seed, step)."""

    step: jax.Array  # int32: updates done
    params: Any  # float32, Moshi's parameter tree
    optimizer: optax.OptState


def learning_rate_schedule(config: OptimizerConfig) -> optax.Schedule:
    """Learning rate of each update: linear to the peak at `warmup_steps` updates, cosine to the end at `steps`."""
    peak = config.learning_rate
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=peak,
        warmup_steps=config.warmup_steps,
        decay_steps=config.steps,
        end_value=peak * config.final_learning_rate_fraction,
    )
    # optax counts updates from 0, where the warm-up is still 0: the first update would do nothing.
    return lambda count: schedule(count + 1)


def decay_mask(params: Any) -> Any:
    """True for the parameters that are decayed: matrices; not norms, biases, gates nor the inner model's biases."""

    def is_decayed(path, param):
        is_vector = sum(size > 1 for size in param.shape) < 2
        return not is_vector and path[-1].key not in NEVER_DECAYED

    return jax.tree.map_with_path(is_decayed, params)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate_schedule(config),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        ),
    )


def init_state(config: ExperimentConfig) -> TrainState:
    """A fresh state; the parameters follow from `config.seed`."""
    streams = 1 + config.model.n_q
    codes = jnp.zeros((1, streams, config.data.num_frames), jnp.int32)
    params = moshi.Moshi(config.model).init(jax.random.key(config.seed), codes)["params"]
    return TrainState(jnp.zeros((), jnp.int32), params, make_optimizer(config.optimizer).init(params))


def loss(config: ExperimentConfig, params: Any, codes: jax.Array) -> tuple[jax.Array, dict]:
    """Moshi's weighted loss, and the unweighted NLLs in nats per token.

    Args:
        config: The experiment.
        params: The model's parameters.
        codes: Tokens [B, 1 + n_q, T] int32, -1 where there is none.

    Returns:
        The loss (scalar float32), and `{"loss": scalar, "text": scalar, "audio": [dep_q]}`.
    """
    output: Any = moshi.Moshi(config.model).apply({"params": params}, codes)
    losses = moshi.losses(
        output,
        codes,
        first_codebook_weight=config.loss.first_codebook_weight,
        text_padding_weight=config.loss.text_padding_weight,
        text_padding_ids=config.model.text_padding_ids,
    )
    return losses.total, {"loss": losses.total, "text": losses.text_nll, "audio": losses.audio_nll}


def train_step(config: ExperimentConfig, state: TrainState, codes: jax.Array) -> tuple[TrainState, dict]:
    """One update, and the metrics of the parameters it started from."""
    gradients, metrics = jax.grad(loss, argnums=1, has_aux=True)(config, state.params, codes)
    metrics["gradient_norm"] = optax.tree.norm(gradients)
    updates, optimizer = make_optimizer(config.optimizer).update(gradients, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, optimizer), metrics


def diagnostics(config: ExperimentConfig, params: Any, codes: jax.Array) -> dict[str, jax.Array]:
    """What the layers sow under "diagnostics", as `{"path/of/layer/name": scalar}`; empty for a model without TTT."""
    _, variables = moshi.Moshi(config.model).apply({"params": params}, codes, mutable=["diagnostics"])
    sown = jax.tree.leaves_with_path(variables.get("diagnostics", {}), is_leaf=lambda leaf: isinstance(leaf, tuple))
    return {"/".join(str(key.key) for key in path): jnp.mean(jnp.stack(values)) for path, values in sown}


@jax.jit
def all_finite(tree) -> jax.Array:
    """Whether every number of a pytree is finite (scalar bool)."""
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]).all()
