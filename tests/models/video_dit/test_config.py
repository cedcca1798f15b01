import dataclasses
import re

import numpy as np
import pytest

from ttt_jax.config import from_mapping
from ttt_jax.models.video_dit import VideoDiTConfig


def test_published_sizes():
    config = VideoDiTConfig.of_size("5B")
    assert (config.model_dim, config.num_heads, config.num_layers) == (3072, 48, 42)
    assert (config.ttt_config.mini_batch_size, config.ttt_config.base_lr, config.ttt_config.causal) == (64, 0.1, False)
    debug = VideoDiTConfig.of_size("debug", ssm_layer="ttt_linear")
    assert (debug.model_dim, debug.num_heads, debug.num_layers) == (512, 8, 6)
    assert (debug.ttt_config.kind, debug.ttt_config.mini_batch_size, debug.ttt_config.base_lr) == ("linear", 16, 1.0)


def test_metadata_and_tensors_make_the_config_and_it_goes_back():
    shapes = {
        "patch_embedding.vid_proj.weight": (32, 4, 2, 2),
        "patch_embedding.text_proj.weight": (32, 24),
        "time_embed.0.weight": (40, 32),
        "layers.0.seq_modeling_block.ssm.ttt.W1": (2, 16, 16),
        "layers.1.seq_modeling_block.ssm.ttt.W1": (2, 16, 16),
    }
    tensors = {name: np.zeros(shape) for name, shape in shapes.items()}
    config = VideoDiTConfig.from_ttt_video_dit({"attn_length": "4", "ttt_base_lr": "0.5", "num_frames": "9"}, tensors)
    assert config == VideoDiTConfig(
        **{"model_dim": 32, "num_heads": 2, "num_layers": 2, "text_dim": 24, "time_embed_dim": 40, "in_channels": 4},
        **{"attn_length": 4, "ssm_layer": "ttt_linear", "ttt_base_lr": 0.5},
    )
    assert VideoDiTConfig.from_ttt_video_dit(config.to_ttt_video_dit(), tensors) == config
    assert from_mapping(VideoDiTConfig, dataclasses.asdict(config)) == config
    with pytest.raises(ValueError, match=re.escape("it says {'num_heads': 4}, the tensors say {'num_heads': 2}")):
        VideoDiTConfig.from_ttt_video_dit({"num_heads": "4"}, tensors)
    with pytest.raises(ValueError, match="unknown field 'attn_lenght' in the Video-DiT config; did you mean 'attn_len"):
        VideoDiTConfig.from_ttt_video_dit({"attn_lenght": "4"}, tensors)
    with pytest.raises(ValueError, match="attn_length must be int or a string of one, got 'four'"):
        VideoDiTConfig.from_ttt_video_dit({"attn_length": "four"}, tensors)


def test_a_config_of_cogvideox():
    raw = {"_class_name": "CogVideoXTransformer3DModel", "num_attention_heads": 48, "attention_head_dim": 64}
    raw |= {"num_layers": 42, "use_rotary_positional_embeddings": True, "norm_eps": 1e-5, "dropout": 0.0}
    assert VideoDiTConfig.from_cogvideox(raw | {"out_channels": 16}) == VideoDiTConfig()
    config = VideoDiTConfig.from_cogvideox(raw | {"ssm_layer": "ttt_linear", "attn_length": 6})
    assert (config.ssm_layer, config.attn_length) == ("ttt_linear", 6)
    assert VideoDiTConfig.from_cogvideox(config.to_cogvideox()) == VideoDiTConfig()
    with pytest.raises(ValueError, match="use_rotary_positional_embeddings=False is not supported"):
        VideoDiTConfig.from_cogvideox(raw | {"use_rotary_positional_embeddings": False})
    with pytest.raises(ValueError, match="out_channels=8 different from in_channels"):
        VideoDiTConfig.from_cogvideox(raw | {"out_channels": 8})
    with pytest.raises(ValueError, match="unknown field 'attn_lengths'"):
        VideoDiTConfig.from_cogvideox(raw | {"attn_lengths": 8})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 5}, "model_dim must be num_heads times a multiple of 16"),
        ({"model_dim": 48 * 8}, "got model_dim=384 and num_heads=48"),
        ({"num_layers": 0}, "num_layers must be an int >= 1, got 0"),
        ({"prefix_temporal_length": -1}, "prefix_temporal_length must be an int >= 0, got -1"),
        ({"mini_batch_size": 0}, "mini_batch_size must be an int >= 1, got 0"),
        ({"ssm_layer": "linear"}, "ssm_layer must be one of .*, got 'linear'"),
        ({"dtype": "float16"}, "dtype must be one of .*, got 'float16'"),
        ({"ttt_base_lr": 0.0}, "ttt_base_lr must be > 0, or None for the published value, got 0.0"),
        ({"theta": 0.0}, "theta must be > 0, got 0.0"),
        ({"gating_alpha_init": 0.0}, "gating_alpha_init must not be 0"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        VideoDiTConfig(**fields)


def test_unknown_size():
    with pytest.raises(ValueError, match=r"size must be one of .*'5B'.*, got '7B'"):
        VideoDiTConfig.of_size("7B")
