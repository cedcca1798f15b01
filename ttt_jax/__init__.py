"""Test-time-training layers in JAX for very long audio.

The functions need JAX alone. The Flax modules (`TTTLayer`, `TTTBidirectional`, `ttt_jax.models`) and `load` are
imported when first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ttt_jax.layers.attention import AttentionCache, segment_attention, window_attention
from ttt_jax.layers.rope import RotaryEmbedding
from ttt_jax.ttt import (
    TTTLinearParams,
    TTTLosses,
    TTTMLPParams,
    TTTState,
    explain,
    init_state,
    ttt_linear,
    ttt_loss,
    ttt_mlp,
)

if TYPE_CHECKING:
    from ttt_jax import convert, generate, models
    from ttt_jax.checkpoint import load, save_model
    from ttt_jax.layers.ttt import TTTConfig, TTTLayer
    from ttt_jax.layers.two_way import TTTBidirectional

__all__ = [
    "AttentionCache",
    "RotaryEmbedding",
    "TTTBidirectional",
    "TTTConfig",
    "TTTLayer",
    "TTTLinearParams",
    "TTTLosses",
    "TTTMLPParams",
    "TTTState",
    "convert",
    "explain",
    "generate",
    "init_state",
    "load",
    "models",
    "save_model",
    "segment_attention",
    "ttt_linear",
    "ttt_loss",
    "ttt_mlp",
    "window_attention",
]

_ROOMS = {
    "TTTBidirectional": "ttt_jax.layers.two_way",
    "TTTConfig": "ttt_jax.layers.ttt",
    "TTTLayer": "ttt_jax.layers.ttt",
    "load": "ttt_jax.checkpoint",
    "save_model": "ttt_jax.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return getattr(importlib.import_module(_ROOMS[name]), name)
    if name in ("convert", "generate", "models"):
        return importlib.import_module(f"ttt_jax.{name}")
    raise AttributeError(f"module 'ttt_jax' has no attribute {name!r}")
