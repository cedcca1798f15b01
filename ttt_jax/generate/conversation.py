"""Full-duplex conversation, one frame of 80 ms at a time: the user's sound in, Moshi's sound and text out."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.models import mimi, moshi
from ttt_jax.models.mimi import MimiConfig
from ttt_jax.models.moshi import UNGENERATED_TOKEN, MoshiConfig
from ttt_jax.models.moshi.stream import Sampling

KYUTAIS_SAMPLING = Sampling(temperature=0.8, top_k=250, temperature_text=0.7, top_k_text=25)


class Configs(NamedTuple):
    """The two models of a conversation; `Configs.of` checks that they fit."""

    moshi: MoshiConfig
    mimi: MimiConfig

    @classmethod
    def of(cls, moshi: MoshiConfig, mimi: MimiConfig) -> "Configs":
        """The configs of models that can talk to each other.

        Raises:
            ValueError: Mimi's codes are not those that Moshi reads and writes, or it has too few codebooks.
        """
        if mimi.bins != moshi.card:
            raise ValueError(
                f"mimi: its codes lie in [0, {mimi.bins}), the model's in [0, {moshi.card}); was the model trained on "
                "another codec?"
            )
        needed = max(moshi.user_q, moshi.voice_q)
        if mimi.n_q < needed:
            raise ValueError(f"mimi: expected at least {needed} codebooks, as many as the model has, got {mimi.n_q}")
        return cls(moshi, mimi)

    @property
    def hears(self) -> MimiConfig:
        """Mimi of as many codebooks as the user has."""
        return dataclasses.replace(self.mimi, num_codebooks=self.moshi.user_q)

    @property
    def speaks(self) -> MimiConfig:
        """Mimi of as many codebooks as Moshi's voice has; not for models that only write text."""
        return dataclasses.replace(self.mimi, num_codebooks=self.moshi.voice_q)


class Conversation(NamedTuple):
    """Everything that B conversations carry from frame to frame, of constant size; all but the last two by row."""

    encoder: mimi.EncoderState
    stream: moshi.Stream
    decoder: mimi.DecoderState | None  # None: the model only writes text
    rng: jax.Array  # [2] uint32, data of the key that every step's is derived from
    steps: jax.Array  # int32, steps so far


# Compiled, and with all parameters, so that it lies where they lie: the first step then compiles for all of them.
@functools.partial(jax.jit, static_argnames=("configs", "batch_size"), keep_unused=True)
def init_conversation(configs: Configs, params: tuple[Any, Any], batch_size: int, seed: int = 0) -> Conversation:
    """`batch_size` conversations before their first frame.

    Args:
        configs: of the two models.
        params: Moshi's parameter tree and Mimi's.
        batch_size: conversations.
        seed: of the sampling.
    """
    moshi_params, mimi_params = params
    return Conversation(
        mimi.init_encoder_state(configs.hears, mimi_params, batch_size),
        moshi.init_stream(configs.moshi, moshi_params, batch_size),
        mimi.init_decoder_state(configs.speaks, mimi_params, batch_size) if configs.moshi.voice_q else None,
        jax.random.key_data(jax.random.key(seed)),
        jnp.zeros((), jnp.int32),
    )


def conversation_step(
    configs: Configs,
    params: tuple[Any, Any],
    conversation: Conversation,
    user_wav: jax.Array,
    *,
    sampling: Sampling = KYUTAIS_SAMPLING,
    active: jax.Array | None = None,
    reset: jax.Array | None = None,
    condition: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, Conversation]:
    """One frame of every conversation. Jit it with `configs` and `sampling` static and `conversation` donated.

    As in Kyutai's server, Moshi does not hear the first frame of a conversation, which lies before all that the model
    knows, and Mimi begins with the second. What comes back is what Moshi said `max_delay` frames ago; while there is
    none yet, it is silent and its tokens are -2.

    Args:
        configs: of the two models.
        params: Moshi's parameter tree and Mimi's; never changed.
        conversation: from `init_conversation` or the previous step.
        user_wav: `[B, 1, frame_samples]` floating in [-1, 1] at Mimi's sample rate. JAX may read a NumPy array where it
            lies while the step runs: fill a microphone's buffer again once the result is there, or hand over a copy.
        sampling: of the tokens; a temperature of 0 is greedy, a top_k of 0 draws from all.
        active: `[B]` bool; an inactive row is silent, returns -2 and does not move.
        reset: `[B]` bool; these rows start a new conversation with this frame.
        condition: of `moshi.condition_vector`, for models that have conditioners.

    Returns:
        Moshi's wav, float32 `[B, 1, frame_samples]` (of no samples where the model only writes text); its tokens
        `[B, 1 + dep_q]` int32, text first; and the conversation to go on with.

    Raises:
        ValueError: wrong shapes, dtypes or sampling values.
    """
    _check_frame(configs, conversation, user_wav)
    position = conversation.stream.position
    heard = (position if reset is None else jnp.where(reset, 0, position)) > 0
    heard = heard if active is None else heard & active
    codes, encoder = mimi.encode_step(
        configs.hears, params[1], conversation.encoder, user_wav, active=heard, reset=reset
    )
    key = jax.random.fold_in(jax.random.wrap_key_data(conversation.rng), conversation.steps)
    tokens, stream = moshi.stream_step(
        configs.moshi,
        params[0],
        conversation.stream,
        codes[:, :, 0],
        rng=key,
        **sampling._asdict(),
        active=active,
        reset=reset,
        condition=condition,
    )
    wav, decoder = _speak(configs, params[1], conversation.decoder, tokens, reset)
    return wav, tokens, Conversation(encoder, stream, decoder, conversation.rng, conversation.steps + 1)


def _speak(configs: Configs, params, decoder, tokens, reset):
    """The sound of the voice in `tokens [B, 1 + dep_q]`; where there is none, silence, and the decoder stays."""
    if decoder is None:
        return jnp.zeros((tokens.shape[0], 1, 0), jnp.float32), None
    voice = tokens[:, 1 : 1 + configs.moshi.voice_q]
    said = (voice != UNGENERATED_TOKEN).all(axis=1)
    voice = jnp.where(said[:, None], voice, 0)
    wav, decoder = mimi.decode_step(configs.speaks, params, decoder, voice[:, :, None], active=said, reset=reset)
    return wav.astype(jnp.float32), decoder


def _check_frame(configs: Configs, conversation: Conversation, user_wav) -> None:
    rows, samples = conversation.stream.position.shape[0], configs.mimi.frame_samples
    if user_wav.shape != (rows, 1, samples):
        raise ValueError(f"user_wav must have shape {(rows, 1, samples)}, a frame of every row, got {user_wav.shape}")


advance = jax.jit(conversation_step, static_argnames=("configs", "sampling"), donate_argnames="conversation")
"""`conversation_step`, compiled; the conversation that it is given is used up."""


def generate(
    model: tuple[MoshiConfig, Any],
    codec: tuple[MimiConfig, Any],
    wav: np.ndarray,
    *,
    sampling: Sampling = KYUTAIS_SAMPLING,
    seed: int = 0,
    active: np.ndarray | None = None,
    reset: np.ndarray | None = None,
    condition: jax.Array | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """What Moshi says while it hears each row of `wav`, frame by frame.

    Frame i of the result is what a microphone before Moshi records while one before the user records frame i, but for
    `max_delay - 1` frames that it is late by (none in Kyutai's models). A conversation hears its first frame: a step
    before it, whose result is dropped, takes the place of the one that Moshi does not hear.

    Args:
        model: Moshi's config and parameters, as `ttt_jax.load` returns them.
        codec: the same of Mimi.
        wav: `[B, S]` or `[B, 1, S]` floating in [-1, 1] at Mimi's sample rate; a last frame that S does not fill ends
            in zeros. T = ceil(S / frame_samples).
        sampling: of the tokens; a temperature of 0 is greedy, a top_k of 0 draws from all.
        seed: of the sampling.
        active: `[B, T]` bool, the frames that a row takes part in; in the others it is silent and does not move.
        reset: `[B, T]` bool; a row's next active frame, from this one on, starts a new conversation.
        condition: of `moshi.condition_vector`, for models that have conditioners.

    Returns:
        wav, float32 of `[B, T * frame_samples]` or `[B, 1, T * frame_samples]`, and text tokens `[B, T]` int32, -2
        where there are none.

    Raises:
        ValueError: wrong shapes, dtypes or sampling values, or models that do not fit.
    """
    configs, params = Configs.of(model[0], codec[0]), (model[1], codec[1])
    frames = _frames(np.asarray(wav), configs.mimi.frame_samples)
    rows, num_frames = frames.shape[1], len(frames)
    active = _by_frame("active", active, rows, num_frames, default=True)
    reset = _by_frame("reset", reset, rows, num_frames, default=False)
    options: dict[str, Any] = {"sampling": sampling, "condition": condition}
    conversation = init_conversation(configs, params, rows, seed)
    said: list[tuple[Any, Any]] = []
    waiting, never = np.ones(rows, bool), np.zeros(rows, bool)
    for frame, moves, restarts in zip(frames, active.T, reset.T, strict=True):
        waiting = waiting | restarts
        start, waiting = waiting & moves, waiting & ~moves
        if start.any():
            *_, conversation = advance(configs, params, conversation, frame, active=start, reset=start, **options)
        sound, tokens, conversation = advance(
            configs, params, conversation, frame, active=moves, reset=never, **options
        )
        said.append((sound, tokens[:, 0]))
        if len(said) > 1:  # while the device works on this frame, fetch the one before
            said[-2] = jax.device_get(said[-2])
    sounds, texts = zip(*jax.device_get(said), strict=True) if said else ((), ())
    whole = np.concatenate([np.zeros((rows, 1, 0), np.float32), *sounds], axis=2)
    text = np.stack(texts, axis=1) if texts else np.zeros((rows, 0), np.int32)
    return (whole[:, 0] if np.ndim(wav) == 2 else whole), text


def _frames(wav: np.ndarray, samples: int) -> np.ndarray:
    """`[B, S]` or `[B, 1, S]` to `[T, B, 1, samples]` float32."""
    if wav.ndim not in (2, 3) or (wav.ndim == 3 and wav.shape[1] != 1) or not np.issubdtype(wav.dtype, np.floating):
        raise ValueError(f"wav must be floating of shape [B, S] or [B, 1, S], got {wav.dtype} {wav.shape}")
    rows = wav.reshape(wav.shape[0], wav.shape[-1]).astype(np.float32)
    rows = np.pad(rows, ((0, 0), (0, -rows.shape[1] % samples)))
    return np.moveaxis(rows.reshape(len(rows), 1, -1, samples), 2, 0)


def _by_frame(name: str, mask: np.ndarray | None, rows: int, frames: int, *, default: bool) -> np.ndarray:
    if mask is None:
        return np.full((rows, frames), default)
    mask = np.array(mask)
    if mask.shape != (rows, frames) or mask.dtype != bool:
        raise ValueError(f"{name} must be bool of shape ({rows}, {frames}), got {mask.dtype} {mask.shape}")
    return mask
