"""The dual form over mini-batches by `lax.scan`: exact, differentiable, and the same on every backend.

Tokens are laid out in slots. Each row starts at the slot where its open mini-batch stopped, so mini-batch borders of
all rows fall on the same slots; slots without a real token have k = v = q = 0 and step size 0 and change nothing.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.remat import checkpointed_scan
from ttt_jax.rows import zero_where_not
from ttt_jax.ttt import inner
from ttt_jax.ttt.call import Call, commit_pending, fresh_state, select_rows, vary_together
from ttt_jax.ttt.types import TTTLosses, TTTState


class _Slots(NamedTuple):
    """N mini-batches of c slots; leading axis N so that `lax.scan` walks over it."""

    q: jax.Array  # [N, B, H, c, D]
    k: jax.Array
    target: jax.Array
    lr: jax.Array  # [N, B, H, c, 1]
    token_scale: jax.Array  # [N, B or 1, 1, c, 1]
    real: jax.Array  # [N, B, 1, c] bool
    full: jax.Array  # [N, B] bool: the mini-batch ends inside this call, so its gradient is applied


class _Layout(NamedTuple):
    """Where each token goes: slot = offset[b] + t."""

    num_mini_batches: int
    size: int  # slots per mini-batch: C, or 1 for a single-token call
    offset: jax.Array | None  # [B] int32; None when every row starts at slot 0


def _layout(call: Call) -> _Layout:
    num_tokens, c = call.q.shape[1], call.mini_batch_size
    if call.state is None or not call.causal:
        return _Layout(-(-num_tokens // c), c, None)
    if num_tokens == 1:  # decoding: the one token is wherever its row stands
        return _Layout(1, 1, None)
    return _Layout(-(-(num_tokens + c - 1) // c), c, call.state.count)


def _to_slots(x: jax.Array, layout: _Layout) -> jax.Array:
    """[B, T, H, X] to [N, B, H, c, X], rows moved to their offset."""
    num_slots = layout.num_mini_batches * layout.size
    batch_size, num_tokens = x.shape[:2]
    padded = jnp.pad(x, ((0, 0), (0, num_slots - num_tokens), (0, 0), (0, 0)))
    if layout.offset is not None:
        source = (jnp.arange(num_slots, dtype=jnp.int32)[None] - layout.offset[:, None]) % num_slots
        padded = jnp.take_along_axis(padded, source[:, :, None, None], axis=1, mode="promise_in_bounds")
    split = padded.reshape(batch_size, layout.num_mini_batches, layout.size, *x.shape[2:])
    return jnp.transpose(split, (1, 0, 3, 2, 4))


def _from_slots(slots: jax.Array, layout: _Layout, num_tokens: int) -> jax.Array:
    """[N, B, H, c, D] back to [B, T, H, D]."""
    joined = jnp.transpose(slots, (1, 0, 3, 2, 4))
    joined = joined.reshape(joined.shape[0], joined.shape[1] * joined.shape[2], *joined.shape[3:])
    if layout.offset is None:
        return joined[:, :num_tokens]
    source = jnp.arange(num_tokens, dtype=jnp.int32)[None] + layout.offset[:, None]
    return jnp.take_along_axis(joined, source[:, :, None, None], axis=1, mode="promise_in_bounds")


def _slots(call: Call, layout: _Layout) -> _Slots:
    batch_size = call.q.shape[0]

    def slots(x):
        return _to_slots(zero_where_not(call.is_real, x), layout)

    k = slots(call.k)
    count = jnp.zeros(batch_size, jnp.int32) if call.state is None else call.state.count
    if layout.size == call.mini_batch_size:
        token_scale = jnp.broadcast_to(call.token_scale, (layout.num_mini_batches, 1, 1, layout.size))
    else:
        token_scale = call.token_scale[count][None, :, None, None]
    ends = (jnp.arange(layout.num_mini_batches, dtype=jnp.int32) + 1) * call.mini_batch_size
    full = ((count + call.lengths)[None] >= ends[:, None]) if call.causal else jnp.ones((len(ends), batch_size), bool)
    return _Slots(
        q=slots(call.q),
        k=k,
        target=slots(call.v) - k,
        lr=slots(call.lr[..., None]),
        token_scale=token_scale[..., None],
        real=_to_slots(call.is_real[:, :, None, None], layout)[..., 0],
        full=full,
    )


def _mini_batch(call: Call, carry, slots: _Slots, *, has_pending: bool):
    """One mini-batch: (weights, gradient) to the next pair, with (out, f(k) at its start, weights after its update).

    A gradient can be pending only in a call's first mini-batch; later a row either starts a mini-batch or has ended.
    """
    weights, pending = carry
    ln = _inner_layer_norm(call)
    tokens = inner.Tokens(slots.q, slots.k, slots.target, slots.lr, slots.token_scale)
    dual = call.model.dual(weights, pending if has_pending else None, tokens, ln, call.causal)
    gradient = tuple(p + g for p, g in zip(pending, dual.gradient, strict=True))
    updated = tuple(w - call.token_scale[-1] * g for w, g in zip(weights, gradient, strict=True))
    cleared = tuple(jnp.zeros_like(g) for g in gradient)
    carry = select_rows(slots.full, (updated, cleared), (weights, gradient))
    return carry, (slots.q + inner.layer_norm(dual.z_q, ln), dual.z_k, updated)


def _inner_layer_norm(call: Call) -> inner.LayerNormParams:
    scale, bias = (x[None, :, None] for x in (call.params.ln_scale, call.params.ln_bias))
    return inner.LayerNormParams(scale, bias, call.eps)


def _starting_state(call: Call) -> TTTState:
    if call.state is None:
        return fresh_state(call.params, call.q.shape[0])
    return call.state if call.causal else commit_pending(call.state, call.token_scale)


def _walk(call: Call, slots: _Slots, state: TTTState, outputs):
    """Run the mini-batches in order and stack what `outputs(slots, out, z_k, updated)` makes of each.

    Returns (weights, gradient) at the end and the stack, leading axis N.
    """

    def step(carry, x, *, has_pending):
        carry, results = _mini_batch(call, carry, x, has_pending=has_pending)
        return carry, outputs(x, *results)

    carry = vary_together((state.weights, state.gradient), call)
    if call.state is None or not call.causal:
        return checkpointed_scan(partial(step, has_pending=False), carry, slots, call.remat_every)
    carry, first = step(carry, jax.tree.map(lambda x: x[0], slots), has_pending=True)
    later = jax.tree.map(lambda x: x[1:], slots)
    carry, rest = checkpointed_scan(partial(step, has_pending=False), carry, later, call.remat_every)
    return carry, jax.tree.map(lambda f, r: jnp.concatenate([f[None], r]), first, rest)


def ttt(call: Call) -> tuple[jax.Array, TTTState]:
    """The operation by its dual form; see `ttt_jax.ttt.api` for the contract."""
    state = _starting_state(call)
    num_tokens = call.q.shape[1]
    if num_tokens == 0:
        return jnp.zeros_like(call.q), state
    layout = _layout(call)
    (weights, gradient), out = _walk(call, _slots(call, layout), state, lambda x, out, z_k, updated: out)
    out = zero_where_not(call.is_real, _from_slots(out, layout, num_tokens))
    count = (state.count + call.lengths) % call.mini_batch_size if call.causal else state.count
    return out, TTTState(weights, gradient, count)


def losses(call: Call) -> TTTLosses:
    """Inner losses of every mini-batch; see `ttt_jax.ttt.api.ttt_loss`."""
    batch_size, num_tokens, num_heads = call.q.shape[:3]
    if num_tokens == 0:
        empty = jnp.zeros((batch_size, num_heads, 0), call.q.dtype)
        return TTTLosses(empty, empty, empty)
    initial = fresh_state(call.params, batch_size).weights
    ln = _inner_layer_norm(call)

    def mean_errors(x: _Slots, out, z_k, updated):
        def mean(z):
            errors = jnp.where(x.real, inner.squared_error(z, x.target, ln), 0)
            return jnp.sum(errors, axis=-1) / jnp.maximum(jnp.sum(x.real, axis=-1), 1).astype(z.dtype)

        return TTTLosses(mean(call.model.predict(initial, x.k)), mean(z_k), mean(call.model.predict(updated, x.k)))

    _, stacked = _walk(call, _slots(call, _layout(call)), _starting_state(call), mean_errors)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), stacked)
