"""Whole conversions, from released folders to checkpoints that `ttt_jax.load` reads."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ttt_jax
from ttt_jax import checkpoint
from ttt_jax.convert import moshi_params, synthetic
from ttt_jax.convert.program import Options, convert, describe, plan, read_insertion
from ttt_jax.models.mimi import Mimi, MimiConfig
from ttt_jax.models.moshi import Moshi, MoshiConfig, TTTInsertion, init_stream, stream_step

SMALL = MoshiConfig(
    **{"dim": 256, "num_layers": 8, "num_heads": 4, "text_card": 99, "card": 99},
    **{"depformer_dim": 64, "depformer_num_layers": 1, "depformer_num_heads": 4, "depformer_dim_feedforward": 264},
)
"""29 MB in float32, the largest parameter 1.6 MB."""

MOSHIS = ("moshi_tiny", "moshi_tiny_schedule")


def assert_close(got, want):
    """1e-4 of the largest value: two float32 implementations that add in different orders."""
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max(), rtol=0)


def assert_trees_equal(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


@pytest.mark.parametrize("name", MOSHIS)
def test_a_released_moshi_says_what_was_recorded(data_dir, tmp_path, released, name):
    convert(plan("moshi", str(released(name)), Options()), tmp_path / "out")
    config, params = ttt_jax.load(tmp_path / "out")
    assert config == MoshiConfig.from_kyutai(data_dir / f"{name}.json")
    assert_trees_equal(params, moshi_params(config, load_file(data_dir / f"{name}.safetensors")))
    recorded = np.load(data_dir / f"{name}.npz")
    output = jax.jit(Moshi(config).apply)({"params": params}, recorded["codes"])
    assert_close(output.logits, recorded["logits"])
    assert_close(output.text_logits, recorded["text_logits"])
    assert recorded["gen_user"].shape[2] > 2 * config.context
    step = jax.jit(functools.partial(stream_step, config), donate_argnums=1)
    stream, tokens = init_stream(config, params, recorded["gen_user"].shape[0]), []
    for user in np.moveaxis(recorded["gen_user"], 2, 0):
        out, stream = step(params, stream, user)
        tokens.append(out)
    np.testing.assert_array_equal(np.stack(tokens, axis=2), recorded["gen_out"])


def test_a_released_mimi_gives_the_recorded_codes_and_sound(data_dir, tmp_path):
    options = Options(config=data_dir / "mimi_tiny.json")
    convert(plan("mimi", str(data_dir / "mimi_tiny.safetensors"), options), tmp_path / "out")
    config, params = ttt_jax.load(tmp_path / "out")
    assert config == MimiConfig.from_kyutai(data_dir / "mimi_tiny.json", num_codebooks=8)
    recorded = np.load(data_dir / "mimi_tiny.npz")
    apply = jax.jit(functools.partial(Mimi(config).apply, {"params": params}), static_argnames="method")
    np.testing.assert_array_equal(apply(recorded["wav"], method="encode"), recorded["codes"])
    assert_close(apply(recorded["codes"], method="decode"), recorded["decoded"])


def test_a_ttt_lm_layer(data_dir, tmp_path):
    with np.load(data_dir / "ttt_lm_mlp_layer_causal.npz") as recorded:
        tensors = {name.removeprefix("param/"): x for name, x in recorded.items() if name.startswith("param/")}
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, tmp_path / "layer.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"base_lr": 0.25, "num_heads": 4}))
    convert(plan("ttt_lm", str(tmp_path / "layer.safetensors"), Options()), tmp_path / "out")
    config, params = ttt_jax.load(tmp_path / "out")
    assert (config.kind, config.shared_qk, config.base_lr, config.num_heads) == ("mlp", True, 0.25, 4)
    assert_trees_equal(params, ttt_jax.convert.ttt_lm_params(tensors))
    (tmp_path / "config.json").write_text(json.dumps({"kind": "linear"}))
    with pytest.raises(ValueError, match=r"it says \{'kind': 'linear'\}, the tensors say"):
        plan("ttt_lm", str(tmp_path / "layer.safetensors"), Options())


def test_sharded_weights_and_other_names_give_the_same(data_dir, tmp_path, released):
    folder = released("moshi_tiny")
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(sorted(whole))}
    for shard in set(shards.values()):
        save_file({name: whole[name] for name in whole if shards[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    convert(plan("moshi", str(folder), Options()), tmp_path / "out")
    config, params = ttt_jax.load(tmp_path / "out")
    assert_trees_equal(params, moshi_params(config, whole))


def test_dtypes(tmp_path, released, rewritten):
    folder = released("moshi_tiny_schedule")
    convert(plan("moshi", str(folder), Options(), dtype="bfloat16"), tmp_path / "narrow")
    config, params = ttt_jax.load(tmp_path / "narrow")
    assert config.dtype == "bfloat16"
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(ml_dtypes.bfloat16)}
    rewritten(
        folder / "model.safetensors",
        lambda tensors: tensors.update({name: x.astype(ml_dtypes.bfloat16) for name, x in tensors.items()}),
    )
    convert(plan("moshi", str(folder), Options()), tmp_path / "stored")
    assert_trees_equal(ttt_jax.load(tmp_path / "stored"), (config, params))
    convert(plan("moshi", str(folder), Options(), dtype="float32"), tmp_path / "wide")
    wide_config, wide = ttt_jax.load(tmp_path / "wide")
    assert wide_config.dtype == "float32"
    assert_trees_equal(wide, jax.tree.map(lambda leaf: leaf.astype(np.float32), params))
    with pytest.raises(ValueError, match="--dtype: expected one of"):
        plan("moshi", str(folder), Options(), dtype="int8")


def test_int8_and_lora_are_merged(data_dir, tmp_path, released, rewritten):
    folder = released("moshi_tiny", quantize=True)
    original = load_file(folder / "model.safetensors")
    name, other = "transformer.layers.0.gating.linear_in", "transformer.layers.1.self_attn.in_projs.0"
    rng = np.random.default_rng(0)
    rows, columns = original[f"{name}.weight"].shape
    int8 = rng.integers(-127, 128, (rows, columns)).astype(np.int8)
    scale = rng.random(rows).astype(np.float32)
    rewritten(
        folder / "model.safetensors",
        lambda tensors: tensors.update({f"{name}.weight": int8, f"{name}.weight_scb": scale}),
    )
    lora = tmp_path / "lora"
    lora.mkdir()
    a, b = rng.standard_normal((2, 64)).astype(np.float32), rng.standard_normal((192, 2)).astype(np.float32)
    save_file({f"{other}.lora_A.weight": a, f"{other}.lora_B.weight": b}, lora / "lora.safetensors")
    (lora / "config.json").write_text(json.dumps({"lora": True, "lora_rank": 2, "lora_scaling": 0.5}))
    expected = moshi_params(MoshiConfig.from_kyutai(data_dir / "moshi_tiny.json"), original)
    expected["layers_0"]["gating"]["linear_in"] = (int8 * (scale / 127)[:, None]).T
    for scaling, options in ((0.5, Options(lora=lora)), (3.0, Options(lora=lora, lora_scaling=3.0))):
        convert(plan("moshi", str(folder), options), tmp_path / f"out{scaling}")
        _, params = ttt_jax.load(tmp_path / f"out{scaling}")
        merged = original["transformer.layers.1.self_attn.in_proj_weight"] + scaling * b @ a
        expected["layers_1"]["self_attn"]["in_proj"] = merged.T
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), params, expected)


def test_insertion_changes_no_logit(data_dir, tmp_path, released):
    folder = released("moshi_tiny")
    convert(plan("moshi", str(folder), Options()), tmp_path / "plain")
    insertion = TTTInsertion(layers=(1, 0), kind="mlp")
    convert(plan("moshi", str(folder), Options(), ttt=insertion), tmp_path / "ttt", seed=3)
    codes = np.load(data_dir / "moshi_tiny.npz")["codes"]
    outputs = []
    for name in ("plain", "ttt"):
        config, params = ttt_jax.load(tmp_path / name)
        outputs.append(jax.jit(Moshi(config).apply)({"params": params}, codes))
    assert config.ttt == insertion
    shapes = jax.eval_shape(Moshi(config).init, jax.random.key(0), codes)["params"]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    assert_trees_equal(*outputs)
    weights = [params[f"layers_{i}"]["ttt"]["inner"]["w1"] for i in (0, 1)]
    assert np.abs(np.asarray(weights[0]) - np.asarray(weights[1])).max() > 0  # each layer draws its own
    assert not np.asarray(params["layers_1"]["ttt"]["wo"]["kernel"]).any()


def test_what_the_ttt_flag_takes(tmp_path):
    expected = TTTInsertion(layers=(0, 1), context=7)
    (tmp_path / "ttt.json").write_text('{"layers": [0, 1], "context": 7}')
    assert read_insertion('{"layers": [0, 1], "context": 7}') == expected
    assert read_insertion(str(tmp_path / "ttt.json")) == expected
    assert read_insertion("configs/conversations.py:small").layers == (1, 2)
    for text, problem in (
        ("{layers: [0]}", "--ttt: expected JSON such as"),
        ('{"layer": [0]}', "Did you mean `layers`"),
        ('{"layers": "all"}', r"--ttt\.layers: expected"),
        ("configs/conversations.py:small-without-ttt", "has no TTT layers"),
        ("nowhere.json", "No such file"),
    ):
        with pytest.raises(ValueError, match=problem):
            read_insertion(text)


def test_the_plan_is_printed_and_nothing_written(tmp_path, released, capsys):
    folder = released("moshi_tiny")
    *lines, summary = describe(plan("moshi", str(folder), Options(), ttt=TTTInsertion(layers=(0,))))
    assert "text_linear.weight float32[50, 64] -> text_linear float32[64, 50]" in lines
    assert "emb.0.weight .. emb.15.weight (16) float32[33, 64] -> emb float32[16, 33, 64]" in lines
    assert "inserted -> layers_0/gate float32[64]" in lines
    assert summary.startswith("123 tensors, 0.4 M parameters and 0.0 M of TTT: 1.6 MB on the disk")
    assert [path.name for path in tmp_path.iterdir()] == ["released"]


def test_memory_stays_near_the_largest_parameter(tmp_path, monkeypatch):
    synthetic.write(SMALL, tmp_path / "synthetic", dtype="float32", seed=0)
    monkeypatch.setattr(checkpoint, "GROUP_BYTES", 2**20)
    steps = plan("moshi", str(tmp_path / "synthetic"), Options())
    tracemalloc.start()
    convert(steps, tmp_path / "out")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(steps.leaf_bytes()) > 28e6
    assert peak < 5 * max(steps.leaf_bytes()) < 9e6, peak  # a group twice, a tensor beside its leaf, and Python's own


COMMAND = (sys.executable, "-m", "ttt_jax.convert")


def run(*arguments):
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=120, check=False)


def test_killed_half_way_it_leaves_nothing_that_loads_and_starts_again(tmp_path):
    synthetic.write(SMALL, tmp_path / "synthetic", dtype="float32", seed=0)
    out = tmp_path / "out"
    # A group of one parameter, so that there are many moments to be killed in.
    code = "import runpy, ttt_jax.checkpoint as c; c.GROUP_BYTES = 1; "
    code += "runpy.run_module('ttt_jax.convert', run_name='__main__')"
    arguments = ["--source=moshi", f"--input={tmp_path / 'synthetic'}", f"--output={out}"]
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while not list(tmp_path.glob(".out.being-written/whole*/*")):
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    with pytest.raises(FileNotFoundError):
        ttt_jax.load(out)
    with pytest.raises(FileNotFoundError, match="neither a workdir"):
        ttt_jax.load(tmp_path / ".out.being-written")
    convert(plan("moshi", str(tmp_path / "synthetic"), Options()), out)
    _, params = ttt_jax.load(out)
    assert_trees_equal(params, moshi_params(SMALL, load_file(tmp_path / "synthetic" / "model.safetensors")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "synthetic"]


def drop_a_tensor(folder, rewritten):
    rewritten(folder / "model.safetensors", lambda tensors: tensors.pop("emb.3.weight"))


def add_a_tensor(folder, rewritten):
    rewritten(folder / "model.safetensors", lambda tensors: tensors.update({"emb.99.weight": np.zeros((33, 64), "f4")}))


def cut_it_short(folder, rewritten):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def wrong_config(folder, rewritten):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"dim": 128}))


def broken_config(folder, rewritten):
    (folder / "config.json").write_text("{")


def integers(folder, rewritten):
    rewritten(
        folder / "model.safetensors", lambda tensors: tensors.update({"out_norm.alpha": np.ones((1, 1, 64), int)})
    )


def in_files(folder, count):
    """The weights of a folder spread over files without an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for i in range(count):
        part = {name: tensor for at, (name, tensor) in enumerate(tensors.items()) if at % count == i}
        save_file(part, folder / f"model-{i + 1:05}-of-{count:05}.safetensors")


@pytest.mark.parametrize("named", ["", "model-00002-of-00003.safetensors"])
def test_files_that_belong_together_need_no_index(released, named):
    folder = released("moshi_tiny")
    expected = {name: np.asarray(x) for name, x in plan("moshi", str(folder), Options()).source.tensors.items()}
    in_files(folder, 3)
    found = plan("moshi", str(folder / named), Options()).source.tensors
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        np.testing.assert_array_equal(np.asarray(tensor), expected[name], err_msg=name)


def one_of_three_missing(folder, rewritten):
    in_files(folder, 3)
    (folder / "model-00002-of-00003.safetensors").unlink()


def two_files(folder, rewritten):
    for name in ("a", "b"):
        (folder / f"{name}.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (drop_a_tensor, r"missing \(1\): emb\.3\.weight \[33, 64\]"),
        (add_a_tensor, r"unexpected \(1\): emb\.99\.weight"),
        (cut_it_short, "is cut short"),
        (wrong_config, r"is it the config of this checkpoint\?\nmisshapen"),
        (broken_config, r"--config: .*config\.json cannot be read as JSON"),
        (integers, r"must be floating; the weights hold out_norm\.alpha int64"),
        (one_of_three_missing, r"model-00002-of-00003\.safetensors does not exist"),
        (two_files, r"found a\.safetensors, b\.safetensors; name the file"),
    ],
)
def test_bad_input_is_told_before_anything_is_written(tmp_path, released, rewritten, damage, problem):
    folder = released("moshi_tiny")
    damage(folder, rewritten)
    with pytest.raises(ValueError, match=problem):
        plan("moshi", str(folder), Options())


def test_the_command(tmp_path, released):
    folder = released("moshi_tiny")
    done = run("--source=moshi", f"--input={folder}", f"--output={tmp_path / 'out'}", '--ttt={"layers": [1]}')
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'out'}\n"), done.stderr
    assert ttt_jax.load(tmp_path / "out")[0].ttt == TTTInsertion(layers=(1,))
    again = run("--source=moshi", f"--input={folder}", f"--output={tmp_path / 'out'}")
    assert (again.returncode, again.stderr.splitlines()[-1][:17]) == (1, "error: --output: ")
    nothing = run("--source=moshi", f"--input={tmp_path / 'none'}", f"--output={tmp_path / 'other'}")
    assert nothing.returncode == 1
    assert "expected a .safetensors file" in nothing.stderr
    assert "Traceback" not in nothing.stderr
    assert not (tmp_path / "other").exists()
    wrong = run("--reverse", f"--input={tmp_path / 'out'}", f"--output={tmp_path / 'other'}", "--ttt={}")
    assert wrong.returncode == 1
    assert "--ttt belongs to moshi, not to reverse" in wrong.stderr
    dry = run("--source=moshi", f"--input={folder}", "--dry_run")
    assert dry.returncode == 0
    assert "out_norm.alpha float32[1, 1, 64] -> out_norm/alpha float32[64]" in dry.stdout
