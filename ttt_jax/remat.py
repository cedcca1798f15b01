"""`lax.scan` that trades time for memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def checkpointed_scan(step: Callable[[Any, Any], Any], carry: Any, xs: Any, every: int) -> tuple[Any, Any]:
    """`lax.scan` whose backward pass keeps only every `every`-th carry and recomputes the rest."""
    num_steps = jax.tree.leaves(xs)[0].shape[0]
    if num_steps <= every:
        return jax.lax.scan(step, carry, xs)
    groups, rest = divmod(num_steps, every)

    @jax.checkpoint
    def scan(carry, xs):
        return jax.lax.scan(step, carry, xs)

    grouped = jax.tree.map(lambda x: x[: groups * every].reshape(groups, every, *x.shape[1:]), xs)
    carry, ys = jax.lax.scan(scan, carry, grouped)
    ys = jax.tree.map(lambda y: y.reshape(groups * every, *y.shape[2:]), ys)
    if rest:
        carry, tail = scan(carry, jax.tree.map(lambda x: x[groups * every :], xs))
        ys = jax.tree.map(lambda y, t: jnp.concatenate([y, t]), ys, tail)
    return carry, ys
