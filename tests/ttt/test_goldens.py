"""The published operation: TTT-Video-DiT's recorded outputs and gradients (non-causal, eps 1e-8)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ttt_cases import IMPLEMENTATIONS, OPERATIONS

from ttt_jax import TTTLinearParams, TTTMLPParams

PARAMS = {"linear": TTTLinearParams, "mlp": TTTMLPParams}


def to_tokens(x):
    """[B, H, N, C, ...] to [B, T, H, ...]."""
    x = np.moveaxis(x, 1, 3)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_matches_recorded_outputs_and_gradients(kind, implementation, data_dir):
    with np.load(data_dir / f"ttt_{kind}_noncausal.npz") as recorded:
        golden = {name: recorded[name].astype(np.float64) for name in recorded}
    c = golden["q"].shape[3]
    leaves = {name: golden[name] for name in PARAMS[kind]._fields}
    params = PARAMS[kind](**{name: x[:, 0] if name in ("b1", "b2") else x for name, x in leaves.items()})
    inputs = tuple(to_tokens(golden[name]) for name in ("q", "k", "v", "lr"))
    batch_size, num_tokens, num_heads, dim = inputs[0].shape

    def objective(params, q, k, v, lr):
        out, _ = OPERATIONS[kind](
            params, q, k, v, lr, mini_batch_size=c, causal=False, eps=1e-8, remat_every=3, implementation=implementation
        )
        return jnp.sum(out * golden["cotangent"].reshape(out.shape)), out

    grad = jax.jit(jax.value_and_grad(objective, argnums=(0, 1, 2, 3, 4), has_aux=True))
    (_, out), (grad_params, *grad_inputs) = grad(params, *inputs)
    np.testing.assert_allclose(out, golden["out"].reshape(batch_size, num_tokens, num_heads, dim), rtol=0, atol=1e-6)
    got = grad_params._asdict() | dict(zip(("q", "k", "v", "lr"), grad_inputs, strict=True))
    for name, gradient in got.items():
        expected = golden[f"grad_{name}"]
        expected = to_tokens(expected) if name in ("q", "k", "v", "lr") else expected.reshape(gradient.shape)
        # The goldens are stored as float32, so the error is relative to the largest entry.
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=5e-6 * max(1, np.abs(expected).max()), err_msg=name)
