"""Moshi: config, model, losses, delays, low-rank adaptation and streaming."""

from ttt_jax.models.moshi import lora
from ttt_jax.models.moshi.conditions import condition_vector
from ttt_jax.models.moshi.config import (
    UNGENERATED_TOKEN,
    ZERO_TOKEN,
    Conditioner,
    MoshiConfig,
    TTTInsertion,
    check_codes,
)
from ttt_jax.models.moshi.delays import delay, delay_mask, delayed_positions, undelay
from ttt_jax.models.moshi.losses import Losses, LossSums, loss_sums, losses, mean_losses, token_nll
from ttt_jax.models.moshi.model import LayerState, Moshi, MoshiOutput, View, init_state
from ttt_jax.models.moshi.stream import StepLogits, Stream, init_stream, stream_step, stream_step_with_logits

__all__ = [
    "UNGENERATED_TOKEN",
    "ZERO_TOKEN",
    "Conditioner",
    "LayerState",
    "LossSums",
    "Losses",
    "Moshi",
    "MoshiConfig",
    "MoshiOutput",
    "StepLogits",
    "Stream",
    "TTTInsertion",
    "View",
    "check_codes",
    "condition_vector",
    "delay",
    "delay_mask",
    "delayed_positions",
    "init_state",
    "init_stream",
    "lora",
    "loss_sums",
    "losses",
    "mean_losses",
    "stream_step",
    "stream_step_with_logits",
    "token_nll",
    "undelay",
]
