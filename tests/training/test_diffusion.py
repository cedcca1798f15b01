"""Training a Video-DiT: many devices are one, a resumed run one never stopped, and only what is to be trained is."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from configs import video_dit
from ttt_jax.checkpoint import load
from ttt_jax.config import from_mapping
from ttt_jax.data import moving_shapes
from ttt_jax.data.videos import VideoBatch
from ttt_jax.models.video_dit import VideoDiT
from ttt_jax.training import ExperimentConfig, run, sharding
from ttt_jax.training.config import MeshConfig
from ttt_jax.training.diffusion import Diffusion
from ttt_jax.training.initial import initial_parameters
from ttt_jax.training.loop import Functions
from ttt_jax.training.optimizer import decay_mask, learning_rate_schedule
from ttt_jax.training.parameters import group_of, is_trained
from ttt_jax.training.step import init_state, train_step

MODEL = {
    **{"model_dim": 32, "num_heads": 2, "num_layers": 1, "text_dim": 16, "time_embed_dim": 32, "in_channels": 3},
    **{"attn_length": 2, "ssm_layer": "ttt_linear", "mini_batch_size": 8, "patch_size": 4},
}
DATA = {"num_frames": 5, "num_scenes": 2, "text_length": 4, "height": 12, "width": 12}


def mapping(directory="", *, rows=8, **optimizer) -> dict:
    return {
        "objective": "diffusion",
        "data": {"directory": str(directory), "batch_size": rows, **DATA},
        "model": MODEL,
        "optimizer": {"learning_rate": 1e-2, "steps": 4, "warmup_steps": 1, **optimizer},
        "checkpoint": {"every_steps": 2, "every_seconds": 0.0},
        "log": {"every_steps": 1, "diagnostics_every_steps": 2, "tensorboard": False},
        "validation": {"every_steps": 4, "num_batches": 1},
        "mesh": {"data": 1},
    }


def make(**optimizer) -> ExperimentConfig:
    return from_mapping(ExperimentConfig, mapping(**optimizer))


def batch(rows=8) -> VideoBatch:
    rng = np.random.default_rng(0)
    video = rng.standard_normal((rows, 5, 3, 12, 12)).astype(np.float32)
    return VideoBatch(
        video,
        rng.standard_normal((rows, 2, 4, 16)).astype(np.float32),
        rng.integers(1 << 32, size=(rows, 2), dtype=np.uint32),
    )


def by_path(tree) -> dict:
    return flatten_dict(tree, sep="/")


@functools.cache
def on_one_device():
    config = make()
    state = jax.jit(lambda: init_state(config))()
    return state, *jax.jit(functools.partial(train_step, config))(state, batch())


@pytest.mark.parametrize(
    ("sizes", "changes"),
    [
        pytest.param((8, 1, 1), {}, marks=pytest.mark.slow),
        pytest.param((2, 4, 1), {}, marks=pytest.mark.slow),
        ((2, 2, 2), {"remat": True, "remat_layers": True}),
    ],
    ids=["data", "fsdp", "tensor"],
)
def test_eight_devices_are_one(sizes, changes):
    given = mapping()
    config = from_mapping(ExperimentConfig, given | {"model": given["model"] | changes})
    mesh = sharding.make_mesh(MeshConfig(*sizes))
    with jax.set_mesh(mesh):
        functions = Functions(config, mesh)
        state, rows = functions.init(None), functions.put(batch())
        kernel = state.params["layers_0"]["mlp"]["layer1"]["kernel"]
        assert kernel.addressable_shards[0].data.size == kernel.size // (sizes[1] * sizes[2])
        functions.compile(rows)
        state, metrics = functions.update(state, rows)
    start, end, expected = on_one_device()
    for name in ("loss", "denoised_error", "gradient_norm"):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=2e-5, err_msg=name)  # sums in another order
    # Adam's first update is the gradient's sign, so the moments tell: those of one tenth of the clipped gradient.
    for got, want in ((state.optimizer, end.optimizer), (state.params, end.params)):
        for (path, x), y in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
            far = np.abs(np.asarray(x) - np.asarray(y)) > 1e-5 + 1e-3 * np.abs(y)
            # A parameter whose gradient is 0 but for rounding may go the other way.
            assert np.mean(far) < 0.02, jax.tree_util.keystr(path)
    assert any(np.any(x != y) for x, y in zip(*map(jax.tree.leaves, (start.params, end.params)), strict=True))


def test_rows_draw_their_own_timesteps_and_noise():
    objective, given = Diffusion(make()), batch(64)
    _, noise, timestep = objective._noisy(given)
    assert len(set(np.asarray(timestep).tolist())) > 50
    assert 0 <= timestep.min() < 100 < 900 < timestep.max() <= 999
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.1
    again = objective._noisy(VideoBatch(*(x[3:5] for x in given)))
    np.testing.assert_array_equal(again[2], timestep[3:5])
    np.testing.assert_array_equal(again[1], noise[3:5])


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    directory = tmp_path_factory.mktemp("shapes") / "dataset"
    moving_shapes.make(directory, num_videos=24, scenes=2, scene_frames=2, size=12)
    return directory


def test_a_run_resumes_to_the_same_bits_and_the_next_stage_starts_from_it(shapes, tmp_path, capsys, cached_compilation):
    first, again = tmp_path / "first", tmp_path / "again"
    assert run(mapping(shapes, rows=2), first) == (4, 4)
    shutil.copytree(first, again)
    shutil.rmtree(again / "checkpoints" / "4")
    assert run(mapping(shapes, rows=2), again) == (4, 4)
    assert "resuming after step 2 of 4" in capsys.readouterr().err
    config, params = load(first)
    jax.tree.map(np.testing.assert_array_equal, load(again)[1], params)
    lines = [json.loads(line) for line in (again / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train" in line] == [1, 2, 3, 4]
    assert lines[-1]["validation"].keys() == {"loss", "denoised_error"}
    assert any("layers_0/ttt/step_size_saturation" in line.get("diagnostics", {}) for line in lines)
    stage = mapping(shapes, rows=2, steps=1, warmup_steps=0, train="qkvo") | {"init_from": str(first)}
    assert run(stage, tmp_path / "next") == (1, 1)
    for path, leaf in by_path(load(tmp_path / "next")[1]).items():
        before = by_path(params)[path]
        assert np.array_equal(leaf, before) != is_trained(path, "qkvo") or path.endswith("gate_backward_text"), path
    assert config.in_channels == 3


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"data": {"num_frames": 13}}, r"config\.data\.num_frames: the videos in \S+ have 5, the config says 13"),
        ({"model": {"text_dim": 8}}, r"config\.model\.text_dim: the videos in \S+ have 16, the config says 8"),
        ({"data": {"directory": "nowhere"}}, r"moving_shapes --output=nowhere"),
        ({"optimizer": {"train": "lora"}}, r"optimizer\.train: expected .*next_token.*got 'lora'"),
        ({"model": {"dim": 8}}, r"config\.model\.dim: VideoDiTConfig has no such field"),
        ({"loss": {"text_dropout": 2.0}}, r"text_dropout: expected a probability in \[0, 1\], got 2\.0"),
        ({"data": {"height": 0}}, r"config\.data: height: expected at least 1, got 0"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_written(shapes, tmp_path, section, message):
    whole = mapping(shapes)
    ((name, fields),) = section.items()
    whole[name] = whole.get(name, {}) | fields
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(whole, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_which_parameters_are_what():
    params = jax.eval_shape(lambda: initial_parameters(make())[0])
    paths = by_path(params)
    groups = {name: {path for path in paths if group_of(path) == name} for name in ("gates", "ttt", "base")}
    directions = {f"layers_0/gate_{a}_{b}" for a in ("forward", "backward") for b in ("text", "video")}
    assert groups["gates"] == directions
    assert groups["ttt"] == {path for path in paths if "/ttt/" in path}
    of_base = {path for path in groups["base"] if is_trained(path, "qkvo")}
    names = {f"layers_0/self_attn/{x}/{y}" for x in "qkvo" for y in ("kernel", "bias")}
    assert of_base - names == {path for path in paths if "q_norm" in path or "k_norm" in path}
    assert names < of_base
    decayed = {path for path, is_decayed in by_path(decay_mask(params)).items() if is_decayed}
    assert not any(word in path for path in decayed for word in ("bias", "norm/", "/b1", "gate_", "ln_"))
    assert "layers_0/ttt/inner/w1" in decayed


@pytest.mark.parametrize("name", video_dit.STAGES)
def test_the_published_stages(name):
    mapping = video_dit.get_config(name).to_dict()
    config = from_mapping(ExperimentConfig, mapping)
    stage, frames = video_dit.STAGES[name], config.data.num_frames
    assert (
        frames * 30 * 45 + stage.num_scenes * stage.text_length
        == {**{"3s": 18_048, "9s": 51_456, "18s": 101_376, "30s": 168_320, "63s": 351_168}}[name]
    )
    assert config.model.check_inputs(*shapes_of(config)) is None
    base, ttt = (learning_rate_schedule(config.optimizer, group) for group in ("base", "ttt"))
    warm, last = stage.warmup_steps, stage.steps - 1
    np.testing.assert_allclose([base(warm - 1), base(last)], 1e-5, rtol=1e-5)
    np.testing.assert_allclose([ttt(warm - 1), ttt(last)], [1e-4 if name == "3s" else 1e-5, 1e-5], rtol=1e-5)
    assert config.data.batch_size == 64
    assert config.optimizer.train == ("all" if name == "3s" else "qkvo")


def shapes_of(config):
    d, m = config.data, config.model
    video = jax.ShapeDtypeStruct((1, d.num_frames, m.in_channels, d.height, d.width), jnp.float32)
    text = jax.ShapeDtypeStruct((1, d.num_scenes, d.text_length, m.text_dim), jnp.float32)
    return video, text, jax.ShapeDtypeStruct((1,), jnp.int32)


def test_an_unknown_stage_is_named():
    with pytest.raises(ValueError, match=r"video_dit\.py:5s: expected one of \['tiny', '3s', '9s'"):
        video_dit.get_config("5s")


def test_the_view_sees_every_block():
    """What it is given are the parameters of the model, and what it returns is what the model computes with."""
    config = make()
    params = jax.jit(lambda: initial_parameters(config)[0])()
    seen = set()

    def view(names, tree):
        leaves = jax.tree.leaves_with_path(tree)
        seen.update("/".join([*names, *(key.key for key in path if key.key != "params")]) for path, _ in leaves)
        return jax.tree.map(lambda x: 0 * x, tree) if names == ("final_linear",) else tree

    inputs = batch(1).video, batch(1).text, np.zeros(1, np.int32)
    out = jax.jit(VideoDiT(config.model, view).apply)({"params": params}, *inputs)
    assert seen == {path for path in by_path(params) if not path.startswith("transformer_norm")}
    assert np.all(out == 0)
