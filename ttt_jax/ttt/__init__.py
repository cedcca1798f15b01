"""The TTT operation: pure functions of arrays; the equations are in `ttt_jax.ttt.api`."""

from ttt_jax.ttt.api import explain, init_state, ttt_linear, ttt_loss, ttt_mlp
from ttt_jax.ttt.types import TTTLinearParams, TTTLosses, TTTMLPParams, TTTParams, TTTState

__all__ = [
    "TTTLinearParams",
    "TTTLosses",
    "TTTMLPParams",
    "TTTParams",
    "TTTState",
    "explain",
    "init_state",
    "ttt_linear",
    "ttt_loss",
    "ttt_mlp",
]
