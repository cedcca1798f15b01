"""One softmax over several sets of keys."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.dtypes import at_least_float32

MASKED = -1e30  # finite: a masked logit must not turn a gradient into NaN


class KeySet(NamedTuple):
    """Queries and keys in one frame of reference, and which query sees which key."""

    queries: jax.Array  # [..., T, H, D]
    keys: jax.Array  # [..., S, H, D]
    values: jax.Array  # [..., S, H, D]
    visible: jax.Array  # bool, broadcastable to [..., T, S]


def softmax_attention(sets: list[KeySet]) -> jax.Array:
    """`[..., T, H, D]` in the queries' dtype, without joining the sets' keys. Leading axes `...` are broadcast."""
    dtype, head_dim = sets[0].queries.dtype, sets[0].queries.shape[-1]
    wide = at_least_float32(dtype)
    logits = []
    for queries, keys, _, visible in sets:
        scores = jnp.einsum("...thd,...shd->...hts", queries, keys.astype(dtype), preferred_element_type=wide)
        logits.append(jnp.where(visible[..., None, :, :], scores * head_dim**-0.5, MASKED))
    weights = jax.nn.softmax(jnp.concatenate(logits, axis=-1), axis=-1).astype(dtype)
    out, offset = jnp.zeros((), wide), 0
    for _, keys, values, _ in sets:
        part = weights[..., offset : offset + keys.shape[-3]]
        out = out + jnp.einsum("...hts,...shd->...thd", part, values.astype(dtype), preferred_element_type=wide)
        offset += keys.shape[-3]
    return out.astype(dtype)
