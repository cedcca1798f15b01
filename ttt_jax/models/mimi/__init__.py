"""Mimi: config, model and streaming."""

from ttt_jax.models.mimi.config import MimiConfig
from ttt_jax.models.mimi.model import DecoderState, EncoderState, Mimi, check_codes, check_wav
from ttt_jax.models.mimi.quantizer import MISSING_CODE
from ttt_jax.models.mimi.stream import decode_step, encode_step, init_decoder_state, init_encoder_state

__all__ = [
    "MISSING_CODE",
    "DecoderState",
    "EncoderState",
    "Mimi",
    "MimiConfig",
    "check_codes",
    "check_wav",
    "decode_step",
    "encode_step",
    "init_decoder_state",
    "init_encoder_state",
]
