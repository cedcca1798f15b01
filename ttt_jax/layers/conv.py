"""Causal depth-wise convolution that can be cut anywhere in its stream."""

import jax
import jax.numpy as jnp


def causal_conv(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, past: jax.Array | None = None, length: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """`out[t] = bias + sum_i kernel[i] * x[t - (K - 1) + i]`, per feature; before the start x is zero.

    Args:
      x: [B, T, width] float; entries at or beyond `length` must be finite (outputs there are meaningless).
      kernel: [K, 1, width], index K - 1 the current token.
      bias: [width].
      past: [B, K - 1, width], the inputs before this call, oldest first; None for zeros.
      length: [B] int in [0, T], real tokens per row; None for all.

    Returns:
      out, [B, T, width], and the last K - 1 real inputs, [B, K - 1, width], both in x's dtype.
    """
    batch_size, num_tokens, width = x.shape
    reach = kernel.shape[0] - 1
    if past is None:
        past = jnp.zeros((batch_size, reach, width), x.dtype)
    joined = jnp.concatenate([past.astype(x.dtype), x], axis=1)
    taps = [kernel[i].astype(x.dtype)[None] * joined[:, i : i + num_tokens] for i in range(reach + 1)]
    out = sum(taps, start=bias.astype(x.dtype)[None, None])
    if length is None:
        return out, joined[:, num_tokens:]
    kept = length[:, None] + jnp.arange(reach, dtype=length.dtype)[None]
    return out, jnp.take_along_axis(joined, kept[:, :, None], axis=1, mode="promise_in_bounds")
