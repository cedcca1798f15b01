"""Kernels on arrays that a mesh of devices splits: each device runs the kernel on its own rows and heads.

The compiler cannot cut a kernel itself; it is told which axes of the arrays are rows and heads, and gathers the others.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec


class Axes(NamedTuple):
    """Which axes of an array are rows and heads; None: it has no such axis."""

    row: int | None
    head: int | None


TOKENS = Axes(0, 2)
"""Of `[B, T, H, D]`."""

EACH = Axes(0, 1)
"""Of `[B, H, ...]`."""

HEADS = Axes(None, 0)
"""Of `[H, ...]`."""

SHARED = Axes(None, None)
"""Of what all rows and heads share."""


def split(
    kernel: Callable[..., Any], arguments: Sequence[jax.Array], of_arguments: Sequence[Axes], of_results: Sequence[Axes]
) -> tuple[jax.Array, ...]:
    """`kernel(*arguments)`, on each device those rows and heads that it has; the first argument decides which.

    Args:
        kernel: Takes and returns arrays, with any number of rows and heads.
        arguments: What it is called with.
        of_arguments: The axes of each argument; the first one has both.
        of_results: The axes of each result.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if all(size == 1 or name in mesh.manual_axes for name, size in mesh.shape.items()):
        return tuple(kernel(*arguments))
    results = jax.eval_shape(kernel, *arguments)
    ranks = [x.ndim for x in (*arguments, *results)]
    partitioned = custom_partitioning(lambda *arguments: tuple(kernel(*arguments)))

    def partition(mesh, given, _):
        spec = [*given[0].sharding.spec, *[None] * given[0].ndim]
        placed = {"row": spec[of_arguments[0].row], "head": spec[of_arguments[0].head]}
        shardings = [NamedSharding(mesh, _spec(axes, placed)) for axes in (*of_arguments, *of_results)]
        at = len(of_arguments)
        return mesh, lambda *arguments: tuple(kernel(*arguments)), tuple(shardings[at:]), tuple(shardings[:at])

    rule, whole = _rule(ranks, (*of_arguments, *of_results), len(of_arguments))
    partitioned.def_partition(partition, sharding_rule=rule, need_replication_factors=whole)
    return partitioned(*arguments)


def _spec(axes: Axes, placed: dict[str, Any]) -> PartitionSpec:
    entries: list[Any] = [None] * (1 + max((axis for axis in axes if axis is not None), default=-1))
    for name, axis in axes._asdict().items():
        if axis is not None:
            entries[axis] = placed[name]
    return PartitionSpec(*entries)


def _rule(ranks: Sequence[int], axes: Sequence[Axes], num_arguments: int) -> tuple[str, tuple[str, ...]]:
    """A sharding rule, such as "row a1 head a3, head b1 -> row a1 head a3", and its factors that nobody may split."""
    whole, terms = [], []
    for i, (rank, (row, head)) in enumerate(zip(ranks, axes, strict=True)):
        names = [f"x{i}y{axis}" for axis in range(rank)]
        for axis, name in ((row, "row"), (head, "head")):
            if axis is not None:
                names[axis] = name
        whole += [name for name in names if name not in ("row", "head")]
        terms.append(" ".join(names))
    return f"{', '.join(terms[:num_arguments])} -> {', '.join(terms[num_arguments:])}", tuple(whole)
