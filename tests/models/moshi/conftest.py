import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.models.moshi import Moshi, MoshiConfig, TTTInsertion

# Layer 0: a window of 4; layer 1: TTT-Linear beside segments of 3.
TTT = TTTInsertion(layers=(1,), kind="linear", mini_batch_size=3, attention="segment", context=3)
CONFIG = MoshiConfig(
    dim=16,
    text_card=20,
    n_q=4,
    dep_q=2,
    card=20,
    num_heads=2,
    num_layers=2,
    context=4,
    depformer_dim=8,
    depformer_dim_feedforward=16,
    depformer_num_heads=2,
    depformer_num_layers=1,
    delays=(0, 0, 1, 0, 2),
    ttt=TTT,
)


@pytest.fixture(scope="session")
def config():
    return CONFIG


@pytest.fixture(scope="session")
def params():
    return _random_params(CONFIG)


@pytest.fixture(scope="session")
def random_params():
    """Function of a config to random parameters."""
    return _random_params


@functools.cache
def _random_params(config, seed=0):
    """Initial values plus noise: wo, biases and offsets are not zero, so TTT takes part."""
    codes = np.zeros((1, config.num_streams, 2), np.int32)
    values = jax.jit(Moshi(config).init)(jax.random.key(seed), codes)["params"]
    leaves, treedef = jax.tree.flatten(values)
    rng = np.random.default_rng(seed)
    return treedef.unflatten([x + 0.2 * rng.normal(size=x.shape).astype(np.float32) for x in leaves])


@pytest.fixture(scope="session")
def temporal():
    """Jitted `(config, params, delayed, state, length, reset)` -> z, text logits, state."""

    @functools.partial(jax.jit, static_argnums=0)
    def apply(config, params, delayed, state=None, length=None, reset=None):
        return Moshi(config).apply({"params": params}, delayed, state, length, reset, method="temporal")

    return apply


@pytest.fixture(scope="session")
def random_codes():
    """Function of (seed, batch, frames) to `[batch, 1 + n_q, frames]` int32."""

    def make(seed, batch, frames):
        return jnp.asarray(
            np.random.default_rng(seed).integers(0, CONFIG.card, (batch, CONFIG.num_streams, frames)), jnp.int32
        )

    return make


@pytest.fixture(scope="session")
def process():
    """Function of a seed to codes `[8, 5, 32]` in which own tokens step by 3 now and then by 7, and streams follow."""

    def make(seed):
        rng = np.random.default_rng(seed)
        steps = np.where(rng.random((8, 32)) < 0.1, 7, 3)
        first = np.cumsum(steps, axis=1) % CONFIG.card
        text = (first * 7) % CONFIG.text_card
        user = rng.integers(0, CONFIG.card, (2, 8, 32))
        return jnp.asarray(np.stack([text, first, (first + 5) % CONFIG.card, *user], axis=1), jnp.int32)

    return make


@pytest.fixture(scope="session")
def trained(process):
    """The tiny model with TTT after a few hundred steps of Adam on `process`: (config, params)."""
    from ttt_jax.models.moshi import losses

    def loss(params, codes):
        return losses(Moshi(CONFIG).apply({"params": params}, codes), codes).total

    @jax.jit
    def step(carry, codes):
        params, mean, square, count = carry
        grad = jax.grad(loss)(params, codes)
        count = count + 1
        mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mean, grad)
        square = jax.tree.map(lambda s, g: 0.99 * s + 0.01 * g * g, square, grad)
        params = jax.tree.map(
            lambda p, m, s: p - 0.01 * (m / (1 - 0.9**count)) / (jnp.sqrt(s / (1 - 0.99**count)) + 1e-8),
            params,
            mean,
            square,
        )
        return params, mean, square, count

    params = jax.jit(Moshi(CONFIG).init)(jax.random.key(0), process(0))["params"]
    zeros = jax.tree.map(jnp.zeros_like, params)
    carry = (params, zeros, zeros, jnp.zeros((), jnp.float32))
    for seed in range(200):
        carry = step(carry, process(seed))
    return CONFIG, carry[0]
