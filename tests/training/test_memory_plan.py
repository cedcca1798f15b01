"""The memory of a training step, read off the program compiled for the fake CPU devices; nothing is run."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from ttt_jax.config import from_mapping
from ttt_jax.data.reader import open_dataset
from ttt_jax.training import ExperimentConfig, memory_plan

ROOT = pathlib.Path(__file__).parents[2]


def make(train="qkvo", batch_size=8, frozen="bfloat16", **mesh) -> ExperimentConfig:
    model = {
        **{"dim": 64, "num_layers": 1, "num_heads": 4, "context": 4, "hidden_scale": 3.0},
        **{"n_q": 2, "dep_q": 2, "card": 20, "text_card": 20, "delays": (0, 0, 1)},
        **{"depformer_dim": 16, "depformer_num_layers": 1, "depformer_num_heads": 2, "depformer_dim_feedforward": None},
        "ttt": {"layers": (0,), "mini_batch_size": 4},
    }
    sections = {
        "data": {"directory": "", "num_frames": 10, "batch_size": batch_size, "mode": "follow"},
        "model": model,
        "optimizer": {"train": train},
        "precision": {"frozen": frozen, "activations": "bfloat16"},
        "mesh": mesh,
    }
    return from_mapping(ExperimentConfig, sections)


def state_of(config, devices) -> dict[str, int]:
    _, state = memory_plan.lower(config, devices)
    return memory_plan.state_bytes(config, state)


@pytest.fixture(scope="module")
def eight():
    return memory_plan.plan(make(data=1, fsdp=8), jax.devices())


def test_the_state_of_one_device_and_of_eight(eight):
    one = state_of(make(data=1, batch_size=1), jax.devices()[:1])
    norms, mlp = 2 * 64, 64 * 2 * 128 + 128 * 64
    depth = 2 * 64 * 16 + 21 * 16 + 21 * 16 + 2 * (16 * 48 + 16 * 16 + 16 * 64 + 32 * 16) + 2 * 16 + 2 * 16 * 20
    frozen = norms + mlp + 21 * 64 + 2 * 21 * 64 + 64 + 64 * 20 + depth
    trained = eight["parameters"] - frozen
    assert one["frozen"] == 2 * frozen  # bfloat16
    assert one["trained"] == 4 * trained  # float32
    assert 8 * trained < one["optimizer"] < 8 * trained + 40  # two moments, and some counts of updates
    ring, fast, rest = 2 * 4 * 64 * 2, 2 * 4 * (16 * 16 + 16) * 4, 3 * 64 * 4 + 3 * 4
    assert one["carried"] == eight["state"]["carried"] == ring + fast + rest  # of one row
    for name in ("trained", "frozen", "optimizer"):
        assert eight["state"][name] < 0.3 * one[name]
    assert (eight["rows_per_device"], eight["mesh"]) == (1, {"data": 1, "fsdp": 8, "tensor": 1})


def test_parts_of_a_program_add_up_and_hold_the_state_once(eight):
    program = dict(eight["program"])
    assert program.pop("total") == sum(program.values())
    inputs, chunk = sum(eight["state"].values()), 4 * 3 * 11 + 4 + 1
    # Beside the state go in its step and the chunk: tokens, length, reset.
    assert program["arguments"] == inputs + 4 + chunk
    assert 0 < program["outputs_beside_arguments"] < 1000  # metrics and their places: the state's are those of the old
    assert program["temporaries"] > 0


def test_every_objective_gets_its_vocabularies_from_the_dataset(dataset):
    card = open_dataset(dataset, "train").info.card
    for objective in ("next_token", "infill"):
        mapping = {"objective": objective, "data": {"directory": str(dataset)}, "model": None}
        assert memory_plan.read_config(mapping).model.card == card


def test_a_batch_that_does_not_fit_the_mesh_is_told():
    with pytest.raises(ValueError, match=r"config\.data\.batch_size: expected a multiple of 8"):
        memory_plan.plan(make(batch_size=4, fsdp=8, data=1), jax.devices())


def test_h100s_without_the_compiler_are_told_what_to_install():
    with pytest.raises(RuntimeError, match=r"pip install --no-deps jax-cuda13-plugin=="):
        memory_plan.h100s(8)


def test_the_program_prints_and_writes_it(tmp_path, tiny_config_path):
    command = [sys.executable, "-m", "ttt_jax.training.memory_plan", f"--config={tiny_config_path}", "--target=cpu"]
    command += ["--devices=2", "--config.mesh.fsdp=2", f"--output={tmp_path / 'plan.json'}"]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "plan.json").read_text())
    assert (result["device"], result["mesh"]["fsdp"], result["rows_per_device"]) == ("cpu", 2, 1)
    assert "fits" not in result  # which a CPU does not tell of an H100
    assert "cpu (data 1, fsdp 2, tensor 1): train=all" in done.stdout
    assert f"total {result['program']['total'] / 1e9:.2f} GB" in " ".join(done.stdout.split())
