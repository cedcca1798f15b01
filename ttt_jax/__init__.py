"""Test-time-training layers in JAX for very long audio.

Everything is imported when first asked for: the functions need JAX alone, the Flax modules (`TTTLayer`,
`TTTBidirectional`, `ttt_jax.models`) and `load` more, and a program's `--help` nothing of either.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ttt_jax import convert, generate, models, ttt
    from ttt_jax.checkpoint import load, save_model
    from ttt_jax.layers.attention import AttentionCache, segment_attention, window_attention
    from ttt_jax.layers.rope import RotaryEmbedding
    from ttt_jax.layers.ttt import TTTConfig, TTTLayer
    from ttt_jax.layers.two_way import TTTBidirectional
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
    "ttt",
    "ttt_linear",
    "ttt_loss",
    "ttt_mlp",
    "window_attention",
]

_ROOMS = {
    "checkpoint": ("load", "save_model"),
    "layers.attention": ("AttentionCache", "segment_attention", "window_attention"),
    "layers.rope": ("RotaryEmbedding",),
    "layers.ttt": ("TTTConfig", "TTTLayer"),
    "layers.two_way": ("TTTBidirectional",),
    "ttt": (
        *("TTTLinearParams", "TTTLosses", "TTTMLPParams", "TTTState"),
        *("explain", "init_state", "ttt_linear", "ttt_loss", "ttt_mlp"),
    ),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _ROOM_OF:
        value = getattr(importlib.import_module(f"ttt_jax.{_ROOM_OF[name]}"), name)
    elif name in ("convert", "generate", "models", "ttt"):
        value = importlib.import_module(f"ttt_jax.{name}")
    else:
        raise AttributeError(f"module 'ttt_jax' has no attribute {name!r}")
    return globals().setdefault(name, value)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
