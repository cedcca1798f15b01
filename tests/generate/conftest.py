import dataclasses

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from ttt_jax import save_model
from ttt_jax.convert import mimi_params, moshi_params
from ttt_jax.data import conversations
from ttt_jax.data.text import load_tokenizer, train_tokenizer
from ttt_jax.models.mimi import MimiConfig
from ttt_jax.models.moshi import Moshi, MoshiConfig, TTTInsertion


@pytest.fixture(scope="session")
def mimi(data_dir):
    """Config and parameters of the tiny Mimi, cut to as many codes as Moshi has."""
    config = MimiConfig.from_kyutai(data_dir / "mimi_tiny.json")
    tensors = load_file(data_dir / "mimi_tiny.safetensors")
    halved = {name: x[1::2] if "_codebook." in name and x.shape[:1] == (64,) else x for name, x in tensors.items()}
    config = dataclasses.replace(config, bins=32)
    return config, jax.device_put(mimi_params(config, halved), jax.devices()[0])


@pytest.fixture(scope="session")
def golden_moshi(data_dir):
    """Config and parameters of the tiny Moshi, 8 codebooks a speaker."""
    config = MoshiConfig.from_kyutai(data_dir / "moshi_tiny.json")
    params = moshi_params(config, load_file(data_dir / "moshi_tiny.safetensors"))
    return config, jax.device_put(params, jax.devices()[0])


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """Path of a sentencepiece model of whole words and letters."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_tokenizer(["hello my name is Anna", "my sister lives in Paris"] * 5, 40))
    return path


@pytest.fixture(scope="session")
def moshi(tokenizer):
    """Config and parameters of a Moshi with TTT and 2 codebooks a speaker, so far from the start that TTT matters."""
    config = MoshiConfig(
        dim=32,
        text_card=load_tokenizer(tokenizer).get_piece_size(),
        n_q=4,
        dep_q=2,
        card=32,
        num_heads=2,
        num_layers=2,
        context=6,
        depformer_dim=16,
        depformer_dim_feedforward=32,
        depformer_num_heads=2,
        depformer_num_layers=1,
        delays=(0, 0, 1, 0, 1),
        ttt=TTTInsertion(layers=(1,), mini_batch_size=3),
    )
    initial = jax.jit(Moshi(config).init)(jax.random.key(0), np.zeros((1, config.num_streams, 2), np.int32))["params"]
    rng = np.random.default_rng(0)
    return config, jax.tree.map(lambda x: x + 0.2 * rng.standard_normal(x.shape).astype(np.float32), initial)


@pytest.fixture(scope="session")
def directories(tmp_path_factory, moshi, mimi):
    """Where `moshi` and `mimi` are saved."""
    root = tmp_path_factory.mktemp("models")
    for name, model in (("moshi", moshi), ("mimi", mimi)):
        save_model(root / name, *model)
    return root / "moshi", root / "mimi"


@pytest.fixture(scope="session")
def speech(tmp_path_factory):
    """A synthesized conversation of a few seconds, one speaker a channel, at 8 kHz."""
    output = tmp_path_factory.mktemp("conversations") / "data"
    conversations.make(output, hours=0.002, seed=5, min_minutes=0.05, max_minutes=0.06, keep_wav=1)
    (path,) = (output / "wav").iterdir()
    return path
