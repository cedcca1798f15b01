"""Sinks and causal overlap against a loop over frames in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from ttt_jax.layers.attention import init_attention_cache, segment_attention, window_attention
from ttt_jax.layers.rope import RotaryEmbedding

B, H, D = 2, 2, 4
THETA = 100.0
CASES = {  # kind, size, overlap, sinks
    "window": ("window", 5, 0, 3),
    "more sinks than window": ("window", 2, 0, 5),
    "segment": ("segment", 5, 0, 2),
    "more overlap than segment": ("segment", 2, 3, 0),
    "overlap and sinks": ("segment", 4, 3, 2),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@functools.cache
def attention(case):
    kind, size, overlap, sinks = case
    if kind == "window":
        return functools.partial(window_attention, window=size, sinks=sinks, rope=RotaryEmbedding(THETA))
    return functools.partial(segment_attention, segment=size, overlap=overlap, sinks=sinks, rope=RotaryEmbedding(THETA))


@functools.cache
def jitted(case):
    return jax.jit(attention(case))


def empty_cache(case):
    _, size, overlap, sinks = case
    return init_attention_cache(B, size + overlap, H, D, sinks=sinks)


def qkv(frames, seed=0, batch=B, dtype=np.float64):
    return tuple(np.random.default_rng(seed).normal(size=(3, batch, frames, H, D)).astype(dtype))


def seen(case, t):
    """The frames that frame t sees, oldest first."""
    kind, size, overlap, sinks = case
    first = t - size + 1 if kind == "window" else t // size * size - overlap
    run = list(range(max(first, 0), t + 1))
    return [j for j in range(sinks) if j < run[0]] + run


def naive(case, q, k, v):
    """One row, `[T, H, D]`: what a frame sees is numbered anew from 0, and rotated by that number."""
    out = np.zeros_like(q)
    for t in range(len(q)):
        frames = seen(case, t)
        angles = np.arange(len(frames))[:, None, None] * THETA ** (-np.arange(0, D, 2) / D)
        turn = np.exp(1j * angles)
        keys = (k[frames, :, ::2] + 1j * k[frames, :, 1::2]) * turn
        query = (q[t, :, ::2] + 1j * q[t, :, 1::2]) * turn[-1]
        scores = np.sum((np.conj(keys) * query).real, axis=-1) * D**-0.5
        weights = np.exp(scores - scores.max(0))
        out[t] = np.einsum("sh,shd->hd", weights / weights.sum(0), v[frames])
    return out


def test_the_loop_sees_a_sink_at_the_distance_of_the_definition():
    case = CASES["window"]
    _, window, _, sinks = case
    for t in range(20):
        frames = seen(case, t)
        for j in range(min(sinks, t + 1)):
            assert len(frames) - 1 - frames.index(j) == min(t, sinks + window - 1) - j


def test_ragged_calls_with_resets_equal_the_loop_long_after_the_ring_wrapped(case):
    """NaN beyond each row's length; calls of one frame, in one piece and in blocks."""
    rng = np.random.default_rng(0)
    resets = {2: [False, True], 8: [False, True], 15: [True, False]}  # the first row stands at 60 frames by then
    with jax.enable_x64(True):
        cache = jax.tree.map(lambda x: x.astype(np.float64) if x.dtype == np.float32 else x, empty_cache(case))
        history = [[], []]
        for call, frames in enumerate([0, 1, 1, 1, 4, 1, 23, 23, 0, 4, 4, 1, 1, 23, 1, 4, 0, 1, 23, 1]):
            q, k, v = qkv(frames, seed=call)
            length = rng.integers(0, frames + 1, B) if call % 3 == 0 else np.full(B, frames)
            reset = resets.get(call, [False, False])
            beyond = np.arange(frames)[None, :, None, None] >= length[:, None, None, None]
            padded = (np.where(beyond, np.nan, x) for x in (q, k, v))
            assert call != 15 or cache.position[0] > 60
            out, cache = jitted(case)(*padded, cache=cache, length=jnp.asarray(length), reset=jnp.array(reset))
            for row in range(B):
                history[row] = ([] if reset[row] else history[row]) + [[x[row, : length[row]] for x in (q, k, v)]]
                whole = [np.concatenate(parts) for parts in zip(*history[row], strict=True)]
                expected = naive(case, *whole)[len(whole[0]) - length[row] :]
                np.testing.assert_allclose(out[row, : length[row]], expected, atol=1e-12, err_msg=f"{call} {row}")
                np.testing.assert_array_equal(out[row, length[row] :], 0)
                assert cache.position[row] == len(whole[0])
                for leaf, x in zip(cache.sinks or (), whole[1:], strict=False):
                    first = x[: case[3]]
                    np.testing.assert_array_equal(leaf[row, : len(first)], first)


def test_a_fresh_call_and_its_gradient(case):
    with jax.enable_x64(True):
        q, k, v = qkv(23, batch=1)
        out, _ = jitted(case)(q, k, v)
        np.testing.assert_allclose(out[0], naive(case, q[0], k[0], v[0]), atol=1e-12)
        check_grads(lambda *x: jitted(case)(*x)[0], (q, k, v), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


def test_every_frame_depends_on_what_it_sees_and_on_nothing_else(case):
    """By Jacobian, gradients flowing through the cache; no later frame, and each seen frame."""
    splits = (2, 1, 17)
    q, k, v = qkv(sum(splits), batch=1, dtype=np.float32)

    def summed(v):
        outs, start, cache = [], 0, None
        for frames in splits:
            part = slice(start, start + frames)
            out, cache = attention(case)(q[:, part], k[:, part], v[:, part], cache=cache)
            outs.append(out.sum((0, 2, 3)))
            start += frames
        return jnp.concatenate(outs)

    depends = np.abs(jax.jit(jax.jacobian(summed))(v)).sum((1, 3, 4)) > 0
    np.testing.assert_array_equal(
        depends, [np.isin(np.arange(len(depends)), seen(case, t)) for t in range(len(depends))]
    )


def test_precision_does_not_degrade_with_the_position(case):
    """A stream near position 1e6 gives the bits of one near the start."""
    size, splits = case[1], (1, 1, 17, 1)
    q, k, v = qkv(sum(splits), dtype=np.float32)
    _, near = jitted(case)(*qkv(17, seed=9, dtype=np.float32), cache=empty_cache(case))
    period = size * (size + case[2])  # the ring's and the segments' phase stay
    far = near._replace(position=near.position + 1_000_000 // period * period)
    for start, frames in zip(np.cumsum((0, *splits)), splits, strict=False):
        part = slice(start, start + frames)
        out, near = jitted(case)(q[:, part], k[:, part], v[:, part], cache=near)
        at_far, far = jitted(case)(q[:, part], k[:, part], v[:, part], cache=far)
        np.testing.assert_array_equal(out, at_far)


def test_reset_heals_sinks_that_hold_nan():
    case = CASES["window"]
    q, k, v = qkv(7, dtype=np.float32)
    _, cache = jitted(case)(q, k, np.full_like(v, np.nan))
    first, cache = jitted(case)(q[:, :1], k[:, :1], v[:, :1], cache=cache, reset=jnp.array([True, True]))
    rest, _ = jitted(case)(q[:, 1:], k[:, 1:], v[:, 1:], cache=cache)
    whole, _ = jitted(case)(q, k, v)
    np.testing.assert_allclose(np.concatenate([first, rest], axis=1), whole, atol=2e-6)  # float32, sums of at most 8


def test_long_calls_never_build_the_square_of_their_length(case):
    shape = jax.ShapeDtypeStruct((1, 4096, 1, 4), jnp.float32)
    lowered = jax.make_jaxpr(attention(case))(shape, shape, shape)
    largest = max(np.prod(v.aval.shape) for eqn in lowered.eqns for v in eqn.outvars)
    assert largest <= 4096 * (2 * (case[1] + case[2]) + case[3] + 4) * 2


def test_sinks_of_a_narrow_dtype_are_kept_in_it():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in qkv(9, dtype=np.float32))
    out, cache = jitted(CASES["window"])(q, k, v)
    assert out.dtype == cache.sinks.keys.dtype == cache.sinks.values.dtype == jnp.bfloat16
    expected = [naive(CASES["window"], *(np.asarray(x[row], np.float64) for x in (q, k, v))) for row in range(B)]
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=0.03)  # bfloat16 has 8 bits


def test_bad_sinks_and_overlaps_are_refused():
    q, k, v = qkv(3, dtype=np.float32)
    for bad in (-1, True, 1.0):
        with pytest.raises(ValueError, match=r"sinks must be an int >= 0 \(frames\), got"):
            window_attention(q, k, v, window=5, sinks=bad)  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match=r"overlap must be an int >= 0 \(frames\), got"):
            segment_attention(q, k, v, segment=5, overlap=bad)  # pyright: ignore[reportArgumentType]
    for sinks, cached, message in (
        (3, 0, r"cache\.sinks must hold sinks, as sinks=3, got NoneType"),
        (0, 3, r"cache\.sinks must be None without sinks, as sinks=0, got Sinks"),
        (3, 2, r"cache\.sinks\.keys must have shape \(2, 3, 2, 4\) .*another batch size or number of sinks"),
    ):
        with pytest.raises(ValueError, match=message):
            window_attention(q, k, v, window=5, sinks=sinks, cache=init_attention_cache(B, 5, H, D, sinks=cached))
    with pytest.raises(
        ValueError, match=r"cache\.keys must have shape \(2, 7, 2, 4\) = \[B, segment \+ overlap, H, D\]"
    ):
        segment_attention(q, k, v, segment=5, overlap=2, cache=init_attention_cache(B, 5, H, D))
