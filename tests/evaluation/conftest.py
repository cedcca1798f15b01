import jax
import numpy as np
import pytest

from ttt_jax.models.moshi import Moshi, MoshiConfig, TTTInsertion


@pytest.fixture(scope="session")
def config():
    """Layer 1 has TTT-Linear; delays differ among own and user streams."""
    return MoshiConfig(
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
        delays=(0, 0, 2, 0, 1),
        # In float32 its logits are of order 1, which the tolerances of these tests are for.
        ttt=TTTInsertion(layers=(1,), mini_batch_size=3, init="published"),
    )


@pytest.fixture(scope="session")
def params(config):
    """Far from the initial values, so that TTT takes part."""
    initial = jax.jit(Moshi(config).init)(jax.random.key(0), np.zeros((1, config.num_streams, 2), np.int32))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + 0.2 * rng.standard_normal(x.shape).astype(np.float32), initial)


@pytest.fixture(scope="session")
def recordings(config):
    """Codes of 23, 1, 9 and 0 frames, with holes."""
    rng = np.random.default_rng(1)
    codes = [rng.integers(0, 20, (config.num_streams, frames)).astype(np.int32) for frames in (23, 1, 9, 0)]
    codes[0][0, 5:8] = -1
    codes[0][3:, 11] = -1
    return codes
