"""What of each row of a batch is real: `length` and `reset`, as all operations and layers take them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def checked_rows(length, reset, batch_size: int, num_tokens: int) -> tuple[jax.Array | None, Any]:
    """`length` as `[B]` int32 in [0, num_tokens], of numbers of any integer dtype, and `reset` as `[B]` bool.

    Both may be lists, and None stays None.

    Raises:
        ValueError: another shape or dtype.
    """
    length, reset = (None if x is None else _array(x) for x in (length, reset))
    for name, x, kind, expected in (("length", length, jnp.integer, "integers"), ("reset", reset, jnp.bool_, "bool")):
        if x is not None and (x.shape != (batch_size,) or not jnp.issubdtype(x.dtype, kind)):
            raise ValueError(f"{name}: expected {expected} of shape [B] = ({batch_size},), got {x.dtype} of {x.shape}.")
    return None if length is None else _clipped(length, num_tokens), reset


def real_tokens(length: jax.Array | None, num_tokens: int) -> jax.Array | None:
    """Which tokens lie within their row's length, `[B, T]` bool; None: all."""
    return None if length is None else jnp.arange(num_tokens, dtype=jnp.int32)[None] < length[:, None]


def zero_where_not(kept: jax.Array | None, x: jax.Array) -> jax.Array:
    """`x` with zeros where `kept`, of its first axes, is not; None keeps all."""
    if kept is None:
        return x
    return jnp.where(kept.reshape(kept.shape + (1,) * (x.ndim - kept.ndim)), x, jnp.zeros((), x.dtype))


def _clipped(length, num_tokens: int) -> jax.Array:
    if not isinstance(length, jax.Array):  # JAX would wrap what does not fit its default integers
        return jnp.asarray([min(max(int(number), 0), num_tokens) for number in length], jnp.int32)
    return jnp.clip(length, 0, min(num_tokens, jnp.iinfo(length.dtype).max)).astype(jnp.int32)


def _array(x) -> Any:
    """A list as an array, and arrays as they are: JAX's own would lose what does not fit its default integers."""
    if isinstance(x, list | tuple) and any(isinstance(number, jax.Array) for number in x):
        return jnp.asarray(x)
    return x if isinstance(x, jax.Array) else np.asarray(x)
