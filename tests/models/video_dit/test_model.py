"""The whole model: gradients everywhere, many devices as one, narrow dtypes, and what it refuses."""

import dataclasses
import re

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ttt_jax.models.video_dit import VideoDiT, VideoDiTConfig

CONFIG = VideoDiTConfig(
    model_dim=32,
    num_heads=2,
    num_layers=1,
    text_dim=6,
    time_embed_dim=8,
    in_channels=3,
    attn_length=2,
    ssm_layer="ttt_linear",
    mini_batch_size=4,
)


def inputs(batch, *, scenes=2, text_length=5, frames=5, dtype=np.float32):
    """A text is longer than a mini-batch; nothing divides anything."""
    rng = np.random.default_rng(0)
    video = rng.standard_normal((batch, frames, 3, 2, 4)).astype(dtype)
    text = rng.standard_normal((batch, scenes, text_length, 6)).astype(dtype)
    return video, text, np.linspace(0, 999, batch).astype(np.int32)


@pytest.fixture(scope="module")
def params():
    """Initial values plus noise."""
    shapes = jax.eval_shape(lambda: VideoDiT(CONFIG).init(jax.random.key(0), *inputs(1)))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: jnp.asarray(0.2 * rng.standard_normal(s.shape), s.dtype), shapes)
    return jax.tree.map_with_path(lambda path, x: x + 1 if "scale" in path[-1].key else x, params)


def loss_and_gradients(config):
    def loss(params, video, text, timestep):
        out = VideoDiT(config).apply({"params": params}, video, text, timestep)
        return jnp.mean(jnp.square(out - video)), out

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.fixture(scope="module")
def on_one_device(params):
    return loss_and_gradients(CONFIG)(params, *inputs(8))


def test_every_parameter_gets_a_gradient(on_one_device):
    """But the gate of what the last layer's backward pass learns about the texts, which nothing reads."""
    _, gradients = on_one_device
    still = [jax.tree_util.keystr(path) for path, x in jax.tree.leaves_with_path(gradients) if not np.any(x)]
    assert still == ["['layers_0']['gate_backward_text']"]


def test_eight_devices_and_recomputed_blocks_are_one_device_and_kept_ones(params, on_one_device):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    split = [jax.device_put(x, rows) for x in inputs(8)]
    everywhere = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    got = loss_and_gradients(dataclasses.replace(CONFIG, remat=True))(everywhere, *split)
    assert got[0][1].sharding.is_equivalent_to(rows, 5)
    for (path, x), y in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(on_one_device), strict=True):
        # float32 sums in another order; gradients here reach 30.
        scale = max(1, np.abs(y).max())
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5 * scale, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def three_blocks(params):
    """Parameters that differ from block to block, and what they give when nothing is recomputed."""
    deep = params | {
        f"layers_{i}": jax.tree.map(lambda x, i=i: x * (1 - 0.1 * i), params["layers_0"]) for i in range(3)
    }
    return deep, loss_and_gradients(dataclasses.replace(CONFIG, num_layers=3))(deep, *inputs(2))


@pytest.mark.parametrize(
    ("group", "layers"),
    [pytest.param(1, False, marks=pytest.mark.slow), pytest.param(2, False, marks=pytest.mark.slow), (2, True)],
    ids=str,
)
def test_recomputed_blocks_are_the_kept_ones(three_blocks, group, layers):
    deep, expected = three_blocks
    config = dataclasses.replace(CONFIG, num_layers=3, remat=True, remat_group=group, remat_layers=layers)
    got = loss_and_gradients(config)(deep, *inputs(2))
    for (path, x), y in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(
            x, y, rtol=0, atol=2e-5 * max(1, np.abs(y).max()), err_msg=jax.tree_util.keystr(path)
        )


def test_the_loop_over_blocks_tells_the_diagnostics_of_each(three_blocks):
    def sown(**changes):
        model = VideoDiT(dataclasses.replace(CONFIG, num_layers=3, **changes))
        apply = jax.jit(lambda params: model.apply({"params": params}, *inputs(1), mutable=["diagnostics"])[1])
        return apply(three_blocks[0])

    expected, got = sown(), sown(remat=True, remat_group=2)
    assert len({float(x) for x in jax.tree.leaves(expected)}) > 3
    for (path, x), y in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, err_msg=jax.tree_util.keystr(path))
    assert jax.tree.structure(got) == jax.tree.structure(expected)


def test_what_is_recomputed():
    """Of three blocks in groups of two, the inputs of the first and the last are kept; in blocks, their layers'."""

    def nested(jaxpr):
        """The scans and recomputed regions that lead to TTT's scan over mini-batches, from the outside."""
        for eqn in jaxpr.eqns:
            for inner in jax.extend.core.jaxprs_in_params(eqn.params):
                name = {"scan": f"scan {eqn.params.get('length')}", "remat2": "again"}.get(eqn.primitive.name)
                yield from ([name, *path] if name else path for path in nested(inner))
        yield []

    def recomputed(**changes):
        model = VideoDiT(dataclasses.replace(CONFIG, num_layers=3, remat=True, **changes))
        shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs(1)))
        jaxpr = jax.make_jaxpr(lambda variables: model.apply(variables, *inputs(1)))(shapes).jaxpr
        longest = max(len(path) for path in nested(jaxpr))
        return jax.tree.structure(shapes), {tuple(path) for path in nested(jaxpr) if len(path) == longest}

    names, alone = recomputed()
    assert alone == {("scan 3", "again", "scan 5")}
    assert recomputed(remat_layers=True) == (names, {("scan 3", "again", "again", "scan 5")})
    assert recomputed(remat_group=2) == (names, {("scan 1", "again", "scan 2", "again", "scan 5")})


def test_what_layers_read_and_return_is_placed(params):
    """Attention, both TTT passes, the MLP, and the block."""
    placed = []
    model = VideoDiT(CONFIG, place=lambda parts: placed.append(set(parts)) or parts)
    jax.eval_shape(lambda p: model.apply({"params": p}, *inputs(1)), params)
    assert placed == 9 * [{"text", "video"}]


def test_bfloat16_is_near_float32_and_parameters_stay_float32(params, on_one_device):
    narrow = VideoDiT(dataclasses.replace(CONFIG, dtype="bfloat16"))
    shapes = jax.eval_shape(lambda: narrow.init(jax.random.key(0), *inputs(1)))["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    out = jax.jit(narrow.apply)({"params": params}, *inputs(8))
    expected = on_one_device[0][1]
    assert out.dtype == jnp.float32
    assert np.sqrt(np.mean(np.square(out - expected))) < 0.05 * np.std(expected)


VIDEO, TEXT, TIME = inputs(1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((VIDEO[0], TEXT, TIME), "video must have shape [B, frames, in_channels, h, w], got (5, 3, 2, 4)"),
        ((VIDEO[:, :, :2], TEXT, TIME), "in_channels = 3 on its third axis, got shape (1, 5, 2, 2, 4)"),
        ((VIDEO[..., :3], TEXT, TIME), "patch_size = 2 divides, got shape (1, 5, 3, 2, 3); crop or pad"),
        ((VIDEO[:, :0], TEXT, TIME), "video must have frames"),
        ((VIDEO, TEXT[..., :5], TIME), "text must have shape [1, scenes, L, text_dim = 6]"),
        ((VIDEO, TEXT[:, :0], TIME), "with at least one scene, got (1, 0, 5, 6)"),
        ((VIDEO, TEXT, TIME[0]), "timestep must have shape [B], got ()"),
        ((VIDEO, TEXT, np.zeros(2)), "timestep must have shape [1], one for each video, got (2,)"),
        ((VIDEO, TEXT[:, :1], TIME), "1 * 2 + 1 = 3 frames, else no scene would see the rest, got 5; pass a text for"),
        ((VIDEO, TEXT.astype(int), TIME), "text must be floating, got int64; cast it first"),
        ((VIDEO, TEXT, 3), "timestep must be an array, got int; make it one with jnp.asarray"),
    ],
)  # fmt: skip
def test_bad_inputs_are_named(params, given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        VideoDiT(CONFIG).apply({"params": params}, *given)


def test_any_number_of_scenes_and_frames_and_any_text(params):
    """Shapes alone: what comes out is checked part by part."""
    for scenes, text_length, frames in ((1, 7, 1), (3, 2, 4), (4, 3, 3), (2, 0, 5)):
        given = inputs(2, scenes=scenes, text_length=text_length, frames=frames)
        out = jax.eval_shape(lambda p, *x: VideoDiT(CONFIG).apply({"params": p}, *x), params, *given)
        assert (out.shape, out.dtype) == (given[0].shape, jnp.float32)
    none = inputs(0)
    out = jax.eval_shape(lambda p, *x: VideoDiT(CONFIG).apply({"params": p}, *x), params, *none)
    assert out.shape == none[0].shape


def test_memory_is_linear_in_the_number_of_scenes(params):
    def needed(scenes):
        shapes = jax.eval_shape(lambda: inputs(1, scenes=scenes, frames=2 * scenes + 1))
        compiled = jax.jit(VideoDiT(CONFIG).apply).lower({"params": params}, *shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert needed(1024) < 2.05 * needed(512)  # small ones share buffers differently
