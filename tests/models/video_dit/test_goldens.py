"""Against recordings of ttt-video-dit's whole transformer in float64, with every token's own step size.

It rounds the timestep's embedding to float32, as the model here does.
"""

import dataclasses

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import safe_open

from ttt_jax.convert import video_dit_params
from ttt_jax.convert.table import assemble
from ttt_jax.convert.video_dit import ttt_video_dit_table
from ttt_jax.models.video_dit import VideoDiT, VideoDiTConfig


def below(arrays, prefix):
    return {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}


@pytest.mark.parametrize(
    "name", ["video_dit_mlp_1scene", "video_dit_linear_3scenes", "video_dit_linear_2scenes_ragged"]
)
def test_outputs_and_gradients_match(data_dir, name):
    with safe_open(data_dir / f"{name}.safetensors", "np") as file:
        metadata = file.metadata()
        arrays = {name: file.get_tensor(name).astype(np.float64) for name in file.keys()}  # noqa: SIM118
    tensors, recorded = below(arrays, "param/"), below(arrays, "grad/")
    config = dataclasses.replace(VideoDiTConfig.from_ttt_video_dit(metadata, tensors), dtype="float64")
    params = flatten_dict(video_dit_params(config, tensors), sep="/")
    rules = [rule for rule in ttt_video_dit_table(config).rules if rule.names[0] in recorded]
    assert len(rules) == len(recorded)
    inputs = [arrays[f"in/{name}"] for name in ("video", "text", "timestep")]

    def objective(chosen):
        out = VideoDiT(config).apply({"params": unflatten_dict(params | chosen, sep="/")}, *inputs)
        return (out * arrays["cotangent"]).sum(), out

    with jax.enable_x64(True):
        grad = jax.jit(jax.value_and_grad(objective, has_aux=True))
        (_, out), gradients = grad({rule.path: params[rule.path] for rule in rules})
    np.testing.assert_allclose(out, arrays["out"], rtol=0, atol=1e-6)
    for rule in rules:
        expected = assemble(rule, recorded)
        # The goldens are stored as float32, so the error is relative to the largest entry.
        scale = max(1, np.abs(expected).max())
        np.testing.assert_allclose(gradients[rule.path], expected, rtol=0, atol=5e-6 * scale, err_msg=rule.path)
