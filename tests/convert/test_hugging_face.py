"""Recorded from transformers' MoshiForConditionalGeneration with random weights, sequences shorter than its window."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from ttt_jax.convert import moshi_params
from ttt_jax.convert.hugging_face import codec_tensors, has_codec, is_hugging_face, moshi_config, moshi_tensors
from ttt_jax.models.moshi import Moshi


@pytest.fixture
def raw(data_dir):
    return json.loads((data_dir / "moshi_hugging_face.json").read_text())


@pytest.fixture
def tensors(data_dir):
    return load_file(data_dir / "moshi_hugging_face.safetensors")


def test_the_recorded_hidden_states_and_logits(data_dir, raw, tensors):
    config = moshi_config(raw)
    params = moshi_params(config, moshi_tensors(config, tensors))
    recorded = np.load(data_dir / "moshi_hugging_face.npz")
    model, variables = Moshi(config), {"params": params}
    text, codes = jnp.asarray(recorded["text"])[:, None], jnp.asarray(recorded["codes"])
    z, text_logits, _ = model.apply(variables, jnp.concatenate([text, codes], 1), method="temporal")
    depth = model.apply(variables, z, jnp.concatenate([text, codes[:, : config.dep_q]], 1), method="depth")
    # float32 on both sides: 4e-6 of a largest logit of 7
    np.testing.assert_allclose(z, recorded["z"], atol=1e-5)
    np.testing.assert_allclose(text_logits[:, 0], recorded["text_logits"], atol=1e-5)
    np.testing.assert_allclose(jnp.moveaxis(depth, 1, 2), recorded["depth_logits"], atol=1e-5)


def test_sizes_follow_from_its_config(raw):
    assert moshi_config({}) == moshi_config({"num_codebooks": 8, "model_type": "moshi"})
    published = moshi_config({})
    assert (published.hidden_scale, published.depformer_dim_feedforward, published.context) == (4.125, 4224, 3000)
    assert published.delays == (0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1)
    assert moshi_config(raw).num_streams == 9
    assert moshi_config({"rope_parameters": {"rope_theta": 5e5}, "sliding_window": None}).max_period == 5e5
    for wrong in ({"num_key_value_heads": 1}, {"hidden_act": "gelu"}, {"rms_norm_eps": 1e-5}, {"head_dim": 99}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.* is not supported"):
            moshi_config(raw | wrong)
    with pytest.raises(ValueError, match=r"depth_decoder_config\.hidden_act='gelu'"):
        moshi_config(raw | {"depth_decoder_config": raw["depth_decoder_config"] | {"hidden_act": "gelu"}})
    with pytest.raises(ValueError, match="rope_type='yarn'"):
        moshi_config({"rope_parameters": {"rope_type": "yarn"}})


def test_the_codecs_tensors_are_told_apart(raw, tensors):
    assert is_hugging_face(tensors)
    assert has_codec(tensors)
    names = moshi_tensors(moshi_config(raw), tensors).keys()
    assert not any("encoder" in name for name in names)
    assert "encoder.layers.0.conv.weight" in codec_tensors(tensors)


def test_a_missing_or_unknown_tensor_is_in_the_error(raw, tensors):
    config = moshi_config(raw)
    del tensors["decoder.model.layers.1.self_attn.k_proj.linear.weight"]
    tensors["decoder.model.layers.0.mlp.fc3.weight"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match="do not fit the config") as error:
        moshi_params(config, moshi_tensors(config, tensors))
    assert "transformer.layers.1.self_attn.in_projs.0.weight" in str(error.value)
    assert "decoder.model.layers.0.mlp.fc3.weight" in str(error.value)
