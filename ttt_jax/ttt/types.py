"""Parameters, state and results of the TTT operation.

Shapes: B batch, T tokens, H heads, D head dim, F hidden width of the inner MLP (4D), C mini-batch, N mini-batches.
"""

from typing import NamedTuple

import jax


class TTTLinearParams(NamedTuple):
    """Initial fast weights of TTT-Linear, `f(x) = x w1 + b1`, and the inner LayerNorm."""

    w1: jax.Array  # [H, D, D]
    b1: jax.Array  # [H, D]
    ln_scale: jax.Array  # [H, D]
    ln_bias: jax.Array  # [H, D]

    @property
    def fast_weights(self) -> tuple[jax.Array, ...]:
        """The leaves that the inner loop trains."""
        return self.w1, self.b1


class TTTMLPParams(NamedTuple):
    """Initial fast weights of TTT-MLP, `f(x) = gelu(x w1 + b1) w2 + b2`, and the inner LayerNorm."""

    w1: jax.Array  # [H, D, F]
    b1: jax.Array  # [H, F]
    w2: jax.Array  # [H, F, D]
    b2: jax.Array  # [H, D]
    ln_scale: jax.Array  # [H, D]
    ln_bias: jax.Array  # [H, D]

    @property
    def fast_weights(self) -> tuple[jax.Array, ...]:
        """The leaves that the inner loop trains."""
        return self.w1, self.b1, self.w2, self.b2


TTTParams = TTTLinearParams | TTTMLPParams


class TTTState(NamedTuple):
    """Hidden state of every row and head: a model in training, cut anywhere in its stream.

    `weights` and `gradient` are (w1, b1) or (w1, b1, w2, b2), each with leading axes [B, H] and float32 (float64 when
    the operation computes in float64).
    """

    weights: tuple[jax.Array, ...]  # fast weights at the start of the open mini-batch
    gradient: tuple[jax.Array, ...]  # sum over the open mini-batch's tokens of lr[j] * d loss_j / d weights
    count: jax.Array  # [B] int32, tokens in the open mini-batch, 0 <= count < C


class TTTLosses(NamedTuple):
    """Inner losses per mini-batch, each [B, H, N]; see `ttt_loss`."""

    initial: jax.Array
    before: jax.Array
    after: jax.Array
