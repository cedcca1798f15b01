"""Video-DiT's weights: ttt-video-dit's, with recorded outputs, and CogVideoX', with fresh TTT layers; and back."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import ttt_jax
from ttt_jax.convert import video_dit_params
from ttt_jax.convert.program import Options, _leaves, convert, describe, plan
from ttt_jax.convert.reverse import describe as reversed_lines
from ttt_jax.convert.reverse import reverse
from ttt_jax.convert.sources import wanted_of_repository
from ttt_jax.convert.video_dit import cogvideox_table
from ttt_jax.models.video_dit import VideoDiT, VideoDiTConfig


@pytest.fixture
def golden(data_dir, tmp_path):
    """Function of a name to its state_dict in a file, as one would be published, its metadata, and all its arrays."""

    def make(name):
        with safe_open(data_dir / f"{name}.safetensors", "np") as file:
            metadata = file.metadata()
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        tensors = {name.removeprefix("param/"): x for name, x in arrays.items() if name.startswith("param/")}
        save_file(tensors, tmp_path / f"{name}.safetensors", metadata)
        return tmp_path / f"{name}.safetensors", metadata, tensors, arrays

    return make


def test_a_converted_checkpoint_gives_the_recorded_video_and_goes_back_bit_for_bit(golden, tmp_path):
    """Of TTT-MLP, which has all the names; the other recordings are compared in tests/models by the same tree."""
    path, metadata, tensors, arrays = golden("video_dit_mlp_1scene")
    convert(plan("video_dit", str(path), Options()), tmp_path / "out")
    config, params = ttt_jax.load(tmp_path / "out")
    assert config == VideoDiTConfig.from_ttt_video_dit(metadata, tensors)
    jax.tree.map(np.testing.assert_array_equal, params, video_dit_params(config, tensors))
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        model = VideoDiT(dataclasses.replace(config, dtype="float64"))
        inputs = [arrays[f"in/{name}"].astype(np.float64) for name in ("video", "text", "timestep")]
        out = jax.jit(model.apply)({"params": params}, *inputs)
    np.testing.assert_allclose(out, arrays["out"], rtol=0, atol=1e-6)

    reverse(tmp_path / "out", tmp_path / "back", dtype=None, names=None)
    home = load_file(tmp_path / "back" / "model.safetensors")
    assert home.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(home[key], tensor, err_msg=key)
    assert plan("video_dit", str(tmp_path / "back"), Options()).config == config


def test_a_state_dict_beside_other_things_and_a_config_of_its_own(golden, tmp_path):
    path, metadata, tensors, _ = golden("video_dit_linear_3scenes")
    inside = {f"model.{name}": x for name, x in tensors.items()}
    save_file(inside | {"optimizer.step": np.zeros(1)}, tmp_path / "run.safetensors", {"format": "pt"})
    config = plan("video_dit", str(tmp_path / "run.safetensors"), Options()).config
    assert (config.attn_length, config.ttt_config.base_lr, config.model_dim) == (12, 1.0, 32)
    (tmp_path / "sizes.json").write_text(json.dumps(metadata | {"ttt_base_lr": 0.25}))
    config = plan("video_dit", str(tmp_path / "run.safetensors"), Options(config=tmp_path / "sizes.json")).config
    assert (config.attn_length, config.ttt_config.base_lr) == (4, 0.25)
    tensors["layers.1.mlp.layer1.bias"] = tensors["layers.1.mlp.layer1.bias"][1:]
    del tensors["transformer_norm.bias"]
    save_file(tensors | {"extra": np.zeros(3)}, path, metadata)
    with pytest.raises(
        ValueError, match=r"(?s)missing \(1\): transformer_norm.*unexpected \(1\): extra.*mlp\.layer1\.bias: expected"
    ):
        plan("video_dit", str(path), Options())


# Of one layer of width 16 in diffusers, with one head, 2 channels, text of width 5 and time of width 3.
DIFFUSERS = """
patch_embed.proj.weight 16 2 2 2; patch_embed.proj.bias 16; patch_embed.text_proj.weight 16 5
patch_embed.text_proj.bias 16; time_embedding.linear_1.weight 3 16; time_embedding.linear_1.bias 3
time_embedding.linear_2.weight 3 3; time_embedding.linear_2.bias 3
transformer_blocks.0.norm1.linear.weight 96 3; transformer_blocks.0.norm1.linear.bias 96
transformer_blocks.0.norm1.norm.weight 16; transformer_blocks.0.norm1.norm.bias 16
transformer_blocks.0.attn1.norm_q.weight 16; transformer_blocks.0.attn1.norm_q.bias 16
transformer_blocks.0.attn1.norm_k.weight 16; transformer_blocks.0.attn1.norm_k.bias 16
transformer_blocks.0.attn1.to_q.weight 16 16; transformer_blocks.0.attn1.to_q.bias 16
transformer_blocks.0.attn1.to_k.weight 16 16; transformer_blocks.0.attn1.to_k.bias 16
transformer_blocks.0.attn1.to_v.weight 16 16; transformer_blocks.0.attn1.to_v.bias 16
transformer_blocks.0.attn1.to_out.0.weight 16 16; transformer_blocks.0.attn1.to_out.0.bias 16
transformer_blocks.0.norm2.linear.weight 96 3; transformer_blocks.0.norm2.linear.bias 96
transformer_blocks.0.norm2.norm.weight 16; transformer_blocks.0.norm2.norm.bias 16
transformer_blocks.0.ff.net.0.proj.weight 64 16; transformer_blocks.0.ff.net.0.proj.bias 64
transformer_blocks.0.ff.net.2.weight 16 64; transformer_blocks.0.ff.net.2.bias 16
norm_final.weight 16; norm_final.bias 16; norm_out.linear.weight 32 3; norm_out.linear.bias 32
norm_out.norm.weight 16; norm_out.norm.bias 16; proj_out.weight 8 16; proj_out.bias 8
"""


def test_the_names_are_those_of_diffusers():
    sizes = {"model_dim": 16, "num_heads": 1, "num_layers": 1, "text_dim": 5, "time_embed_dim": 3, "in_channels": 2}
    lines = [entry.split() for entry in re.split(r"[;\n]", DIFFUSERS) if entry.strip()]
    expected = {name: tuple(map(int, shape)) for name, *shape in lines}
    assert cogvideox_table(VideoDiTConfig(**sizes)).shapes == expected


RENAMES = {
    "patch_embedding.vid_proj": "patch_embed.proj",
    "patch_embedding.text_proj": "patch_embed.text_proj",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "layers.": "transformer_blocks.",
    "pre_seq_layernorm": "norm1.norm",
    "pre_seq_adaLN_modulation.1": "norm1.linear",
    "pre_mlp_layernorm": "norm2.norm",
    "pre_mlp_adaLN_modulation.1": "norm2.linear",
    "seq_modeling_block.q_norm": "attn1.norm_q",
    "seq_modeling_block.k_norm": "attn1.norm_k",
    "seq_modeling_block.q.": "attn1.to_q.",
    "seq_modeling_block.k.": "attn1.to_k.",
    "seq_modeling_block.v.": "attn1.to_v.",
    "seq_modeling_block.o.": "attn1.to_out.0.",
    "mlp.layer1": "ff.net.0.proj",
    "mlp.layer2": "ff.net.2",
    "transformer_norm": "norm_final",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.norm": "norm_out.norm",
    "final_layer.linear": "proj_out",
}
"""What ttt-video-dit and diffusers call the same."""


def in_diffusers(name):
    for ours, theirs in RENAMES.items():
        name = name.replace(ours, theirs)
    return name


@pytest.fixture
def cogvideox(golden, tmp_path):
    """A pipeline's folder whose transformer, in two files, has the golden's weights without TTT; config and tensors."""
    _, metadata, tensors, _ = golden("video_dit_linear_3scenes")
    config = VideoDiTConfig.from_ttt_video_dit(metadata, tensors)
    params = flatten_dict(video_dit_params(config, tensors), sep="/")
    named = {in_diffusers(name): x for name, x in tensors.items() if ".ssm." not in name and "_ssm_" not in name}
    folder = tmp_path / "pipeline" / "transformer"
    folder.mkdir(parents=True)
    files = {name: f"diffusion_pytorch_model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(named)}
    for file in set(files.values()):
        save_file({name: x for name, x in named.items() if files[name] == file}, folder / file)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    (folder / "config.json").write_text(json.dumps(config.to_cogvideox()))
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"ssm_layer": "ttt_linear", "attn_length": 4, "mini_batch_size": 16}))
    return folder.parent, own, named, params


def test_cogvideox_gets_fresh_ttt_layers_by_the_seed_and_goes_back(cogvideox, tmp_path):
    folder, own, named, base = cogvideox
    assert wanted_of_repository("cogvideox", folder) == (["transformer/*.safetensors"], [])
    steps = plan("cogvideox", str(folder), Options(config=own))
    assert "inserted -> layers_1/gate_backward_video float32[32]" in list(describe(steps))
    convert(steps, tmp_path / "out", seed=3)
    config, params = ttt_jax.load(tmp_path / "out")
    params = flatten_dict(params, sep="/")
    assert (config.ssm_layer, config.attn_length, config.num_layers) == ("ttt_linear", 4, 2)
    fresh = {path for path in base if "/ttt/" in path or "/gate_" in path}
    assert params.keys() == base.keys()
    for path in base.keys() - fresh:
        np.testing.assert_array_equal(params[path], base[path], err_msg=path)
    np.testing.assert_array_equal(params["layers_1/gate_forward_text"], np.full(32, 0.1, np.float32))
    first = params["layers_0/ttt/wo/kernel"]
    assert np.std(first) == pytest.approx(0.02, rel=0.1)
    assert np.all(first != params["layers_1/ttt/wo/kernel"])
    again, other = (dict(_leaves(steps, seed))["layers_0/ttt/wo/kernel"] for seed in (3, 4))
    np.testing.assert_array_equal(again, first)
    assert np.all(other != first)

    reverse(tmp_path / "out", tmp_path / "back", dtype=None, names=None)
    home = load_file(tmp_path / "back" / "diffusion_pytorch_model.safetensors")
    assert home.keys() == named.keys()
    for name, tensor in named.items():
        np.testing.assert_array_equal(home[name], tensor, err_msg=name)
    ttt = load_file(tmp_path / "back" / "ttt.safetensors")
    assert ttt.keys() == fresh
    np.testing.assert_array_equal(ttt["layers_0/ttt/wo/kernel"], first)
    assert plan("cogvideox", str(tmp_path / "back"), Options(config=own)).config == config

    *lines, summary = reversed_lines(tmp_path / "out", dtype=None, names="ttt_video_dit")
    name = "layers.1.seq_modeling_block.ssm.ttt.learnable_ttt_lr_weight"
    assert f"layers_1/ttt/step_size/kernel -> {name} float32[2, 1, 32]" in lines
    assert summary.startswith(f"{len(base)} parameters and 0 of TTT")
    with pytest.raises(ValueError, match=r"--names: expected one of \('ttt_video_dit', 'diffusers'\) .*got 'fused'"):
        reverse(tmp_path / "out", tmp_path / "wrong", dtype=None, names="fused")
