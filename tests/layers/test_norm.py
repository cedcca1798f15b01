import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.layers.norm import LayerNorm, RMSNorm, rms_norm


def test_equals_the_formula_and_keeps_the_dtype():
    x = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
    alpha = np.linspace(0.5, 2, 8, dtype=np.float32)
    expected = x * alpha / np.sqrt(1e-8 + np.mean(x**2, axis=-1, keepdims=True))
    np.testing.assert_allclose(rms_norm(jnp.asarray(x), jnp.asarray(alpha)), expected, rtol=1e-6)
    assert rms_norm(jnp.asarray(x, jnp.bfloat16), jnp.asarray(alpha)).dtype == jnp.bfloat16


def test_bfloat16_input_is_averaged_in_float32():
    x = jnp.full((1, 4096), 3.0, jnp.bfloat16)  # a bfloat16 sum of 4096 nines stalls at 2304
    np.testing.assert_array_equal(rms_norm(x, jnp.ones(4096)).astype(jnp.float32), 1.0)


def test_eps_keeps_a_zero_input_finite():
    out, params = RMSNorm().init_with_output(jax.random.key(0), jnp.zeros((1, 2, 4)))
    assert params["params"]["alpha"].shape == (4,)
    np.testing.assert_array_equal(out, 0)


def test_layer_norm_equals_the_formula_and_is_float32_inside():
    x = 100 + np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
    scale, bias = np.linspace(0.5, 2, 8, dtype=np.float32), np.linspace(-1, 1, 8, dtype=np.float32)
    centered = x.astype(np.float64) - x.mean(axis=-1, keepdims=True, dtype=np.float64)
    expected = centered / np.sqrt(0.5 + np.mean(centered**2, axis=-1, keepdims=True)) * scale + bias
    variables = {"params": {"scale": scale, "bias": bias}}
    np.testing.assert_allclose(LayerNorm(eps=0.5).apply(variables, jnp.asarray(x)), expected, atol=1e-4)
    narrow = jnp.asarray(x, jnp.bfloat16)
    out = LayerNorm(eps=0.5).apply(variables, narrow)
    assert out.dtype == jnp.bfloat16
    wide = LayerNorm(eps=0.5).apply(variables, narrow.astype(jnp.float32))
    np.testing.assert_array_equal(out, wide.astype(jnp.bfloat16))
