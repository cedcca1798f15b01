import dataclasses
import functools
import json
import math

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ttt_jax.config import from_mapping
from ttt_jax.data.chunks import Chunk
from ttt_jax.training import sharding, train
from ttt_jax.training.config import ExperimentConfig, MeshConfig
from ttt_jax.training.step import init_state

MESH = {"data": 1, "fsdp": 4, "tensor": 2}


@pytest.fixture(scope="module")
def config() -> ExperimentConfig:
    model = {
        **{"dim": 32, "num_layers": 2, "num_heads": 4, "context": 4, "hidden_scale": 3.0},
        **{"n_q": 4, "dep_q": 2, "card": 20, "text_card": 20, "delays": (0, 0, 1, 0, 1)},
        **{"depformer_dim": 16, "depformer_num_layers": 1, "depformer_num_heads": 2, "depformer_dim_feedforward": None},
        "ttt": {"layers": (1,), "kind": "mlp", "mini_batch_size": 4},
    }
    return from_mapping(
        ExperimentConfig,
        {
            "data": {"directory": "", "num_frames": 10, "batch_size": 8},
            "model": model,
            "optimizer": {"learning_rate": 1e-2, "steps": 30, "warmup_steps": 2},
        },
    )


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("layers_0/self_attn/in_proj", (32, 96), P("fsdp", "tensor")),
        ("layers_0/self_attn/out_proj", (32, 32), P("tensor", "fsdp")),
        ("layers_0/gating/linear_in", (32, 128), P("fsdp", "tensor")),
        ("layers_0/gating/linear_out", (64, 32), P("tensor", "fsdp")),
        ("layers_0/norm1/scale", (4096,), P()),
        ("layers_1/ttt/wq/kernel", (32, 32), P("fsdp", "tensor")),
        ("layers_1/ttt/wo/kernel", (32, 32), P("tensor", "fsdp")),
        ("layers_1/ttt/wo/bias", (32,), P()),
        ("layers_1/ttt/inner/w1", (4, 16, 64), P("tensor", None, "fsdp")),
        ("layers_1/ttt/inner/b1", (4, 8), P("tensor", None)),
        ("layers_1/ttt/conv_q/kernel", (4, 1, 32), P(None, None, None)),
        ("depformer/layers_0/in_proj", (2, 16, 48), P(None, "fsdp", "tensor")),
        ("depformer/linears", (2, 32, 20), P(None, "fsdp", "tensor")),
        ("text_linear", (32, 21 * 3), P("fsdp", None)),
        ("emb", (4, 21, 32), P(None, None, "fsdp")),
        ("unheard/of", (7, 300), P(None, "fsdp")),
        ("unheard/of", (7, 301), P(None, None)),
        ("", (), P()),
    ],
)
def test_how_a_parameter_is_split(config, name, shape, expected):
    assert sharding.parameter_spec(tuple(name.split("/")), shape, config.model, MESH) == expected


def test_heads_are_not_cut(config):
    mesh = {"data": 1, "fsdp": 1, "tensor": 4}
    spec = functools.partial(sharding.parameter_spec, model=config.model, mesh=mesh)
    assert spec(("layers_0", "self_attn", "in_proj"), (32, 96)) == P(None, "tensor")
    # The depth transformer has two heads: its attention is whole on every device, its feed-forward layer is split.
    assert spec(("depformer", "layers_0", "in_proj"), (2, 16, 48)) == P(None, None, None)
    assert spec(("depformer", "layers_0", "out_proj"), (2, 16, 16)) == P(None, None, None)
    assert spec(("depformer", "layers_0", "linear_in"), (2, 16, 64)) == P(None, None, "tensor")


def test_moments_are_split_as_their_parameters(config):
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    state = jax.eval_shape(functools.partial(init_state, config))
    shardings = sharding.state_shardings(mesh, config.model, state)
    nodes = jax.tree.leaves(shardings.optimizer, is_leaf=lambda node: hasattr(node, "mu"))
    moments = [node for node in nodes if hasattr(node, "mu")]
    assert moments
    for adam in moments:
        assert adam.mu == adam.nu == shardings.params
    split = jax.tree.map(lambda s, leaf: math.prod(s.shard_shape(leaf.shape)), shardings.params, state.params)
    whole = jax.tree.map(lambda leaf: leaf.size, state.params)
    assert jax.tree.reduce(int.__add__, split) < 0.4 * jax.tree.reduce(int.__add__, whole)  # a quarter, and small ones


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((1, 1, -1), (1, 1, 8)), ((1, 2, 1), (1, 2, 1))],
)
def test_the_mesh_takes_the_devices_that_are_left(sizes, shape):
    mesh = sharding.make_mesh(MeshConfig(*sizes))
    assert tuple(mesh.shape.values()) == shape
    assert {kind.name for kind in mesh.axis_types} == {"Auto"}


@pytest.mark.parametrize("sizes", [(-1, 3, 1), (16, 1, 1), (-1, 16, 1)])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes):
    with pytest.raises(
        ValueError, match=r"config\.mesh: expected sizes whose product is the number of devices, 8, got"
    ):
        sharding.make_mesh(MeshConfig(*sizes))


@pytest.mark.parametrize(("sizes", "name"), [((0, 1, 1), "data"), ((1, 1, -2), "tensor"), ((-1, -1, 1), "mesh")])
def test_a_mesh_that_means_nothing_is_refused(sizes, name):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        MeshConfig(*sizes)


def test_a_batch_that_cannot_be_dealt_out_is_refused():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    sharding.check_batch_size(mesh, 8, accumulate=2)
    with pytest.raises(
        ValueError, match=r"batch_size: expected a multiple of 4 \(mesh\.data x mesh\.fsdp = 4\), got 6"
    ):
        sharding.check_batch_size(mesh, 6)
    with pytest.raises(ValueError, match=r"multiple of 8 .*optimizer\.accumulate = 2\), got 4"):
        sharding.check_batch_size(mesh, 4, accumulate=2)


def test_rows_are_dealt_to_data_and_fsdp_and_the_same_to_tensor():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    np.testing.assert_array_equal(sharding.local_rows(mesh, 8), np.arange(8))
    rows = np.arange(16).reshape(8, 2)
    array = sharding.put_rows(mesh, {"tokens": rows}, 8)["tokens"]
    np.testing.assert_array_equal(array, rows)
    assert {shard.data.shape for shard in array.addressable_shards} == {(2, 2)}
    by_device = {shard.device.id: int(shard.data[0, 0]) for shard in array.addressable_shards}
    grid = np.vectorize(lambda device: by_device[device.id])(mesh.devices)
    np.testing.assert_array_equal(grid, np.array([[[0, 0], [4, 4]], [[8, 8], [12, 12]]]))


def make_chunks(config: ExperimentConfig, count: int) -> list[Chunk]:
    """Rows of random tokens, in follow mode some of them at a recording's start or end."""
    rng = np.random.default_rng(0)
    rows, frames = config.data.batch_size, config.data.num_frames
    chunks = []
    for step in range(count):
        tokens = rng.integers(0, 20, (rows, config.model.num_streams, frames + 1)).astype(np.int32)
        length, reset = np.full(rows, frames, np.int32), np.ones(rows, bool)
        if config.data.mode == "follow":
            length, reset = (
                rng.integers(frames // 2, frames + 1, rows, np.int32),
                rng.random(rows) < (0.3 if step else 1),
            )
        chunks.append(Chunk(np.where(np.arange(frames + 1) <= length[:, None, None], tokens, -1), length, reset))
    return chunks


def train_on(config: ExperimentConfig, workdir, sizes) -> list[dict]:
    """The metrics of every update."""
    config = dataclasses.replace(config, mesh=MeshConfig(*sizes))
    train(config, workdir, make_chunks(config, config.optimizer.steps), None)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["train"] for line in lines]


if __name__ == "__main__":
    pass
