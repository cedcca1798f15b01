import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from ttt_jax.convert import mimi_params
from ttt_jax.convert.mimi import is_hugging_face, mimi_from_hugging_face, mimi_table
from ttt_jax.convert.table import assemble, take_apart
from ttt_jax.models.mimi import Mimi, MimiConfig


@pytest.fixture(params=["mimi_tiny", "mimi_odd"])
def checkpoint(request, data_dir):
    config = MimiConfig.from_kyutai(data_dir / f"{request.param}.json", num_codebooks=4)
    return config, load_file(data_dir / f"{request.param}.safetensors")


@pytest.fixture
def hugging_face(data_dir):
    """A random `MimiModel` of transformers 4.57 and what it computes, shorter than its window, which it ignores."""
    path = data_dir / "mimi_hugging_face"
    data = dict(np.load(f"{path}.npz"))
    config = MimiConfig.from_hugging_face(json.loads(path.with_suffix(".json").read_text()), data["codes"].shape[1])
    assert data["codes"].shape[2] * config.stride <= config.context
    return config, load_file(f"{path}.safetensors"), data


def released(tensors):
    """The same checkpoint with the attention's projections under the names of released files."""
    names = {"in_projs.0.weight": "in_proj_weight", "out_projs.0.weight": "out_proj.weight"}
    for current, fused in names.items():
        tensors = {name.replace(current, fused): x for name, x in tensors.items()}
    return tensors


def test_gives_exactly_the_models_tree(checkpoint):
    config, tensors = checkpoint
    params = mimi_params(config, tensors)
    wav = jax.ShapeDtypeStruct((1, 1, config.frame_samples), jnp.float32)
    expected = jax.eval_shape(Mimi(config).init, jax.random.key(0), wav)["params"]
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), expected)
    flags = [name for name in tensors if name.endswith("_initialized")]
    assert sum(x.size for x in jax.tree.leaves(params)) + len(flags) == sum(x.size for x in tensors.values())


def test_both_namings_give_the_same_parameters(checkpoint):
    config, tensors = checkpoint
    other = released(tensors)
    assert len(set(other) - set(tensors)) == 4 * config.num_layers
    jax.tree.map(np.testing.assert_array_equal, mimi_params(config, tensors), mimi_params(config, other))


def test_gives_every_tensor_back_bit_for_bit(checkpoint):
    config, tensors = checkpoint
    table = mimi_table(config)
    back = dict(table.constants)
    for rule in table.rules:
        back |= take_apart(rule, assemble(rule, tensors))
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)
        assert back[name].dtype == tensor.dtype


def test_one_error_lists_every_missing_unexpected_and_misshapen_tensor(data_dir):
    config = MimiConfig.from_kyutai(data_dir / "mimi_tiny.json")
    tensors = load_file(data_dir / "mimi_tiny.safetensors")
    del tensors["encoder.model.0.conv.conv.bias"], tensors["quantizer.rvq_rest.vq.layers.14._codebook._initialized"]
    tensors["decoder.model.15.conv.conv.bias"] = np.zeros(3, np.float32)
    tensors["upsample.convtr.convtr.convtr.weight"] = np.zeros((32, 32, 4), np.float32)
    with pytest.raises(ValueError, match="do not fit the config") as error:
        mimi_params(config, tensors)
    for part in (
        "missing (2)",
        "encoder.model.0.conv.conv.bias [4]",
        "quantizer.rvq_rest.vq.layers.14._codebook._initialized [1]",
        "unexpected (1)",
        "decoder.model.15.conv.conv.bias [3]",
        "upsample.convtr.convtr.convtr.weight: expected [32, 1, 4], got [32, 32, 4]",
    ):
        assert part in str(error.value)


def test_hugging_faces_tensors_compute_what_they_computed_there(hugging_face):
    config, tensors, data = hugging_face
    assert is_hugging_face(tensors)
    params = mimi_params(config, mimi_from_hugging_face(config, tensors))

    @jax.jit
    def run(params, wav, codes):
        model, variables = Mimi(config), {"params": params}
        latent = model.apply(variables, wav, method="encode_to_latent")
        codes_of = model.apply(variables, latent, method="quantize")
        return latent, codes_of, model.apply(variables, codes, method="decode")

    latent, codes, decoded = run(params, data["wav"], data["codes"])
    # 2e-6 of the largest value: two float32 implementations that add in different orders
    np.testing.assert_allclose(latent, data["latent"], atol=2e-6 * np.abs(data["latent"]).max())
    np.testing.assert_array_equal(codes, data["codes"])
    np.testing.assert_allclose(decoded, data["decoded"], atol=2e-6 * np.abs(data["decoded"]).max())


def test_what_hugging_faces_tensors_lack_or_add_is_listed(hugging_face):
    config, tensors, _ = hugging_face
    del tensors["decoder_transformer.layers.1.self_attn.q_proj.weight"]
    tensors["decoder.layers.99.conv.weight"] = np.zeros((1, 1, 1), np.float32)
    with pytest.raises(ValueError, match="do not fit the config") as error:
        mimi_params(config, mimi_from_hugging_face(config, tensors))
    for part in (
        "missing (1): decoder_transformer.transformer.layers.1.self_attn.in_projs.0.weight [48, 16]",
        "decoder.layers.99.conv.weight [1, 1, 1]",
        "decoder_transformer.layers.1.self_attn.k_proj.weight [16, 16]",
    ):
        assert part in str(error.value)
    assert not is_hugging_face({"encoder.model.0.conv.conv.bias": np.zeros(3)})
