"""cuDNN's flash attention where no GPU is: which calls go to it, and that XLA gives the same for the same arguments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax import devices
from ttt_jax.layers.attention import flash, init_attention_cache, segment_attention, window_attention
from ttt_jax.layers.rope import RotaryEmbedding

B, H, D = 2, 2, 8
SIZE = 5
ROPE = RotaryEmbedding(100.0)
KINDS = {
    "window": functools.partial(window_attention, window=SIZE, rope=ROPE),
    "segment": functools.partial(segment_attention, segment=SIZE, rope=ROPE),
    "bidirectional": functools.partial(segment_attention, segment=SIZE, overlap=2, causal=False, rope=ROPE),
}


def qkv(frames, dtype=jnp.float32, head_dim=D):
    values = np.random.default_rng(0).normal(size=(3, B, frames, H, head_dim))
    return [jnp.asarray(x, dtype) for x in values]


@pytest.fixture
def on_gpu(monkeypatch):
    """As on an H100, with JAX's XLA form in cuDNN's place; returns the keywords of the calls to cuDNN."""
    calls, attend = [], jax.nn.dot_product_attention

    def xla(*args, implementation, **keywords):
        assert implementation == "cudnn"
        assert all(x.shape[1] % 2 == 0 for x in args)  # or cuDNN refuses the gradient
        calls.append(keywords)
        with jax.numpy_dtype_promotion("standard"):
            return attend(*args, implementation="xla", **keywords)

    monkeypatch.setattr(devices, "compute_capability", lambda: (9, 0))
    monkeypatch.setattr(jax.nn, "dot_product_attention", xla)
    return calls


@pytest.fixture
def any_dtype(monkeypatch):
    """Without the limit to 16 bits, so that equality shows to float32's precision."""
    refusal = flash._refusal
    monkeypatch.setattr(flash, "_refusal", lambda q, *rest: refusal(q.astype(jnp.bfloat16), *rest))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("frames", "lengths"), [(1, None), (5, (4, 0)), (23, None), (23, (23, 6))])
def test_the_same_arguments_give_what_xla_gives(kind, frames, lengths, on_gpu, any_dtype):
    x = qkv(frames)
    attend = functools.partial(KINDS[kind], length=None if lengths is None else jnp.array(lengths))
    weights = np.random.default_rng(1).normal(size=x[0].shape).astype(np.float32)

    expected, cache, grads = jax.jit(lambda: _run(attend, x, weights, "xla"))()
    assert not on_gpu
    got, flash_cache, flash_grads = jax.jit(lambda: _run(attend, x, weights, "cudnn"))()
    assert len(on_gpu) == 1
    np.testing.assert_allclose(got, expected, atol=2e-6)  # float32, sums of at most 8
    jax.tree.map(np.testing.assert_array_equal, flash_cache, cache)
    for a, b in zip(flash_grads, grads, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)


AFTER_CACHE = {
    "window": KINDS["window"],
    "segment": KINDS["segment"],
    "overlap": functools.partial(KINDS["segment"], overlap=2),
}


@pytest.mark.parametrize("kind", AFTER_CACHE)
@pytest.mark.parametrize(("frames", "lengths"), [(3, None), (7, (4, 0)), (23, None), (24, (23, 6))])
def test_the_same_cache_gives_what_xla_gives(kind, frames, lengths, on_gpu, any_dtype, monkeypatch):
    monkeypatch.setattr(flash, "MIN_FRAMES_AFTER_CACHE", 1)
    _, cache = AFTER_CACHE[kind](
        *qkv(9), length=jnp.array((9, 2)), implementation="xla"
    )  # one ring has wrapped, one is not full
    options = {"cache": cache, "length": None if lengths is None else jnp.array(lengths)}
    attend = functools.partial(AFTER_CACHE[kind], **options, reset=jnp.array([False, frames == 23]))
    x = [x[::-1] for x in qkv(frames)]
    weights = np.random.default_rng(1).normal(size=x[0].shape).astype(np.float32)
    expected, cache, grads = jax.jit(lambda: _run(attend, x, weights, "xla"))()
    got, flash_cache, flash_grads = jax.jit(lambda: _run(attend, x, weights, "cudnn"))()
    assert [call["mask"].dtype for call in on_gpu] == [bool]
    np.testing.assert_allclose(got, expected, atol=2e-6)  # float32, sums of at most 12
    jax.tree.map(np.testing.assert_array_equal, flash_cache, cache)
    for a, b in zip(flash_grads, grads, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)


def _run(attend, x, weights, implementation):
    out, vjp, cache = jax.vjp(lambda *x: attend(*x, implementation=implementation), *x, has_aux=True)
    return out, cache, vjp(weights)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_none_takes_cudnn_on_a_gpu(kind, dtype, on_gpu):
    x = qkv(23, dtype)
    out, _ = KINDS[kind](*x)
    assert len(on_gpu) == 1
    assert out.dtype == dtype
    expected, _ = KINDS[kind](*x, implementation="xla")
    assert len(on_gpu) == 1
    np.testing.assert_allclose(out.astype(np.float32), expected.astype(np.float32), atol=0.03)  # bfloat16 has 8 bits


def test_masks_are_put_as_cudnn_knows_them(on_gpu):
    """It skips what its own masks hide; a mask given as an array it would have to read."""
    x = qkv(23, jnp.bfloat16)
    KINDS["window"](*x)
    KINDS["segment"](*x)
    KINDS["bidirectional"](*x)
    window, segment, bidirectional = on_gpu
    assert window == {"scale": D**-0.5, "is_causal": True, "local_window_size": (SIZE - 1, 0)}
    assert segment == {"scale": D**-0.5, "is_causal": True, "local_window_size": None}
    assert bidirectional.pop("key_value_seq_lengths").shape == (B * 7,)
    assert bidirectional == {"scale": D**-0.5}
    KINDS["window"](*(y[:, :SIZE] for y in x))
    assert on_gpu[-1]["local_window_size"] is None  # all frames are inside


REFUSED = {
    "a cache": (KINDS["window"], qkv(6, jnp.bfloat16), {"cache": True}, "6 < 64 frames continue a cache"),
    "sinks and a cache": (
        KINDS["window"],
        qkv(64, jnp.bfloat16),
        {"cache": True, "sinks": 2},
        "sinks=2 stand .* cache",
    ),
    "sinks": (KINDS["window"], qkv(6, jnp.bfloat16), {"sinks": 2}, "sinks=2 stand at other distances"),
    "sinks of segments": (KINDS["segment"], qkv(6, jnp.bfloat16), {"sinks": 2}, "sinks=2 stand at other distances"),
    "overlap": (KINDS["segment"], qkv(6, jnp.bfloat16), {"overlap": 2}, "overlap=2 of causal segments"),
    "float32": (KINDS["segment"], qkv(6), {}, "bfloat16 or float16, q is float32"),
    "an odd head": (KINDS["bidirectional"], qkv(6, jnp.bfloat16, 12), {}, "multiple of 8 and at most 256, got 12"),
    "a wide head": (KINDS["window"], qkv(6, jnp.bfloat16, 264), {}, "multiple of 8 and at most 256, got 264"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cudnn_cannot_do_is_left_to_xla_and_refused_when_asked_for(name, on_gpu):
    attend, x, options, message = REFUSED[name]
    if "cache" in options:
        options = options | {"cache": init_attention_cache(B, SIZE, H, D, jnp.bfloat16, sinks=options.get("sinks", 0))}
    with pytest.raises(NotImplementedError, match=f"implementation='cudnn' does not support this call: .*{message}"):
        attend(*x, **options, implementation="cudnn")
    out, _ = attend(*x, **options)
    assert not on_gpu
    assert out.shape == x[0].shape


def test_sinks_and_overlaps_that_lie_inside_do_no_harm(on_gpu):
    x = qkv(SIZE, jnp.bfloat16)
    plain, _ = KINDS["window"](*x)
    for attend, options in ((KINDS["window"], {"sinks": 2}), (KINDS["segment"], {"sinks": 2, "overlap": 3})):
        out, cache = attend(*x, **options)
        np.testing.assert_array_equal(out, plain)
        np.testing.assert_array_equal(cache.sinks.keys, x[1][:, :2])
    assert len(on_gpu) == 3


def test_rotations_beyond_16_bits_are_left_to_xla(on_gpu, monkeypatch):
    monkeypatch.setattr(flash, "MAX_POSITION", 10)
    x = qkv(11, jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="rope over 11 > 10 frames would lose precision"):
        KINDS["window"](*x, implementation="cudnn")
    KINDS["segment"](*x, implementation="cudnn")  # positions start again in every segment
    window_attention(*x, window=SIZE, implementation="cudnn")  # no positions


@pytest.mark.parametrize(
    ("capability", "head_dim", "message"), [((7, 5), 8, "8.0, this GPU has 7.5"), ((8, 0), 136, "at most 128")]
)
def test_old_gpus(capability, head_dim, message, on_gpu, monkeypatch):
    monkeypatch.setattr(devices, "compute_capability", lambda: capability)
    with pytest.raises(NotImplementedError, match=message):
        KINDS["window"](*qkv(6, jnp.bfloat16, head_dim), implementation="cudnn")


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_gpu_cudnn_is_refused_and_none_takes_xla(kind):
    x = qkv(6, jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="the default device is no CUDA GPU"):
        KINDS[kind](*x, implementation="cudnn")
    np.testing.assert_array_equal(KINDS[kind](*x)[0], KINDS[kind](*x, implementation="xla")[0])
    with pytest.raises(ValueError, match="implementation must be 'xla', 'cudnn' or None, got 'flash'"):
        KINDS[kind](*x, implementation="flash")
    with jax.default_device("cpu"):
        assert devices.compute_capability() is None
    with jax.default_device(jax.devices()[3]):
        assert devices.compute_capability() is None
