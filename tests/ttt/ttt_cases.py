"""Small random calls of the TTT operation, shared by its tests."""

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax import TTTLinearParams, TTTMLPParams, ttt_linear, ttt_mlp

OPERATIONS = {"linear": ttt_linear, "mlp": ttt_mlp}
IMPLEMENTATIONS = ("reference", "scan")
C = 4


def make_params(kind: str, num_heads: int = 2, dim: int = 4, seed: int = 0):
    rng = np.random.default_rng(seed)
    hidden = 4 * dim

    def normal(*shape, scale=0.5):
        return jnp.asarray(scale * rng.standard_normal((num_heads, *shape)), jnp.float64)

    ln = {"ln_scale": 1 + normal(dim, scale=0.2), "ln_bias": normal(dim, scale=0.2)}
    if kind == "linear":
        return TTTLinearParams(w1=normal(dim, dim), b1=normal(dim), **ln)
    return TTTMLPParams(w1=normal(dim, hidden), b1=normal(hidden), w2=normal(hidden, dim), b2=normal(dim), **ln)


def make_tokens(num_tokens: int, batch_size: int = 2, num_heads: int = 2, dim: int = 4, seed: int = 1):
    rng = np.random.default_rng(seed)
    q, k, v = (
        jnp.asarray(rng.standard_normal((batch_size, num_tokens, num_heads, dim)), jnp.float64) for _ in range(3)
    )
    return q, k, v, jnp.asarray(rng.uniform(0.05, 0.3, (batch_size, num_tokens, num_heads)), jnp.float64)


def cut(tokens, start: int, stop: int):
    return tuple(x[:, start:stop] for x in tokens)


def assert_trees_close(a, b, tolerance: float):
    """Largest difference over the leaves' size, at most `tolerance` of the leaf's largest value (or of 1)."""
    leaves = zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True)
    for (path, x), y in leaves:
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert x.shape == y.shape, jax.tree_util.keystr(path)
        np.testing.assert_allclose(
            x, y, rtol=0, atol=tolerance * max(1, np.abs(y).max(initial=0)), err_msg=jax.tree_util.keystr(path)
        )
