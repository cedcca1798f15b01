"""The parameters that a Video-DiT has beside those of CogVideoX: TTT layers and the gates around them."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from ttt_jax.models.video_dit.config import VideoDiTConfig
from ttt_jax.models.video_dit.model import Block

_INSERTED = re.compile(r"layers_\d+/(ttt/.*|gate_(forward|backward)_(text|video))")


def is_inserted(path: str) -> bool:
    """Whether a parameter, such as "layers_0/ttt/wq/kernel", came with TTT."""
    return _INSERTED.fullmatch(path) is not None


def inserted_shapes(config: VideoDiTConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every parameter that TTT adds, by path."""
    shapes = jax.eval_shape(lambda: _init(config, jax.random.key(0)))
    layers = range(config.num_layers)
    return {f"layers_{layer}/{path}": leaf for layer in layers for path, leaf in shapes.items()}


def init_inserted(config: VideoDiTConfig, layer: int, rng: jax.Array) -> dict[str, jax.Array]:
    """The parameters that TTT adds to one layer, drawn anew: path in the model's tree to float32 array."""
    return {f"layers_{layer}/{path}": leaf for path, leaf in _init(config, rng).items()}


@functools.partial(jax.jit, static_argnums=0)  # as one, so that the block's other parameters are never made
def _init(config: VideoDiTConfig, rng: jax.Array) -> dict[str, Any]:
    dtype, width = jnp.dtype(config.dtype), config.model_dim
    parts = {"text": jnp.zeros((1, 1, 1, width), dtype), "video": jnp.zeros((1, 1, 1, 1, width), dtype)}
    params = Block(config).init(rng, parts, jnp.zeros((1, config.time_embed_dim), dtype))["params"]
    params = flatten_dict(params, sep="/")
    return {path: leaf for path, leaf in params.items() if is_inserted(f"layers_0/{path}")}
