"""TTT-Linear and TTT-MLP on whole mini-batches, differentiable: each joins a forward and a backward kernel."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ttt_kernels import interpreter, linear_backward, linear_forward, mlp
from ttt_kernels.blocks import LinearBlocks, MLPBlocks
from ttt_kernels.cluster import SLICES
from ttt_kernels.hopper import TILE, D
from ttt_kernels.partitioned import EACH, HEADS, SHARED, TOKENS, split

MINI_BATCH_SIZES = (16, 64)
HEAD_DIMS = {"linear": (D, 2 * D), "mlp": (D,)}
"""Of each model."""

FLOAT32_HEAD_DIMS = (D,)
"""Of both, on float32 tokens: SMEM holds no more."""

HIDDEN_UNITS = SLICES * D
"""Of TTT-MLP."""

Arrays = tuple[jax.Array, ...]


class _Model(NamedTuple):
    """The kernels of a fast model."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


_LINEAR = _Model(linear_forward.forward, linear_backward.backward)
_MLP = _Model(mlp.forward, mlp.backward)


class _Options(NamedTuple):
    model: _Model
    causal: bool
    eps: float
    blocks: Any
    interpret: Any


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
    causal: bool = True,
    eps: float = 1e-6,
    blocks: LinearBlocks | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """TTT-Linear over mini-batches of C = 16 or 64 tokens, head dim D = 64 or 128, on an NVIDIA Hopper GPU.

    With `f(x) = x w1 + b1` and `g[j]` the gradient of token j's inner loss by `f(k[j])` at its mini-batch's start,

        out[i] = q[i] + LN(f(q[i]) - token_scale[i] * sum_j lr_read[j] (q[i] . k[j] + 1) g[j])
        w1    <- w1 - sum_j lr_update[j] k[j] g[j]^T,   b1 <- b1 - sum_j lr_update[j] g[j]

    j are the tokens of i's mini-batch, where causal those up to i. A mini-batch whose `lr_update` is 0 leaves the
    weights as they are.

    Args:
        q: `[B, T, H, D]` bfloat16, or at D = 64 float32; T is a multiple of C.
        k: as q.
        v: as q.
        lr_read: `[B, T, H]` float32.
        lr_update: `[B, T, H]` float32.
        token_scale: `[C]` float32.
        w1: `[B, H, D, D]` float32.
        b1: `[B, H, D]` float32.
        ln_scale: `[H, D]` float32.
        ln_bias: `[H, D]` float32.
        causal: whether a token reads the gradients of its mini-batch's tokens up to itself, or of all.
        eps: of the inner LayerNorm.
        blocks: block sizes; None takes the default.

    Returns:
        out `[B, T, H, D]` in q's dtype, and w1 and b1 after the last mini-batch. Weights are kept and updated in
        float32. With bfloat16 tokens all products are of bfloat16, and every array can be differentiated; with float32
        tokens products are of 16 bits of each number, and there are no derivatives.

    Raises:
        ValueError: wrong shapes or dtypes.
        NotImplementedError: differentiated with float32 tokens.
    """
    dim = q.shape[-1]
    shapes = {"w1": (w1, (dim, dim)), "b1": (b1, (dim,))}
    inputs, ln = (q, k, v, lr_read, lr_update, token_scale), (ln_scale, ln_bias)
    _check(*inputs, *ln, shapes, "linear")
    if blocks is None:
        c = token_scale.shape[0]
        blocks = LinearBlocks.choose(c, 4 * TILE // c, dim)
    out, (wt, b1) = _padded(_LINEAR, inputs, (w1.swapaxes(-1, -2), b1), ln, causal, eps, blocks)
    return out, wt.swapaxes(-1, -2), b1


def ttt_mlp(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lr_read: jax.Array,
    lr_update: jax.Array,
    token_scale: jax.Array,
    w1: jax.Array,
    b1: jax.Array,
    w2: jax.Array,
    b2: jax.Array,
    ln_scale: jax.Array,
    ln_bias: jax.Array,
    *,
    causal: bool = True,
    eps: float = 1e-6,
    blocks: MLPBlocks | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """TTT-MLP: as `ttt_linear` with `f(x) = gelu_tanh(x w1 + b1) w2 + b2`, whose two layers each read and update so.

    Args: those of `ttt_linear` but for
        q: `[B, T, H, 64]`, as k and v.
        w1: `[B, H, 64, 256]` float32.
        b1: `[B, H, 256]` float32.
        w2: `[B, H, 256, 64]` float32.
        b2: `[B, H, 64]` float32.

    Returns:
        out, w1, b1, w2, b2, as `ttt_linear`.

    Raises:
        ValueError: wrong shapes or dtypes. RuntimeError: interpreted, with too few threads.
        NotImplementedError: differentiated with float32 tokens.
    """
    shapes = {
        "w1": (w1, (D, HIDDEN_UNITS)),
        "b1": (b1, (HIDDEN_UNITS,)),
        "w2": (w2, (HIDDEN_UNITS, D)),
        "b2": (b2, (D,)),
    }
    inputs, ln = (q, k, v, lr_read, lr_update, token_scale), (ln_scale, ln_bias)
    _check(*inputs, *ln, shapes, "mlp")
    if interpreter.parameters() is not None:
        interpreter.require_threads(SLICES + 2)
    slices = (*q.shape[:1], q.shape[2], SLICES, D)
    w1t, w2t = w1.swapaxes(-1, -2).reshape(*slices, D), w2.reshape(*slices, D).swapaxes(-1, -2)
    if blocks is None:
        c = token_scale.shape[0]
        blocks = MLPBlocks.choose(c, 4 * TILE // c)
    out, (w1t, b1_slices, w2t, b2) = _padded(_MLP, inputs, (w1t, b1.reshape(slices), w2t, b2), ln, causal, eps, blocks)
    w1, w2 = w1t.reshape(*w1.shape[:2], HIDDEN_UNITS, D).swapaxes(-1, -2), w2t.swapaxes(-1, -2).reshape(w2.shape)
    return out, w1, b1_slices.reshape(b1.shape), w2, b2


def _padded(
    model: _Model, inputs: Arrays, weights: Arrays, ln: Arrays, causal, eps, blocks
) -> tuple[jax.Array, Arrays]:
    """Out and final weights, over whole tiles: the tokens behind the last have step size 0, which changes nothing."""
    *of_tokens, token_scale = inputs
    num_tokens = of_tokens[0].shape[1]
    q, k, v, *steps = (jnp.pad(x, ((0, 0), (0, -num_tokens % TILE)) + ((0, 0),) * (x.ndim - 2)) for x in of_tokens)
    interpret = interpreter.parameters()
    options = _Options(model, causal, eps, blocks if interpret is None else blocks.for_interpreter(), interpret)
    results: Any = _tiles(options, (q, k, v, *(x.transpose(0, 2, 1) for x in steps), token_scale), weights, ln)
    return results[0][:, :num_tokens], results[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tiles(options: _Options, inputs: Arrays, weights: Arrays, ln: Arrays) -> tuple[jax.Array, Arrays]:
    out, *at_end = _forward(options, inputs, weights, ln, keep=False)
    return out, tuple(at_end)


_OF_INPUTS = (*(TOKENS,) * 3, *(EACH,) * 2, SHARED)
_OF_LN = (HEADS,) * 2


def _forward(options: _Options, inputs: Arrays, weights: Arrays, ln: Arrays, *, keep: bool) -> Arrays:
    kernel = functools.partial(options.model.forward, keep=keep, **_keywords(options))
    of_weights = (EACH,) * len(weights)
    of_results = (TOKENS, *of_weights, *(of_weights if keep else ()))
    return split(kernel, (*inputs, *weights, *ln), (*_OF_INPUTS, *of_weights, *_OF_LN), of_results)


def _keywords(options: _Options) -> dict[str, Any]:
    return {name: value for name, value in options._asdict().items() if name != "model"}


def _tiles_forward(options, inputs, weights, ln):
    if inputs[0].dtype != jnp.bfloat16:
        raise NotImplementedError(f"q: there are no derivatives in {inputs[0].dtype}; cast q, k and v to bfloat16.")
    out, *rest = _forward(options, inputs, weights, ln, keep=True)
    at_end, checkpoints = rest[: len(weights)], rest[len(weights) :]
    return (out, tuple(at_end)), (inputs, tuple(checkpoints), ln)


def _tiles_backward(options, kept, derivatives):
    inputs, checkpoints, ln = kept
    d_out, d_weights = derivatives
    of_weights = (EACH,) * len(checkpoints)
    results = split(
        functools.partial(options.model.backward, **_keywords(options)),
        (*inputs, *checkpoints, *ln, d_out, *d_weights),
        (*_OF_INPUTS, *of_weights, *_OF_LN, TOKENS, *of_weights),
        (*(TOKENS,) * 3, *(EACH,) * 3, *of_weights, *(EACH,) * 2),
    )
    *d_inputs, d_scale = results[:6]
    d_scale = d_scale.reshape(-1, inputs[-1].shape[0]).sum(axis=0)
    return (*d_inputs, d_scale), tuple(results[6:-2]), tuple(x.sum(axis=0) for x in results[-2:])


_tiles.defvjp(_tiles_forward, _tiles_backward)


def _check(q, k, v, lr_read, lr_update, token_scale, ln_scale, ln_bias, weights, model) -> None:
    (batch_size, num_tokens, num_heads), dim = q.shape[:3], q.shape[-1]
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"q: expected bfloat16 or float32, got {q.dtype}.")
    head_dims = HEAD_DIMS[model] if q.dtype == jnp.bfloat16 else FLOAT32_HEAD_DIMS
    if dim not in head_dims:
        raise ValueError(f"q: expected head dim {' or '.join(map(str, head_dims))} in {q.dtype}, got {dim}.")
    of_tokens, of_steps = (batch_size, num_tokens, num_heads, dim), (batch_size, num_tokens, num_heads)
    expected = {
        "q": (q, of_tokens, q.dtype),
        "k": (k, of_tokens, q.dtype),
        "v": (v, of_tokens, q.dtype),
        "lr_read": (lr_read, of_steps, jnp.float32),
        "lr_update": (lr_update, of_steps, jnp.float32),
        "token_scale": (token_scale, token_scale.shape[:1], jnp.float32),
        "ln_scale": (ln_scale, (num_heads, dim), jnp.float32),
        "ln_bias": (ln_bias, (num_heads, dim), jnp.float32),
    }
    expected |= {name: (x, (batch_size, num_heads, *shape), jnp.float32) for name, (x, shape) in weights.items()}
    for name, (x, shape, dtype) in expected.items():
        if x.shape != shape or x.dtype != dtype:
            raise ValueError(f"{name}: expected {jnp.dtype(dtype)}{list(shape)}, got {x.dtype}{list(x.shape)}.")
    c = token_scale.shape[0]
    if c not in MINI_BATCH_SIZES:
        raise ValueError(f"token_scale: expected C entries, C in {MINI_BATCH_SIZES}, got {c}.")
    if num_tokens == 0 or num_tokens % c:
        raise ValueError(f"q: expected T > 0 tokens, a multiple of {c}, got {num_tokens}.")
