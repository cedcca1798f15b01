import gc

import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.checkpoint import load, save_model
from ttt_jax.models.moshi import MoshiConfig, TTTInsertion

CONFIG = MoshiConfig(dim=64, num_heads=2, ttt=TTTInsertion((1, 3), kind="mlp"))
PARAMS = {"layers_0": {"w": jnp.arange(6.0).reshape(2, 3)}, "b": jnp.ones(4, jnp.bfloat16)}


def test_a_saved_model_comes_back(tmp_path):
    save_model(tmp_path / "deep" / "model", CONFIG, PARAMS)
    config, params = load(tmp_path / "deep" / "model")
    assert config == CONFIG
    np.testing.assert_array_equal(params["layers_0"]["w"], PARAMS["layers_0"]["w"])
    assert params["b"].dtype == jnp.bfloat16
    with pytest.raises(FileExistsError, match="choose another directory"):
        save_model(tmp_path / "deep" / "model", CONFIG, PARAMS)


def test_what_is_not_a_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"neither a workdir of train\.py nor a checkpoint"):
        load(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match="no finished checkpoint yet"):
        load(tmp_path)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # TensorStore's failed reads
def test_a_damaged_model_is_named(tmp_path):
    save_model(tmp_path / "model", CONFIG, PARAMS)
    for path in (tmp_path / "model" / "params" / "d").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="no readable checkpoint"):
        load(tmp_path / "model")
    gc.collect()
