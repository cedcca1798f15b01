import dataclasses

import jax
import numpy as np
import pytest
import soundfile
from safetensors.numpy import load_file

from ttt_jax import save_model
from ttt_jax.convert import mimi_params, moshi_params
from ttt_jax.data import conversations, dialogue
from ttt_jax.data.codecs import Codec2
from ttt_jax.data.text import load_tokenizer, train_tokenizer
from ttt_jax.models.mimi import MimiConfig
from ttt_jax.models.moshi import Moshi, MoshiConfig, TTTInsertion


@pytest.fixture(scope="session")
def mimi_tensors(data_dir):
    """Every other entry of the tiny Mimi's codebooks, and the rest of it."""
    tensors = load_file(data_dir / "mimi_tiny.safetensors")
    return {name: x[1::2] if "_codebook." in name and x.shape[:1] == (64,) else x for name, x in tensors.items()}


@pytest.fixture(scope="session")
def mimi(data_dir, mimi_tensors):
    """Config and parameters of a Mimi of as many codes as Moshi has."""
    config = MimiConfig.from_kyutai(data_dir / "mimi_tiny.json")
    config = dataclasses.replace(config, bins=32)
    return config, jax.device_put(mimi_params(config, mimi_tensors), jax.devices()[0])


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
    """Config and parameters of a Moshi with TTT and 2 codebooks a speaker."""
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
    return config, random_params(config)


def random_params(config):
    """Of a Moshi that says something else each frame."""
    rng, codes = np.random.default_rng(0), np.zeros((1, config.num_streams, 2), np.int32)
    shapes = jax.eval_shape(Moshi(config).init, jax.random.key(0), codes)["params"]
    return jax.tree.map(lambda x: (x.ndim == 1) + 0.3 * rng.standard_normal(x.shape).astype(np.float32), shapes)


@pytest.fixture(scope="session")
def save_random(tmp_path_factory):
    """Saves a Moshi of random parameters, and returns the directory."""

    def save(config):
        directory = tmp_path_factory.mktemp("random") / "model"
        save_model(directory, config, random_params(config))
        return directory

    return save


@pytest.fixture(scope="session")
def directories(tmp_path_factory, moshi, mimi):
    """Where `moshi` and `mimi` are saved."""
    root = tmp_path_factory.mktemp("models")
    for name, model in (("moshi", moshi), ("mimi", mimi)):
        save_model(root / name, *model)
    return root / "moshi", root / "mimi"


@pytest.fixture(scope="session")
def speech(tmp_path_factory):
    """Two seconds and a bit of a synthesized conversation at 8 kHz, one speaker a channel; the right one talks."""
    (outline, *_) = dialogue.outlines(5, 0.002, 0.05, 0.06, facts_per_minute=0.5, questions_per_fact=1)
    codec = Codec2()
    blocks = conversations.Conversation(outline, None).read(codec).blocks
    wav = next(block for block in blocks if np.abs(block[1]).max() > 0.1)
    path = tmp_path_factory.mktemp("speech") / "speech.wav"
    soundfile.write(path, wav.T[: round(2.1 * codec.sample_rate_hz)], codec.sample_rate_hz)
    return path
