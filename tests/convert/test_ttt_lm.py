"""TTT-LM's layers through `ttt_lm_params`: recorded outputs, gradients and inner losses in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from ttt_jax.convert import ttt_lm_params
from ttt_jax.layers.ttt import TTTConfig, TTTLayer

LAYERS = {
    "ttt_lm_linear_layer_causal": ("linear", "mamba"),
    "ttt_lm_mlp_layer_causal": ("mlp", "mamba"),
    "ttt_lm_linear_base_layer_causal": ("linear", "base"),
}


@pytest.fixture(params=LAYERS)
def golden(request, data_dir):
    with np.load(data_dir / f"{request.param}.npz") as recorded:
        arrays = {name: recorded[name].astype(np.float64) for name in recorded}
    kind, backbone = LAYERS[request.param]
    read = {name.removeprefix("config/"): float(x) for name, x in arrays.items() if name.startswith("config/")}
    config = TTTConfig.ttt_lm(
        kind,
        arrays["x"].shape[-1],
        int(read["num_heads"]),
        backbone=backbone,
        mini_batch_size=int(read["mini_batch_size"]),
        base_lr=read["ttt_base_lr"],
        rope_theta=read["rope_theta"],
        conv_width=int(read["conv_width"]),
    )
    return config, arrays


def tensors(arrays, prefix):
    return {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}


def test_outputs_and_gradients_match(golden):
    config, arrays = golden
    with jax.enable_x64(True):
        layer = TTTLayer(config, dtype=jnp.float64)

        def objective(params, x):
            y, _ = layer.apply({"params": params}, x)
            return jnp.sum(y * arrays["cotangent"]), y

        grad = jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))
        (_, y), (grad_params, grad_x) = grad(ttt_lm_params(tensors(arrays, "param/")), arrays["x"])
    np.testing.assert_allclose(y, arrays["out"], rtol=0, atol=1e-6)
    expected = flatten_dict(ttt_lm_params(tensors(arrays, "grad_param/")), sep="/") | {"x": arrays["grad_x"]}
    got = flatten_dict(grad_params, sep="/") | {"x": grad_x}
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        # The goldens are stored as float32, so the error is relative to the largest entry.
        scale = max(1, np.abs(expected[name]).max())
        np.testing.assert_allclose(gradient, expected[name], rtol=0, atol=5e-6 * scale, err_msg=name)


def test_inner_losses_match(golden):
    """Published statistics look at the last token of each mini-batch, the library averages over a call's tokens.

    So calls of C - 1 tokens and of one token show the same numbers.
    """
    config, arrays = golden
    c, num_tokens = config.mini_batch_size, arrays["x"].shape[1]
    with jax.enable_x64(True):
        layer = TTTLayer(config, dtype=jnp.float64)
        params = ttt_lm_params(tensors(arrays, "param/"))

        @jax.jit
        def read(x, state):
            (_, state), sown = layer.apply({"params": params}, x, state, mutable=["diagnostics"])
            return state, sown["diagnostics"]

        state = layer.apply({"params": params}, 2, method="init_state")
        losses = {"initial": [], "before": [], "after": []}
        for start in range(0, num_tokens, c):
            state, _ = read(arrays["x"][:, start : start + c - 1], state)
            state, sown = read(arrays["x"][:, start + c - 1 : start + c], state)
            for name, values in losses.items():
                values.append(sown[f"inner_loss_{name}"][0])
    for name, published in {
        "initial": "ttt_loss_init",
        "before": "ttt_loss_step_0",
        "after": "ttt_loss_step_1",
    }.items():
        np.testing.assert_allclose(np.stack(losses[name]), arrays[f"stat/{published}"], rtol=2e-6, err_msg=name)


def test_every_wrong_tensor_is_listed(golden):
    _, arrays = golden
    broken = tensors(arrays, "param/")
    broken["wv/kernel"] = broken["wv/kernel"][:-1]
    del broken["post_norm/scale"]
    broken["extra"] = np.zeros(3)
    with pytest.raises(
        ValueError, match=r"(?s)missing \(1\): post_norm/scale.*unexpected \(1\): extra.*wv/kernel: expected"
    ):
        ttt_lm_params(broken)


def test_the_tree_is_the_layers_own(golden):
    config, arrays = golden
    layer = TTTLayer(config)
    own = jax.eval_shape(lambda: layer.init(jax.random.key(0), jnp.zeros((1, 2, config.width)))["params"])
    converted = ttt_lm_params(tensors(arrays, "param/"))
    assert jax.tree.map(jnp.shape, converted) == jax.tree.map(jnp.shape, unflatten_dict(flatten_dict(own)))
