"""The operation on GPU kernels: what they can take, and how a call is cut into the whole mini-batches that they read.

Each row of a call has up to three parts: the tokens that complete the mini-batch it stands in, whole mini-batches, and
the tokens of one that stays open. The kernel reads the second part; `scan` reads the others, one mini-batch each.
Non-causal mini-batches start at the call's first token and none stays open: the kernel reads them all. A call of one
token that continues a state, which is what decoding makes, has a kernel of its own, in float32.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from ttt_jax import devices
from ttt_jax.ttt import scan
from ttt_jax.ttt.call import Call, commit_pending, fresh_state, select_rows
from ttt_jax.ttt.types import TTTMLPParams, TTTState

FASTER_ON: frozenset[str] = frozenset({"NVIDIA H100 80GB HBM3"})
"""Kinds of devices on which the kernels were measured to be faster than the scan, forward and back: see
kernels/README.md. There they are the default at `MEASURED_SIZES` in `MEASURED_DTYPE`, but not for steps of one
token."""

MEASURED_SIZES: dict[int, tuple[int, ...]] = {64: (16, 64), 128: (16,)}
"""Head dim to tokens of a mini-batch."""

MEASURED_DTYPE = jnp.dtype(jnp.bfloat16)

HOPPER = 9
"""Major compute capability of the GPUs that the kernels are for."""


def is_default(call: Call) -> bool:
    """Whether the kernels are tried first where no implementation is named."""
    measured = has_measured_size(call) and call.dtype == MEASURED_DTYPE and not is_step(call)
    return measured and devices.default_device().device_kind in FASTER_ON


def has_measured_size(call: Call) -> bool:
    """Whether it is one of `MEASURED_SIZES`."""
    return call.mini_batch_size in MEASURED_SIZES.get(call.q.shape[-1], ())


def refusal(call: Call) -> str | None:
    """Why the kernels cannot take the call; None if they can."""
    try:
        from ttt_kernels import interpreter, operations
    except ImportError as error:  # of another version of JAX, say
        return f"the kernels cannot be imported: {error}"
    if interpreter.parameters() is None:
        capability = devices.compute_capability()
        if capability is None:
            return f"the default device is no CUDA GPU (backend {jax.default_backend()!r})"
        if capability[0] != HOPPER:
            return f"the kernels are for compute capability {HOPPER}, this GPU has {'.'.join(map(str, capability))}"
    is_mlp = isinstance(call.params, TTTMLPParams)
    if is_mlp and call.params.b1.shape[-1] != operations.HIDDEN_UNITS:
        return f"the kernels' inner MLP has {operations.HIDDEN_UNITS} hidden units, not {call.params.b1.shape[-1]}"
    of_step = is_step(call)
    if of_step and call.q.dtype != jnp.float32:
        return f"a step is computed in float32, q is {call.dtype}"
    if not of_step and call.dtype not in (jnp.bfloat16, jnp.float32):
        return f"the kernels compute on bfloat16 or float32, q is {call.dtype}"
    head_dims, where = operations.HEAD_DIMS["mlp" if is_mlp else "linear"], ""
    if call.dtype == jnp.float32 and not of_step:
        head_dims, where = operations.FLOAT32_HEAD_DIMS, " in float32"
    if call.q.shape[-1] not in head_dims:
        return f"the kernels' head dim is {' or '.join(map(str, head_dims))}{where}, not {call.q.shape[-1]}"
    if 0 in (call.q.shape[0], call.q.shape[2]):
        return "the call has no rows or no heads"
    if of_step:
        return _refused_mesh()
    if call.mini_batch_size not in operations.MINI_BATCH_SIZES:
        sizes = " or ".join(map(str, operations.MINI_BATCH_SIZES))
        return f"the kernels' mini-batches have {sizes} tokens, not {call.mini_batch_size}"
    if call.q.shape[1] < (call.mini_batch_size if call.causal else 1):
        return f"{call.q.shape[1]} tokens have no whole mini-batch"
    return _refused_mesh()


def _refused_mesh() -> str | None:
    from ttt_kernels import interpreter, partitioned

    axes = partitioned.split_axes()
    if interpreter.parameters() is not None:
        reader = "the interpreter" if axes else None
    else:  # the compiler gives each device its rows and heads, but not of explicit axes
        reader = "a kernel" if AxisType.Explicit in axes.values() else None
    if reader is None:
        return None
    mesh = dict(jax.sharding.get_abstract_mesh().shape)
    return f"{reader} reads the arrays of one device, the mesh has {mesh}: call it inside jax.shard_map"


def is_step(call: Call) -> bool:
    """Whether the call is one of decoding."""
    return call.causal and call.state is not None and call.q.shape[1] == 1


class _Part(NamedTuple):
    """Consecutive tokens of each row."""

    start: jax.Array | None  # [B] int32, token of the call; None: every row's first
    length: jax.Array | None  # [B] int32; None, if start is None too: `size` in every row
    size: int  # tokens at most


def ttt(call: Call) -> tuple[jax.Array, TTTState]:
    """The operation, where there is no `refusal`; see `ttt_jax.ttt.api` for the contract."""
    if is_step(call):
        return _with_derivatives_of_scan(_step, call)
    c, (batch_size, num_tokens) = call.mini_batch_size, call.q.shape[:2]
    state = fresh_state(call.params, batch_size) if call.state is None else call.state
    if not call.causal:
        whole = num_tokens % c == 0 and call.length is None
        everything = _Part(None, None if whole else call.lengths, -(-num_tokens // c) * c)
        out, state = _whole_mini_batches(call, everything, commit_pending(state, call.token_scale))
        return _joined(call, [(everything, out)]), state
    lengths, start, parts = call.lengths, jnp.zeros(batch_size, jnp.int32), []
    if call.state is not None:
        start = jnp.minimum(-state.count % c, lengths)
        completing = _Part(None, start, c)
        out, state = scan.ttt(_call_of(call, completing, state))
        parts.append((completing, out))
    size, length = num_tokens // c * c, (lengths - start) // c * c
    everywhere = call.state is None and call.length is None
    whole = _Part(None, None, size) if everywhere else _Part(start, length, size)
    out, state = _whole_mini_batches(call, whole, state)
    parts.append((whole, out))
    if not everywhere or num_tokens % c:
        rest = _Part(start + length, lengths - start - length, c)
        out, state = scan.ttt(_call_of(call, rest, state))
        parts.append((rest, out))
    return _joined(call, parts), state


def _with_derivatives_of_scan(kernel: Callable[[Call], Any], call: Call) -> tuple[jax.Array, TTTState]:
    """`kernel(call)`, which has no backward pass of its own."""
    names = ("params", "q", "k", "v", "lr", "token_scale", "state", "length")

    @jax.custom_vjp
    def run(arrays):
        return kernel(call._replace(**arrays))

    def forward(arrays):
        return run(arrays), arrays

    def backward(arrays, derivatives):
        return jax.vjp(lambda arrays: scan.ttt(call._replace(**arrays)), arrays)[1](derivatives)

    run.defvjp(forward, backward)
    return run({name: getattr(call, name) for name in names})


def _step(call: Call) -> tuple[jax.Array, TTTState]:
    """One token."""
    import ttt_kernels

    state, c = cast("TTTState", call.state), call.mini_batch_size
    real = call.lengths > 0
    count = state.count + real.astype(jnp.int32)
    ends = count == c
    q, k, v = (jnp.where(real[:, None, None], x[:, 0], 0) for x in (call.q, call.k, call.v))
    out, weights, gradient = ttt_kernels.ttt_step(
        q,
        k,
        v,
        jnp.where(real[:, None], call.lr[:, 0], 0),
        call.token_scale[state.count],
        jnp.where(ends, call.token_scale[-1], 0),
        state.weights,
        state.gradient,
        call.params.ln_scale,
        call.params.ln_bias,
        eps=call.eps,
    )
    gradient = select_rows(ends, tuple(jnp.zeros_like(g) for g in gradient), gradient)
    out = jnp.where(real[:, None, None], out, 0)[:, None]
    return out, TTTState(weights, gradient, jnp.where(ends, 0, count))


def _whole_mini_batches(call: Call, part: _Part, state: TTTState) -> tuple[jax.Array, TTTState]:
    # In bfloat16, if that is what they were, before anything moves, which halves what does.
    q, k, v = (x.astype(call.dtype) for x in (call.q, call.k, call.v))
    of_part = _call_of(call._replace(q=q, k=k, v=v), part, state)
    return _kernel(of_part) if call.dtype == jnp.bfloat16 else _with_derivatives_of_scan(_kernel, of_part)


def _kernel(call: Call) -> tuple[jax.Array, TTTState]:
    """Whole mini-batches."""
    import ttt_kernels

    c, state = call.mini_batch_size, cast("TTTState", call.state)
    operation: Any
    blocks: Any
    if isinstance(call.params, TTTMLPParams):
        operation, blocks = ttt_kernels.ttt_mlp, ttt_kernels.MLPBlocks.choose(c, call.remat_every)
    else:
        operation = ttt_kernels.ttt_linear
        blocks = ttt_kernels.LinearBlocks.choose(c, call.remat_every, call.q.shape[-1])
    out, *weights = operation(
        *(call.q, call.k, call.v, call.lr, call.lr * call.token_scale[-1], call.token_scale),
        *state.weights,
        call.params.ln_scale,
        call.params.ln_bias,
        causal=call.causal,
        eps=call.eps,
        blocks=blocks,
    )
    return out, state._replace(weights=tuple(weights))


def _call_of(call: Call, part: _Part, state: TTTState) -> Call:
    """The part of each row as a call of its own."""
    q, k, v, lr = (_tokens_of(x, part) for x in (call.q, call.k, call.v, call.lr))
    return call._replace(q=q, k=k, v=v, lr=lr, state=state, length=part.length)


def _tokens_of(x: jax.Array, part: _Part) -> jax.Array:
    """`[B, T, ...]` to the tokens of a part, zero behind its length."""
    at = jnp.arange(part.size, dtype=jnp.int32)[None]
    if part.start is None:
        x = jnp.pad(x[:, : part.size], ((0, 0), (0, max(0, part.size - x.shape[1]))) + ((0, 0),) * (x.ndim - 2))
    if part.length is None:
        return x
    trailing = (1,) * (x.ndim - 2)
    real = at < part.length[:, None]
    if part.start is not None:
        at = jnp.where(real, part.start[:, None] + at, 0)
        x = jnp.take_along_axis(x, at.reshape(*at.shape, *trailing), axis=1, mode="promise_in_bounds")
    return jnp.where(real.reshape(*real.shape, *trailing), x, 0)


def _joined(call: Call, parts: list[tuple[_Part, jax.Array]]) -> jax.Array:
    """Each token's output from the part that it is in; zero where it is in none."""
    dtype, num_tokens = call.q.dtype, call.q.shape[1]
    (part, out), *others = parts
    if not others and part.length is None:
        return out[:, :num_tokens].astype(dtype)
    tokens = jnp.arange(num_tokens, dtype=jnp.int32)[None]
    joined = jnp.zeros((), dtype)
    for part, out in parts:
        start = jnp.zeros((1, 1), jnp.int32) if part.start is None else part.start[:, None]
        length = part.size if part.length is None else part.length[:, None]
        at = tokens - start
        inside = (at >= 0) & (at < length)
        taken = jnp.take_along_axis(out, jnp.where(inside, at, 0)[:, :, None, None], axis=1, mode="promise_in_bounds")
        joined = jnp.where(inside[:, :, None, None], taken.astype(dtype), joined)
    return joined
