"""The primal form, one token at a time for one row and head: the definition that the fast forms are tested against.

Nothing here is hand-derived: gradients come from `jax.grad` of the inner loss.
"""

import jax
import jax.numpy as jnp

from ttt_jax.rows import zero_where_not
from ttt_jax.ttt.call import Call, commit_pending, fresh_state, vary_together
from ttt_jax.ttt.inner import LayerNormParams, layer_norm
from ttt_jax.ttt.types import TTTState


def ttt(call: Call) -> tuple[jax.Array, TTTState]:
    """The operation, token by token; see `ttt_jax.ttt.api` for the contract."""
    state = fresh_state(call.params, call.q.shape[0]) if call.state is None else call.state
    if not call.causal:
        state = commit_pending(state, call.token_scale)
    weights, gradient = vary_together((state.weights, state.gradient), call)
    count = vary_together(state.count, (state.count, call.is_real))
    q, k, v, lr = (zero_where_not(call.is_real, x) for x in (call.q, call.k, call.v, call.lr))
    read = _read_causal if call.causal else _read_mini_batches

    def one_row_and_head(q, k, v, lr, ln_scale, ln_bias, weights, gradient, count, real):
        return read(call, LayerNormParams(ln_scale, ln_bias, call.eps), (q, k, v, lr, real), (weights, gradient, count))

    heads = jax.vmap(one_row_and_head, in_axes=(1, 1, 1, 1, 0, 0, 0, 0, None, None), out_axes=(1, (0, 0, None)))
    rows = jax.vmap(heads, in_axes=(0, 0, 0, 0, None, None, 0, 0, 0, 0))
    ln = call.params.ln_scale, call.params.ln_bias
    out, state = rows(q, k, v, lr, *ln, weights, gradient, count, call.is_real)
    return out, TTTState(*state)


def _loss(weights, k, v, call: Call, ln: LayerNormParams) -> jax.Array:
    """Inner loss of one token: `1/2 * sum((LN(f(k)) - (v - k))^2)`."""
    prediction = layer_norm(call.model.predict(weights, k[None]), ln._replace(scale=ln.scale[None], bias=ln.bias[None]))
    return jnp.sum(jnp.square(prediction - (v - k)[None])) / 2


def _output(weights, q, call: Call, ln: LayerNormParams) -> jax.Array:
    """`q + LN(f(q))` of one token."""
    ln = ln._replace(scale=ln.scale[None], bias=ln.bias[None])
    return q + layer_norm(call.model.predict(weights, q[None]), ln)[0]


def _descend(weights, gradient, scale):
    return jax.tree.map(lambda w, g: w - scale * g, weights, gradient)


def _read_causal(call: Call, ln: LayerNormParams, tokens, state):
    """Each token adds its gradient, taken at the mini-batch's start, and reads through all that have been added."""

    def read_token(state, token):
        weights, gradient, count = state
        q, k, v, lr, real = token
        own = jax.grad(_loss)(weights, k, v, call, ln)
        gradient = jax.tree.map(lambda g, o: jnp.where(real, g + lr * o, g), gradient, own)
        out = jnp.where(real, _output(_descend(weights, gradient, call.token_scale[count]), q, call, ln), 0)
        count = count + real.astype(count.dtype)
        complete = count == call.mini_batch_size
        committed = _descend(weights, gradient, call.token_scale[-1])
        weights = jax.tree.map(lambda new, old: jnp.where(complete, new, old), committed, weights)
        gradient = jax.tree.map(lambda g: jnp.where(complete, 0, g), gradient)
        return (weights, gradient, jnp.where(complete, 0, count)), out

    state, out = jax.lax.scan(read_token, state, tokens)
    return out, state


def _read_mini_batches(call: Call, ln: LayerNormParams, tokens, state):
    """Each mini-batch adds all its gradients, then all its tokens read."""
    c, num_tokens = call.mini_batch_size, tokens[0].shape[0]
    padding = -num_tokens % c
    tokens = [jnp.pad(x, ((0, padding),) + ((0, 0),) * (x.ndim - 1)) for x in tokens]
    mini_batches = [x.reshape(-1, c, *x.shape[1:]) for x in tokens]

    def read_mini_batch(weights, mini_batch):
        q, k, v, lr, real = mini_batch

        def scaled_gradient(k, v, lr, real):
            own = jax.grad(_loss)(weights, k, v, call, ln)
            return jax.tree.map(lambda o: jnp.where(real, lr * o, 0), own)

        gradient = jax.tree.map(lambda g: jnp.sum(g, axis=0), jax.vmap(scaled_gradient)(k, v, lr, real))
        read = jax.vmap(lambda q, scale: _output(_descend(weights, gradient, scale), q, call, ln))
        out = jnp.where(real[:, None], read(q, call.token_scale), 0)
        return _descend(weights, gradient, call.token_scale[-1]), out

    weights, gradient, count = state
    weights, out = jax.lax.scan(read_mini_batch, weights, mini_batches)
    return out.reshape(-1, out.shape[-1])[:num_tokens], (weights, gradient, count)
