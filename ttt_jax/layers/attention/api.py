"""Local attention as users call it: checked arguments, one choice of implementation."""

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.layers.attention import flash
from ttt_jax.layers.attention.bidirectional import attend_bidirectional
from ttt_jax.layers.attention.cache import AttentionCache, Sinks, init_attention_cache, push_recent, push_sinks
from ttt_jax.layers.attention.causal import Context, attend_causal
from ttt_jax.layers.attention.softmax import softmax_attention
from ttt_jax.layers.rope import RotaryEmbedding
from ttt_jax.rows import checked_rows, real_tokens, zero_where_not


def window_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    window: int,
    sinks: int = 0,
    rope: RotaryEmbedding | None = None,
    cache: AttentionCache | None = None,
    length: jax.Array | None = None,
    reset: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, AttentionCache]:
    """Causal softmax attention of frame t to frames `t - window + 1 .. t` (Moshi's `delta < context`) and to the sinks.

    Frames are counted per row from the row's last reset. A sequence may be split into calls anywhere, any T >= 0, by
    handing each call the cache of the one before.

    Args:
        q: `[B, T, H, D]` un-rotated queries; k and v alike.
        k: keys.
        v: values.
        window: frames visible to a frame, itself included.
        sinks: the row's first frames, visible for ever. Those that have left the window are seen as if they stood
            right before it: sink j at distance `min(t, sinks + window - 1) - j` (Xiao et al. 2023, arXiv 2309.17453).
        rope: rotates queries and keys, None for no position.
        cache: of the previous call, or None for a fresh start.
        length: `[B]` int, only the first `length[b]` frames of row b are real (clipped to [0, T]). The rest return
            zeros, change nothing, and their values never matter, NaN included.
        reset: `[B]` bool, these rows forget the cache before the first frame.
        implementation: "xla"; "cudnn" (flash attention: CUDA GPU as the default device, bfloat16 or float16; no sinks
            unless T <= window without a cache, at least 64 frames with one); or None for cuDNN where it supports the
            call, else XLA.

    Returns:
        Output `[B, T, H, D]` in q's dtype (softmax in float32) and the cache to continue from.

    Raises:
        ValueError: shapes, dtypes or static values that do not fit. NotImplementedError: cuDNN was asked for and does
            not support the call.
    """
    context = Context("window", _checked("window", window, 1), sinks=_checked("sinks", sinks, 0))
    return _causal("window", context, q, k, v, rope, cache, length, reset, implementation)


def segment_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    segment: int,
    overlap: int = 0,
    causal: bool = True,
    sinks: int = 0,
    rope: RotaryEmbedding | None = None,
    cache: AttentionCache | None = None,
    length: jax.Array | None = None,
    reset: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, AttentionCache | None]:
    """Softmax attention inside hard segments of `segment` frames.

    Causal: frame t of the segment that starts at `a = t // segment * segment` sees the frames `a - overlap .. t` and
    the sinks. Frames are counted per row from the row's last reset. A sink that is not among those frames is seen as
    if the sinks stood right before them: sink j at distance `min(t, sinks + t - (a - overlap)) - j`.

    Not causal: segment i holds the frames `[i * stride, i * stride + segment)` with `stride = segment - overlap`,
    counted from the call's first frame, and each of its frames sees all of it. A frame that several segments hold gets
    the mean of their outputs. The last segment is the first that reaches the row's last real frame; it may be short.
    Positions are relative to the segment's start. There is no past: `cache` must be None and None is returned for it,
    `reset` changes nothing.

    Args:
        q: `[B, T, H, D]` un-rotated queries; k and v alike.
        k: keys.
        v: values.
        segment: frames per segment, those shared with its neighbours included unless causal.
        overlap: frames before its start that a causal segment sees, or that a bidirectional one (then below `segment`)
            shares with the one before.
        causal: whether a frame sees no later one.
        sinks: the row's first frames, visible for ever; 0 unless causal.
        rope: as in `window_attention`.
        cache: as in `window_attention`, of `segment + overlap` frames; None unless causal.
        length: as in `window_attention`.
        reset: as in `window_attention`.
        implementation: as in `window_attention`; cuDNN needs overlap = 0 if causal, unless T <= segment or
            there is a cache.

    Returns:
        Output `[B, T, H, D]` in q's dtype (softmax in float32), and the cache to continue from (None unless causal).

    Raises:
        ValueError: shapes, dtypes or static values that do not fit. NotImplementedError: cuDNN was asked for and does
            not support the call.
    """
    if not isinstance(causal, bool | np.bool_):
        raise ValueError(f"causal must be True or False, got {causal!r}")
    overlap, sinks = _checked("overlap", overlap, 0), _checked("sinks", sinks, 0)
    context = Context("segment", _checked("segment", segment, 1), overlap, sinks)
    if causal:
        name = "segment + overlap" if overlap else "segment"
        return _causal(name, context, q, k, v, rope, cache, length, reset, implementation)
    return _bidirectional(context, q, k, v, rope, cache, length, reset, implementation), None


def _causal(name: str, context: Context, q, k, v, rope, cache, length, reset, implementation):
    length, reset = _check_arrays(q, k, v, length, reset)
    _check_rope(rope, q)
    batch, frames, heads, head_dim = q.shape
    if cache is not None:
        _check_cache(name, context, (batch, heads, head_dim), cache)
    fresh = cache is None
    use_flash = flash.choose(implementation, flash.causal_refusal(context, q, rope, fresh))
    if cache is None:
        cache = init_attention_cache(batch, context.reach, heads, head_dim, k.dtype, sinks=context.sinks)
    if reset is not None:
        cache = cache._replace(position=jnp.where(reset, 0, cache.position))
    if frames == 0:
        return q, cache
    real = real_tokens(length, frames)
    q, k, v = (zero_where_not(real, x) for x in (q, k, v))
    sinks = push_sinks(cache, k, v, length)
    if use_flash and fresh:
        out = flash.attend_causal(context, q, k, v, rope)
    else:
        attend = flash.attend_sets if use_flash else softmax_attention
        out = attend_causal(context, q, k, v, rope, None if fresh else cache, sinks, cache.position, attend)
    return zero_where_not(real, out), push_recent(cache, k, v, length)._replace(sinks=sinks)


def _bidirectional(context: Context, q, k, v, rope, cache, length, reset, implementation):
    _check_bidirectional(context, cache)
    length, _ = _check_arrays(q, k, v, length, reset)
    _check_rope(rope, q)
    use_flash = flash.choose(implementation, flash.bidirectional_refusal(context.size, q, rope))
    batch, frames = q.shape[:2]
    if frames == 0:
        return q
    real = real_tokens(length, frames)
    q, k, v = (zero_where_not(real, x) for x in (q, k, v))
    if length is None:
        length = jnp.full(batch, frames, jnp.int32)
    return zero_where_not(real, attend_bidirectional(context.size, context.overlap, q, k, v, rope, length, use_flash))


def _checked(name: str, value, lowest: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise ValueError(f"{name} must be an int >= {lowest} (frames), got {value!r}")
    return value


def _check_bidirectional(context: Context, cache):
    if cache is not None:
        raise ValueError(
            "cache must be None with causal=False, which has no past to continue; pass the whole sequence in one call"
        )
    if context.sinks:
        raise ValueError(f"sinks must be 0 with causal=False, whose segments see only themselves, got {context.sinks}")
    if context.overlap >= context.size:
        raise ValueError(
            f"overlap must be < segment = {context.size} with causal=False, for segments to advance, "
            f"got {context.overlap}"
        )


def _check_arrays(q, k, v, length, reset):
    """Checks them and returns length (int32, clipped to [0, T]) and reset as arrays or None."""
    for argument, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, jax.Array | np.ndarray):
            raise ValueError(f"{argument} must be an array, got {type(x).__name__}; make it one with jnp.asarray")
    if q.ndim != 4:
        raise ValueError(f"q must have shape [B, T, H, D], got {q.shape}")
    for other, x in (("k", k), ("v", v)):
        if x.shape != q.shape or x.dtype != q.dtype:
            raise ValueError(f"{other} must be like q, {q.dtype}{list(q.shape)}, got {x.dtype}{list(x.shape)}")
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q must be floating, got {q.dtype}")
    return checked_rows(length, reset, *q.shape[:2])


def _check_rope(rope, q):
    if rope is not None and not isinstance(rope, RotaryEmbedding):
        raise ValueError(f"rope must be a RotaryEmbedding or None, got {rope!r}; was RotaryEmbedding(theta=...) meant?")
    if rope is not None and q.shape[-1] % 2:
        raise ValueError(f"q must have an even head dim to be rotated in pairs, got shape {q.shape}; or leave rope out")


def _check_cache(name: str, context: Context, sizes: tuple[int, int, int], cache):
    if not isinstance(cache, AttentionCache):
        raise ValueError(f"cache must be the AttentionCache of an earlier call or None, got {type(cache).__name__}")
    batch, heads, head_dim = sizes
    ring = (batch, context.reach, heads, head_dim)
    leaves = [
        ("keys", cache.keys, f"[B, {name}, H, D]", ring, jnp.floating),
        ("values", cache.values, f"[B, {name}, H, D]", ring, jnp.floating),
        ("position", cache.position, "[B]", (batch,), jnp.int32),
    ]
    if (context.sinks > 0) != isinstance(cache.sinks, Sinks):
        raise ValueError(
            f"cache.sinks must {'hold' if context.sinks else 'be None without'} sinks, as sinks={context.sinks}, got "
            f"{type(cache.sinks).__name__}; was the cache made with another number of sinks?"
        )
    if isinstance(cache.sinks, Sinks):
        first = (batch, context.sinks, heads, head_dim)
        leaves += [
            (f"sinks.{leaf}", x, "[B, sinks, H, D]", first, jnp.floating) for leaf, x in cache.sinks._asdict().items()
        ]
    for leaf, x, letters, expected, kind in leaves:
        if x.shape != expected:
            size = "number of sinks" if "sinks" in leaf else name
            raise ValueError(
                f"cache.{leaf} must have shape {expected} = {letters}, got {x.shape}; "
                f"was the cache made with another batch size or {size}?"
            )
        if not jnp.issubdtype(x.dtype, kind):
            raise ValueError(f"cache.{leaf} must be {kind.__name__}, got {x.dtype}")
