"""Kernels on arrays that a mesh of devices splits: each device runs the kernel on its own rows and heads.

The compiler cannot cut a kernel itself; it is told which axes of the arrays are rows and heads, and gathers the others.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec


class Axes(NamedTuple):
    """Which axes of an array are rows and heads; None: it has no such axis."""

    row: int | None
    head: int | None


TOKENS = Axes(0, 2)
"""Of `[B, T, H, D]`."""

EACH = Axes(0, 1)
"""Of `[B, H, ...]`."""

EACH_ROW = Axes(0, None)
"""Of `[B, ...]`."""

HEADS = Axes(None, 0)
"""Of `[H, ...]`."""

SHARED = Axes(None, None)
"""Of what all rows and heads share."""


def split_axes() -> dict[str, AxisType]:
    """The current mesh's axes of several devices along which arrays may be split here, and their types."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: kind for name, size, kind in axes if size > 1 and kind != AxisType.Manual}


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
    if not split_axes():
        return tuple(kernel(*arguments))

    def run(*arguments):
        return tuple(kernel(*arguments))

    def partition(mesh, given, results):
        spec = [*given[0].sharding.spec, *[None] * given[0].ndim]
        row, head = (spec[axis] for axis in of_arguments[0] if axis is not None)
        placed = [
            tuple(NamedSharding(mesh, PartitionSpec(*_named(x.ndim, axes, row, head))) for x, axes in pairs)
            for pairs in (zip(given, of_arguments, strict=True), zip(results, of_results, strict=True))
        ]
        return mesh, run, placed[1], placed[0]

    ranks = [[x.ndim for x in xs] for xs in (arguments, jax.eval_shape(run, *arguments))]
    rule, whole = _rule(ranks, (of_arguments, of_results))
    partitioned = custom_partitioning(run)
    partitioned.def_partition(partition, sharding_rule=rule, need_replication_factors=whole)
    return partitioned(*arguments)


def _named(rank: int, axes: Axes, row: Any, head: Any) -> list[Any]:
    """The axes of an array: `row`, `head`, and None for the others."""
    return [row if axis == axes.row else head if axis == axes.head else None for axis in range(rank)]


def _rule(ranks: Sequence[Sequence[int]], axes: Sequence[Sequence[Axes]]) -> tuple[str, tuple[str, ...]]:
    """Of arguments and results: such as "row x0 head, head x1 -> row x2 head", and the names that nobody may split."""
    numbers = itertools.count()
    sides = [
        [
            [name or f"x{next(numbers)}" for name in _named(rank, of_array, "row", "head")]
            for rank, of_array in zip(side, of_side, strict=True)
        ]
        for side, of_side in zip(ranks, axes, strict=True)
    ]
    rule = " -> ".join(", ".join(" ".join(terms) for terms in side) for side in sides)
    return rule, tuple(f"x{i}" for i in range(next(numbers)))  # in the order of the rule, as is demanded
