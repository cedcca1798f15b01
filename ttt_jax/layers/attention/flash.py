"""cuDNN's flash attention, for the masks that it knows: which calls it can take, and how they are put to it."""

import jax
import jax.numpy as jnp

from ttt_jax import devices
from ttt_jax.layers.attention.causal import Context
from ttt_jax.layers.attention.softmax import KeySet
from ttt_jax.layers.rope import RotaryEmbedding, rotate

MAX_POSITION = 2**14
"""Beyond it float32 angles are coarser than float16 numbers; the XLA form keeps its positions small."""

MIN_FRAMES_AFTER_CACHE = 64
"""A stream's few frames against a ring of keys have no logits worth sparing."""


def choose(implementation: str | None, refusal: str | None) -> bool:
    """Whether to use cuDNN, given why it cannot take the call (None: it can).

    Raises:
        ValueError: an unknown implementation. NotImplementedError: cuDNN is asked for and cannot.
    """
    if implementation not in (None, "xla", "cudnn"):
        raise ValueError(f"implementation must be 'xla', 'cudnn' or None, got {implementation!r}")
    if implementation == "cudnn" and refusal is not None:
        raise NotImplementedError(f"implementation='cudnn' does not support this call: {refusal}; use 'xla' or None")
    return implementation != "xla" and refusal is None


def causal_refusal(context: Context, q, rope, fresh: bool) -> str | None:
    """Why cuDNN cannot take a causal call, None if it can."""
    if not fresh:
        if context.sinks:
            return f"sinks={context.sinks} stand at other distances than the frames of the cache"
        if q.shape[1] < MIN_FRAMES_AFTER_CACHE:
            return f"{q.shape[1]} < {MIN_FRAMES_AFTER_CACHE} frames continue a cache, which leaves little to save"
        return _refusal(q, rope, min(q.shape[1], 2 * context.reach))
    if q.shape[1] > context.size:  # else a frame sees all frames before it
        if context.sinks:
            return f"sinks={context.sinks} stand at other distances than the frames of the {context.kind}"
        if context.overlap:
            return f"overlap={context.overlap} of causal segments is no causal mask of cuDNN's"
    positions = min(q.shape[1], context.size) if context.kind == "segment" else q.shape[1]
    return _refusal(q, rope, positions)


def bidirectional_refusal(segment: int, q, rope) -> str | None:
    """Why cuDNN cannot take a call with bidirectional segments, None if it can."""
    return _refusal(q, rope, segment)


def attend_causal(context: Context, q, k, v, rope: RotaryEmbedding | None):
    """`[B, T, H, D]` of a fresh start; hard segments become sequences of their own."""
    batch, frames, heads, head_dim = q.shape
    window = None
    if frames > context.size and context.kind == "window":
        window = (context.size - 1, 0)  # frames before and after, the frame itself apart
    if frames > context.size and context.kind == "segment":
        padding = ((0, 0), (0, -frames % context.size), (0, 0), (0, 0))
        q, k, v = (jnp.pad(x, padding).reshape(-1, context.size, heads, head_dim) for x in (q, k, v))
    if rope is not None:
        positions = jnp.arange(q.shape[1], dtype=jnp.int32)
        q, k = rotate(rope, q, positions), rotate(rope, k, positions)
    out = _cudnn(q, k, v, is_causal=True, local_window_size=window)
    return out.reshape(batch, -1, heads, head_dim)[:, :frames]


def attend_sets(sets: list[KeySet]):
    """`softmax_attention` of sets with the same queries, under a mask that is read: 16 bits a query and key."""
    queries, leading = sets[0].queries, sets[0].queries.shape[:-3]
    keys, values = (jnp.concatenate([getattr(s, x) for s in sets], -3) for x in ("keys", "values"))
    visible = jnp.concatenate([jnp.broadcast_to(s.visible, (*leading, *s.visible.shape[-2:])) for s in sets], -1)
    flat = (x.astype(queries.dtype).reshape(-1, *x.shape[-3:]) for x in (queries, keys, values))
    odd = [(0, size % 2) for size in visible.shape[-2:]]
    mask = jnp.pad(visible.reshape(-1, 1, *visible.shape[-2:]), ((0, 0), (0, 0), *odd))
    return _cudnn(*flat, mask=mask).reshape(queries.shape)


def attend_real(q, k, v, real):
    """`[B, N, S, H, D]`, every query against the first `real [B, N]` keys of its segment; if none is, the first one."""
    flat = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    return _cudnn(*flat, key_value_seq_lengths=jnp.maximum(real.reshape(-1), 1)).reshape(q.shape)


def _cudnn(q, k, v, **masks):
    """`[B, S, H, D]`; what is padded at the end is invisible under each of the masks used here."""
    frames = q.shape[1]
    # Its gradient needs even lengths.
    q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
    out = jax.nn.dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, implementation="cudnn", **masks)
    return out[:, :frames]


def _refusal(q, rope, positions: int) -> str | None:
    capability = devices.compute_capability()
    if capability is None:
        return f"the default device is no CUDA GPU (backend {jax.default_backend()!r})"
    if capability < (8, 0):
        return f"it needs compute capability 8.0, this GPU has {'.'.join(map(str, capability))}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 or float16, q is {q.dtype}"
    largest = 256 if capability >= (9, 0) else 128
    if q.shape[-1] % 8 or q.shape[-1] > largest:
        return f"the head dim must be a multiple of 8 and at most {largest}, got {q.shape[-1]}"
    if rope is not None and positions > MAX_POSITION:
        return f"rope over {positions} > {MAX_POSITION} frames would lose precision"
    return None
