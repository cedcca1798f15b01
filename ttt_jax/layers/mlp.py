"""Feed-forward layers: gated with SiLU, as in Moshi, and with tanh's GELU, as in Video-DiT."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ttt_jax.dtypes import at_least_float32
from ttt_jax.layers.linear import linear

KERNEL_INIT = nn.initializers.lecun_normal()


def gated_hidden_size(width: int, feedforward: int) -> int:
    """Hidden size of each gated branch: two thirds of `feedforward`, Kyutai's `21 * width / 8` when it is 4 * width."""
    return 21 * width // 8 if feedforward == 4 * width else 2 * feedforward // 3


def gated_silu(x: jax.Array) -> jax.Array:
    """`silu(a) * b` for x = (a, b) on the last axis: `[..., 2 * hidden]` to `[..., hidden]`."""
    a, b = jnp.split(x, 2, axis=-1)
    return jax.nn.silu(a) * b


class GatedMLP(nn.Module):
    """`(silu(a) * b) @ linear_out` with `(a, b) = x @ linear_in`, no biases."""

    hidden_size: int
    dtype: jnp.dtype = jnp.dtype("float32")

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., width]` to `[..., width]`."""
        width = x.shape[-1]
        linear_in = self.param("linear_in", KERNEL_INIT, (width, 2 * self.hidden_size), jnp.float32)
        linear_out = self.param("linear_out", KERNEL_INIT, (self.hidden_size, width), jnp.float32)
        hidden = gated_silu(linear(self, "linear_in", x.astype(self.dtype), linear_in))
        return linear(self, "linear_out", hidden, linear_out)


class GeluMLP(nn.Module):
    """`layer2(gelu(layer1(x)))` with biases, tanh's GELU."""

    hidden_size: int
    dtype: jnp.dtype = jnp.dtype("float32")

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., width]` to `[..., width]`."""
        options: Any = {"dtype": self.dtype, "param_dtype": at_least_float32(self.dtype)}
        hidden = nn.gelu(nn.Dense(self.hidden_size, name="layer1", **options)(x), approximate=True)
        return nn.Dense(x.shape[-1], name="layer2", **options)(hidden)
