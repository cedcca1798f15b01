import jax
import numpy as np
import pytest

from ttt_jax.layers.mlp import GatedMLP, GeluMLP, gated_hidden_size


def test_equals_the_formula():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))
    out, variables = GatedMLP(6).init_with_output(jax.random.key(1), x)
    params = variables["params"]
    a, b = np.split(np.asarray(x, np.float64) @ np.asarray(params["linear_in"], np.float64), 2, axis=-1)
    expected = (a / (1 + np.exp(-a)) * b) @ np.asarray(params["linear_out"], np.float64)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_with_gelu_equals_the_formula():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))
    layer = GeluMLP(6)
    shapes = jax.eval_shape(layer.init, jax.random.key(1), x)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32), shapes)
    before = np.asarray(x, np.float64) @ params["layer1"]["kernel"] + params["layer1"]["bias"]
    hidden = before / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (before + 0.044715 * before**3)))
    expected = hidden @ params["layer2"]["kernel"] + params["layer2"]["bias"]
    np.testing.assert_allclose(layer.apply({"params": params}, x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("width", "feedforward", "hidden"), [(64, 264, 176), (4096, 16896, 11264), (64, 256, 168)])
def test_hidden_size_is_kyutais(width, feedforward, hidden):
    assert gated_hidden_size(width, feedforward) == hidden
