"""SEANet (Tagliasacchi et al. 2020, arXiv 2009.02095) as Mimi uses it: causal convolutions between samples and latent.

Every layer is `layer(x [B, T, C], state) -> (y, state)`, where the state None is a fresh start (and all there is for a
convolution of width 1).
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ttt_jax.models.mimi.config import MimiConfig
from ttt_jax.models.mimi.conv import causal_conv, depthwise_transposed_conv, transposed_conv

CONV_INIT = nn.initializers.lecun_normal()
TRANSPOSED_INIT = nn.initializers.variance_scaling(0.5, "fan_in", "truncated_normal", 0, 1, batch_axis=2)


class CausalConv(nn.Module):
    """`causal_conv` of `x` (of `elu(x)` with `elu`), plus a bias."""

    features: int
    kernel_size: int
    stride: int = 1
    dilation: int = 1
    elu: bool = True

    @nn.compact
    def __call__(self, x, past):
        """`[B, T, C]` to `[B, T / stride, features]`, and the past to go on with."""
        shape = (self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", CONV_INIT, shape, jnp.float32).astype(x.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32).astype(x.dtype)
        x = nn.elu(x) if self.elu else x
        y, past = causal_conv(x, kernel, past, stride=self.stride, dilation=self.dilation)
        return y + bias[None, None], past


class TransposedConv(nn.Module):
    """`transposed_conv` of `elu(x)`, plus a bias."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x, tail):
        """`[B, T, C]` to `[B, T * stride, features]`, and the tail to go on with."""
        shape = (x.shape[-1], self.features, 2 * self.stride)
        kernel = self.param("kernel", TRANSPOSED_INIT, shape, jnp.float32).astype(x.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32).astype(x.dtype)
        y, tail = transposed_conv(nn.elu(x), kernel, tail)
        return y + bias[None, None], tail


class ResidualBlock(nn.Module):
    """`x + conv(elu(conv(elu(x))))`, the second convolution of width 1."""

    config: MimiConfig
    dilation: int

    @nn.compact
    def __call__(self, x, past):
        """`[B, T, C]` to the same, and the past to go on with."""
        channels, c = x.shape[-1], self.config
        narrow = CausalConv(channels // c.compress, c.residual_kernel_size, dilation=self.dilation, name="conv1")
        hidden, past = narrow(x, past)
        hidden, _ = CausalConv(channels, 1, name="conv2")(hidden, None)
        return x + hidden, past


class SEANetEncoder(nn.Module):
    """Samples to steps."""

    config: MimiConfig

    @nn.compact
    def __call__(self, x, states):
        """`[B, S, 1]` to `[B, S / product of ratios, dimension]`, and the layers' states."""
        c = self.config
        layers: list[nn.Module] = [CausalConv(c.n_filters, c.kernel_size, elu=False, name="conv_in")]
        for i, ratio in enumerate(reversed(c.ratios)):
            layers += _residual_blocks(c, i)
            layers.append(CausalConv(c.n_filters * 2 ** (i + 1), 2 * ratio, stride=ratio, name=f"down_{i}"))
        layers.append(CausalConv(c.dimension, c.last_kernel_size, name="conv_out"))
        return _run(layers, x, states)


class SEANetDecoder(nn.Module):
    """Steps to samples."""

    config: MimiConfig

    @nn.compact
    def __call__(self, x, states):
        """`[B, T, dimension]` to `[B, T * product of ratios, 1]`, and the layers' states."""
        c = self.config
        widest = c.n_filters * 2 ** len(c.ratios)
        layers: list[nn.Module] = [CausalConv(widest, c.kernel_size, elu=False, name="conv_in")]
        for i, ratio in enumerate(c.ratios):
            layers.append(TransposedConv(widest // 2 ** (i + 1), ratio, name=f"up_{i}"))
            layers += _residual_blocks(c, i)
        layers.append(CausalConv(1, c.last_kernel_size, name="conv_out"))
        return _run(layers, x, states)


class DownsampleState(NamedTuple):
    """What the downsampling convolution has seen."""

    past: jax.Array  # [B, stride, dimension]
    started: jax.Array  # [B] bool, False before the row's first step


class Downsample(nn.Module):
    """Steps to frames: a convolution without bias before whose start the first input is repeated."""

    config: MimiConfig

    @nn.compact
    def __call__(self, x, state: DownsampleState | None):
        """`[B, T, dimension]` to `[B, T / stride, dimension]`, and the state to go on with."""
        c = self.config
        shape = (2 * c.stride, c.dimension, c.dimension)
        kernel = self.param("kernel", CONV_INIT, shape, jnp.float32).astype(x.dtype)
        if state is None:
            past = jnp.zeros((x.shape[0], c.stride, c.dimension), x.dtype)
            state = DownsampleState(past, jnp.zeros(x.shape[0], bool))
        if x.shape[1] == 0:  # nothing to repeat yet
            return x, state
        past = jnp.where(state.started[:, None, None], state.past, x[:, :1])
        y, past = causal_conv(x, kernel, past, stride=c.stride)
        assert past is not None  # the kernel is wider than its stride
        return y, DownsampleState(past, jnp.ones(x.shape[0], bool))


class Upsample(nn.Module):
    """Frames to steps: a transposed convolution without bias for every channel alone."""

    config: MimiConfig

    @nn.compact
    def __call__(self, x, tail):
        """`[B, T, dimension]` to `[B, T * stride, dimension]`, and the tail to go on with."""
        shape = (2 * self.config.stride, 1, self.config.dimension)
        kernel = self.param("kernel", nn.initializers.normal(0.5), shape, jnp.float32).astype(x.dtype)
        return depthwise_transposed_conv(x, kernel, tail)


def _residual_blocks(config: MimiConfig, i: int) -> list[nn.Module]:
    return [
        ResidualBlock(config, config.dilation_base**j, name=f"residual_{i}_{j}")
        for j in range(config.n_residual_layers)
    ]


def _run(layers: list[nn.Module], x: jax.Array, states):
    """The layers one after the other, each with its state."""
    after = []
    for layer, state in zip(layers, states or [None] * len(layers), strict=True):
        x, state = layer(x, state)
        after.append(state)
    return x, tuple(after)
