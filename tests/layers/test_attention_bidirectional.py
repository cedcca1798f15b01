"""Bidirectional segments with overlap against a loop over segments in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from ttt_jax.layers.attention import init_attention_cache, segment_attention
from ttt_jax.layers.rope import RotaryEmbedding

H, D = 2, 4
THETA = 100.0
ROPE = RotaryEmbedding(THETA)
# (13, 1) are Video-DiT's scenes: scene i sees the latent frames [12 i, 12 i + 13).
SIZES = [(5, 0), (5, 2), (4, 2), (5, 3), (13, 1), (40, 3)]
sizes = pytest.mark.parametrize(("segment", "overlap"), SIZES)


@functools.cache
def attention(segment, overlap):
    return functools.partial(segment_attention, segment=segment, overlap=overlap, causal=False, rope=ROPE)


@functools.cache
def jitted(segment, overlap):
    return jax.jit(attention(segment, overlap))


def qkv(frames, seed=0, batch=1, dtype=np.float64):
    return tuple(np.random.default_rng(seed).normal(size=(3, batch, frames, H, D)).astype(dtype))


def segments(segment, overlap, frames):
    """The frames of each segment, up to the one that reaches the end."""
    found, start = [], 0
    while True:
        found.append(np.arange(start, min(start + segment, frames)))
        if start + segment >= frames:
            return found
        start += segment - overlap


def naive(segment, overlap, q, k, v):
    """One row, `[T, H, D]`."""
    total, count = np.zeros_like(q), np.zeros(len(q))
    for frames in segments(segment, overlap, len(q)):
        angles = np.arange(len(frames))[:, None, None] * THETA ** (-np.arange(0, D, 2) / D)
        rotated = [(x[frames, :, ::2] + 1j * x[frames, :, 1::2]) * np.exp(1j * angles) for x in (q, k)]
        scores = np.einsum("thd,shd->hts", rotated[0], np.conj(rotated[1])).real * D**-0.5
        weights = np.exp(scores)
        total[frames] += np.einsum("hts,shd->thd", weights / weights.sum(-1, keepdims=True), v[frames])
        count[frames] += 1
    return total / count[:, None, None]


@sizes
def test_every_length_gives_what_that_row_alone_gives_whatever_lies_beyond(segment, overlap):
    frames = 37
    lengths = [37, 36, 26, 25, 14, 13, 6, 5, 4, 2, 1, 0]
    with jax.enable_x64(True):
        q, k, v = qkv(frames, batch=len(lengths))
        beyond = np.arange(frames)[None, :, None, None] >= np.array(lengths)[:, None, None, None]
        padded = (np.where(beyond, np.nan, x) for x in (q, k, v))
        out, cache = jitted(segment, overlap)(*padded, length=jnp.array(lengths))
        assert cache is None
        for row, length in enumerate(lengths):
            expected = naive(segment, overlap, *(x[row, :length] for x in (q, k, v)))
            np.testing.assert_allclose(out[row, :length], expected, atol=1e-12, err_msg=f"length {length}")
            np.testing.assert_array_equal(out[row, length:], 0)


@sizes
@pytest.mark.parametrize("frames", [1, 12])
def test_whole_call_and_its_gradient(segment, overlap, frames):
    with jax.enable_x64(True):
        q, k, v = qkv(frames)
        out, _ = jitted(segment, overlap)(q, k, v)
        np.testing.assert_allclose(out[0], naive(segment, overlap, q[0], k[0], v[0]), atol=1e-12)
        check_grads(lambda *x: jitted(segment, overlap)(*x)[0], (q, k, v), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


@sizes
def test_gradient_is_zero_and_finite_beyond_length(segment, overlap):
    q, k, v = qkv(12, batch=3, dtype=np.float32)
    length = np.array([7, 1, 0])
    beyond = np.arange(12)[None, :, None, None] >= length[:, None, None, None]
    padded = [np.where(beyond, np.float32(np.nan), x) for x in (q, k, v)]
    attend = functools.partial(attention(segment, overlap), length=jnp.asarray(length))
    weights = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)
    grads = jax.jit(jax.grad(lambda *x: jnp.sum(attend(*x)[0] * weights), argnums=(0, 1, 2)))(*padded)
    for grad in grads:
        assert np.all(np.isfinite(grad))
        np.testing.assert_array_equal(np.where(beyond, grad, 0), 0)
    assert np.any(grads[2][0, :7])


@sizes
def test_a_frame_depends_on_its_segments_and_on_nothing_else(segment, overlap):
    frames = 27
    q, k, v = qkv(frames, batch=2, dtype=np.float32)
    jacobian = jax.jit(jax.jacobian(lambda v: attention(segment, overlap)(q, k, v)[0].sum((2, 3))))(v)
    depends = np.abs(jacobian).sum((4, 5)) > 0
    expected = np.zeros((frames, frames), bool)
    for members in segments(segment, overlap, frames):
        expected[np.ix_(members, members)] = True
    for a in range(2):
        for b in range(2):
            np.testing.assert_array_equal(depends[a, :, b], expected & (a == b))


def test_positions_are_relative_to_the_segment():
    """A segment far into the call, where angles would be coarse, gives what one at its start gives."""
    q, k, v = qkv(5, dtype=np.float32)
    alone, _ = jitted(5, 0)(q, k, v)
    repeated, _ = jitted(5, 0)(*(np.tile(x, (1, 2000, 1, 1)) for x in (q, k, v)))
    np.testing.assert_allclose(repeated[:, -5:], alone, atol=5e-7)  # float32, sums of 5


@sizes
def test_segments_are_one_batch(segment, overlap):
    """As many operations for many segments as for few, and memory that grows with the frames alone."""

    def trace(frames):
        shape = jax.ShapeDtypeStruct((1, frames, 1, 4), jnp.float32)
        return jax.make_jaxpr(lambda q, k, v: attention(segment, overlap)(q, k, v)[0])(shape, shape, shape)

    few, many = trace(51), trace(4097)  # neither a whole number of segments
    assert len(few.eqns) == len(many.eqns)
    largest = max(np.prod(v.aval.shape) for eqn in many.eqns for v in eqn.outvars)
    assert largest <= (4097 + segment) * segment * max(segment, 4) / (segment - overlap)


def test_no_frames_no_past_and_no_sinks():
    q, k, v = qkv(3, batch=2, dtype=np.float32)
    out, cache = attention(5, 2)(q[:, :0], k[:, :0], v[:, :0])
    assert out.shape == (2, 0, H, D)
    assert cache is None
    plain, _ = jitted(5, 2)(q, k, v)
    np.testing.assert_array_equal(jitted(5, 2)(q, k, v, reset=jnp.array([True, False]))[0], plain)
    with pytest.raises(ValueError, match="cache must be None with causal=False"):
        attention(5, 0)(q, k, v, cache=init_attention_cache(2, 5, H, D))
    with pytest.raises(ValueError, match=r"sinks must be 0 with causal=False.* got 2"):
        attention(5, 0)(q, k, v, sinks=2)
    with pytest.raises(ValueError, match=r"overlap must be < segment = 5 with causal=False.* got 5"):
        attention(5, 5)(q, k, v)
