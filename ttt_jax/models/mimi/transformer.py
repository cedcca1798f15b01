"""Mimi's two transformers: causal, pre-normalized, with rotary positions and scaled branches."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ttt_jax.layers.attention import AttentionCache, window_attention
from ttt_jax.layers.mlp import KERNEL_INIT
from ttt_jax.layers.rope import RotaryEmbedding
from ttt_jax.models.mimi.config import MimiConfig

Caches = tuple[AttentionCache, ...]
"""One layer's rings: one, or with `published_ring` one for every step of a frame."""


class SelfAttention(nn.Module):
    """Attention to the last `context` steps; `in_proj` columns are q, k, v; no biases."""

    config: MimiConfig

    @nn.compact
    def __call__(self, x, caches: Caches | None, length, reset):
        """`[B, T, dimension]` to the same, and the rings."""
        c = self.config
        width = c.dimension
        in_proj = self.param("in_proj", KERNEL_INIT, (width, 3 * width), jnp.float32).astype(x.dtype)
        out_proj = self.param("out_proj", KERNEL_INIT, (width, width), jnp.float32).astype(x.dtype)
        qkv = jnp.einsum("btd,de->bte", x, in_proj)
        q, k, v = (part.reshape(*x.shape[:2], c.num_heads, width // c.num_heads) for part in jnp.split(qkv, 3, axis=-1))
        outs, after = [], []
        windows = _windows(c)
        for window, cache in zip(windows, caches or [None] * len(windows), strict=True):
            options = {"rope": RotaryEmbedding(c.max_period), "cache": cache, "length": length, "reset": reset}
            out, cache = window_attention(q, k, v, window=window, **options)
            outs.append(out)
            after.append(cache)
        return jnp.einsum("btd,de->bte", _interleaved(outs).reshape(x.shape), out_proj), tuple(after)


def _windows(config: MimiConfig) -> list[int]:
    """What each step of a frame sees, or what all of them see."""
    if not config.published_ring:
        return [config.context]
    return [config.context - config.stride + 1 + j for j in range(config.stride)]


def _interleaved(outs):
    """Every step from the output with its own window. Calls start at a frame's first step."""
    joined = outs[0]
    for j in range(1, len(outs)):
        joined = joined.at[:, j :: len(outs)].set(outs[j][:, j :: len(outs)])
    return joined


class LayerNorm(nn.Module):
    """`(x - mean) / sqrt(variance + 1e-5) * scale + bias` over the last axis (Ba et al. 2016), in x's dtype."""

    @nn.compact
    def __call__(self, x):
        """`[B, T, dimension]` to the same."""
        width = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (width,), jnp.float32).astype(x.dtype)
        bias = self.param("bias", nn.initializers.zeros, (width,), jnp.float32).astype(x.dtype)
        centered = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(centered**2, axis=-1, keepdims=True)
        return centered * jax.lax.rsqrt(variance + 1e-5) * scale[None, None] + bias[None, None]


class Block(nn.Module):
    """`x += scale1 * SA(LN(x)); x += scale2 * W2 gelu(W1 LN(x))`, exact GELU, no biases but the norms'."""

    config: MimiConfig

    @nn.compact
    def __call__(self, x, caches: Caches | None, length, reset):
        """`[B, T, dimension]` to the same, and the rings."""
        c = self.config
        branch, caches = SelfAttention(c, name="self_attn")(LayerNorm(name="norm1")(x), caches, length, reset)
        x = x + self._scale("scale1", x) * branch
        linear1 = self.param("linear1", KERNEL_INIT, (c.dimension, c.dim_feedforward), jnp.float32).astype(x.dtype)
        linear2 = self.param("linear2", KERNEL_INIT, (c.dim_feedforward, c.dimension), jnp.float32).astype(x.dtype)
        hidden = nn.gelu(jnp.einsum("btd,df->btf", LayerNorm(name="norm2")(x), linear1), approximate=False)
        return x + self._scale("scale2", x) * jnp.einsum("btf,fd->btd", hidden, linear2), caches

    def _scale(self, name: str, x):
        init = nn.initializers.constant(self.config.layer_scale)
        return self.param(name, init, (self.config.dimension,), jnp.float32).astype(x.dtype)[None, None]


class Transformer(nn.Module):
    """`num_layers` blocks."""

    config: MimiConfig

    @nn.compact
    def __call__(self, x, caches: tuple[Caches, ...] | None, length=None, reset=None):
        """`[B, T, dimension]` to the same, and the rings of every layer.

        Args:
            x: whole frames, `stride` steps each.
            caches: of the call before, None for a fresh start.
            length: `[B]` int, the row's first `length` steps are real.
            reset: `[B]` bool, rows that start anew.
        """
        before, after = caches or [None] * self.config.num_layers, []
        for i in range(self.config.num_layers):
            x, layer_caches = Block(self.config, name=f"layers_{i}")(x, before[i], length, reset)
            after.append(layer_caches)
        return x, tuple(after)
