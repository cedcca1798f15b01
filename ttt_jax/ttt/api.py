"""The TTT operation as users call it: checked arguments, one dispatch, any implementation.

The maths is that of Sun et al. 2024 (arXiv 2407.04620): each row and head holds a small model that is trained by
gradient descent while the sequence is read. For a mini-batch of C tokens and the model f with weights theta at its
start,

    g[j]   = d/d theta 1/2 * sum((LN(f(k[j]; theta)) - (v[j] - k[j]))^2)
    out[i] = q[i] + LN(f(q[i]; theta - token_scale[i] * sum_j lr[j] g[j]))      over j <= i (causal) or all j
    theta <- theta - token_scale[C-1] * sum_j lr[j] g[j]

Shapes: B batch, T tokens, H heads, D head dim, F hidden width of the inner MLP (4D), C mini-batch, N mini-batches.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ttt_jax import devices
from ttt_jax.dtypes import at_least_float32
from ttt_jax.rows import checked_rows
from ttt_jax.ttt import pallas, reference, scan
from ttt_jax.ttt.call import Call, fresh_state, select_rows
from ttt_jax.ttt.types import TTTLinearParams, TTTLosses, TTTMLPParams, TTTParams, TTTState

Implementation = str | Sequence[str] | None
IMPLEMENTATIONS = ("scan", "pallas", "reference")


def ttt_linear(
    params: TTTLinearParams,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lr: jax.Array,
    *,
    mini_batch_size: int = 16,
    causal: bool = True,
    token_scale: jax.Array | None = None,
    state: TTTState | None = None,
    length: jax.Array | None = None,
    reset: jax.Array | None = None,
    eps: float = 1e-6,
    remat_every: int = 16,
    implementation: Implementation = None,
) -> tuple[jax.Array, TTTState]:
    """TTT with the inner model `f(x) = x w1 + b1`; the module's docstring has the equations.

    Causal calls may split a sequence anywhere (T = 0 included) and give the outputs and the final state of one call.
    Non-causal mini-batches start at the call's first token; a short last one is applied too, a pending causal state
    first, and the count returned is 0: their splits are exact at multiples of C.

    Args:
      params: initial fast weights and inner LayerNorm, any float dtype.
      q: queries, [B, T, H, D], float. float64 computes in float64, all else in float32.
      k: keys, as q.
      v: values, as q.
      lr: step size of each token as a source, [B, T, H] float32 (or float64), >= 0.
      mini_batch_size: C >= 1, tokens whose gradients are taken at the same weights.
      causal: whether token i reads only the gradients of tokens j <= i of its mini-batch.
      token_scale: [C] float32 (or float64); default 1/(i+1) when causal, else 1/C.
      state: what an earlier call with the same C returned; None starts every row from `params`.
      length: [B] int, clipped to [0, T]: tokens of each row that are real. The others return zeros, change nothing, get
        zero gradient, and their values never matter.
      reset: [B] bool: rows that restart from `params` before their first token, also at length 0.
      eps: of the inner LayerNorm, > 0.
      remat_every: mini-batches per checkpoint in the backward pass, >= 1.
      implementation: "scan", "pallas" or "reference", a sequence of them to try in order, or None for the fastest that
        supports the call. The products of "pallas" read bfloat16, of float32 tokens 16 bits of each number; what they
        add up, the weights too, is float32.

    Returns:
      out, [B, T, H, D] in q's dtype, and the state after the last real token of each row, float32 (or float64).

    Raises:
      ValueError: wrong types, shapes, dtypes or static values, or (where it is not traced) a state whose count is not
        in [0, C). NotImplementedError: no implementation supports the call.
    """
    _check_params(params, TTTLinearParams, "ttt_linear")
    return _dispatch(
        "ttt",
        params,
        q,
        k,
        v,
        lr,
        mini_batch_size,
        causal,
        token_scale,
        state,
        length,
        reset,
        eps,
        remat_every,
        implementation,
    )


def ttt_mlp(
    params: TTTMLPParams,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lr: jax.Array,
    *,
    mini_batch_size: int = 16,
    causal: bool = True,
    token_scale: jax.Array | None = None,
    state: TTTState | None = None,
    length: jax.Array | None = None,
    reset: jax.Array | None = None,
    eps: float = 1e-6,
    remat_every: int = 16,
    implementation: Implementation = None,
) -> tuple[jax.Array, TTTState]:
    """TTT with the inner model `f(x) = gelu_tanh(x w1 + b1) w2 + b2`; arguments, results and errors as `ttt_linear`."""
    _check_params(params, TTTMLPParams, "ttt_mlp")
    return _dispatch(
        "ttt",
        params,
        q,
        k,
        v,
        lr,
        mini_batch_size,
        causal,
        token_scale,
        state,
        length,
        reset,
        eps,
        remat_every,
        implementation,
    )


def ttt_loss(
    params: TTTParams,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lr: jax.Array,
    *,
    mini_batch_size: int = 16,
    causal: bool = True,
    token_scale: jax.Array | None = None,
    state: TTTState | None = None,
    length: jax.Array | None = None,
    reset: jax.Array | None = None,
    eps: float = 1e-6,
    remat_every: int = 16,
    implementation: Implementation = None,
) -> TTTLosses:
    """Inner losses `mean((LN(f(k)) - (v - k))^2)` of every mini-batch; arguments and errors as `ttt_linear`.

    Returns:
      initial, before, after, each [B, H, N]: the loss over the mini-batch's real tokens of this call and D under the
      initial fast weights, under those at the mini-batch's start, and with its gradient so far applied as at its end. A
      mini-batch without a real token has 0. N = ceil(T/C); causal calls that continue a state may start inside a
      mini-batch, which gives N = ceil((T+C-1)/C) (1 for T = 1), the first being the one that was open. T = 0 gives
      N = 0.
    """
    _check_params(params, TTTParams, "ttt_loss")
    return _dispatch(
        "losses",
        params,
        q,
        k,
        v,
        lr,
        mini_batch_size,
        causal,
        token_scale,
        state,
        length,
        reset,
        eps,
        remat_every,
        implementation,
    )


def init_state(params: TTTParams, batch_size: int) -> TTTState:
    """The state of `batch_size` rows that have read nothing: float32 (float64 for float64 params), leaves lead with B.

    Raises:
      ValueError: params of another type, or a negative batch size.
    """
    _check_params(params, TTTParams, "init_state")
    if not isinstance(batch_size, int | np.integer) or batch_size < 0:
        raise ValueError(f"batch_size: expected an int >= 0, got {batch_size!r}.")
    dtype = at_least_float32(params.w1.dtype)
    return fresh_state(jax.tree.map(lambda x: jnp.asarray(x, dtype), params), batch_size)


def _dispatch(
    operation,
    params,
    q,
    k,
    v,
    lr,
    mini_batch_size,
    causal,
    token_scale,
    state,
    length,
    reset,
    eps,
    remat_every,
    implementation,
) -> Any:
    _check_inputs(params, q, k, v, lr)
    _check_static(mini_batch_size=mini_batch_size, causal=causal, remat_every=remat_every, eps=eps)
    _check_token_scale(token_scale, mini_batch_size)
    length, reset = checked_rows(length, reset, *q.shape[:2])
    _check_state(params, q.shape[0], mini_batch_size, state)
    call = _prepare(params, q, k, v, lr, mini_batch_size, causal, token_scale, state, length, reset, eps, remat_every)
    names = _implementations(implementation, call)
    refusals = []
    for name in names:
        try:
            result = _run(name, operation, call)
        except NotImplementedError as refusal:
            refusals.append(f"{name}: {refusal}")
            continue
        if operation == "losses":
            return result
        return result[0].astype(q.dtype), result[1]
    raise NotImplementedError("no implementation supports this call. " + " ".join(refusals))


def explain(
    params: TTTParams,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lr: jax.Array,
    *,
    mini_batch_size: int = 16,
    causal: bool = True,
    state: TTTState | None = None,
    length: jax.Array | None = None,
) -> str:
    """Which implementation `ttt_linear` or `ttt_mlp` takes for a call that names none, and why not the kernels.

    Arguments as those functions', of which only shapes and dtypes matter. Raises ValueError as they do.
    """
    _check_params(params, TTTParams, "explain")
    _check_inputs(params, q, k, v, lr)
    _check_static(mini_batch_size=mini_batch_size, causal=causal, remat_every=1, eps=1e-6)
    _check_state(params, q.shape[0], mini_batch_size, state)
    call = _prepare(params, q, k, v, lr, mini_batch_size, causal, None, state, length, None, 1e-6, 1)
    refusal = pallas.refusal(call)
    if refusal is not None:
        return f"scan; the kernels cannot take this call: {refusal}"
    if pallas.is_default(call):
        return "pallas"
    where = repr(devices.default_device().device_kind)
    if not pallas.has_measured_size(call):
        where += f" at head dim {q.shape[-1]} and mini-batches of {mini_batch_size} tokens"
    if pallas.is_step(call):
        where += " for one token"
    elif call.dtype != pallas.MEASURED_DTYPE:
        where += f" in {call.dtype}, of which products read 16 bits"
    return f"scan; the kernels can take this call, but were not measured to be faster on {where}: name 'pallas' to try"


def _run(name: str, operation: str, call: Call):
    if name == "pallas":
        refusal = "it reports no losses" if operation == "losses" else pallas.refusal(call)
        if refusal is not None:
            raise NotImplementedError(f"{refusal}; use 'scan'.")
        return pallas.ttt(call)
    if name == "reference":
        if operation == "losses":
            raise NotImplementedError("the token-by-token form reports no losses; use 'scan'.")
        return reference.ttt(call)
    return scan.losses(call) if operation == "losses" else scan.ttt(call)


def _implementations(implementation: Implementation, call: Call) -> tuple[str, ...]:
    if implementation is None:
        return ("pallas", "scan") if pallas.is_default(call) else ("scan",)
    names: tuple[Any, ...] = tuple(implementation) if isinstance(implementation, list | tuple) else (implementation,)
    unknown = [name for name in names if name not in IMPLEMENTATIONS]
    if unknown or not names:
        raise ValueError(
            f"implementation: expected one of {IMPLEMENTATIONS}, a sequence of them or None, got {implementation!r}."
        )
    return names


def _prepare(params, q, k, v, lr, mini_batch_size, causal, token_scale, state, length, reset, eps, remat_every) -> Call:
    """Everything in one compute dtype, defaults filled in, rows reset."""
    given, dtype = q.dtype, at_least_float32(q.dtype)
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
    if token_scale is None:
        steps = jnp.arange(1, mini_batch_size + 1, dtype=dtype)
        token_scale = 1 / (steps if causal else jnp.full_like(steps, mini_batch_size))
    if state is not None:
        weights, gradient = (tuple(jnp.asarray(x, dtype) for x in leaves) for leaves in (state.weights, state.gradient))
        state = TTTState(weights, gradient, jnp.asarray(state.count))
        if reset is not None:
            state = select_rows(jnp.asarray(reset), fresh_state(params, q.shape[0]), state)
    q, k, v, lr, token_scale = (jnp.asarray(x, dtype) for x in (q, k, v, lr, token_scale))
    return Call(params, q, k, v, lr, token_scale, state, length, causal, eps, remat_every, given)


def _require(ok: bool, name: str, expected: str, got: object, hint: str = "") -> None:
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {got}." + (f" {hint}" if hint else ""))


def _check_params(params, kind, function: str) -> None:
    names = " or ".join(t.__name__ for t in getattr(kind, "__args__", (kind,)))
    _require(isinstance(params, kind), "params", f"{names} for {function}", type(params).__name__)
    for name, x in params._asdict().items():
        _require_array(f"params.{name}", x)


def _require_array(name: str, x) -> None:
    _require(isinstance(x, jax.Array | np.ndarray), name, "an array", type(x).__name__, "Make it one with jnp.asarray.")


def _check_inputs(params: TTTParams, q, k, v, lr) -> None:
    for name, x in (("q", q), ("k", k), ("v", v), ("lr", lr)):
        _require_array(name, x)
    _require(q.ndim == 4, "q", "shape [B, T, H, D]", q.shape)
    _require(jnp.issubdtype(q.dtype, jnp.floating), "q", "a float dtype", q.dtype)
    for name, x in (("k", k), ("v", v)):
        _require(x.shape == q.shape, name, f"q's shape {q.shape}", x.shape)
        _require(x.dtype == q.dtype, name, f"q's dtype {q.dtype}", x.dtype, f"Cast it with {name}.astype({q.dtype}).")
    _require(lr.shape == q.shape[:3], "lr", f"shape [B, T, H] = {q.shape[:3]}", lr.shape)
    wide = (jnp.float32, jnp.float64)
    _require(lr.dtype in wide, "lr", "dtype float32 or float64", lr.dtype, "Step sizes lose too much in 16 bits.")
    h, d = q.shape[2:]
    hidden = params.b1.shape[-1]
    shapes = {
        "w1": (h, d, hidden),
        "b1": (h, hidden),
        "w2": (h, hidden, d),
        "b2": (h, d),
        "ln_scale": (h, d),
        "ln_bias": (h, d),
    }
    if isinstance(params, TTTLinearParams):
        shapes |= {"w1": (h, d, d), "b1": (h, d)}
    for name, x in params._asdict().items():
        _require(
            x.shape == shapes[name], f"params.{name}", f"shape {shapes[name]} for q's H = {h} and D = {d}", x.shape
        )
        _require(jnp.issubdtype(x.dtype, jnp.floating), f"params.{name}", "a float dtype", x.dtype)


def _check_static(*, mini_batch_size, causal, remat_every, eps) -> None:
    _require(isinstance(causal, bool | np.bool_), "causal", "True or False", repr(causal))
    for name, value in (("mini_batch_size", mini_batch_size), ("remat_every", remat_every)):
        ok = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        _require(ok, name, "an int >= 1", repr(value))
    ok = isinstance(eps, int | float | np.number) and not isinstance(eps, bool) and bool(eps > 0)
    _require(ok, "eps", "a float > 0", repr(eps))


def _check_token_scale(token_scale, mini_batch_size: int) -> None:
    if token_scale is None:
        return
    _require_array("token_scale", token_scale)
    hint = "It has one entry per position in the mini-batch."
    _require(
        token_scale.shape == (mini_batch_size,),
        "token_scale",
        f"shape [C] = ({mini_batch_size},)",
        token_scale.shape,
        hint,
    )
    wide = (jnp.float32, jnp.float64)
    _require(token_scale.dtype in wide, "token_scale", "dtype float32 or float64", token_scale.dtype)


def _check_state(params: TTTParams, batch_size: int, mini_batch_size: int, state) -> None:
    if state is None:
        return
    _require(
        isinstance(state, TTTState),
        "state",
        "the TTTState that an earlier call or init_state returned",
        type(state).__name__,
    )
    expected = tuple((batch_size, *w.shape) for w in params.fast_weights)
    for name, leaves in (("weights", state.weights), ("gradient", state.gradient)):
        for leaf in leaves:
            _require_array(f"state.{name}", leaf)
        got = tuple(x.shape for x in leaves)
        _require(
            got == expected,
            f"state.{name}",
            f"shapes {expected}",
            got,
            "Does it belong to these params and this batch?",
        )
    count = state.count
    _require_array("state.count", count)
    _require(count.shape == (batch_size,), "state.count", f"shape [B] = ({batch_size},)", count.shape)
    _require(count.dtype == jnp.int32, "state.count", "dtype int32", count.dtype)
    if not isinstance(count, Tracer):
        counts = np.asarray(count)
        hint = "Was the state made with another mini_batch_size?"
        ok = bool(np.all((counts >= 0) & (counts < mini_batch_size)))
        _require(ok, "state.count", f"0 <= count < C = {mini_batch_size}", counts.tolist(), hint)
