import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.layers.norm import RMSNorm, rms_norm


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
