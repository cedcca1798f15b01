"""One update: loss, gradients, AdamW; and the loss and diagnostics alone. Pure functions of (state, chunk)."""

import dataclasses
import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from ttt_jax.data.chunks import Chunk
from ttt_jax.models import moshi
from ttt_jax.training import sharding
from ttt_jax.training.config import ExperimentConfig
from ttt_jax.training.initial import initial_parameters
from ttt_jax.training.optimizer import make_optimizer
from ttt_jax.training.parameters import Trained, put_back, trained_part


class TrainState(NamedTuple):
    """Everything that a checkpoint must hold to go on bit-exactly; the chunk follows from (seed, step)."""

    step: jax.Array  # int32: updates done
    params: Any  # Moshi's parameter tree: what is trained in float32, the rest as `precision.frozen` says
    optimizer: optax.OptState
    carry: Any = ()  # following recordings: Moshi's state of every row, leaves [B, ...]
    lora: Any = None  # low-rank factors to be merged into `params`, None unless the run trains such


def init_state(config: ExperimentConfig, given: Any = None) -> TrainState:
    """A fresh state; the parameters follow from `config.seed` and from `given`, see `initial_parameters`."""
    params, lora = initial_parameters(config, given)
    optimizer = make_optimizer(config.optimizer).init(trained_part(params, lora, config.optimizer.train))
    carry = moshi.init_state(config.model, params, config.data.batch_size) if config.data.mode == "follow" else ()
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer, carry, lora)


def model_params(config: ExperimentConfig, params: Any, lora: Any) -> Any:
    """A plain Moshi: `params`, with the low-rank factors, if any, merged into them."""
    return moshi.lora.merge(params, lora, config.lora.scaling) if lora else params


def train_step(config: ExperimentConfig, state: TrainState, chunk: Chunk) -> tuple[TrainState, dict]:
    """One update, and the metrics of the parameters it started from.

    The rows may be read in `optimizer.accumulate` groups, one after the other: the gradient is the same, that of the
    loss over all rows.
    """
    weights = _loss_weights(config, chunk)
    trained = trained_part(state.params, state.lora, config.optimizer.train)
    gradients = jax.grad(functools.partial(_loss, config, state.params, weights), has_aux=True)
    groups = config.optimizer.accumulate
    if groups == 1:
        total, (sums, carry) = gradients(trained, chunk, state.carry)
    else:

        def add(accumulated, group):
            gradient, (sums, carry) = gradients(trained, *group)
            return jax.tree.map(jnp.add, accumulated, (gradient, sums)), carry

        # Group g is rows g, g + groups, ...: rows that lie together on a device are then in different groups, and every
        # device has some of each.
        split = jax.tree.map(lambda x: x.reshape(-1, groups, *x.shape[1:]).swapaxes(0, 1), (chunk, state.carry))
        zeros = (jax.tree.map(jnp.zeros_like, trained), _zero_sums(config))
        (total, sums), carry = jax.lax.scan(add, zeros, split)
        carry = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), carry)
    updates, optimizer = make_optimizer(config.optimizer).update(total, state.optimizer, trained)
    trained: Any = optax.apply_updates(trained, updates)
    metrics = _metrics(sums) | {"gradient_norm": optax.tree.norm(total)}
    return TrainState(state.step + 1, put_back(state.params, trained), optimizer, carry, trained.lora), metrics


def evaluate(config: ExperimentConfig, params: Any, chunk: Chunk, lora: Any = None) -> dict[str, jax.Array]:
    """The loss and the unweighted NLLs in nats per token, `{"loss": scalar, "text": scalar, "audio": [dep_q]}`.

    Args:
        config: The experiment.
        params: The model's parameters.
        chunk: Rows that all start afresh.
        lora: Low-rank factors beside the parameters, or None.
    """
    return _metrics(_read(config, _variables(config, params, lora), chunk, ())[0])


def diagnostics(
    config: ExperimentConfig, params: Any, chunk: Chunk, carry: Any = (), lora: Any = None
) -> dict[str, jax.Array]:
    """What the layers sow under "diagnostics", as `{"path/of/layer/name": scalar}`; empty for a model without TTT."""
    tokens, state, length, reset = _model_input(chunk.tokens, chunk.length, chunk.reset, carry)
    _, variables = _model(config).apply(
        _variables(config, params, lora), tokens, state, length, reset, method="temporal", mutable=["diagnostics"]
    )
    sown = jax.tree.leaves_with_path(variables.get("diagnostics", {}), is_leaf=lambda leaf: isinstance(leaf, tuple))
    return {"/".join(str(key.key) for key in path): jnp.mean(jnp.stack(values)) for path, values in sown}


def _loss(config: ExperimentConfig, params, weights, trained: Trained, chunk: Chunk, carry):
    """Loss of some rows, as a part of that of all rows, whose tokens weigh `weights`; gradients are for `trained`."""
    variables = _variables(config, put_back(params, trained), trained.lora)
    sums, carry = _read(config, variables, chunk, carry)
    text_weight, audio_weight = weights
    return sums.text / text_weight + sums.audio / audio_weight, (sums, carry)


def _model(config: ExperimentConfig) -> moshi.Moshi:
    return moshi.Moshi(config.model, sharding.gathering_view(config.model))


def _variables(config: ExperimentConfig, params, lora) -> dict[str, Any]:
    return {"params": params} | (moshi.lora.collection(lora, config.lora.scaling) if lora else {})


def _read(config: ExperimentConfig, variables, chunk: Chunk, carry) -> tuple[moshi.LossSums, Any]:
    """Reads a chunk piece by piece, with the activations of one piece in memory at a time."""
    pieces = config.data.gradient_chunks
    if pieces == 1 or not carry:
        return _read_piece(config, variables, chunk.tokens, chunk.length, chunk.reset, carry)
    frames = (chunk.tokens.shape[-1] - 1) // pieces
    read = jax.checkpoint(functools.partial(_read_piece, config))

    def step(accumulated, i):
        sums, carry = accumulated
        tokens = jax.lax.dynamic_slice_in_dim(chunk.tokens, i * frames, frames + 1, axis=2)
        length = jnp.clip(chunk.length - i * frames, 0, frames)
        more, carry = read(variables, tokens, length, chunk.reset & (i == 0), carry)
        return (jax.tree.map(jnp.add, sums, more), carry), None

    return jax.lax.scan(step, (_zero_sums(config), carry), jnp.arange(pieces, dtype=jnp.int32))[0]


def _read_piece(config: ExperimentConfig, variables, tokens, length, reset, carry) -> tuple[moshi.LossSums, Any]:
    apply = functools.partial(_model(config).apply, variables)
    state: Any
    z, text_logits, state = cast(tuple, apply(*_model_input(tokens, length, reset, carry), method="temporal"))
    targets = tokens[:, :, 1:]
    mask = _targets_mask(config, targets)
    logits = cast(jax.Array, apply(z, targets[:, : 1 + config.model.dep_q], method="depth"))
    output = moshi.MoshiOutput(logits, mask[:, 1:], text_logits, mask[:, :1])
    return moshi.loss_sums(output, targets, **_loss_options(config)), state if carry else ()


def _model_input(tokens, length, reset, carry):
    """Tokens to read, state, length, reset. Without a carried state every row starts afresh, and padding is at its end:
    causality leaves nothing to mask.
    """
    return (tokens[:, :, :-1], carry, length, reset) if carry else (tokens[:, :, :-1], None, None, None)


def _targets_mask(config: ExperimentConfig, targets) -> jax.Array:
    """[B, 1 + dep_q, n] bool: the targets that are tokens of a frame."""
    own = slice(0, 1 + config.model.dep_q)
    initial = jnp.asarray(config.model.initial_tokens[own], jnp.int32)
    return (targets[:, own] >= 0) & (targets[:, own] < initial[None, :, None])


def _loss_options(config: ExperimentConfig) -> dict[str, Any]:
    return {**dataclasses.asdict(config.loss), "text_padding_ids": config.model.text_padding_ids}


def _loss_weights(config: ExperimentConfig, chunk: Chunk) -> tuple[jax.Array, jax.Array]:
    """What the tokens of a whole batch weigh, text and audio; they do not depend on the model."""
    targets = jnp.asarray(chunk.tokens)[:, :, 1:]
    mask = _targets_mask(config, targets)
    logits, text_logits = (jnp.zeros((*m.shape, 1), jnp.float32) for m in (mask[:, 1:], mask[:, :1]))
    output = moshi.MoshiOutput(logits, mask[:, 1:], text_logits, mask[:, :1])
    sums = moshi.loss_sums(output, targets, **_loss_options(config))
    text, audio = (jnp.where(weight > 0, weight, 1) for weight in (sums.text_weight, sums.audio_weight))
    return text, audio


def _zero_sums(config: ExperimentConfig) -> moshi.LossSums:
    per_codebook = jnp.zeros(config.model.dep_q)
    return moshi.LossSums(*[jnp.zeros(())] * 6, audio_nll=per_codebook, num_audio_tokens=per_codebook)


def _metrics(sums: moshi.LossSums) -> dict[str, jax.Array]:
    losses = moshi.mean_losses(sums)
    return {"loss": losses.total, "text": losses.text_nll, "audio": losses.audio_nll}


@jax.jit
def all_finite(tree) -> jax.Array:
    """Whether every number of a pytree is finite (scalar bool)."""
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]).all()
