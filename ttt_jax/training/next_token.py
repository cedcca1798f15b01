"""The objective of Moshi: the next frame's tokens, text and audio."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.data.chunks import Chunk, Chunks, Crops, Stages, Walks
from ttt_jax.data.reader import TokenDataset, open_dataset, splits
from ttt_jax.models import moshi
from ttt_jax.training import sharding
from ttt_jax.training.config import ExperimentConfig, Stage, with_vocabulary
from ttt_jax.training.held_out import VALIDATION, VALIDATION_SEED, is_validated
from ttt_jax.training.tensorboard import losses_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class NextToken:
    """Cross-entropy of every stream's next token, weighted as `config.loss` says; see `Objective`."""

    unit: str = "frames"
    not_in_the_shapes: Sequence[str] = ("num_heads", "depformer_num_heads", "max_period", "delays", "depth_schedule")

    def __init__(self, config: ExperimentConfig):
        self._config = config

    @classmethod
    def with_dataset(cls, config: ExperimentConfig, section: Mapping[str, Any]) -> ExperimentConfig:
        """With the dataset's streams and vocabularies, see `with_vocabulary`."""
        info = open_dataset(config.data.directory, "train").info
        return dataclasses.replace(config, model=with_vocabulary(section, info))

    def batches(self) -> tuple[Chunks, Chunks | None]:
        """The stages of the curriculum, then the data section's own sizes; validation is on crops."""
        config = self._config
        training = training_chunks(config, open_dataset(config.data.directory, "train"))
        if not is_validated(config, splits(config.data.directory)):
            return training, None
        held_out = open_dataset(config.data.directory, VALIDATION)
        return training, _chunks(config, held_out, Crops, num_frames=config.data.num_frames, seed=VALIDATION_SEED)

    def batch_shapes(self) -> Any:
        """A chunk of the largest size."""
        data, rows = self._config.data, self._config.data.batch_size
        tokens = (rows, self._config.model.num_streams, data.num_frames * data.gradient_chunks + 1)
        shapes = ((tokens, np.int32), ((rows,), np.int32), ((rows,), bool))
        return Chunk(*(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes))  # pyright: ignore

    def units(self, batch: Chunk) -> int:
        """Frames that are read."""
        return int(batch.length.sum())

    def init_parameters(self, key: jax.Array) -> Any:
        """Moshi's."""
        codes = jnp.zeros((1, self._config.model.num_streams, 2), jnp.int32)
        return moshi.Moshi(self._config.model).init(key, codes)["params"]

    def init_carry(self, params: Any) -> Any:
        """Moshi's state of every row where recordings are followed."""
        config = self._config
        return moshi.init_state(config.model, params, config.data.batch_size) if config.data.mode == "follow" else ()

    def loss_weights(self, batch: Chunk) -> tuple[jax.Array, jax.Array]:
        """What the tokens of a whole batch weigh, text and audio."""
        targets = jnp.asarray(batch.tokens)[:, :, 1:]
        mask = self._targets_mask(targets)
        logits, text_logits = (jnp.zeros((*m.shape, 1), jnp.float32) for m in (mask[:, 1:], mask[:, :1]))
        output = moshi.MoshiOutput(logits, mask[:, 1:], text_logits, mask[:, :1])
        sums = moshi.loss_sums(output, targets, **self._loss_options())
        text, audio = (jnp.where(weight > 0, weight, 1) for weight in (sums.text_weight, sums.audio_weight))
        return text, audio

    def read(self, variables: Any, batch: Chunk, carry: Any) -> tuple[moshi.LossSums, Any]:
        """Reads a chunk piece by piece, with the activations of one piece in memory at a time."""
        pieces = self._config.data.gradient_chunks
        if pieces == 1 or not carry:
            return self._read_piece(variables, batch.tokens, batch.length, batch.reset, carry)
        frames = (batch.tokens.shape[-1] - 1) // pieces
        read = jax.checkpoint(self._read_piece)

        def step(accumulated, i):
            sums, carry = accumulated
            tokens = jax.lax.dynamic_slice_in_dim(batch.tokens, i * frames, frames + 1, axis=2)
            length = jnp.clip(batch.length - i * frames, 0, frames)
            more, carry = read(variables, tokens, length, batch.reset & (i == 0), carry)
            return (jax.tree.map(jnp.add, sums, more), carry), None

        return jax.lax.scan(step, (self.zero_sums(), carry), jnp.arange(pieces, dtype=jnp.int32))[0]

    def zero_sums(self) -> moshi.LossSums:
        """Of no tokens."""
        per_codebook = jnp.zeros(self._config.model.dep_q)
        return moshi.LossSums(*[jnp.zeros(())] * 6, audio_nll=per_codebook, num_audio_tokens=per_codebook)

    def loss(self, sums: moshi.LossSums, weights: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Mean cross-entropy of text and of audio, added up."""
        text_weight, audio_weight = weights
        return sums.text / text_weight + sums.audio / audio_weight

    def metrics(self, sums: moshi.LossSums) -> dict[str, jax.Array]:
        """The loss and the unweighted NLLs in nats per token, `{"loss": scalar, "text": scalar, "audio": [dep_q]}`."""
        losses = moshi.mean_losses(sums)
        return {"loss": losses.total, "text": losses.text_nll, "audio": losses.audio_nll}

    def diagnostics(self, variables: Any, batch: Chunk, carry: Any) -> Any:
        """Of the temporal transformer on the first of `data.gradient_chunks`; empty for a model without TTT."""
        frames = (batch.tokens.shape[-1] - 1) // (self._config.data.gradient_chunks if carry else 1)
        tokens = batch.tokens[:, :, :frames]
        # Short recordings in crops are padded, which `length` does not tell.
        is_given = jnp.any(tokens >= 0, axis=1)
        length = jnp.max(jnp.where(is_given, jnp.arange(1, frames + 1, dtype=jnp.int32)[None], 0), axis=1)
        length, state = jnp.minimum(length, batch.length), carry or None
        reset = batch.reset if carry else None
        _, sown = self._model().apply(
            variables, tokens, state, length, reset, method="temporal", mutable=["diagnostics"]
        )
        return sown.get("diagnostics", {})

    def figure(self, validation: Mapping[str, Any]) -> "Figure | None":
        """NLL by stream."""
        return losses_figure(validation)

    def _model(self) -> moshi.Moshi:
        return moshi.Moshi(self._config.model, sharding.gathering_view(self._config.model))

    def _read_piece(self, variables, tokens, length, reset, carry) -> tuple[moshi.LossSums, Any]:
        apply = functools.partial(self._model().apply, variables)
        state: Any
        z, text_logits, state = cast(tuple, apply(*_model_input(tokens, length, reset, carry), method="temporal"))
        targets = tokens[:, :, 1:]
        mask = self._targets_mask(targets)
        logits = cast(jax.Array, apply(z, targets[:, : 1 + self._config.model.dep_q], method="depth"))
        output = moshi.MoshiOutput(logits, mask[:, 1:], text_logits, mask[:, :1])
        return moshi.loss_sums(output, targets, **self._loss_options()), state if carry else ()

    def _targets_mask(self, targets) -> jax.Array:
        """[B, 1 + dep_q, n] bool: the targets that are tokens of a frame."""
        own = slice(0, 1 + self._config.model.dep_q)
        initial = jnp.asarray(self._config.model.initial_tokens[own], jnp.int32)
        return (targets[:, own] >= 0) & (targets[:, own] < initial[None, :, None])

    def _loss_options(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self._config.loss), "text_padding_ids": self._config.model.text_padding_ids}


def _model_input(tokens, length, reset, carry):
    """Tokens to read, state, length, reset. Without a carried state every row starts afresh, and padding is at its end:
    causality leaves nothing to mask.
    """
    return (tokens[:, :, :-1], carry, length, reset) if carry else (tokens[:, :, :-1], None, None, None)


def training_chunks(config: ExperimentConfig, dataset: TokenDataset) -> Chunks:
    """What each update of the experiment reads: the stages of its curriculum, then the data section's own sizes."""
    data, last = config.data, Stage(config.optimizer.steps, config.data.num_frames, config.data.recording_frames)
    # An order of each stage's own: else it would begin with the recordings that the one before has read.
    seeds = [int(np.random.SeedSequence((config.seed, i)).generate_state(1)[0]) for i in range(len(data.stages))]
    stages = []
    for stage, seed in zip((*data.stages, last), (*seeds, config.seed), strict=True):
        if data.mode == "follow":
            frames = stage.num_frames * data.gradient_chunks
            make = functools.partial(Walks, num_frames=frames, recording_frames=stage.recording_frames)
        else:
            make = functools.partial(Crops, num_frames=stage.num_frames)
        stages.append((stage.steps, _chunks(config, dataset, make, seed=seed)))
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
