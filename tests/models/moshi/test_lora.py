import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.models.moshi import Moshi, MoshiConfig, TTTInsertion, lora

CONFIG = MoshiConfig(
    **{"dim": 16, "num_layers": 2, "num_heads": 2, "context": 4, "hidden_scale": 3.0},
    **{"n_q": 4, "dep_q": 2, "card": 20, "text_card": 20, "delays": (0, 0, 1, 0, 1)},
    **{"depformer_dim": 8, "depformer_num_layers": 1, "depformer_num_heads": 2, "depformer_dim_feedforward": None},
    depformer_low_rank_embeddings=4,
    ttt=TTTInsertion((1,), mini_batch_size=4),
)
CODES = np.random.default_rng(0).integers(0, 20, (2, 5, 6)).astype(np.int32)


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda: Moshi(CONFIG).init(jax.random.key(0), CODES)["params"])()


def by_path(tree) -> dict:
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def test_every_linear_layer_and_nothing_else_has_factors(params):
    factors = by_path(lora.init_factors(jax.random.key(1), params, rank=3))
    adapted = {name.rsplit("/", 1)[0] for name in factors}
    linears = {"text_linear", "depformer/depformer_in", "depformer/linears", "depformer/depformer_low_rank"}
    for layer in ("layers_0", "layers_1"):
        linears |= {f"{layer}/self_attn/{name}" for name in ("in_proj", "out_proj")}
        linears |= {f"{layer}/gating/{name}" for name in ("linear_in", "linear_out")}
    linears |= {f"depformer/layers_0/{name}" for name in ("in_proj", "out_proj", "linear_in", "linear_out")}
    assert adapted == linears
    for name in linears:
        *batch, inputs, outputs = by_path(params)[name].shape
        assert factors[f"{name}/A"].shape == (*batch, inputs, 3)
        assert factors[f"{name}/B"].shape == (*batch, 3, outputs)


def test_a_is_random_within_its_bound_and_b_is_zero(params):
    factors = by_path(lora.init_factors(jax.random.key(1), params, rank=64))
    seen = set()
    for name, factor in factors.items():
        if name.endswith("B"):
            assert not np.any(factor)
            continue
        bound = factor.shape[-2] ** -0.5
        # Uniform of at least 500 numbers in +-bound: the largest comes near it, the spread is bound / sqrt(3).
        assert 0.98 * bound < np.max(np.abs(factor)) <= bound * (1 + 1e-6)
        np.testing.assert_allclose(np.std(factor), bound / 3**0.5, rtol=0.1)
        seen.add(float(factor.reshape(-1)[0]) / bound)
    assert len(seen) == len(factors) // 2


def test_fresh_factors_leave_the_logits_bit_equal(params):
    factors = lora.init_factors(jax.random.key(1), params, rank=2)
    forward = jax.jit(lambda params: Moshi(CONFIG).apply({"params": params}, CODES))
    jax.tree.map(np.testing.assert_array_equal, forward(lora.merge(params, factors, 2.0)), forward(params))


def test_merged_kernels_are_the_low_rank_path_beside_the_frozen_one(params):
    rng = np.random.default_rng(2)
    factors = jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype),
        lora.init_factors(jax.random.key(1), params, rank=3),
    )
    merged, base, factors = by_path(lora.merge(params, factors, 0.5)), by_path(params), by_path(factors)
    assert merged.keys() == base.keys()
    for name, kernel in merged.items():
        if f"{name}/A" not in factors:
            np.testing.assert_array_equal(kernel, base[name])
            continue
        w, a, b, m = (
            np.asarray(x, np.float64) for x in (base[name], factors[f"{name}/A"], factors[f"{name}/B"], kernel)
        )
        x = rng.standard_normal((*w.shape[:-2], 7, w.shape[-2]))
        # float32 rounding of the kernel, whose entries reach 10, summed over up to 48 inputs
        np.testing.assert_allclose(x @ m, x @ w + 0.5 * ((x @ a) @ b), atol=1e-4, err_msg=name)


def test_merging_keeps_the_dtype_of_the_kernels(params):
    factors = lora.init_factors(jax.random.key(1), params, rank=2)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(lora.merge(half, factors, 2.0))} == {jnp.dtype(jnp.bfloat16)}


def test_factors_beside_the_kernels_give_what_merged_ones_give(params):
    rng = np.random.default_rng(3)
    factors = jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) * 0.1, leaf.dtype),
        lora.init_factors(jax.random.key(1), params, rank=3),
    )
    forward = jax.jit(lambda variables: Moshi(CONFIG).apply(variables, CODES))
    got = forward({"params": params} | lora.collection(factors, 0.5))
    want = forward({"params": lora.merge(params, factors, 0.5)})
    plain = forward({"params": params})
    for name in ("logits", "text_logits"):
        values, expected, base = (getattr(output, name) for output in (got, want, plain))
        np.testing.assert_allclose(values, expected, atol=1e-5)  # float32, logits of about 1: measured 3.4e-6
        assert np.max(np.abs(expected - base)) > 1e-2


def test_products_too_small_for_a_bfloat16_kernel_still_count(params):
    """1e-3 of a kernel is less than half a unit in its last place: merged, it would round away."""
    half = {name: params[name] for name in params}
    half["text_linear"] = params["text_linear"].astype(jnp.bfloat16)
    factors = lora.init_factors(jax.random.key(1), params, rank=2)
    factors = {"text_linear": {**factors["text_linear"], "B": jnp.full_like(factors["text_linear"]["B"], 1e-6)}}
    forward = jax.jit(lambda variables: Moshi(CONFIG).apply(variables, CODES).text_logits)
    plain = forward({"params": half})
    np.testing.assert_array_equal(forward({"params": lora.merge(half, factors, 1.0)}), plain)
    assert np.any(forward({"params": half} | lora.collection(factors, 1.0)) != plain)
