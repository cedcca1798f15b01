"""TTT-Linear on whole mini-batches, differentiable: the forward and the backward kernel as one operation."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ttt_kernels import interpreter
from ttt_kernels.blocks import LinearBlocks
from ttt_kernels.hopper import TILE
from ttt_kernels.linear_backward import backward
from ttt_kernels.linear_forward import C, D, forward

MINI_BATCH_SIZE = C
HEAD_DIM = D


def ttt_linear(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lr_read: jax.Array,
    lr_update: jax.Array,
    token_scale: jax.Array,
    w1: jax.Array,
    b1: jax.Array,
    ln_scale: jax.Array,
    ln_bias: jax.Array,
    *,
    eps: float = 1e-6,
    blocks: LinearBlocks | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Causal TTT-Linear over mini-batches of 16 tokens, head dim 64, on an NVIDIA Hopper GPU.

    With `f(x) = x w1 + b1` and `g[j]` the gradient of token j's inner loss by `f(k[j])` at its mini-batch's start,

        out[i] = q[i] + LN(f(q[i]) - token_scale[i] * sum_{j <= i} lr_read[j] (q[i] . k[j] + 1) g[j])
        w1    <- w1 - sum_j lr_update[j] k[j] g[j]^T,   b1 <- b1 - sum_j lr_update[j] g[j]

    A mini-batch whose `lr_update` is 0 leaves the weights as they are.

    Args:
        q: `[B, T, H, 64]` bfloat16; T is a multiple of 16.
        k: as q.
        v: as q.
        lr_read: `[B, T, H]` float32.
        lr_update: `[B, T, H]` float32.
        token_scale: `[16]` float32.
        w1: `[B, H, 64, 64]` float32.
        b1: `[B, H, 64]` float32.
        ln_scale: `[H, 64]` float32.
        ln_bias: `[H, 64]` float32.
        eps: of the inner LayerNorm.
        blocks: block sizes; None takes the default.

    Returns:
        out `[B, T, H, 64]` bfloat16, and w1 and b1 after the last mini-batch. Weights are read in bfloat16, kept and
        updated in float32. Differentiable in every array.

    Raises:
        ValueError: wrong shapes or dtypes.
    """
    _check(q, k, v, lr_read, lr_update, token_scale, w1, b1, ln_scale, ln_bias)
    blocks = LinearBlocks() if blocks is None else blocks
    parameters = interpreter.parameters()
    if parameters is not None:
        blocks = blocks.for_interpreter()
    num_tokens = q.shape[1]
    padding = -num_tokens % TILE  # its step size is 0, which changes nothing
    q, k, v, lr_read, lr_update = (
        jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2)) for x in (q, k, v, lr_read, lr_update)
    )
    steps = (x.transpose(0, 2, 1) for x in (lr_read, lr_update))
    results: Any = _tiles(
        (eps, blocks, parameters), q, k, v, *steps, token_scale, w1.swapaxes(-1, -2), b1, ln_scale, ln_bias
    )
    out, wt, b1 = results
    return out[:, :num_tokens], wt.swapaxes(-1, -2), b1


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tiles(options, *arrays):
    eps, blocks, interpret = options
    return forward(*arrays, eps=eps, blocks=blocks, interpret=interpret)[:3]


def _tiles_forward(options, *arrays):
    eps, blocks, interpret = options
    *results, wt_kept, b_kept = forward(*arrays, eps=eps, blocks=blocks, interpret=interpret)
    return tuple(results), (*arrays[:6], wt_kept, b_kept, *arrays[8:])


def _tiles_backward(options, kept, derivatives):
    eps, blocks, interpret = options
    results = backward(*kept, *derivatives, eps=eps, blocks=blocks, interpret=interpret)
    d_q, d_k, d_v, d_lr_read, d_lr_update, d_scale, d_wt, d_b, d_ln_scale, d_ln_bias = results
    d_scale = d_scale.reshape(-1, C).sum(axis=0)
    return d_q, d_k, d_v, d_lr_read, d_lr_update, d_scale, d_wt, d_b, d_ln_scale.sum(axis=0), d_ln_bias.sum(axis=0)


_tiles.defvjp(_tiles_forward, _tiles_backward)


def _check(q, k, v, lr_read, lr_update, token_scale, w1, b1, ln_scale, ln_bias) -> None:
    batch_size, num_tokens, num_heads = q.shape[:3]
    of_tokens, of_steps = (batch_size, num_tokens, num_heads, D), (batch_size, num_tokens, num_heads)
    expected = {
        "q": (q, of_tokens, jnp.bfloat16),
        "k": (k, of_tokens, jnp.bfloat16),
        "v": (v, of_tokens, jnp.bfloat16),
        "lr_read": (lr_read, of_steps, jnp.float32),
        "lr_update": (lr_update, of_steps, jnp.float32),
        "token_scale": (token_scale, (C,), jnp.float32),
        "w1": (w1, (batch_size, num_heads, D, D), jnp.float32),
        "b1": (b1, (batch_size, num_heads, D), jnp.float32),
        "ln_scale": (ln_scale, (num_heads, D), jnp.float32),
        "ln_bias": (ln_bias, (num_heads, D), jnp.float32),
    }
    for name, (x, shape, dtype) in expected.items():
        if x.shape != shape or x.dtype != dtype:
            raise ValueError(f"{name}: expected {jnp.dtype(dtype)}{list(shape)}, got {x.dtype}{list(x.shape)}.")
    if num_tokens == 0 or num_tokens % C:
        raise ValueError(f"q: expected T > 0 tokens, a multiple of {C}, got {num_tokens}.")
