"""How parameters are made of a published checkpoint's tensors: a table that is read in both directions.

A tensor is anything with `shape` and `dtype` that `numpy.asarray` takes: an array, or a `Tensor` that reads it from a
file when it is asked for.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import unflatten_dict

from ttt_jax.convert.checks import check_tensors

Tensors = Mapping[str, Any]


class Rule(NamedTuple):
    """One leaf of the parameter tree and the tensors that it is made of."""

    path: str  # of the leaf, "layers_0/self_attn/in_proj"
    names: tuple[str, ...]  # of the tensors
    shape: tuple[int, ...]  # of each of them
    view: tuple[int, ...] | None = None  # the shape without axes of size 1 that the leaf does not have
    transpose: bool = False  # the leaf has the axes in the opposite order
    stack: bool = False  # the tensors lie along a new leading axis; else there is only one

    @property
    def part_shape(self) -> tuple[int, ...]:
        """What one tensor is in the leaf."""
        shape = self.shape if self.view is None else self.view
        return shape[::-1] if self.transpose else shape

    @property
    def leaf_shape(self) -> tuple[int, ...]:
        """Shape of the leaf."""
        return (len(self.names), *self.part_shape) if self.stack else self.part_shape


class Table(NamedTuple):
    """A model's parameters as a checkpoint's tensors."""

    rules: tuple[Rule, ...]
    constants: Mapping[str, np.ndarray] = {}
    """Tensors that stand in the checkpoint and are no parameters: their values are not read, and written as here."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape."""
        shapes = {name: rule.shape for rule in self.rules for name in rule.names}
        return shapes | {name: constant.shape for name, constant in self.constants.items()}


def leaf_dtype(rule: Rule, tensors: Tensors) -> np.dtype:
    """What holds the values of all of the leaf's tensors."""
    return np.result_type(*(np.dtype(tensors[name].dtype) for name in rule.names))


def assemble(rule: Rule, tensors: Tensors, dtype: Any = None) -> np.ndarray:
    """The leaf, in `dtype` or that of its tensors; in memory there is one tensor beside it."""
    leaf = np.empty(rule.leaf_shape, leaf_dtype(rule, tensors) if dtype is None else dtype)
    for i, name in enumerate(rule.names):
        part = leaf[i] if rule.stack else leaf
        tensor = np.asarray(tensors[name]).reshape(rule.shape if rule.view is None else rule.view)
        part[...] = tensor.T if rule.transpose else tensor
    return leaf


def take_apart(rule: Rule, leaf: np.ndarray) -> Iterable[tuple[str, np.ndarray]]:
    """The tensors that `assemble` made the leaf of, by name."""
    for i, name in enumerate(rule.names):
        part = leaf[i] if rule.stack else leaf
        yield name, np.ascontiguousarray((part.T if rule.transpose else part).reshape(rule.shape))


def make_params(table: Table, tensors: Tensors, dtype: Any = None) -> dict[str, Any]:
    """The parameter tree.

    Args:
        table: Of the model.
        tensors: Name to tensor.
        dtype: Of every leaf; None keeps those of the tensors.

    Raises:
        ValueError: One error that lists every missing, unexpected or misshapen tensor.
    """
    check_tensors(table.shapes, tensors)
    return unflatten_dict({rule.path: assemble(rule, tensors, dtype) for rule in table.rules}, sep="/")
