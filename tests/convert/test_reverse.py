"""Checkpoints back to Kyutai's files, bit for bit."""

import dataclasses
import json
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import ttt_jax
from ttt_jax.convert.program import Options, convert, plan
from ttt_jax.convert.reverse import describe, reverse
from ttt_jax.data.builder import TokenRecordings, write_records
from ttt_jax.data.tokens import INFO_FILE, TokenInfo, info_to_json
from ttt_jax.models.mimi import MimiConfig
from ttt_jax.models.moshi import Moshi, MoshiConfig, TTTInsertion
from ttt_jax.training.experiment import run

SOURCES = {
    "moshi_tiny": ("moshi", MoshiConfig),
    "moshi_tiny_schedule": ("moshi", MoshiConfig),
    "moshi_hibiki": ("moshi", MoshiConfig),
    "moshi_stt": ("moshi", MoshiConfig),
    "moshi_personaplex": ("moshi", MoshiConfig),
    "mimi_tiny": ("mimi", MimiConfig),
}


def assert_same_tensors(tensors, others):
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert (others[name].dtype, others[name].shape) == (tensor.dtype, tensor.shape), name
        np.testing.assert_array_equal(others[name], tensor, err_msg=name)


@pytest.mark.parametrize("name", SOURCES)
def test_there_and_back_bit_for_bit(data_dir, tmp_path, released, name):
    kind, config_type = SOURCES[name]
    convert(plan(kind, str(released(name)), Options()), tmp_path / "out")
    reverse(tmp_path / "out", tmp_path / "back", dtype=None, names=None)
    original = load_file(data_dir / f"{name}.safetensors")
    assert_same_tensors(original, load_file(tmp_path / "back" / "model.safetensors"))
    config = config_type.from_kyutai(data_dir / f"{name}.json")
    assert config_type.from_kyutai(tmp_path / "back" / "config.json") == config
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == ["config.json", "model.safetensors"]


def test_the_tokenizer_goes_with_the_weights(tmp_path, released):
    folder = released("moshi_tiny", tokenizer_name="words.model")
    (folder / "words.model").write_bytes(b"a sentencepiece model")
    (folder / "another.model").write_bytes(b"another")
    convert(plan("moshi", str(folder), Options()), tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"a sentencepiece model"
    assert ttt_jax.load(tmp_path / "out")[0].dim == 64
    reverse(tmp_path / "out", tmp_path / "back", dtype=None, names=None)
    assert (tmp_path / "back" / "tokenizer_spm_32k_3.model").read_bytes() == b"a sentencepiece model"


def test_both_namings_and_another_dtype(data_dir, tmp_path, released):
    convert(plan("moshi", str(released("moshi_tiny_schedule")), Options()), tmp_path / "out")
    written = {}
    for names in ("fused", "current"):
        reverse(tmp_path / "out", tmp_path / names, dtype="bfloat16", names=names)
        written[names] = load_file(tmp_path / names / "model.safetensors")
        assert {tensor.dtype for tensor in written[names].values()} == {np.dtype(ml_dtypes.bfloat16)}
    layer = "depformer.layers.1.self_attn"
    steps = [written["current"][f"{layer}.in_projs.{i}.weight"] for i in range(3)]
    np.testing.assert_array_equal(written["fused"][f"{layer}.in_proj_weight"], np.concatenate(steps))
    for name in written:
        convert(plan("moshi", str(tmp_path / name), Options()), tmp_path / f"again-{name}")
    first, second = (ttt_jax.load(tmp_path / f"again-{name}") for name in written)
    assert first[0] == second[0]
    jax.tree.map(np.testing.assert_array_equal, first[1], second[1])


@pytest.fixture
def train(tmp_path):
    """Function that trains what is in a directory for three steps, on codes that fit moshi_tiny."""
    info = TokenInfo("codec2", 12.5, 8000, num_codebooks=8, card=32, text_card=50)
    data = tmp_path / "data"

    def example(name):
        codes = np.random.default_rng(0).integers(0, 32, (60, 17)).astype(np.int32)
        return {"id": name, "codes": codes, "metadata": "{}"}

    def train(directory, mode, **options):
        data.mkdir()
        write_records(data, TokenRecordings, records={"train": ["a"]}, make_example=example, num_streams=17)
        (data / INFO_FILE).write_text(info_to_json(info, {"train": [60]}))
        model = dataclasses.asdict(ttt_jax.load(directory)[0])
        for name in ("card", "text_card", "n_q", "dep_q"):  # of the dataset
            del model[name]
        mapping = {
            "init_from": str(directory),
            "model": model,
            "data": {"directory": str(data), "num_frames": 16, "batch_size": 1},
            "optimizer": {"steps": 3, "warmup_steps": 1, "train": mode, "learning_rate": 1e-2},
            "validation": {"every_steps": 0},
            "mesh": {"data": 1},
        }
        assert run(mapping | options, tmp_path / "run") == (3, 3)
        return tmp_path / "run"

    return train


def test_a_model_with_ttt_is_trained_and_every_original_tensor_goes_home(data_dir, tmp_path, released, train):
    insertion = TTTInsertion(layers=(1,))
    convert(plan("moshi", str(released("moshi_tiny")), Options()), tmp_path / "plain")
    convert(plan("moshi", str(tmp_path / "released" / "moshi_tiny"), Options(), ttt=insertion), tmp_path / "ttt")
    plain, inserted = ttt_jax.load(tmp_path / "plain"), ttt_jax.load(tmp_path / "ttt")
    codes = np.load(data_dir / "moshi_tiny.npz")["codes"]
    logits = [jax.jit(Moshi(config).apply)({"params": params}, codes) for config, params in (plain, inserted)]
    jax.tree.map(np.testing.assert_array_equal, *logits)

    reverse(train(tmp_path / "ttt", "ttt"), tmp_path / "home", dtype=None, names=None)
    original = load_file(data_dir / "moshi_tiny.safetensors")
    assert_same_tensors(original, load_file(tmp_path / "home" / "model.safetensors"))
    _, trained = ttt_jax.load(tmp_path / "run")
    ttt = load_file(tmp_path / "home" / "ttt.safetensors")
    np.testing.assert_array_equal(ttt["layers_1/ttt/wo/kernel"], trained["layers_1"]["ttt"]["wo"]["kernel"])
    assert ttt["layers_1/ttt/wo/kernel"].any()
    assert len(ttt) == len(jax.tree.leaves(inserted[1])) - len(jax.tree.leaves(plain[1]))


def test_lora_factors_of_a_run_are_merged(tmp_path, released, train):
    convert(plan("moshi", str(released("moshi_tiny")), Options()), tmp_path / "plain")
    reverse(train(tmp_path / "plain", "lora", lora={"rank": 2}), tmp_path / "home", dtype=None, names="current")
    home = load_file(tmp_path / "home" / "model.safetensors")
    _, merged = ttt_jax.load(tmp_path / "run")
    name = "transformer.layers.0.self_attn.in_projs.0.weight"
    np.testing.assert_array_equal(home[name], np.asarray(merged["layers_0"]["self_attn"]["in_proj"]).T)
    before = ttt_jax.load(tmp_path / "plain")[1]["layers_0"]["self_attn"]["in_proj"]
    assert np.abs(home[name] - np.asarray(before).T).max() > 1e-4


def test_what_it_refuses(data_dir, tmp_path, released):
    convert(plan("moshi", str(released("moshi_tiny")), Options()), tmp_path / "out")
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="there exists"):
        reverse(tmp_path / "out", tmp_path / "there", dtype=None, names=None)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        reverse(tmp_path / "nothing", tmp_path / "back", dtype=None, names=None)
    *lines, summary = describe(tmp_path / "out", dtype="bfloat16", names="current")
    assert "emb -> emb.0.weight .. emb.15.weight (16) bfloat16[33, 64]" in lines
    assert summary == "32 parameters and 0 of TTT: 0.8 MB"
    assert not (tmp_path / "back").exists()


def test_the_command(tmp_path, released):
    convert(plan("moshi", str(released("moshi_tiny")), Options()), tmp_path / "out")
    command = [sys.executable, "-m", "ttt_jax.convert", "--reverse", f"--input={tmp_path / 'out'}"]
    done = subprocess.run([*command, f"--output={tmp_path / 'back'}"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'back'}\n"), done.stderr
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dim"] == 64
