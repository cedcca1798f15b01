"""Which dtype to compute sensitive parts in."""

import jax.numpy as jnp


def wide_dtype(dtype) -> jnp.dtype:
    """float64 for float64, else float32: for sums, softmax, norms and angles of narrower activations."""
    return jnp.dtype("float64") if jnp.dtype(dtype) == jnp.float64 else jnp.dtype("float32")
