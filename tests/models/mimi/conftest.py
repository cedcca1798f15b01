import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.models.mimi import Mimi, MimiConfig, decode_step, encode_step

# 16 samples and two steps a frame; a context that is no multiple of them.
CONFIG = MimiConfig(
    sample_rate=200,
    dimension=8,
    n_filters=4,
    ratios=(4, 2),
    kernel_size=5,
    num_heads=2,
    num_layers=1,
    dim_feedforward=16,
    context=5,
    layer_scale=1.0,
    codebook_dim=4,
    n_q=4,
    bins=16,
    num_codebooks=3,
)


@pytest.fixture(scope="session")
def config():
    return CONFIG


@pytest.fixture(scope="session")
def params():
    """Random values of about the initial ones' size; biases take part, and the first entry of codebooks is unused."""
    wav = jnp.zeros((1, 1, CONFIG.frame_samples))
    shapes = jax.eval_shape(Mimi(CONFIG).init, jax.random.key(0), wav)["params"]
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        if path[-1].key in ("scale", "scale1", "scale2"):
            return 1 + 0.1 * noise
        if path[-1].key == "cluster_usage":
            usage = np.abs(1 + 0.2 * noise)
            usage[:, 0] = 0
            return usage
        if path[-1].key == "embedding_sum":
            noise[:, 0] *= 1e-5
            return 0.3 * noise
        return (0.3 if len(leaf.shape) < 3 else float(np.prod(leaf.shape[1:])) ** -0.5) * noise

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="session")
def random_wav():
    """Function of (seed, batch, samples) to `[batch, 1, samples]`."""

    def make(seed, batch, samples):
        return np.random.default_rng(seed).normal(size=(batch, 1, samples)).astype(np.float32)

    return make


@pytest.fixture(scope="session")
def random_codes():
    """Function of (seed, batch, frames) to `[batch, num_codebooks, frames]` int32."""

    def make(seed, batch, frames):
        shape = (batch, CONFIG.num_codebooks, frames)
        return np.random.default_rng(seed).integers(0, CONFIG.bins, shape).astype(np.int32)

    return make


@pytest.fixture(scope="session")
def apply():
    """Jitted `(config, method, params, x)` -> what the method returns for whole sequences."""

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def whole(config, method, params, x):
        return Mimi(config).apply({"params": params}, x, method=method)

    return whole


@pytest.fixture(scope="session")
def steps():
    """Jitted `encode_step` and `decode_step`, the config static, the state donated."""
    return tuple(jax.jit(step, static_argnums=0, donate_argnums=2) for step in (encode_step, decode_step))
