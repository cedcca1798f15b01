"""Against recordings of ttt-video-dit's whole transformer in float64, with every token's own step size."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors import safe_open

from ttt_jax.convert import video_dit_params
from ttt_jax.convert.table import assemble
from ttt_jax.convert.video_dit import ttt_video_dit_table
from ttt_jax.models.video_dit import VideoDiT, VideoDiTConfig

NAMES = ("video_dit_mlp_1scene", "video_dit_linear_3scenes", "video_dit_linear_2scenes_ragged")


@functools.cache
def read(path):
    with safe_open(path, "np") as file:
        return file.metadata(), {name: file.get_tensor(name).astype(np.float64) for name in file.keys()}  # noqa: SIM118


def below(arrays, prefix):
    return {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}


@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_match(data_dir, name):
    metadata, arrays = read(data_dir / f"{name}.safetensors")
    tensors = below(arrays, "param/")
    config = dataclasses.replace(VideoDiTConfig.from_ttt_video_dit(metadata, tensors), dtype="float64")
    inputs = [arrays[f"in/{name}"] for name in ("video", "text", "timestep")]
    with jax.enable_x64(True):

        def objective(params):
            out = VideoDiT(config).apply({"params": params}, *inputs)
            return (out * arrays["cotangent"]).sum(), out

        (_, out), gradients = jax.jit(jax.value_and_grad(objective, has_aux=True))(video_dit_params(config, tensors))
    np.testing.assert_allclose(out, arrays["out"], rtol=0, atol=1e-6)
    recorded = below(arrays, "grad/")
    rules = [rule for rule in ttt_video_dit_table(config).rules if rule.names[0] in recorded]
    assert len(rules) == len(recorded)
    gradients = flatten_dict(gradients, sep="/")
    for rule in rules:
        expected = assemble(rule, recorded)
        # The goldens are stored as float32, so the error is relative to the largest entry.
        scale = max(1, np.abs(expected).max())
        np.testing.assert_allclose(gradients[rule.path], expected, rtol=0, atol=5e-6 * scale, err_msg=rule.path)
