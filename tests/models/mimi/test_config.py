import dataclasses
import json

import pytest

from ttt_jax.config import from_mapping
from ttt_jax.models.mimi import MimiConfig


def test_defaults_are_the_published_model():
    config = MimiConfig()
    assert config == MimiConfig.from_kyutai({}) == MimiConfig.from_hugging_face({})
    assert (config.frame_samples, config.stride, config.context, config.n_q) == (1920, 2, 250, 32)


def test_reads_kyutais_json_and_takes_published_values_for_none(data_dir):
    path = data_dir / "mimi_tiny.json"
    config = MimiConfig.from_kyutai(path, num_codebooks=3)
    assert (config.dimension, config.codebook_dim, config.n_q, config.num_codebooks) == (32, 16, 16, 3)
    raw = json.loads(path.read_text())
    raw["transformer"] |= {"context": None}
    raw["sample_rate"] = raw["quantizer"]["bins"] = None
    assert MimiConfig.from_kyutai(raw, 3) == dataclasses.replace(config, context=250, bins=2048)
    assert hash(config) == hash(MimiConfig.from_kyutai(str(path), 3))


@pytest.mark.parametrize("name", ["mimi_tiny", "mimi_odd"])
def test_gives_kyutais_config_back(data_dir, name):
    raw = json.loads((data_dir / f"{name}.json").read_text())
    config = MimiConfig.from_kyutai(raw, 4)
    back = json.loads(json.dumps(config.to_kyutai()))
    assert MimiConfig.from_kyutai(back, 4) == config
    del raw["seanet"]["disable_norm_outer_blocks"]  # its default, without norm
    for part in ("seanet", "quantizer", "transformer"):
        assert raw.pop(part).items() <= back.pop(part).items()
    assert back == raw


def test_reads_hugging_faces_json(data_dir):
    raw = json.loads((data_dir / "mimi_hugging_face.json").read_text())
    config = MimiConfig.from_hugging_face(raw, 3)
    assert (config.dimension, config.n_filters, config.context, config.codebook_dim) == (16, 2, 12, 8)
    assert (config.frame_rate, config.num_codebooks, config.max_period) == (12.5, 3, 10000.0)
    del raw["rope_theta"]
    newer = raw | {"rope_parameters": {"rope_theta": 100.0, "rope_type": "default"}, "sampling_rate": 48000}
    assert MimiConfig.from_hugging_face(newer, 3) == dataclasses.replace(
        config, max_period=100.0, sample_rate=48000, frame_rate=25.0
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sampel_rate": 3}, "did you mean 'sample_rate'"),
        ({"seanet": {"ratio": [8]}}, r"unknown field 'seanet\.ratio' .* did you mean 'seanet\.ratios'"),
        ({"channels": 2}, "channels=2 is not supported; this model implements channels=1"),
        ({"seanet": {"norm": "weight_norm"}}, r"seanet\.norm='weight_norm' is not supported"),
        ({"transformer": {"d_model": 256}}, r"transformer\.d_model=256 is not supported; .* transformer\.d_model=512"),
        ({"quantizer": {"output_dimension": 3}}, r"quantizer\.output_dimension=3 is not supported"),
        ({"transformer": {"output_dimensions": [512, 512]}}, r"transformer\.output_dimensions=\[512, 512\]"),
    ],
)
def test_from_kyutai_refuses_what_it_does_not_implement(fields, message):
    with pytest.raises(ValueError, match=message):
        MimiConfig.from_kyutai(fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_key_value_heads": 4}, "num_key_value_heads=4 is not supported; .* num_key_value_heads=8"),
        ({"use_conv_shortcut": True}, "use_conv_shortcut=True is not supported"),
        ({"codebook_dim": 128}, "codebook_dim=128 is not supported; .* codebook_dim=256"),
        ({"norm_eps": 1e-6}, "norm_eps=1e-06 is not supported"),
    ],
)
def test_from_hugging_face_refuses_what_it_does_not_implement(fields, message):
    with pytest.raises(ValueError, match=message):
        MimiConfig.from_hugging_face(fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_codebooks": 33}, r"num_codebooks must be in 1 \.\. n_q = 32, got 33"),
        ({"num_codebooks": 0}, "num_codebooks must be an int >= 1, got 0"),
        ({"n_q_semantic": 32}, "n_q_semantic must be < n_q = 32"),
        ({"num_heads": 3}, "dimension must be an even multiple of num_heads"),
        ({"num_heads": 512}, "dimension must be an even multiple of num_heads"),
        ({"compress": 3}, "n_filters must be divisible by compress"),
        ({"ratios": (8, 6, 5, 4, 2)}, "a frame must be a multiple .* of the product of ratios, 1920 samples"),
        ({"frame_rate": 12.0}, "a frame must be a multiple"),
        ({"ratios": (8, 0)}, "ratios .* must be an int >= 1, got 0"),
        ({"context": 1, "published_ring": True}, "context must be >= 2 steps"),
        ({"max_period": 0}, "max_period must be > 0"),
        ({"bins": True}, "bins must be an int >= 1"),
    ],
)
def test_validates_itself(fields, message):
    with pytest.raises(ValueError, match=message):
        MimiConfig(**fields)


def test_json_keeps_every_field():
    config = MimiConfig(num_codebooks=5, published_ring=True)
    assert from_mapping(MimiConfig, json.loads(json.dumps(dataclasses.asdict(config)))) == config
