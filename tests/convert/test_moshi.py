import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from ttt_jax.convert import moshi_params
from ttt_jax.models.moshi import Moshi, MoshiConfig, TTTInsertion


@pytest.fixture(params=["moshi_tiny", "moshi_tiny_schedule"])
def checkpoint(request, data_dir):
    return MoshiConfig.from_kyutai(data_dir / f"{request.param}.json"), load_file(
        data_dir / f"{request.param}.safetensors"
    )


def renamed(config, tensors, *, fused):
    """The same checkpoint under the other naming."""
    sets = max(config.depth_schedule) + 1
    out = dict(tensors)
    stacks = [("transformer", config.num_layers, 1), ("depformer", config.depformer_num_layers, sets)]
    for stack, layers, blocks in stacks:
        for i in range(layers):
            for part, legacy in (("in", "in_proj_weight"), ("out", "out_proj.weight")):
                name = f"{stack}.layers.{i}.self_attn"
                split = [f"{name}.{part}_projs.{j}.weight" for j in range(blocks)]
                if fused:
                    out[f"{name}.{legacy}"] = np.concatenate([out.pop(key) for key in split])
                else:
                    out |= dict(zip(split, np.split(out.pop(f"{name}.{legacy}"), blocks), strict=True))
    return out


def test_gives_exactly_the_models_tree(checkpoint):
    config, tensors = checkpoint
    params = moshi_params(config, tensors)
    codes = jax.ShapeDtypeStruct((1, config.num_streams, 2), jnp.int32)
    expected = jax.eval_shape(Moshi(config).init, jax.random.key(0), codes)["params"]
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), expected)
    assert sum(x.size for x in jax.tree.leaves(params)) == sum(x.size for x in tensors.values())


def test_both_namings_give_the_same_parameters(checkpoint):
    config, tensors = checkpoint
    fused = any("in_proj_weight" in name for name in tensors)
    other = renamed(config, tensors, fused=not fused)
    assert set(other) != set(tensors)
    jax.tree.map(np.testing.assert_array_equal, moshi_params(config, tensors), moshi_params(config, other))


def test_one_error_lists_every_missing_unexpected_and_misshapen_tensor(checkpoint):
    config, tensors = checkpoint
    del tensors["emb.3.weight"], tensors["out_norm.alpha"]
    tensors["condition_provider.weight"] = np.zeros(3, np.float32)
    tensors["text_linear.weight"] = tensors["text_linear.weight"][:-1]
    with pytest.raises(ValueError, match="do not fit the config") as error:
        moshi_params(config, tensors)
    for part in (
        "missing (2)",
        "emb.3.weight",
        "out_norm.alpha",
        "unexpected (1)",
        "condition_provider.weight [3]",
        "text_linear.weight: expected [50, 64], got [49, 64]",
    ):
        assert part in str(error.value)


def test_refuses_a_config_with_ttt(checkpoint):
    config, tensors = checkpoint
    with pytest.raises(ValueError, match=r"config\.ttt must be None"):
        moshi_params(dataclasses.replace(config, ttt=TTTInsertion(layers=(0,))), tensors)
