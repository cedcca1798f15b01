"""Test-time-training layers in JAX for very long audio."""

from ttt_jax.ttt import (
    TTTLinearParams,
    TTTLosses,
    TTTMLPParams,
    TTTState,
    init_state,
    ttt_linear,
    ttt_loss,
    ttt_mlp,
)

__all__ = ["TTTLinearParams", "TTTLosses", "TTTMLPParams", "TTTState", "init_state", "ttt_linear", "ttt_loss", "ttt_mlp"]
