"""The inner problem on tokens in registers, float32: LayerNorm, its loss, and GELU.

A block of tokens is transposed, [D, n], features along axis 0; the loss may have them along axis 1.

`g` is the gradient of the inner loss by the prediction, `d_x` the derivative of the outer loss by `x`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ttt_kernels.hopper import over_columns, over_rows


class InnerGradient(NamedTuple):
    """The gradient of the inner loss by the prediction, and what its own derivative needs."""

    g: jax.Array
    normalized: jax.Array
    rstd: jax.Array
    error: jax.Array  # LN(prediction) - target


class InnerDerivatives(NamedTuple):
    """Derivatives of the outer loss; gamma's and beta's are yet to be summed over tokens."""

    d_z: jax.Array
    d_target: jax.Array
    d_gamma: jax.Array
    d_beta: jax.Array


def sum_rows(x: jax.Array) -> jax.Array:
    """Where one warpgroup does it at a time."""
    return x.sum(axis=0)


_STACKED = 16


@dataclasses.dataclass(frozen=True)
class Loss:
    """`1/2 sum (LN(z) - target)^2` of a prediction z; gamma and beta have z's shape.

    Attributes:
        eps: of the LayerNorm.
        total: sums over rows, where features are.
        axis: of features.
        exact: whether the variance is the mean square of what differs from the mean. Else it is the mean square without
            the mean's square, so that both means wait together: for predictions by weights in bfloat16. The updates
            leave the mean of a prediction's features as it is, and where that is so large that float32 cancels here,
            bfloat16 has lost more.
    """

    eps: float
    total: Callable[[jax.Array], jax.Array] = sum_rows
    axis: int = 0
    exact: bool = False

    def means(self, *xs: jax.Array) -> list[jax.Array]:
        """Of each, the mean over features, the same for each feature.

        Few tokens' sums over rows are one reduction of all: what it waits for, shuffles and SMEM, costs more than the
        sums.
        """
        size, num_tokens = xs[0].shape[self.axis], xs[0].shape[1 - self.axis]
        if self.axis or num_tokens > _STACKED:
            found = [x.sum(axis=1) if self.axis else self.total(x) for x in xs]
        else:
            joined = self.total(jnp.concatenate(xs, axis=1))
            found = [joined[i * num_tokens : (i + 1) * num_tokens] for i in range(len(xs))]
        for_each_feature = over_columns if self.axis else over_rows
        return [for_each_feature(x * (1.0 / size), size) for x in found]

    def normalize(self, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        """To zero mean and unit variance over features; also 1/std, as z."""
        if self.exact:
            (mean,) = self.means(z)
            (variance,) = self.means((z - mean) * (z - mean))
        else:
            mean, mean_square = self.means(z, z * z)
            variance = jnp.maximum(mean_square - mean * mean, 0.0)
        rstd = lax.rsqrt(variance + self.eps)
        return (z - mean) * rstd, rstd

    def without_projections(self, x: jax.Array, normalized: jax.Array) -> jax.Array:
        """`x` without its mean and its part along `normalized`: a LayerNorm's derivative, times std."""
        mean, along = self.means(x, x * normalized)
        return x - mean - normalized * along

    def gradient(self, z: jax.Array, target: jax.Array, gamma: jax.Array, beta: jax.Array) -> InnerGradient:
        """By z."""
        normalized, rstd = self.normalize(z)
        error = gamma * normalized + beta - target
        return InnerGradient(rstd * self.without_projections(gamma * error, normalized), normalized, rstd, error)

    def back_through_gradient(self, d_g: jax.Array, inner: InnerGradient, gamma: jax.Array) -> InnerDerivatives:
        """The second derivative, times `d_g`."""
        g, normalized, rstd, error = inner
        d_h, gy = rstd * d_g, gamma * error
        mean, along, of_gy, of_g = self.means(d_h, d_h * normalized, gy * normalized, d_g * g)
        d_gy = d_h - mean - normalized * along
        d_normalized = gamma * gamma * d_gy - d_h * of_gy - gy * along
        d_z = self.without_projections(d_normalized, normalized) - normalized * of_g
        return InnerDerivatives(rstd * d_z, -gamma * d_gy, d_gy * (error + gamma * normalized), d_gy * gamma)


_ROOT = (2 / math.pi) ** 0.5
_CUBIC = 0.044715 * _ROOT
"""GELU in its tanh form is `x / 2 (1 + tanh(_ROOT x + _CUBIC x^3))`; below in as few operations as there are."""


def _tanh(x: jax.Array) -> jax.Array:
    return jnp.tanh(x * (_ROOT + _CUBIC * (x * x)))


def _half_slope(x: jax.Array) -> jax.Array:
    """Half of the derivative of what `_tanh` takes the tanh of."""
    return 0.5 * _ROOT + 1.5 * _CUBIC * (x * x)


def gelu(x: jax.Array) -> jax.Array:
    """GELU in its tanh form."""
    return x * (0.5 + 0.5 * _tanh(x))


def gelu_gradient(x: jax.Array) -> jax.Array:
    """Its derivative."""
    t, half_slope = _tanh(x), _half_slope(x)
    return (0.5 + 0.5 * t) + x * half_slope * (1.0 - t * t)


def gelu_second_derivative(x: jax.Array) -> jax.Array:
    """The derivative of `gelu_gradient`."""
    t, half_slope = _tanh(x), _half_slope(x)
    return (1.0 - t * t) * ((_ROOT + 6.0 * _CUBIC * (x * x)) - 4.0 * (t * half_slope * (x * half_slope)))


def mixing(attention: jax.Array, steps: jax.Array) -> jax.Array:
    """What readers take of sources' gradients; where one sees none, `attention` may be anything."""
    return jnp.where(steps == 0.0, 0.0, (attention + 1.0) * steps)
