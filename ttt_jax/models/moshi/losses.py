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


def losses(
    output: MoshiOutput,
    codes: jax.Array,
    *,
    first_codebook_weight: float = 1.0,
    text_padding_weight: float = 0.5,
    text_padding_ids: Sequence[int] = (3, 0),
) -> Losses:
    """Cross-entropies of `Moshi(codes)`: total = weighted mean over text + weighted mean over audio.

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
    text_loss = _mean(text_nll, text_mask * jnp.where(is_padding, text_padding_weight, 1.0).astype(text_mask.dtype))
    first = jnp.arange(dep_q)[None, :, None] == 0
    audio_loss = _mean(audio_nll, audio_mask * jnp.where(first, first_codebook_weight, 1.0).astype(audio_mask.dtype))
    return Losses(
        total=text_loss + audio_loss,
        text=text_loss,
        audio=audio_loss,
        text_nll=_mean(text_nll, text_mask),
        audio_nll=_mean(audio_nll, audio_mask, axis=(0, 2)),
        num_text_tokens=jnp.sum(text_mask),
        num_audio_tokens=jnp.sum(audio_mask, axis=(0, 2)),
    )


def _mean(x, weights, axis=None):
    total = jnp.sum(weights, axis=axis)
    masked = jnp.where(weights > 0, x, 0) * weights
    return jnp.sum(masked, axis=axis) / jnp.where(total > 0, total, 1)
