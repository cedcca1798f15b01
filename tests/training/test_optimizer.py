import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ttt_jax.config import from_mapping
from ttt_jax.models.moshi import Moshi, MoshiConfig, TTTInsertion, lora
from ttt_jax.training.config import SCHEDULES, OptimizerConfig
from ttt_jax.training.optimizer import decay_mask, groups, learning_rate_schedule, make_optimizer
from ttt_jax.training.parameters import Trained, put_back, trained_part

MODEL = MoshiConfig(
    **{"dim": 16, "num_layers": 2, "num_heads": 2, "context": 4, "hidden_scale": 3.0},
    **{"n_q": 4, "dep_q": 2, "card": 20, "text_card": 20, "delays": (0, 0, 1, 0, 1)},
    **{"depformer_dim": 8, "depformer_num_layers": 1, "depformer_num_heads": 2, "depformer_dim_feedforward": None},
    ttt=TTTInsertion((1,), kind="mlp", mini_batch_size=4),
)


def by_path(tree) -> dict:
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


@pytest.fixture(scope="module")
def model():
    """Moshi's parameters as shapes."""
    return jax.eval_shape(lambda: Moshi(MODEL).init(jax.random.key(0), np.zeros((1, 5, 4), np.int32))["params"])


@pytest.fixture(scope="module")
def params():
    """A few parameters by Moshi's names, some of each group, decayed and not; none is zero, so that decay shows."""
    layer = {
        "self_attn": {"in_proj": jnp.empty((2, 3))},
        "norm1": {"alpha": jnp.empty(2)},
        "gate": jnp.empty(2),
        "norm_ttt": {"alpha": jnp.empty(2)},
        "ttt": {"wq": {"kernel": jnp.empty((2, 2))}, "inner": {"w1": jnp.empty((2, 1, 3)), "b1": jnp.empty((2, 3))}},
    }
    return random_like({"text_linear": jnp.empty((2, 4)), "layers_1": layer}, 0)


def random_like(tree, seed: int):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), tree)


def make(**fields) -> OptimizerConfig:
    return from_mapping(OptimizerConfig, {"learning_rate": 1e-2, "steps": 12, "warmup_steps": 3, **fields})


def updates_of(config: OptimizerConfig, params, number: int = 1, gradients=random_like):
    """The last of `number` updates for gradients that differ at each, at fixed parameters."""
    optimizer = make_optimizer(config)
    state, updates = optimizer.init(params), None
    for i in range(number):  # not jitted: compiling would take longer
        updates, state = optimizer.update(gradients(params, i), state, params)
    return updates


@pytest.fixture(scope="module")
def sixth_updates(params):
    return functools.cache(lambda config: by_path(updates_of(config, params, number=6)))


def zero_gradients(params, _):
    return jax.tree.map(jnp.zeros_like, params)


def test_the_learning_rate_rises_linearly_and_falls_by_a_cosine():
    rate = learning_rate_schedule(OptimizerConfig(2.0, steps=14, warmup_steps=4, final_learning_rate_fraction=0.1))
    got = [float(rate(update)) for update in range(14)]
    np.testing.assert_allclose(got[:4], [0.5, 1.0, 1.5, 2.0], rtol=1e-6)
    np.testing.assert_allclose(got[8], 0.5 * (2.0 + 0.2), rtol=1e-6)
    np.testing.assert_allclose(got[-1], 0.2, rtol=1e-5)
    flat = learning_rate_schedule(OptimizerConfig(2.0, steps=4, warmup_steps=0))
    assert 1.5 < float(flat(0)) < 2.0


@pytest.mark.parametrize(("schedule", "middle", "end"), [("linear", 1.1, 0.2), ("constant", 2.0, 2.0)])
@pytest.mark.parametrize("warmup", [0, 4])
def test_other_schedules_start_like_the_cosine_and_end_as_they_say(schedule, middle, end, warmup):
    rate = learning_rate_schedule(
        OptimizerConfig(2.0, warmup + 10, warmup, schedule=schedule, final_learning_rate_fraction=0.1)
    )
    got = [float(rate(update)) for update in range(warmup + 10)]
    np.testing.assert_allclose(got[:warmup], np.arange(1, warmup + 1) / max(warmup, 1) * 2.0, rtol=1e-6)
    np.testing.assert_allclose(got[warmup + 4], middle, rtol=1e-6)
    np.testing.assert_allclose(got[-1], end, rtol=1e-5)


def test_norms_biases_gates_and_the_inner_biases_are_not_decayed(model):
    shapes, flags = by_path(model), by_path(decay_mask(model))
    decayed = [name for name, flag in flags.items() if flag]
    kept = [name for name, flag in flags.items() if not flag]
    assert not any(shapes[name].ndim == 1 for name in decayed)
    for part in ("norm1/", "norm2/", "norm_ttt/", "out_norm/", "/gate", "/b1", "/b2", "/ln_scale", "/ln_bias"):
        assert any(part in f"{name}/" for name in kept), part
        assert not any(part in f"{name}/" for name in decayed if "gating" not in name), part
    for part in ("emb", "in_proj", "text_linear", "/w1", "/w2", "/wo"):
        assert any(part in name for name in decayed), part


def factor_shapes(model, rank):
    return jax.eval_shape(functools.partial(lora.init_factors, rank=rank), jax.random.key(0), model)


def test_the_factors_of_every_rank_are_decayed(model):
    factors = factor_shapes(model, rank=1)
    assert all(jax.tree.leaves(decay_mask(factors)))


def test_every_parameter_is_in_the_group_it_should_be(model):
    names = by_path(groups(Trained(model, factor_shapes(model, rank=2))))
    found = {group: {name for name in names if names[name] == group} for group in ("base", "ttt", "gates")}
    assert found["gates"] == {"params/layers_1/gate"}
    assert {name.split("/")[2] for name in found["ttt"]} == {"ttt", "norm_ttt"}
    assert all(name.startswith("params/layers_1/") for name in found["ttt"])
    assert {"params/layers_1/gating/linear_in", "lora/layers_1/self_attn/in_proj/A"} <= found["base"]
    assert found["base"] | found["ttt"] | found["gates"] == names.keys()
    assert not [name for name in found["base"] if "ttt" in name]


@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_the_defaults_are_plain_adamw_bit_for_bit(params, warmup_steps):
    config = make(warmup_steps=warmup_steps, clip_norm=0.5)
    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-2, warmup_steps, 12, 1e-2 * 0.1)
    mask = {path: leaf.ndim > 1 and path.split("/")[-1] not in ("b1", "b2") for path, leaf in by_path(params).items()}
    mask |= {path: False for path in mask if path.endswith(("ln_scale", "ln_bias"))}
    mask = jax.tree.unflatten(jax.tree.structure(params), mask.values())
    plain = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(lambda count: rate(count + 1), b1=0.9, b2=0.95, weight_decay=0.1, mask=mask),
    )
    trees = []
    for optimizer in (make_optimizer(config), plain):
        now, state = params, optimizer.init(params)
        update = jax.jit(optimizer.update)
        for i in range(5):
            updates, state = update(random_like(params, i), state, now)
            now = optax.apply_updates(now, updates)
        trees.append(now)
    jax.tree.map(np.testing.assert_array_equal, *trees)


@pytest.mark.parametrize("group", ["base", "ttt", "gates"])
@pytest.mark.parametrize(
    ("own", "run"),
    [
        ({"learning_rate_factor": 0.25}, {"learning_rate": 0.25e-2}),
        ({"schedule": "linear"}, {"schedule": "linear"}),
        ({"schedule": "constant"}, {"schedule": "constant"}),
        ({"warmup_steps": 7}, {"warmup_steps": 7}),
        ({"final_learning_rate_fraction": 0.9}, {"final_learning_rate_fraction": 0.9}),
        ({"weight_decay": 0.7}, {"weight_decay": 0.7}),
    ],
)
def test_a_group_is_trained_as_if_its_settings_were_the_runs_and_the_others_as_before(
    params, sixth_updates, group, own, run
):
    got, as_before, as_run = (sixth_updates(make(**fields)) for fields in ({"groups": {group: own}}, {}, run))
    members = {name for name, label in by_path(groups(params)).items() if label == group}
    changed = {name for name in got if np.any(got[name] != as_before[name])}
    for name in got:
        np.testing.assert_array_equal(got[name], (as_run if name in members else as_before)[name], name)
    is_decayed = by_path(decay_mask(params))
    assert changed == {name for name in members if "weight_decay" not in own or is_decayed[name]}


def test_weight_decay_follows_mask_group_and_learning_rate(params):
    decays, factors = {"base": 0.1, "ttt": 0.3, "gates": 0.5}, {"base": 1.0, "ttt": 4.0, "gates": 2.0}
    settings = {name: {"weight_decay": decays[name], "learning_rate_factor": factors[name]} for name in decays}
    updates = by_path(updates_of(make(groups=settings), params, gradients=zero_gradients))
    mask, group, values = by_path(decay_mask(params)), by_path(groups(params)), by_path(params)
    for name, update in updates.items():
        rate = 1e-2 / 3 * factors[group[name]]
        np.testing.assert_allclose(update, -rate * decays[group[name]] * mask[name] * values[name], rtol=1e-5, atol=0)


def test_the_clip_norm_is_of_all_groups_together(params):
    def gradients(params, i):
        return {**random_like(params, i), "text_linear": params["text_linear"] * 10.0**i}

    def clipped_by_hand(params, i):
        tree = gradients(params, i)
        norm = np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(tree)))
        return jax.tree.map(lambda leaf: leaf * jnp.float32(min(1, 6.0 / norm)), tree)

    got = updates_of(make(clip_norm=6.0), params, number=3, gradients=gradients)
    by_hand = updates_of(make(clip_norm=1e9), params, number=3, gradients=clipped_by_hand)
    unclipped = updates_of(make(clip_norm=1e9), params, number=3, gradients=gradients)
    jax.tree.map(lambda new, want: np.testing.assert_allclose(new, want, rtol=1e-5), got, by_hand)
    # The big gradient is the base's, the others are clipped by it all the same.
    assert not np.allclose(got["layers_1"]["ttt"]["wq"]["kernel"], unclipped["layers_1"]["ttt"]["wq"]["kernel"])


@pytest.mark.parametrize("train", ["all", "qkvo", "ttt", "lora"])
def test_what_each_mode_trains(model, train):
    factors = factor_shapes(model, rank=2) if train == "lora" else None
    trained = trained_part(model, factors, train)
    names = set(by_path(trained.params))
    inserted = {name for name, group in by_path(groups(model)).items() if group != "base"}
    projections = {f"layers_{i}/self_attn/{name}" for i in range(2) for name in ("in_proj", "out_proj")}
    expected = {"all": set(by_path(model)), "qkvo": inserted | projections, "ttt": inserted, "lora": inserted}
    assert names == expected[train]
    assert trained.lora == factors
    moments = [
        leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(make_optimizer(make()).init, trained)) if leaf.ndim
    ]
    assert moments == 2 * [leaf.shape for leaf in jax.tree.leaves(trained)]


def test_what_is_put_back_takes_its_place_and_the_rest_stays(params):
    trained = jax.tree.map(lambda leaf: 2 * leaf, trained_part(params, None, "ttt"))
    assert jax.tree.structure(trained.params) != jax.tree.structure(params)
    for name, leaf in by_path(put_back(params, trained)).items():
        is_new = "ttt" in name or "gate" in name
        np.testing.assert_array_equal(leaf, by_path(params)[name] * (2 if is_new else 1), name)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"groups": {"ttt": {"warmup_steps": 12}}},
            r"groups\.ttt\.warmup_steps: .*less than steps = 12, got 12",
        ),
        ({"groups": {"ttt": {"learning_rate_factor": 0}}}, r"groups\.ttt: learning_rate_factor: .*optimizer\.train"),
        ({"groups": {"gates": {"schedule": "cosin"}}}, r"groups\.gates\.schedule: expected one of .*'cosin'"),
        ({"groups": {"gate": {}}}, r"groups\.gate: .*`gates`"),
        ({"groups": {"base": {"weight_decay": -1.0}}}, r"groups\.base: weight_decay: expected 0 or more, got -1"),
        ({"groups": {"base": {"final_learning_rate_fraction": 2}}}, r"final_learning_rate_fraction: .*fraction"),
        ({"train": "tt"}, r"train: expected one of .*'tt'"),
        ({"schedule": "step"}, r"schedule: expected one of .*'step'"),
    ],
)
def test_a_bad_setting_is_named(fields, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make(**fields)


def test_the_schedules_are_those_of_the_annotations():
    for schedule in SCHEDULES:
        assert make(schedule=schedule, groups={"ttt": {"schedule": schedule}}).group("ttt").schedule == schedule
