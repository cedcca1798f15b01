"""The model speaks: it hears the start of a held-out conversation, then goes on in the main speaker's place."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import soundfile
from tqdm import tqdm

from ttt_jax.data.codecs import codec_of
from ttt_jax.data.text import RESERVED_IDS, load_tokenizer
from ttt_jax.data.tokens import TokenInfo
from ttt_jax.models.moshi import UNGENERATED_TOKEN, MoshiConfig, init_stream, stream_step

SPOKEN_SECONDS = 8.0


@dataclasses.dataclass(frozen=True)
class Continuation:
    """The main speaker's streams, [1 + dep_q, T] int32: given up to `prompt_frames`, then what the model said."""

    tokens: np.ndarray
    prompt_frames: int


def continue_recording(
    config: MoshiConfig,
    params: Any,
    codes: np.ndarray,
    *,
    prompt_frames: int,
    num_frames: int,
    seed: int = 0,
    temperature: float = 0.8,
    top_k: int = 50,
) -> Continuation:
    """Stream a recording frame by frame: the main speaker as recorded for `prompt_frames`, then as the model samples.

    The other speaker is heard as recorded throughout. Where the recording has no text, the model gets none.

    Args:
      config: of the model.
      params: Moshi's parameter tree.
      codes: the recording, [1 + n_q, T] int32.
      prompt_frames: frames of the main speaker that are given.
      num_frames: frames the model adds, fewer where the recording ends sooner.
      seed: of the sampling.
      temperature: of audio and text tokens, 0 is greedy.
      top_k: tokens to draw from, 0 is all.
    """
    total = min(prompt_frames + num_frames, codes.shape[1])
    step = jax.jit(
        functools.partial(stream_step, config, temperature=temperature, top_k=top_k), donate_argnames="stream"
    )
    # Jitted so that the stream lies where the parameters lie: the first step then compiles for all of them.
    stream = jax.jit(init_stream, static_argnums=(0, 2))(config, params, 1)
    key, spoken = jax.random.key(seed), []
    delays = np.asarray(config.delays[: 1 + config.dep_q])
    has_text = (codes[0] >= 0).any()
    user = np.pad(codes[1 + config.dep_q :], ((0, 0), (0, config.max_delay)), constant_values=-1)
    for t in tqdm(range(total + config.max_delay), desc="continuing", unit="frame"):
        frame = t - delays  # what this call predicts of each stream
        given = (frame >= 0) & (frame < min(prompt_frames, total))
        own = codes[np.arange(1 + config.dep_q), np.clip(frame, 0, codes.shape[1] - 1)]
        # A stream's first frames are initial tokens whatever is written there, so any value does.
        forced = np.where(given | (frame < 0), np.where(frame < 0, 0, own), UNGENERATED_TOKEN)
        if not has_text:
            forced[0] = -1  # the model has never heard a text token beside such a recording
        tokens, stream = step(
            params,
            stream=stream,
            user_codes=jnp.asarray(user[None, :, max(t - 1, 0)], jnp.int32),  # a call hears the frame before
            rng=jax.random.fold_in(key, t),
            forced=jnp.asarray(forced[None], jnp.int32),
        )
        spoken.append(tokens[0])
    return Continuation(np.stack(spoken[config.max_delay :], axis=1), min(prompt_frames, total))


def write_wav(path: pathlib.Path, tokens: np.ndarray, other: np.ndarray, info: TokenInfo) -> None:
    """Write stereo speech at the codec's rate: left the main speaker's `tokens [1 + n, T]`, right the other's codes."""
    temporary = path.with_name(path.name + ".tmp")
    soundfile.write(temporary, _stereo(tokens, other, info), info.sample_rate_hz, format="WAV")
    temporary.replace(path)


def _stereo(tokens: np.ndarray, other: np.ndarray, info: TokenInfo) -> np.ndarray:
    codec = codec_of(info)
    channels = [codec.decode(tokens[1 : 1 + info.num_codebooks]), codec.decode(other[:, : tokens.shape[1]])]
    return np.stack(channels, axis=1)


def speak(config: MoshiConfig, params: Any, codes: np.ndarray, info: TokenInfo) -> tuple[np.ndarray, int]:
    """Hear the first seconds of a recording [1 + n_q, T] and go on: stereo float32 [samples, 2], sample rate in Hz."""
    frames = round(SPOKEN_SECONDS * info.frame_rate_hz)
    prompt = min(frames, codes.shape[1] // 2)
    continued = continue_recording(config, params, codes, prompt_frames=prompt, num_frames=frames)
    return _stereo(continued.tokens, codes[1 + info.num_codebooks :], info), info.sample_rate_hz


def spoken_text(text_tokens: np.ndarray, tokenizer_path: pathlib.Path) -> str:
    """The words of a text stream [T], padding left out; empty where the dataset has no tokenizer."""
    if not tokenizer_path.is_file():
        return ""
    pieces = [int(token) for token in text_tokens if token >= RESERVED_IDS]
    return load_tokenizer(tokenizer_path).decode(pieces)
