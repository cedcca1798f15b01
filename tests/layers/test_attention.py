import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.layers.attention import evicted, init_attention_cache, segment_attention, window_attention
from ttt_jax.layers.rope import RotaryEmbedding

B, H, D = 2, 2, 4
SIZE = 5
ROPE = RotaryEmbedding(100.0)
KINDS = {
    "window": functools.partial(window_attention, window=SIZE, rope=ROPE),
    "segment": functools.partial(segment_attention, segment=SIZE, rope=ROPE),
}
JITTED = {kind: jax.jit(attend) for kind, attend in KINDS.items()}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def qkv(frames, seed=0, batch=B, dtype=np.float32):
    return tuple(np.random.default_rng(seed).normal(size=(3, batch, frames, H, D)).astype(dtype))


def sees(kind, t, s):
    return s <= t and (t - s < SIZE if kind == "window" else t // SIZE == s // SIZE)


@functools.partial(jax.jit, static_argnums=0)
def dense(kind, q, k, v):
    """The definition: one [T, T] mask, rotation by absolute positions, no cache."""
    frames = q.shape[1]
    angles = np.arange(frames)[:, None] * 100.0 ** (-np.arange(0, D, 2) / D)
    cos, sin = (jnp.asarray(f(angles), q.dtype)[None, :, None] for f in (np.cos, np.sin))

    def rotated(x):
        a, b = x[..., ::2], x[..., 1::2]
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)

    scores = jnp.einsum("bthd,bshd->bhts", rotated(q), rotated(k)) * D**-0.5
    mask = np.array([[sees(kind, t, s) for s in range(frames)] for t in range(frames)])
    weights = jax.nn.softmax(jnp.where(mask[None, None], scores, -np.inf), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", weights, v)


def out_and_grads(attend, cotangent):
    @jax.jit
    def run(q, k, v):
        out, vjp = jax.vjp(attend, q, k, v)
        return out, vjp(jnp.asarray(cotangent, out.dtype))

    return run


def in_calls(kind, q, k, v, splits, cache=None):
    outs, start = [], 0
    for frames in splits:
        part = slice(start, start + frames)
        out, cache = JITTED[kind](q[:, part], k[:, part], v[:, part], cache=cache)
        outs.append(out)
        start += frames
    return jnp.concatenate(outs, axis=1), cache


@pytest.mark.parametrize("frames", [1, 5, 6, 11, 23])
def test_whole_call_and_its_gradient_equal_the_dense_form_in_float64(kind, frames):
    with jax.enable_x64(True):
        q, k, v = qkv(frames, dtype=np.float64)
        cotangent = np.random.default_rng(1).normal(size=q.shape)
        expected, expected_grads = out_and_grads(functools.partial(dense, kind), cotangent)(q, k, v)
        out, grads = out_and_grads(lambda *x: KINDS[kind](*x)[0], cotangent)(q, k, v)
        assert out.dtype == jnp.float64
        np.testing.assert_allclose(out, expected, atol=1e-12)
        for got, want in zip(grads, expected_grads, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_any_split_into_calls_equals_the_dense_form_long_after_the_ring_wrapped(kind, seed):
    rng = np.random.default_rng(seed)
    splits = [*rng.permutation([0, 1, 1, 1, 3, 4, 5, 6, 10, 11, 13, 23])]
    q, k, v = qkv(sum(splits), seed)
    out, cache = in_calls(kind, q, k, v, splits)
    np.testing.assert_allclose(out, dense(kind, q, k, v), atol=2e-6)  # float32, sums of at most 5
    np.testing.assert_array_equal(cache.position, sum(splits))


def test_gradients_of_a_call_do_not_depend_on_where_the_history_ended(kind):
    q, k, v = qkv(17)
    cotangent = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)

    _, whole = out_and_grads(lambda *x: in_calls(kind, *x, (17,))[0], cotangent)(q, k, v)
    _, parts = out_and_grads(lambda *x: in_calls(kind, *x, (2, 1, 3, 11))[0], cotangent)(q, k, v)
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)


@pytest.mark.parametrize("splits", [(23,), (1,) * 12, (4, 12, 7)])
def test_context_is_exactly_the_configured_one(kind, splits):
    """By Jacobian: frame t depends on value s exactly where the definition says so."""
    q, k, v = qkv(sum(splits), batch=1)
    jacobian = jax.jit(jax.jacobian(lambda v: in_calls(kind, q, k, v, splits)[0].sum((0, 2, 3))))(v)
    depends = np.abs(jacobian).sum((1, 3, 4)) > 0
    frames = sum(splits)
    np.testing.assert_array_equal(depends, [[sees(kind, t, s) for s in range(frames)] for t in range(frames)])


def test_rows_are_independent(kind):
    q, k, v = qkv(12)
    jacobian = jax.jit(jax.jacobian(lambda v: in_calls(kind, q, k, v, (7, 5))[0].sum((1, 2, 3))))(v)
    assert np.all(np.abs(jacobian).sum((2, 3, 4))[~np.eye(B, dtype=bool)] == 0)


@pytest.mark.parametrize("frames", [1, 4, 8, 13])
def test_length_and_reset_are_exact_per_row_whatever_lies_beyond(kind, frames):
    """Ragged calls with NaN beyond each row's length give, row by row, what that row alone gives."""
    rng = np.random.default_rng(frames)
    caches = init_attention_cache(B, SIZE, H, D)
    history = [[], []]
    for call in range(6):
        q, k, v = qkv(frames, seed=call)
        length = rng.integers(0, frames + 1, B)
        reset = rng.random(B) < 0.3
        padded = [
            np.where(np.arange(frames)[None, :, None, None] < length[:, None, None, None], x, np.nan) for x in (q, k, v)
        ]
        padded = [x.astype(np.float32) for x in padded]
        out, caches = JITTED[kind](*padded, cache=caches, length=jnp.asarray(length), reset=jnp.asarray(reset))
        for row in range(B):
            history[row] = [] if reset[row] else history[row]
            history[row].append([x[row, : length[row]] for x in (q, k, v)])
            whole = [np.concatenate(parts)[None] for parts in zip(*history[row], strict=True)]
            if whole[0].shape[1]:
                expected = np.asarray(dense(kind, *whole))[0, whole[0].shape[1] - length[row] :]
                np.testing.assert_allclose(out[row, : length[row]], expected, atol=2e-6)
            np.testing.assert_array_equal(out[row, length[row] :], 0)
            assert caches.position[row] == whole[0].shape[1]


def test_gradient_is_zero_and_finite_beyond_length(kind):
    q, k, v = qkv(8)
    q[:, 3:], k[:, 3:], v[:, 3:] = np.nan, np.nan, np.nan
    length = jnp.array([3, 3])
    _, grads = out_and_grads(lambda *x: KINDS[kind](*x, length=length)[0], np.ones_like(q))(q, k, v)
    for grad in grads:
        assert np.all(np.isfinite(grad[:, :3]))
        np.testing.assert_array_equal(grad[:, 3:], 0)


def test_reset_heals_a_ring_that_holds_nan(kind):
    q, k, v = qkv(3)
    _, cache = JITTED[kind](q, k, np.full_like(v, np.nan))
    out, _ = JITTED[kind](q, k, v, cache=cache, reset=jnp.array([True, True]))
    np.testing.assert_allclose(out, dense(kind, q, k, v), atol=2e-6)


@pytest.mark.parametrize("splits", [(1,) * 8, (3, 14)])
def test_precision_does_not_degrade_with_the_position(kind, splits):
    """A stream that stands at a multiple of the segment near 1e6 gives the same bits as one at the start."""
    q, k, v = qkv(sum(splits))
    far = 1_000_000 // SIZE * SIZE
    near_cache, far_cache = init_attention_cache(B, SIZE, H, D), init_attention_cache(B, SIZE, H, D)
    _, near_cache = JITTED[kind](*qkv(SIZE, seed=9), cache=near_cache)
    far_cache = near_cache._replace(position=near_cache.position + far)
    near, _ = in_calls(kind, q, k, v, splits, near_cache)
    at_far, _ = in_calls(kind, q, k, v, splits, far_cache)
    np.testing.assert_array_equal(near, at_far)


def test_no_frames(kind):
    q, k, v = qkv(0)
    out, cache = KINDS[kind](q, k, v)
    assert out.shape == (B, 0, H, D)
    np.testing.assert_array_equal(cache.position, 0)


def test_long_calls_never_build_the_square_of_their_length(kind):
    shape = jax.ShapeDtypeStruct((1, 4096, 1, 4), jnp.float32)
    lowered = jax.make_jaxpr(KINDS[kind])(shape, shape, shape)
    largest = max(np.prod(v.aval.shape) for eqn in lowered.eqns for v in eqn.outvars)
    assert largest <= 4096 * 4 * SIZE


def test_bfloat16_softmax_is_float32():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in qkv(9))
    out, cache = KINDS["window"](q, k, v)
    assert out.dtype == cache.keys.dtype == jnp.bfloat16
    expected = dense("window", *(np.asarray(x, np.float32) for x in (q, k, v)))
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=0.03)  # bfloat16 has 8 bits


def test_bad_input_names_the_argument():
    q, k, v = qkv(3)
    with pytest.raises(ValueError, match="window must be an int >= 1"):
        window_attention(q, k, v, window=0)
    with pytest.raises(ValueError, match="k must be like q"):
        window_attention(q, k[:, :2], v, window=3)
    with pytest.raises(ValueError, match="q must be an array, got list"):
        window_attention(q.tolist(), k, v, window=3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"length: expected integers of shape \[B\] = \(2,\), got bool"):
        window_attention(q, k, v, window=3, length=[True, False])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="length: expected integers"):
        window_attention(q, k, v, window=3, length=jnp.zeros(B + 1, jnp.int32))

    with pytest.raises(ValueError, match=r"rope must be a RotaryEmbedding or None, got 10000\.0"):
        window_attention(q, k, v, window=3, rope=1e4)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"q must have an even head dim .* \(2, 3, 2, 3\)"):
        window_attention(q[..., :3], k[..., :3], v[..., :3], window=3, rope=ROPE)
    with pytest.raises(ValueError, match="causal must be True or False, got None"):
        segment_attention(q, k, v, segment=3, causal=None)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint32, np.int64])
def test_lengths_of_any_integer_dtype_are_clipped(kind, dtype):
    """Numbers beyond int32 too, which JAX would wrap, and T beyond what the dtype holds."""
    q, k, v = qkv(300)
    most = 2**40 if dtype == np.int64 else np.iinfo(dtype).max
    expected = KINDS[kind](q, k, v, length=jnp.array([min(most, 300), 100]))
    found = KINDS[kind](q, k, v, length=np.array([most, 100], dtype))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_lengths_and_resets_may_be_lists(kind):
    q, k, v = qkv(3)
    cache = KINDS[kind](q, k, v)[1]
    listed = KINDS[kind](q, k, v, cache=cache, length=[1, 3], reset=[True, False])
    arrays = KINDS[kind](q, k, v, cache=cache, length=jnp.array([1, 3]), reset=jnp.array([True, False]))
    jax.tree.map(np.testing.assert_array_equal, listed, arrays)


@pytest.mark.parametrize(
    ("leaf", "value", "message"),
    [
        ("keys", np.zeros((B, SIZE - 1, H, D), np.float32), r"keys must have shape .* another batch size or window"),
        ("keys", np.zeros((B, SIZE, H, D), np.int32), "keys must be floating, got int32"),
        ("values", np.zeros((B, SIZE, H, D + 1), np.float32), r"values must have shape \(2, 5, 2, 4\) .* got"),
        ("position", np.zeros(1, np.int32), r"position must have shape \(2,\) = \[B\], got \(1,\)"),
        ("position", np.zeros(B, np.float32), "position must be int32, got float32"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused(leaf, value, message):
    cache = init_attention_cache(B, SIZE, H, D)._replace(**{leaf: value})
    with pytest.raises(ValueError, match=rf"cache\.{message}"):
        window_attention(*qkv(3), window=SIZE, cache=cache)
    with pytest.raises(ValueError, match="cache must be the AttentionCache"):
        window_attention(*qkv(3), window=SIZE, cache=tuple(cache))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("splits", [(13,), (1,) * 13, (3, 0, 7, 3), (6, 5, 2)])
def test_what_leaves_the_window_is_what_came_a_window_before(splits):
    _, k, v = qkv(13)
    cache, found, start = None, [], 0
    for frames in splits:
        part = slice(start, start + frames)
        found.append(jax.jit(evicted, static_argnums=3)(cache, k[:, part], v[:, part], SIZE))
        _, cache = JITTED["window"](k[:, part], k[:, part], v[:, part], cache=cache)
        start += frames
    keys, values, leaves = (np.concatenate(x, axis=1) for x in zip(*found, strict=True))
    np.testing.assert_array_equal(leaves, np.arange(13)[None].repeat(B, 0) >= SIZE)
    for got, x in ((keys, k), (values, v)):
        np.testing.assert_array_equal(got[:, SIZE:], x[:, :-SIZE])
        assert not np.any(got[:, :SIZE])


def test_nothing_leaves_the_window_of_a_row_that_was_reset():
    _, k, v = qkv(9)
    _, cache = JITTED["window"](k, k, v, length=np.array([9, 3]))
    keys, _, leaves = evicted(cache, k, v, SIZE, reset=np.array([True, False]))
    np.testing.assert_array_equal(leaves, [[False] * 5 + [True] * 4, [False] * 2 + [True] * 7])
    np.testing.assert_array_equal(keys[0, 5:], k[0, :4])
    np.testing.assert_array_equal(keys[1, 2:], np.concatenate([k[1, :3], k[1, :4]]))
