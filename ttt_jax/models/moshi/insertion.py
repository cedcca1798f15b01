"""The parameters that TTT adds to a Moshi: its layers, their norms and gates."""

import re
from collections.abc import Container
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from ttt_jax.models.moshi.config import MoshiConfig
from ttt_jax.models.moshi.model import Moshi

_INSERTED = re.compile(r"layers_\d+/(ttt|norm_ttt)/.*|layers_\d+/gate")


def is_inserted(path: str) -> bool:
    """Whether a parameter, such as "layers_0/ttt/wq/kernel", came with TTT."""
    return _INSERTED.fullmatch(path) is not None


def inserted_shapes(config: MoshiConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """What `init_inserted` makes, path to shape and dtype."""
    return jax.eval_shape(lambda: _init(config, jax.random.key(0)))


def init_inserted(config: MoshiConfig, rng: jax.Array, layers: Container[int] | None = None) -> dict[str, Any]:
    """Only the parameters that `config.ttt` adds, as `Moshi(config).init(rng, ...)` draws them, float32.

    The output projections are 0, so that the model with them says what it said without. The result is a part of the
    parameter tree, and no more than this part is ever in memory.

    Args:
        config: Of the model with TTT.
        rng: A key.
        layers: Those whose parameters to make; None for all that have TTT.
    """

    def init(key):
        leaves = _init(config, key)
        return {path: leaf for path, leaf in leaves.items() if layers is None or _layer_of(path) in layers}

    # Compiled as one, so that what is not returned is never made.
    return unflatten_dict(jax.jit(init)(rng), sep="/")


def _init(config: MoshiConfig, rng) -> dict[str, jax.Array]:
    params = Moshi(config).init(rng, jnp.zeros((1, config.num_streams, 2), jnp.int32))["params"]
    return {path: leaf for path, leaf in flatten_dict(params, sep="/").items() if is_inserted(path)}


def _layer_of(path: str) -> int:
    return int(path.split("/", 1)[0].removeprefix("layers_"))
