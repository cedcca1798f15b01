"""The parameters that TTT adds to a Moshi: its layers, their norms and gates."""

import re
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from ttt_jax.models.moshi.config import MoshiConfig
from ttt_jax.models.moshi.model import Block

_INSERTED = re.compile(r"layers_\d+/(ttt|norm_ttt)/.*|layers_\d+/gate")


def is_inserted(path: str) -> bool:
    """Whether a parameter, such as "layers_0/ttt/wq/kernel", came with TTT."""
    return _INSERTED.fullmatch(path) is not None


def inserted_shapes(config: MoshiConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every parameter that `config.ttt` adds, by path."""
    shapes = {}
    for layer in config.ttt_layers:
        shapes |= jax.eval_shape(lambda layer=layer: _init(config, layer, jax.random.key(0)))
    return shapes


def init_inserted(config: MoshiConfig, layer: int, rng: jax.Array) -> dict[str, jax.Array]:
    """The parameters that `config.ttt` adds to one layer, drawn anew: path in Moshi's tree to float32 array.

    The output projection is 0, so that the model with them says what it said without.
    """
    # Compiled as one, so that the block's other parameters are never made.
    return jax.jit(lambda key: _init(config, layer, key))(rng)


def _init(config: MoshiConfig, layer: int, rng) -> dict[str, Any]:
    x = jnp.zeros((1, 1, config.dim), jnp.dtype(config.dtype))
    params = flatten_dict(Block(config, layer).init(rng, x, None, None, None)["params"], sep="/")
    paths = {f"layers_{layer}/{path}": leaf for path, leaf in params.items()}
    return {path: leaf for path, leaf in paths.items() if is_inserted(path)}


def without_ttt(params: Any) -> Any:
    """Moshi's parameters with every TTT gate at zero: the model as if it had no TTT layers."""

    def close(path, leaf):
        return jnp.zeros_like(leaf) if path[-1].key == "gate" else leaf

    return jax.tree_util.tree_map_with_path(close, params)
