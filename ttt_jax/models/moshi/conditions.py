"""Conditions of a whole conversation, such as the quality of a translation's voice: a learned vector on every frame."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ttt_jax.models.moshi.config import ABSENT, Conditioner, MoshiConfig

EMBEDDING_INIT = nn.initializers.normal(1.0)
PADDING_INIT = nn.initializers.normal(0.2)
PROJECTION_INIT = nn.initializers.lecun_normal()

Value = str | None | Sequence[str | None] | np.ndarray | jax.Array


class LookupConditioner(nn.Module):
    """The parameters of one condition."""

    conditioner: Conditioner
    width: int

    @nn.compact
    def __call__(self, rows: jax.Array) -> jax.Array:
        """Rows `[B]` int32 of the table, -1 where there is no value, to float32 `[B, width]`."""
        c = self.conditioner
        embed = self.param("embed", EMBEDDING_INIT, (c.n_bins + 1, c.dim), jnp.float32)
        output_proj = self.param("output_proj", PROJECTION_INIT, (c.dim, self.width), jnp.float32)
        learnt_padding = self.param("learnt_padding", PADDING_INIT, (self.width,), jnp.float32)
        return look_up(embed, output_proj, learnt_padding, rows)


def look_up(embed: jax.Array, output_proj: jax.Array, learnt_padding: jax.Array, rows: jax.Array) -> jax.Array:
    """`embed[row] @ output_proj`, or the padding where the row is negative: int `[B]` to `[B, width]`."""
    projected = jnp.take(embed, jnp.maximum(rows, 0), axis=0) @ output_proj
    return jnp.where((rows >= 0)[:, None], projected, learnt_padding[None])


def condition_vector(config: MoshiConfig, params, conditions: Mapping[str, Value] | None) -> jax.Array:
    """The sum of all conditions' vectors, for `condition=` of `Moshi` and of `stream_step`; differentiable.

    Args:
        config: of a model that has conditioners.
        params: Moshi's parameter tree.
        conditions: the value of each condition by name: a word for all rows, a list of one for each row, or an int
            array `[B]` of rows of the table (which may be traced). None is no value, -1 in an array; a condition that
            is left out has none. Hibiki's "description" is one of "very_bad", "bad", "neutral", "good", "very_good".

    Returns:
        float32 `[B, dim]`, or `[1, dim]` when nothing is given by row.

    Raises:
        ValueError: the model has no such condition, or a value is none of those it knows; both are listed.
    """
    conditions = {} if conditions is None else dict(conditions)
    names = [conditioner.name for conditioner in config.conditioners]
    unknown = sorted(conditions.keys() - set(names))
    if unknown or not names:
        raise ValueError(f"conditions must be among {names}, those of this model, got {unknown or None}")
    rows = {c.name: _rows(c, conditions.get(c.name)) for c in config.conditioners}
    sizes = {name: x.shape[0] for name, x in rows.items()}
    if len(set(sizes.values()) - {1}) > 1:
        raise ValueError(f"conditions must have a value for each of the same rows, got {sizes}")
    return sum_of_vectors(look_up(**params[f"conditioners_{name}"], rows=x) for name, x in rows.items())


def sum_of_vectors(vectors: Iterable[jax.Array]) -> jax.Array:
    """The sum of `[B or 1, dim]` arrays."""
    first, *others = vectors
    for vector in others:
        first = first + vector
    return first


def _rows(conditioner: Conditioner, value: Any) -> jax.Array:
    """Rows of the table `[B]` int32, from words or row numbers."""
    if value is None or isinstance(value, str):
        return jnp.asarray([conditioner.row(value)], jnp.int32)
    if not hasattr(value, "dtype"):
        return jnp.asarray([conditioner.row(word) for word in value], jnp.int32)
    name = f"conditions[{conditioner.name!r}]"
    if value.ndim != 1 or not jnp.issubdtype(value.dtype, jnp.integer):
        raise ValueError(f"{name} must be words or integers [B], got {value.dtype}{list(value.shape)}")
    known = None if isinstance(value, Tracer) else np.asarray(value)
    if known is not None and np.any((known < ABSENT) | (known >= conditioner.n_bins)):
        raise ValueError(f"{name} must lie in [{ABSENT}, {conditioner.n_bins}), got {known.tolist()}")
    return jnp.asarray(value, jnp.int32)
