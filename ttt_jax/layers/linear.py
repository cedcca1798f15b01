"""Products with a kernel, and with low-rank factors beside it where there are such."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

LORA = "lora"
"""Collection of low-rank factors: `{"A": [..., in, rank], "B": [..., rank, out]}` in the place of a kernel."""


def linear(module: nn.Module, name: str, x: jax.Array, kernel: jax.Array, product=jnp.matmul, **options) -> jax.Array:
    """`x W`, plus `(x A) B` where the collection "lora" of `module` holds factors for `name` (Hu et al. 2021).

    The factors are not added to the kernel: in bfloat16 the sum of a kernel and a small product is the kernel again.

    Args:
        module: Owns the kernel.
        name: Of the kernel.
        x: Input; kernel and factors are cast to its dtype.
        kernel: W, its last two axes are input and output features.
        product: Multiplies an input and such a matrix.
        options: Keywords of `product`.
    """
    kernel, x = _in_turn(kernel, x)
    y = product(x, kernel.astype(x.dtype), **options)
    if not module.has_variable(LORA, name):
        return y
    factors: Any = module.get_variable(LORA, name)
    inner = product(x, factors["A"].astype(x.dtype), **options).astype(x.dtype)
    return y + product(inner, factors["B"].astype(x.dtype), **options)


def _in_turn(kernel: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same two, the kernel only when x has been computed.

    XLA multiplies bfloat16 matrices on a CPU as float32; left to itself it widens those of all layers at the same time.
    """
    if kernel.dtype != jnp.bfloat16:
        return kernel, x
    wait = jax.lax.optimization_barrier
    return jax.lax.platform_dependent(kernel, x, cpu=lambda *both: wait(both), default=lambda *both: both)
