"""The inner problem: the fast models, their loss and its gradient, written by hand.

Leading axes are free (usually [B, H]); the last two are [C, D]. Gradients are those of
`loss = 1/2 * sum((LN(f(k)) - target)^2)`, the reconstruction loss of Sun et al. 2024 (arXiv 2407.04620, section 2).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Weights = tuple[jax.Array, ...]


class LayerNormParams(NamedTuple):
    """Scale and bias of the inner LayerNorm, each broadcastable to [..., C, D]."""

    scale: jax.Array
    bias: jax.Array
    eps: float


def _normalize(x: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """Zero mean and unit (biased) variance over the last axis; also returns 1/std."""
    centered = x - jnp.mean(x, axis=-1, keepdims=True)
    rstd = jax.lax.rsqrt(jnp.mean(jnp.square(centered), axis=-1, keepdims=True) + eps)
    return centered * rstd, rstd


def layer_norm(x: jax.Array, ln: LayerNormParams) -> jax.Array:
    """`scale * (x - mean) / sqrt(var + eps) + bias`, biased variance, over the last axis."""
    return ln.scale * _normalize(x, ln.eps)[0] + ln.bias


def prediction_gradient(z: jax.Array, target: jax.Array, ln: LayerNormParams) -> jax.Array:
    """`d/dz 1/2 sum((LN(z) - target)^2)`: the loss's gradient, taken back through the LayerNorm."""
    normalized, rstd = _normalize(z, ln.eps)
    d_normalized = ln.scale * (ln.scale * normalized + ln.bias - target)
    mean = jnp.mean(d_normalized, axis=-1, keepdims=True)
    projection = jnp.mean(d_normalized * normalized, axis=-1, keepdims=True)
    return rstd * (d_normalized - mean - normalized * projection)


def squared_error(z: jax.Array, target: jax.Array, ln: LayerNormParams) -> jax.Array:
    """`mean((LN(z) - target)^2)` over features, without the 1/2: the loss as it is reported, [..., C]."""
    return jnp.mean(jnp.square(layer_norm(z, ln) - target), axis=-1)


def gelu(x: jax.Array) -> jax.Array:
    """GELU in its tanh form, the one of every TTT layer."""
    return jax.nn.gelu(x, approximate=True)


def gelu_gradient(x: jax.Array) -> jax.Array:
    """Derivative of the tanh form of GELU."""
    root, cubic = 0.7978845608028654, 0.044715  # sqrt(2 / pi)
    t = jnp.tanh(root * (x + cubic * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * root * (1 + 3 * cubic * x * x)


def _dense(x: jax.Array, w: jax.Array, b: jax.Array) -> jax.Array:
    return x @ w + b[..., None, :]


def linear_predict(weights: Weights, x: jax.Array) -> jax.Array:
    """`f(x) = x w1 + b1`."""
    return _dense(x, *weights)


def mlp_predict(weights: Weights, x: jax.Array) -> jax.Array:
    """`f(x) = gelu(x w1 + b1) w2 + b2`."""
    w1, b1, w2, b2 = weights
    return _dense(gelu(_dense(x, w1, b1)), w2, b2)


class Tokens(NamedTuple):
    """One mini-batch of C tokens, each a source (k, target, lr) and a reader (q, token_scale) of gradients."""

    q: jax.Array  # [..., C, D]
    k: jax.Array
    target: jax.Array
    lr: jax.Array  # [..., C, 1], step size of the token's gradient
    token_scale: jax.Array  # [..., C, 1], what the token multiplies all step sizes by


class DualResult(NamedTuple):
    """What the dual form of one mini-batch yields."""

    z_q: jax.Array  # f(q) of every token under its own updated weights, before the LayerNorm
    z_k: jax.Array  # f(k) under the weights at the mini-batch's start
    gradient: Weights  # sum over tokens of lr[j] * d loss_j / d weights


def _read_updated(x, keys, gradient, tokens: Tokens, pending: Weights | None, causal: bool) -> jax.Array:
    """What the mini-batch's updates take away from a dense layer's output at `x`.

    `token_scale_i * sum_j (x_i . keys_j + 1) gradient_j` over the sources j that token i sees (the 1 is the bias's
    part), plus the same for the gradient that was already pending. The C x C step sizes never exist: lr is inside
    `gradient`.
    """
    mixing = x @ jnp.swapaxes(keys, -1, -2) + 1
    if causal:
        mixing = jnp.tril(mixing)
    change = mixing @ gradient
    if pending is not None:
        change = change + _dense(x, *pending)
    return tokens.token_scale * change


def _parameter_gradient(keys: jax.Array, gradient: jax.Array) -> Weights:
    return jnp.swapaxes(keys, -1, -2) @ gradient, jnp.sum(gradient, axis=-2)


def linear_dual(
    weights: Weights, pending: Weights | None, tokens: Tokens, ln: LayerNormParams, causal: bool
) -> DualResult:
    """Dual form of one TTT-Linear mini-batch: per-token updated outputs from matrix products alone."""
    z_k = linear_predict(weights, tokens.k)
    g = tokens.lr * prediction_gradient(z_k, tokens.target, ln)
    z_q = linear_predict(weights, tokens.q) - _read_updated(tokens.q, tokens.k, g, tokens, pending, causal)
    return DualResult(z_q, z_k, _parameter_gradient(tokens.k, g))


def mlp_dual(
    weights: Weights, pending: Weights | None, tokens: Tokens, ln: LayerNormParams, causal: bool
) -> DualResult:
    """Dual form of one TTT-MLP mini-batch. The first layer's gradient passes through w2 as it was before the update."""
    w1, b1, w2, b2 = weights
    z1_k = _dense(tokens.k, w1, b1)
    x2_k = gelu(z1_k)
    z_k = _dense(x2_k, w2, b2)
    g2 = tokens.lr * prediction_gradient(z_k, tokens.target, ln)
    g1 = (g2 @ jnp.swapaxes(w2, -1, -2)) * gelu_gradient(z1_k)
    pending1, pending2 = (None, None) if pending is None else (pending[:2], pending[2:])
    x2_q = gelu(_dense(tokens.q, w1, b1) - _read_updated(tokens.q, tokens.k, g1, tokens, pending1, causal))
    z_q = _dense(x2_q, w2, b2) - _read_updated(x2_q, x2_k, g2, tokens, pending2, causal)
    return DualResult(z_q, z_k, _parameter_gradient(tokens.k, g1) + _parameter_gradient(x2_k, g2))


class InnerModel(NamedTuple):
    """A fast model: its forward pass and the dual form of one of its mini-batches."""

    predict: Callable[[Weights, jax.Array], jax.Array]
    dual: Callable[..., DualResult]


LINEAR = InnerModel(linear_predict, linear_dual)
MLP = InnerModel(mlp_predict, mlp_dual)
