"""Which precision a computation runs in, and integers of any width."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def at_least_float32(dtype) -> jnp.dtype:
    """float64 for float64, float32 for everything narrower."""
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def clipped_length(length, num_tokens: int) -> jax.Array:
    """How many tokens of each row are real, `[B]` int32 in [0, num_tokens], of numbers of any integer dtype."""
    length = integers(length)
    if not isinstance(length, jax.Array):  # JAX would wrap what does not fit its default integers
        return jnp.asarray([min(max(int(number), 0), num_tokens) for number in length], jnp.int32)
    return jnp.clip(length, 0, min(num_tokens, jnp.iinfo(length.dtype).max)).astype(jnp.int32)


def integers(x) -> Any:
    """A list as an array, and arrays as they are: JAX's own would lose what does not fit its default integers."""
    if isinstance(x, list | tuple) and any(isinstance(number, jax.Array) for number in x):
        return jnp.asarray(x)
    return x if isinstance(x, jax.Array) else np.asarray(x)
