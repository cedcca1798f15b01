"""Which of a model's parameters are what: their group, and whether a run trains them."""

import re
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict, unflatten_dict

from ttt_jax.training.config import TrainMode

TTT = re.compile(r"\blayers_\d+/(two_way/)?(ttt|norm_ttt)/")
GATES = re.compile(r"\blayers_\d+/(two_way/)?gate(_(forward|backward)_\w+)?$")
TEMPORAL_ATTENTION = re.compile(r"\blayers_\d+/(two_way/)?self_attn/")
"""Projections and, where there are such, norms of queries and keys."""


class Trained(NamedTuple):
    """What a run changes; only these leaves have a place here, a gradient and an optimizer state."""

    params: Any  # of the model's parameter tree
    lora: Any  # low-rank factors beside it (`ttt_jax.models.moshi.lora`), None without


def group_of(path: str) -> str:
    """The group of a parameter by its path, such as "layers_0/ttt/wq/kernel": "ttt", "gates" or "base"."""
    if TTT.search(path):
        return "ttt"
    return "gates" if GATES.search(path) else "base"


def is_trained(path: str, train: TrainMode) -> bool:
    """Whether a parameter of the base tree changes; what is inserted always does, since nobody else has trained it."""
    in_base = group_of(path) == "base"
    return not in_base or train == "all" or (train == "qkvo" and TEMPORAL_ATTENTION.search(path) is not None)


def trained_part(params: Any, lora: Any, train: TrainMode) -> Trained:
    """The leaves of the model's `params`, and the low-rank factors, that the mode trains."""
    leaves = flatten_dict(params, sep="/")
    chosen = {path: leaf for path, leaf in leaves.items() if is_trained(path, train)}
    return Trained(unflatten_dict(chosen, sep="/"), lora)


def put_back(params: Any, trained: Trained) -> Any:
    """The model's `params` with the trained leaves in their places."""
    return unflatten_dict(flatten_dict(params, sep="/") | flatten_dict(trained.params, sep="/"), sep="/")
