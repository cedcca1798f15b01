"""Normalizations, computed in float32 whatever the activations' dtype."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ttt_jax.dtypes import at_least_float32


def rms_norm(x: jax.Array, alpha: jax.Array, *, eps: float = 1e-8) -> jax.Array:
    """`x * alpha / sqrt(eps + mean(x^2))` over the last axis (Zhang & Sennrich 2019), in x's dtype.

    Args:
        x: `[..., width]`, any float dtype.
        alpha: `[width]` scale.
        eps: added to the mean square; Moshi uses 1e-8.
    """
    wide = at_least_float32(x.dtype)
    x32 = x.astype(wide)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    alpha = alpha.astype(wide).reshape((1,) * (x.ndim - 1) + alpha.shape)
    return (x32 * scale * alpha).astype(x.dtype)


class RMSNorm(nn.Module):
    """Owns `alpha [width]` (init 1) and calls `rms_norm`."""

    eps: float = 1e-8

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., width]` to `[..., width]`, same dtype."""
        alpha = self.param("alpha", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        return rms_norm(x, alpha, eps=self.eps)


class LayerNorm(nn.Module):
    """`(x - mean) / sqrt(variance + eps) * scale + bias` over the last axis (Ba et al. 2016), and owns these two."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., width]` to `[..., width]`, same dtype."""
        wide, shape = at_least_float32(x.dtype), (1,) * (x.ndim - 1) + x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], wide)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], wide)
        centered = x.astype(wide) - jnp.mean(x.astype(wide), axis=-1, keepdims=True)
        normal = centered * jax.lax.rsqrt(jnp.mean(jnp.square(centered), axis=-1, keepdims=True) + self.eps)
        return (normal * scale.astype(wide).reshape(shape) + bias.astype(wide).reshape(shape)).astype(x.dtype)
