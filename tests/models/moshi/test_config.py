import dataclasses
import json

import numpy as np
import pytest

from ttt_jax.config import from_mapping
from ttt_jax.models.moshi import Conditioner, MoshiConfig, TTTInsertion, check_codes


def _condition(table: dict) -> dict:
    return {"conditioners": {"a": {"type": "lut", "lut": table}}, "fuser": {"sum": ["a"]}}


TINY = {"n_q": 2, "dep_q": 1, "delays": (0, 0, 1), "card": 8, "text_card": 10}


def test_defaults_are_the_7b_model():
    config = MoshiConfig()
    assert (config.dim, config.num_layers, config.context, config.max_delay) == (4096, 32, 3000, 1)
    assert config == MoshiConfig.from_kyutai({})


def test_reads_kyutais_json(data_dir, tmp_path):
    path = data_dir / "moshi_tiny_schedule.json"
    config = MoshiConfig.from_kyutai(path)
    assert config.depth_schedule == (0, 1, 1, 2)
    assert hash(config) == hash(MoshiConfig.from_kyutai(json.loads(path.read_text())))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_layer": 3}, "did you mean 'num_layers'"),
        ({"norm": "layer_norm"}, "norm='layer_norm' is not supported"),
        ({"sinks": 4}, "unknown field 'sinks'"),
        ({"model_type": "tts"}, "model_type='tts' is not supported: text-to-speech models .* cross attention"),
        ({"model_type": "hibki"}, "model_type must be one of .* did you mean 'hibiki'"),
        ({"cross_attention": True}, "cross_attention=True is not supported"),
        ({"demux_second_stream": True}, "demux_second_stream=True is not supported"),
        ({"kv_repeat": 2}, "kv_repeat=2 is not supported"),
        ({"depformer_norm": "rms_norm"}, "depformer_norm='rms_norm' is not supported"),
        ({"text_card_out": 5}, "text_card_out=5"),
        ({"depformer_dim_feedforward": [1, 2]}, "depformer_dim_feedforward must be one int"),
        ({"conditioners": {"voice": {"type": "tensor", "tensor": {"dim": 8}}}, "fuser": {"cross": ["voice"]}}, "cross"),
        ({"conditioners": {"voice": {"type": "tensor"}}, "fuser": {"sum": ["voice"]}}, "type='tensor' is not support"),
        ({"conditioners": {"a": {"type": "lut", "lut": {"dim": 2, "n_bins": 2}}}}, "fuser.sum must name every one"),
        ({"fuser": {"sum": ["a"]}}, r"every one of the conditioners \[\], got \['a'\]"),
        (_condition({"n_bins": 2, "dim": 2, "tokenizer": "bpe"}), "tokenizer must be 'noop', got 'bpe'"),
        (_condition({"n_bins": 2, "dim": 2, "learn_padding": False}), "must hold n_bins, dim and possible_values"),
        (_condition({"n_bins": 1, "dim": 2, "possible_values": ["x", "y"]}), "at most n_bins = 1 different words"),
    ],
)
def test_from_kyutai_refuses_what_it_does_not_implement(fields, message):
    with pytest.raises(ValueError, match=message):
        MoshiConfig.from_kyutai(fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dim": 100, "num_heads": 3}, "dim must be divisible by num_heads, got dim=100 and num_heads=3"),
        ({"num_heads": 4096}, "must be even for the rotary embedding"),
        ({"depformer_num_heads": 3}, "depformer_dim must be divisible by depformer_num_heads"),
        ({"delays": (0, 1)}, "delays must hold n_q"),
        ({"delays": (-1,) * 17}, "delays must be >= 0"),
        ({"dep_q": 17}, "dep_q must be <= n_q"),
        ({"dep_q": -1}, "dep_q must be an int >= 0"),
        ({"extra_heads_num_heads": -1}, "extra_heads_num_heads must be an int >= 0"),
        ({"depformer_low_rank_embeddings": 0}, "depformer_low_rank_embeddings must be an int >= 1"),
        ({"existing_text_padding_id": None}, "existing_text_padding_id must be an int >= 0"),
        ({"conditioners": (Conditioner("a", 2, 2),) * 2}, "conditioners must have different names"),
        ({"context": 0}, "context must be an int >= 1"),
        ({"sinks": -1}, "sinks must be an int >= 0"),
        ({"sinks": True}, "sinks must be an int >= 0"),
        ({"dtype": "float16"}, "dtype must be one of"),
        ({"attention": "windows"}, "did you mean 'window'"),
        ({"depformer_weights_per_step_schedule": (0, 1)}, "must hold dep_q = 8 values"),
        ({"depformer_weights_per_step_schedule": (0, 2) * 4}, "use every weight set"),
        ({"ttt": TTTInsertion(layers=(32,))}, r"ttt\.layers must lie in 0 \.\. 31"),
        ({"ttt": TTTInsertion(layers=(0,), num_heads=3)}, r"dim must be divisible by ttt\.num_heads"),
        (
            {"ttt": TTTInsertion(layers=(0,), num_heads=8, design="kv_cache")},
            r"ttt\.num_heads must be None or num_heads = 32 with ttt\.design='kv_cache', .*, got 8",
        ),
    ],
)
def test_validates_itself(fields, message):
    with pytest.raises(ValueError, match=message):
        MoshiConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": (1, 1)}, "must not repeat"),
        ({"layers": 3}, r"ttt\.layers must be indices of layers, such as \(1, 3\), got 3"),
        ({"layers": ("a",)}, r"ttt\.layers must be indices of layers, .*, got \('a',\)"),
        ({"layers": (0,), "base_lr": "x"}, r"ttt\.base_lr must be > 0, .*, got 'x'"),
        ({"layers": (0,), "kind": "liner"}, "did you mean 'linear'"),
        ({"layers": (0,), "design": "kvcache"}, r"ttt\.design must be one of .*; did you mean 'kv_cache'"),
        ({"layers": (0,), "mini_batch_size": 0}, r"ttt\.mini_batch_size must be an int >= 1, got 0"),
        ({"layers": (0,), "sinks": -1}, r"ttt\.sinks must be an int >= 0 \(frames\), got -1"),
        ({"layers": (0,), "gate_init": 0.0}, "gate_init must not be 0"),
        ({"layers": (0,), "init": "zeros"}, r"ttt\.init must be one of .*, got 'zeros'"),
    ],
)
def test_ttt_validates_itself(fields, message):
    with pytest.raises(ValueError, match=message):
        TTTInsertion(**fields)


def test_layers_may_be_any_integers():
    for layers in (range(2), np.arange(2), [0, 1]):
        assert TTTInsertion(layers=layers, base_lr=np.float32(0.5)).layers == (0, 1)  # pyright: ignore


def test_token_scales_can_be_lifted_from_zero():
    for kind in ("linear", "mlp"):
        inner_loop = MoshiConfig(ttt=TTTInsertion(layers=(1,), kind=kind)).ttt_config
        assert inner_loop is not None
        assert inner_loop.liftable_token_scale


def test_layers_with_ttt_may_have_their_own_attention():
    config = MoshiConfig(context=7, sinks=2, ttt=TTTInsertion(layers=(1,)))
    assert config.layer_attention(0) == config.layer_attention(1) == ("window", 7, 2)
    own = dataclasses.replace(config, ttt=TTTInsertion(layers=(1,), attention="segment", context=3, sinks=0))
    assert own.layer_attention(0) == ("window", 7, 2)
    assert own.layer_attention(1) == ("segment", 3, 0)


def test_json_keeps_every_field_and_may_lack_sinks():
    config = MoshiConfig(sinks=2, ttt=TTTInsertion(layers=(1,), sinks=3))
    fields = json.loads(json.dumps(dataclasses.asdict(config)))
    assert from_mapping(MoshiConfig, fields) == config
    del fields["sinks"], fields["ttt"]["sinks"]  # as written before there were any
    old = from_mapping(MoshiConfig, fields)
    assert old.ttt is not None
    assert (old.sinks, old.ttt.sinks, old.layer_attention(1).sinks) == (0, None, 0)


def test_codes_are_checked_and_the_culprit_is_named():
    config = MoshiConfig(**TINY)
    codes = np.zeros((2, 3, 5), np.int32)
    codes[:, 0], codes[:, 1:] = 10, 8
    codes[0, :, 0] = -2
    check_codes(config, codes)
    codes[1, 2, 3] = 9
    with pytest.raises(ValueError, match=r"codes\[1, 2, 3\] = 9 is outside \[-2, 8\] of stream 2 .*position 3"):
        check_codes(config, codes)
    with pytest.raises(ValueError, match="codes must be integers"):
        check_codes(config, codes.astype(np.float32))
    with pytest.raises(ValueError, match=r"codes must have shape \[B, 3, T\]"):
        check_codes(config, codes[:, :2])
