"""Moshi's training loss (weights as in moshi-finetune) and the plain likelihoods that evaluation reports."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.dtypes import at_least_float32
from ttt_jax.models.moshi.model import MoshiOutput


class Losses(NamedTuple):
    """All in nats. A mean over no tokens is 0."""

    total: jax.Array  # text + audio
    text: jax.Array  # weighted mean over text tokens
    audio: jax.Array  # weighted mean over the tokens of all predicted codebooks
    text_nll: jax.Array  # unweighted mean over text tokens
    audio_nll: jax.Array  # [dep_q] unweighted mean per codebook
    num_text_tokens: jax.Array  # tokens behind text_nll
    num_audio_tokens: jax.Array  # [dep_q] tokens behind audio_nll


def token_nll(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """`-log softmax(logits)[target]` in nats, float32: `[..., card]` and int `[...]` to `[...]`.

    Targets outside the vocabulary (masked ones) give finite values that mean nothing.
    """
    logits = logits.astype(at_least_float32(logits.dtype))
    index = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    # A select fuses with the softmax in both directions; gathering would scatter in the backward pass.
    chosen = jnp.sum(jnp.where(index == targets[..., None], logits, 0), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - chosen


class LossSums(NamedTuple):
    """Sums over tokens, in nats: those of pieces of a batch add up to those of the whole."""

    text: jax.Array  # weighted
    text_weight: jax.Array
    audio: jax.Array  # weighted, over all predicted codebooks
    audio_weight: jax.Array
    text_nll: jax.Array  # unweighted
    num_text_tokens: jax.Array
    audio_nll: jax.Array  # [dep_q] unweighted
    num_audio_tokens: jax.Array  # [dep_q]


def loss_sums(
    output: MoshiOutput,
    codes: jax.Array,
    *,
    first_codebook_weight: float = 1.0,
    text_padding_weight: float = 0.5,
    text_padding_ids: Sequence[int] = (3, 0),
) -> LossSums:
    """Cross-entropies of `Moshi(codes)`, summed over tokens.

    Args:
        output: of `Moshi.__call__` on the same codes; no shift is needed.
        codes: `[B, 1 + n_q, T]` int32, text first.
        first_codebook_weight: weight of the tokens of audio codebook 0 against 1 for the others.
        text_padding_weight: weight of text padding tokens against 1 for the others.
        text_padding_ids: the padding tokens; `MoshiConfig.text_padding_ids`.
    """
    dep_q = output.logits.shape[1]
    text, audio = codes[:, :1], codes[:, 1 : 1 + dep_q]
    text_nll, audio_nll = token_nll(output.text_logits, text), token_nll(output.logits, audio)
    text_mask, audio_mask = output.text_mask.astype(text_nll.dtype), output.mask.astype(audio_nll.dtype)
    is_padding = jnp.isin(text, jnp.asarray(tuple(text_padding_ids), text.dtype))
    text_weights = text_mask * jnp.where(is_padding, text_padding_weight, 1.0).astype(text_mask.dtype)
    first = jnp.arange(dep_q)[None, :, None] == 0
    audio_weights = audio_mask * jnp.where(first, first_codebook_weight, 1.0).astype(audio_mask.dtype)
    return LossSums(
        text=_sum(text_nll, text_weights),
        text_weight=jnp.sum(text_weights),
        audio=_sum(audio_nll, audio_weights),
        audio_weight=jnp.sum(audio_weights),
        text_nll=_sum(text_nll, text_mask),
        num_text_tokens=jnp.sum(text_mask),
        audio_nll=_sum(audio_nll, audio_mask, axis=(0, 2)),
        num_audio_tokens=jnp.sum(audio_mask, axis=(0, 2)),
    )


def mean_losses(sums: LossSums) -> Losses:
    """Means over the tokens summed: total = weighted mean over text + weighted mean over audio."""
    text, audio = _mean(sums.text, sums.text_weight), _mean(sums.audio, sums.audio_weight)
    return Losses(
        total=text + audio,
        text=text,
        audio=audio,
        text_nll=_mean(sums.text_nll, sums.num_text_tokens),
        audio_nll=_mean(sums.audio_nll, sums.num_audio_tokens),
        num_text_tokens=sums.num_text_tokens,
        num_audio_tokens=sums.num_audio_tokens,
    )


def losses(output: MoshiOutput, codes: jax.Array, **weights) -> Losses:
    """`mean_losses` of `loss_sums`, whose arguments it takes."""
    return mean_losses(loss_sums(output, codes, **weights))


def _sum(x, weights, axis=None):
    return jnp.sum(jnp.where(weights > 0, x, 0) * weights, axis=axis)


def _mean(total, weight):
    return total / jnp.where(weight > 0, weight, 1)
