"""Which precision a computation runs in."""

import jax.numpy as jnp


def at_least_float32(dtype) -> jnp.dtype:
    """float64 for float64, float32 for everything narrower."""
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)
