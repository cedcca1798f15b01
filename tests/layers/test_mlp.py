import jax
import numpy as np
import pytest

from ttt_jax.layers.mlp import GatedMLP, gated_hidden_size


def test_equals_the_formula():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))
    out, variables = GatedMLP(6).init_with_output(jax.random.key(1), x)
    params = variables["params"]
    a, b = np.split(np.asarray(x, np.float64) @ np.asarray(params["linear_in"], np.float64), 2, axis=-1)
    expected = (a / (1 + np.exp(-a)) * b) @ np.asarray(params["linear_out"], np.float64)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("width", "feedforward", "hidden"), [(64, 264, 176), (4096, 16896, 11264), (64, 256, 168)])
def test_hidden_size_is_kyutais(width, feedforward, hidden):
    assert gated_hidden_size(width, feedforward) == hidden
