"""Likelihood of what was in the masked frames."""

from typing import Any

import jax
import jax.numpy as jnp


def first_masked(masked: Any, number: int) -> jax.Array:
    """Places of the first `number` masked frames of each row, then of others: bool [B, T] to int32 [B, number]."""
    return jnp.argsort(~jnp.asarray(masked), axis=1, stable=True)[:, :number].astype(jnp.int32)


def masked_nll(logits: jax.Array, codes: Any, masked: Any, frames: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Nats of the audio codes of some frames, 0 where a frame is not masked or has no token.

    Args:
        logits: [B, num_codebooks, N, card] of the frames.
        codes: [B, 1 + num_codebooks, T].
        masked: [B, T] bool.
        frames: [B, N] places.

    Returns:
        Nats and which of them count, [B, num_codebooks, N].
    """
    targets = jnp.take_along_axis(jnp.asarray(codes)[:, 1:], frames[:, None], axis=2)
    counted = (targets >= 0) & jnp.take_along_axis(jnp.asarray(masked), frames, axis=1)[:, None]
    chosen = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=3)[..., 0]
    return jnp.where(counted, jax.nn.logsumexp(logits, axis=3) - chosen, 0), counted
