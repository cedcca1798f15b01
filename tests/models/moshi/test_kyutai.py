"""The fields of the `config.json` of published checkpoints, and how large the models are that they describe."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from ttt_jax.config import from_mapping
from ttt_jax.models.moshi import Conditioner, Moshi, MoshiConfig, TTTInsertion

SHARED = {
    **{"card": 2048, "existing_text_padding_id": 3, "hidden_scale": 4.125, "causal": True, "layer_scale": None},
    **{"gating": "silu", "norm": "rms_norm_f32", "positional_embedding": "rope", "depformer_dim": 1024},
    **{"depformer_num_heads": 16, "depformer_num_layers": 6, "depformer_multi_linear": True},
    **{"depformer_pos_emb": "none", "depformer_weights_per_step": True},
}
MOSHI_7B = SHARED | {
    **{"dim": 4096, "text_card": 32000, "n_q": 16, "dep_q": 8, "num_heads": 32, "num_layers": 32, "context": 3000},
    **{"max_period": 10000, "depformer_dim_feedforward": 4224, "depformer_causal": True, "depformer_context": 8},
    **{"depformer_layer_scale": None, "depformer_max_period": 10000, "depformer_gating": "silu"},
    **{"delays": [0, *[0, *[1] * 7] * 2]},
}
QUALITY = {
    "conditioners": {
        "description": {
            "type": "lut",
            "lut": {
                **{"n_bins": 31, "dim": 16, "tokenizer": "noop"},
                **{"possible_values": ["very_bad", "bad", "neutral", "good", "very_good"]},
            },
        }
    },
    "fuser": {
        **{"cross_attention_pos_emb": False, "cross_attention_pos_emb_scale": 1},
        **{"sum": ["description"], "prepend": [], "cross": []},
    },
}
HIBIKI = SHARED | QUALITY | {"model_type": "hibiki", "text_card": 48000, "context": 1500, "max_period": 100000.0}
HIBIKI_1B = HIBIKI | {
    **{"dim": 2048, "n_q": 16, "dep_q": 8, "num_heads": 16, "num_layers": 16, "depformer_dim_feedforward": None},
    **{"delays": [0, *[0, *[2] * 7] * 2], "cross_attention": False, "mimi_name": "mimi-pytorch-e351c8d8@125"},
}
HIBIKI_2B = HIBIKI | {
    **{"dim": 2560, "n_q": 32, "dep_q": 16, "num_heads": 20, "num_layers": 24, "delays": [0, *[0, *[2] * 15] * 2]},
    **{"depformer_num_layers": 4, "depformer_dim_feedforward": 3072, "depformer_low_rank_embeddings": 128},
    **{"depformer_weights_per_step_schedule": [*range(8), *[8] * 8], "cross_attention": []},
    **{"lm_gen_config": {"temp": 0.8, "temp_text": 0.8, "top_k": 250, "top_k_text": 50}, "model_id": {"epoch": 200}},
}
STT = SHARED | {
    **{"model_type": "stt", "n_q": 32, "dep_q": 0, "delays": [0] * 33, "dim": 2048, "max_period": 100000.0},
    **{"depformer_dim_feedforward": None, "conditioners": {}, "cross_attention": False, "fuser": None},
    **{"tokenizer_name": "tokenizer_en_audio_4000.model", "lm_gen_config": {"temp": 0.0, "temp_text": 0.0}},
}
STT_1B = STT | {
    **{"text_card": 8000, "num_heads": 16, "num_layers": 16, "context": 750},
    **{"extra_heads_num_heads": 4, "extra_heads_dim": 6},
    **{"stt_config": {"audio_delay_seconds": 0.5, "audio_silence_prefix_seconds": 0.0}},
}
STT_2_6B = STT | {
    **{"text_card": 4000, "num_heads": 32, "num_layers": 48, "context": 375},
    **{"stt_config": {"audio_delay_seconds": 2.5, "audio_silence_prefix_seconds": 1.0}},
}
PERSONAPLEX = {"model_type": "personaplex", "version": "7b-v1"}
PUBLISHED = {
    **{"moshi_7b": MOSHI_7B, "hibiki_1b": HIBIKI_1B, "hibiki_2b": HIBIKI_2B},
    **{"stt_1b": STT_1B, "stt_2.6b": STT_2_6B, "personaplex": PERSONAPLEX},
}


def shapes(config: MoshiConfig):
    codes = jax.ShapeDtypeStruct((1, config.num_streams, 1), np.int32)
    return jax.eval_shape(Moshi(config).init, jax.random.key(0), codes)["params"]


def size(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def test_the_7b_model_needs_no_config():
    assert MoshiConfig.from_kyutai(MOSHI_7B) == MoshiConfig()


@pytest.mark.parametrize(
    ("name", "file_bytes", "num_tensors"),
    [("hibiki_2b", 5_574_762_720, 327), ("stt_1b", 1_978_522_200, 135), ("personaplex", 16_742_874_000, 475)],
)
def test_sizes_are_those_of_the_published_files(name, file_bytes, num_tensors):
    """bfloat16, behind a header of some 100 bytes for each tensor; layers are alike, so two stand for all."""
    config = MoshiConfig.from_kyutai(PUBLISHED[name])
    two, three = (size(shapes(dataclasses.replace(config, num_layers=n))) for n in (2, 3))
    header = file_bytes - 2 * (two + (config.num_layers - 2) * (three - two))
    assert 60 * num_tensors < header < 160 * num_tensors


def test_roles_of_the_streams():
    roles = {name: (c.voice_q, c.user_q) for name, c in map(_read, PUBLISHED)}
    assert roles == {
        **{"moshi_7b": (8, 8), "hibiki_1b": (8, 8), "hibiki_2b": (16, 16)},
        **{"stt_1b": (0, 32), "stt_2.6b": (0, 32), "personaplex": (8, 8)},
    }


def test_what_the_variants_add():
    hibiki = MoshiConfig.from_kyutai(HIBIKI_2B)
    assert hibiki.depformer_low_rank_embeddings == 128
    (quality,) = hibiki.conditioners
    assert quality == Conditioner("description", 31, 16, ("very_bad", "bad", "neutral", "good", "very_good"))
    speech_to_text = MoshiConfig.from_kyutai(STT_1B)
    assert (speech_to_text.dep_q, speech_to_text.depth_schedule, speech_to_text.max_delay) == (0, (), 0)
    assert (speech_to_text.extra_heads_num_heads, speech_to_text.extra_heads_dim) == (4, 6)
    assert MoshiConfig.from_kyutai(PERSONAPLEX) == MoshiConfig(dep_q=16, model_type="personaplex")
    # What only says how the tensors are stored, or what Kyutai's loader ignores, changes nothing.
    stored = {"lora": True, "lora_rank": 64, "lora_scaling": 2.0, "quantize": True, "depformer_causal": False}
    assert MoshiConfig.from_kyutai(MOSHI_7B | stored | {"demux_second_stream": False}) == MoshiConfig()


@pytest.mark.parametrize("name", PUBLISHED)
def test_written_and_read_again(name):
    config = MoshiConfig.from_kyutai(PUBLISHED[name])
    written = config.to_kyutai()
    assert MoshiConfig.from_kyutai(json.loads(json.dumps(written))) == config
    assert from_mapping(MoshiConfig, json.loads(json.dumps(dataclasses.asdict(config)))) == config
    for field, value in PUBLISHED[name].items():
        if value and field in written:
            assert written[field] == value, field


def test_fields_of_this_project_are_not_written():
    config = MoshiConfig(ttt=TTTInsertion((0,)), sinks=4, dtype="bfloat16")
    assert config.to_kyutai() == MoshiConfig().to_kyutai()


def _read(name: str):
    return name, MoshiConfig.from_kyutai(PUBLISHED[name])
