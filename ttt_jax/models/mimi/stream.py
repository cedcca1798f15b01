"""Mimi in pieces of whole frames: exactly the codes and samples of the whole pass, wherever it is cut."""

from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax.models.mimi.config import MimiConfig
from ttt_jax.models.mimi.model import DecoderState, EncoderState, Mimi, check_codes, check_wav


def init_encoder_state(config: MimiConfig, params, batch_size: int) -> EncoderState:
    """`batch_size` rows before their first sample."""
    frame = jax.ShapeDtypeStruct((batch_size, 1, config.frame_samples), jnp.float32)
    return _fresh(config, params, frame, "encode_chunk")


def encode_step(
    config: MimiConfig,
    params,
    state: EncoderState,
    wav: jax.Array,
    *,
    active: jax.Array | None = None,
    reset: jax.Array | None = None,
) -> tuple[jax.Array, EncoderState]:
    """The codes of the next frames of every row. Jit it with the config static; donate the state.

    Args:
        config: of the model.
        params: Mimi's parameter tree; never changed.
        state: from `init_encoder_state` or the previous step.
        wav: `[B, 1, S]` floating in [-1, 1] at `sample_rate`, S a multiple of `frame_samples` (0 too).
        active: `[B]` bool; an inactive row returns -1 and does not move.
        reset: `[B]` bool; these rows start anew before the first sample.

    Returns:
        codes `[B, num_codebooks, S / frame_samples]` int32 in [0, bins), and the state to go on with.

    Raises:
        ValueError: wrong shapes or dtypes.
    """
    wav, active, reset = jnp.asarray(wav), _array(active), _array(reset)
    check_wav(wav)
    if wav.shape[2] % config.frame_samples:
        raise ValueError(
            f"wav must hold whole frames of {config.frame_samples} samples, got {wav.shape[2]} samples; "
            "keep the rest for the next call, or pad the last frame with zeros"
        )
    _check_rows(EncoderState, "init_encoder_state", state, wav.shape[0], active, reset)
    return _apply(config, params, "encode_chunk", wav, state, active, reset)


def init_decoder_state(config: MimiConfig, params, batch_size: int) -> DecoderState:
    """`batch_size` rows before their first frame."""
    frame = jax.ShapeDtypeStruct((batch_size, config.num_codebooks, 1), jnp.int32)
    return _fresh(config, params, frame, "decode_chunk")


def decode_step(
    config: MimiConfig,
    params,
    state: DecoderState,
    codes: jax.Array,
    *,
    active: jax.Array | None = None,
    reset: jax.Array | None = None,
) -> tuple[jax.Array, DecoderState]:
    """The samples of the next frames of every row. Jit it with the config static; donate the state.

    Args:
        config: of the model.
        params: Mimi's parameter tree; never changed.
        state: from `init_decoder_state` or the previous step.
        codes: `[B, num_codebooks, T]` integers in [-1, bins), T may be 0; a frame with a -1 is silent, as in
            `Mimi.decode`.
        active: `[B]` bool; an inactive row returns zeros and does not move.
        reset: `[B]` bool; these rows start anew before the first frame.

    Returns:
        wav `[B, 1, T * frame_samples]`, and the state to go on with.

    Raises:
        ValueError: wrong shapes or dtypes, or (outside jit) codes out of range.
    """
    codes, active, reset = jnp.asarray(codes), _array(active), _array(reset)
    check_codes(config, codes)
    _check_rows(DecoderState, "init_decoder_state", state, codes.shape[0], active, reset)
    return _apply(config, params, "decode_chunk", codes, state, active, reset)


def _apply(config: MimiConfig, params, method: str, x, state, active=None, reset=None) -> Any:
    return Mimi(config).apply({"params": params}, x, state, active, reset, method=method)


def _fresh(config: MimiConfig, params, frame, method: str) -> Any:
    _, shapes = jax.eval_shape(lambda params, x: _apply(config, params, method, x, None), params, frame)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _array(x):
    return None if x is None else jnp.asarray(x)


def _check_rows(kind: type, maker: str, state, batch: int, active, reset):
    if not isinstance(state, kind):
        raise ValueError(
            f"state must be the {kind.__name__} of {maker} or of the last step, got {type(state).__name__}"
        )
    rows = jax.tree.leaves(state)[0].shape[0]
    if rows != batch:
        raise ValueError(f"state must have as many rows as the input, {batch}, got {rows}")
    for name, x in (("active", active), ("reset", reset)):
        if x is not None and (x.shape != (batch,) or x.dtype != jnp.bool_):
            raise ValueError(f"{name} must be bool of shape ({batch},), got {x.dtype}{list(x.shape)}")
