"""Starting from an existing model: its parameters, TTT inserted without effect, and what does not fit is told."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.checkpoint import save_model
from ttt_jax.config import from_mapping
from ttt_jax.models.moshi import Moshi, MoshiConfig
from ttt_jax.training import ExperimentConfig, run, sharding
from ttt_jax.training.config import MeshConfig
from ttt_jax.training.initial import check_init_from, initial_parameters, read_init_from

CODES = np.random.default_rng(0).integers(0, 20, (2, 3, 9)).astype(np.int32)
MODEL = {
    **{"dim": 16, "num_layers": 2, "num_heads": 2, "context": 4, "hidden_scale": 3.0},
    **{"n_q": 2, "dep_q": 2, "card": 20, "text_card": 20, "delays": (0, 1, 0)},
    **{"depformer_dim": 8, "depformer_num_layers": 1, "depformer_num_heads": 2, "depformer_dim_feedforward": None},
}


def make(init_from="", layers=(0, 1), seed=1, optimizer=None, precision=None, **model) -> ExperimentConfig:
    model = MODEL | {"ttt": {"layers": layers, "mini_batch_size": 4}} | model
    mapping = {"data": {"directory": ""}, "model": model, "init_from": str(init_from), "seed": seed}
    return from_mapping(ExperimentConfig, mapping | {"optimizer": optimizer or {}, "precision": precision or {}})


def random_params(config: MoshiConfig, seed: int):
    """Parameters of which none is zero, the inserted layers' wo included."""
    shapes = jax.eval_shape(lambda: Moshi(config).init(jax.random.key(0), CODES)["params"])
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) * 0.3, leaf.dtype), shapes)


def start(config):
    return jax.jit(lambda given: initial_parameters(config, given)[0])(read_init_from(config))


@pytest.fixture
def plain(tmp_path):
    """A model without TTT: its directory, config and parameters."""
    config = from_mapping(MoshiConfig, MODEL)
    params = random_params(config, 0)
    save_model(tmp_path / "plain", config, params)
    return tmp_path / "plain", config, params


def assert_equal(tree, expected):
    jax.tree.map(np.testing.assert_array_equal, tree, expected)


def test_inserting_ttt_leaves_the_logits_bit_equal(plain):
    directory, model, params = plain
    config = make(directory)
    check_init_from(config)
    got = start(config)
    fresh = jax.jit(lambda: initial_parameters(make())[0])()
    for layer in ("layers_0", "layers_1"):
        for name in ("ttt", "norm_ttt", "gate"):
            assert_equal(got[layer].pop(name), fresh[layer][name])
        assert np.any(fresh[layer]["ttt"]["wq"]["kernel"] != 0)
    assert_equal(got, params)
    logits = jax.jit(Moshi(config.model).apply)({"params": start(config)}, CODES)
    assert_equal(logits, jax.jit(Moshi(model).apply)({"params": params}, CODES))


def test_ttt_layers_that_are_there_are_kept_and_more_are_inserted(tmp_path):
    first = make(layers=(0,))
    params = random_params(first.model, 1)
    save_model(tmp_path / "first", first.model, params)
    got = start(make(tmp_path / "first"))
    assert not np.any(got["layers_1"]["ttt"]["wo"]["kernel"])
    for name in ("ttt", "norm_ttt", "gate"):
        del got["layers_1"][name]
    assert_equal(got, params)


def test_parameters_of_another_dtype_become_float32(plain, tmp_path):
    _, model, params = plain
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    save_model(tmp_path / "half", model, half)
    got = read_init_from(make(tmp_path / "half"))
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_array_equal(got["text_linear"], half["text_linear"].astype(jnp.float32))


def test_on_a_mesh_each_device_reads_its_part(tmp_path):
    config = make(tmp_path / "wide", dim=64, depformer_dim=32)
    plain = dataclasses.replace(config.model, ttt=None)
    params = random_params(plain, 0)
    save_model(tmp_path / "wide", plain, params)
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=8))
    got = read_init_from(config, mesh)
    assert_equal(got, params)
    shardings = sharding.parameter_shardings(mesh, config.model, params)
    assert jax.tree.map(lambda leaf: leaf.sharding, got) == shardings
    for leaf in jax.tree.leaves(got):
        if leaf.size >= sharding.SMALLEST_SHARDED and any(size % 8 == 0 for size in leaf.shape):
            assert {shard.data.size for shard in leaf.addressable_shards} == {leaf.size // 8}
    parts = jax.tree.map(lambda leaf: leaf.addressable_shards[0].data.size, got)
    assert jax.tree.reduce(int.__add__, parts) < 0.2 * jax.tree.reduce(int.__add__, jax.tree.map(jnp.size, params))


def test_what_is_not_trained_is_stored_as_frozen_says(plain):
    config = make(plain[0], optimizer={"train": "qkvo"}, precision={"frozen": "bfloat16"})
    got = jax.tree.leaves_with_path(start(config))
    dtypes = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.dtype for path, leaf in got}
    for name in ("text_emb", "layers_0/gating/linear_in", "layers_0/norm1/alpha", "depformer/linears"):
        assert dtypes[name] == jnp.bfloat16
    for name in ("layers_0/self_attn/in_proj", "layers_1/ttt/wq/kernel", "layers_1/norm_ttt/alpha", "layers_0/gate"):
        assert dtypes[name] == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(read_init_from(make(plain[0])))} == {jnp.dtype(jnp.float32)}


def test_what_does_not_fit_is_listed(plain, tmp_path):
    directory, model, params = plain
    broken = params | {"text_linear": params["text_linear"][:, :-1], "extra": jnp.ones(3)}
    del broken["out_norm"]
    save_model(tmp_path / "broken", model, broken)
    with pytest.raises(ValueError, match=r"init_from=.*broken: the tensors do not fit") as error:
        check_init_from(make(tmp_path / "broken"))
    for part in (
        r"missing (1): out_norm/alpha [16]",
        r"unexpected (1): extra [3]",
        r"misshapen (1): text_linear: expected [16, 20], got [16, 19]",
    ):
        assert part in str(error.value)
    with pytest.raises(ValueError, match=r"the tensors do not fit"):
        read_init_from(make(tmp_path / "broken"))
    with_ttt = make(layers=(0,))
    save_model(tmp_path / "ttt", with_ttt.model, random_params(with_ttt.model, 1))
    with pytest.raises(ValueError, match=r"unexpected \(\d+\): layers_0/gate"):
        check_init_from(make(tmp_path / "ttt", ttt=None))
    for field, value in {"num_heads": 1, "delays": (0, 0, 0), "max_period": 5e3, "depformer_num_heads": 1}.items():
        with pytest.raises(ValueError, match=rf"is another model\. {field}: there .*, config\.model says"):
            check_init_from(make(directory, **{field: value}))
    with pytest.raises(
        ValueError, match=r"another model\. the TTT layers' base_lr: there 1\.0, config\.model says 0\.01"
    ):
        check_init_from(make(tmp_path / "ttt", ttt={"layers": (0,), "mini_batch_size": 4, "base_lr": 0.01}))
    check_init_from(make(tmp_path / "ttt", ttt={"layers": (0,), "mini_batch_size": 4, "base_lr": 1.0}))
    with pytest.raises(ValueError, match=r"TTT layers' design: there 'after_attention', config\.model says 'kv_cache'"):
        check_init_from(make(tmp_path / "ttt", ttt={"layers": (0,), "mini_batch_size": 4, "design": "kv_cache"}))
    check_init_from(make(directory, context=2, attention="segment"))
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        check_init_from(make(tmp_path / "nowhere"))
    assert read_init_from(make()) is None


def test_a_start_from_what_does_not_fit_leaves_nothing_behind(plain, dataset, tmp_path):
    mapping = {
        "data": {"directory": str(dataset), "num_frames": 8},
        "mesh": {"data": 1},
        "model": {"dim": 32, "num_layers": 1, "num_heads": 2, "delays": (0,) * 17},
        "init_from": str(plain[0]),
    }
    with pytest.raises(ValueError, match=r"config\.init_from=.*plain: is another model"):
        run(mapping, tmp_path / "run")
    assert not (tmp_path / "run").exists()
