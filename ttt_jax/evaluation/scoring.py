"""Likelihood of every token of whole recordings, walked in chunks with the state carried from one to the next.

Each frame is scored from a state that has read only the frames before it, then read. Memory is constant however long a
recording is, but for its tokens and scores.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.data.reader import TokenDataset
from ttt_jax.data.tokens import TokenInfo
from ttt_jax.models.moshi import Moshi, MoshiConfig, delayed_positions, init_state, token_nll
from ttt_jax.models.moshi.insertion import without_ttt

MEMORIES = ("carried", "reset", "off")
"""What becomes of the TTT state: carried through the recording, reset at every chunk, or TTT switched off."""


class Codes(Sequence):
    """A dataset's codes, read when asked for."""

    def __init__(self, dataset: TokenDataset):
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index):
        return self._dataset[index].codes


def check_streams(config: MoshiConfig, info: TokenInfo, name: str = "dataset") -> None:
    """Raise ValueError, which names the argument `name`, unless the model's streams are the dataset's."""
    for what, model, data in (
        ("streams", config.num_streams, info.num_streams),
        ("card", config.card, info.card),
        ("text_card", config.text_card, info.text_card),
    ):
        if model != data:
            raise ValueError(
                f"{name}: expected {what} {model} as the model has, got {data}; was it trained on another?"
            )


def score_recordings(
    config: MoshiConfig,
    params: Any,
    recordings: Sequence[np.ndarray],
    *,
    chunk_frames: int,
    batch_size: int = 8,
    memory: str = "carried",
    progress: Callable[[int], object] = lambda frames: None,
) -> list[np.ndarray]:
    """Negative log-likelihoods of every predicted token, teacher-forced.

    Args:
      config: of the model.
      params: Moshi's parameter tree; never changed.
      recordings: codes [1 + n_q, T] int32 each, any lengths; indexed one group of `batch_size` at a time.
      chunk_frames: frames per call. It changes nothing but speed, except that `memory="reset"` resets at every chunk.
      batch_size: recordings walked side by side.
      memory: one of `MEMORIES`; attention carries its cache in all of them.
      progress: called with the number of frames just scored.

    Returns:
      Per recording, in order, [1 + dep_q, T] float32 in nats, text first; NaN where there is no token to predict.

    Raises:
      ValueError: an unknown memory, or sizes below 1.
    """
    check_at_least_one(chunk_frames=chunk_frames, batch_size=batch_size)
    params = with_memory(params, memory)
    lengths = [recordings[i].shape[1] for i in range(len(recordings))]
    rows = min(batch_size, max(len(lengths), 1))  # none is walked for nothing
    by_length = np.argsort(lengths, kind="stable")[::-1]  # rows of one group end at about the same time
    scores: list[np.ndarray] = [np.zeros((1 + config.dep_q, 0), np.float32)] * len(lengths)
    for start in range(0, len(lengths), rows):
        group = by_length[start : start + rows]
        codes = [recordings[i] for i in group]
        parts = [np.zeros((rows, 1 + config.dep_q, 0), np.float32)]  # all there is of empty recordings
        parts += _score_group(config, params, codes, rows, chunk_frames, memory == "reset", progress)
        for row, index in enumerate(group):
            joined = np.concatenate([part[row] for part in parts], axis=-1)
            scores[index] = _undelayed(config, joined, recordings[index])
    return scores


def check_at_least_one(**sizes: int) -> None:
    """Raise ValueError for the first size below 1."""
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}: expected an int >= 1, got {value!r}.")


def with_memory(params: Any, memory: str) -> Any:
    """The parameters to score with under one of `MEMORIES`; ValueError for another."""
    if memory not in MEMORIES:
        raise ValueError(f"memory: expected one of {MEMORIES}, got {memory!r}.")
    return without_ttt(params) if memory == "off" else params


def _score_group(
    config, params, codes: list[np.ndarray], rows: int, chunk_frames: int, reset: bool, progress
) -> Iterator[np.ndarray]:
    """Scores at delayed positions, chunk by chunk: [rows, 1 + dep_q, <= chunk_frames]."""
    delayed = [delayed_tokens(config, c) for c in codes]
    lengths = np.zeros(rows, np.int64)
    lengths[: len(codes)] = [d.shape[1] - 1 for d in delayed]
    state = fresh_state(config, params, rows)
    for start in range(0, lengths.max(initial=0), chunk_frames):
        tokens = np.full((rows, config.num_streams, chunk_frames + 1), -1, np.int32)
        for row, d in enumerate(delayed):
            piece = d[:, start : start + chunk_frames + 1]
            tokens[row, :, : piece.shape[1]] = piece
        length = np.clip(lengths - start, 0, chunk_frames).astype(np.int32)
        if reset and start:
            state = forget_ttt(config, params, state)
        nll, state = _score_chunk(config, params, state, tokens, length)
        progress(int(length.sum()))
        yield np.asarray(nll)


# Jitted so that the state lies where the parameters lie: the first chunk then compiles for all of them.
fresh_state = jax.jit(init_state, static_argnums=(0, 2))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _score_chunk(config: MoshiConfig, params, state, tokens, length):
    return nll_of_next(config, params, state, tokens, length)


def nll_of_next(config: MoshiConfig, params, state, tokens, length, *, with_audio: bool = True):
    """Scores of delayed positions 1.. of `tokens [B, K, n + 1]` given the ones before, and the state that read n.

    Returns [B, 1 + dep_q, n] in nats, without audio [B, 1, n].
    """
    apply = functools.partial(Moshi(config).apply, {"params": params})
    targets = tokens[:, : 1 + config.dep_q, 1:]
    z, text_logits, state = cast(tuple, apply(tokens[:, :, :-1], state, length, method="temporal"))
    nll = token_nll(text_logits, targets[:, :1])
    if with_audio:
        logits = cast(jax.Array, apply(z, targets, method="depth"))
        nll = jnp.concatenate([nll, token_nll(logits, targets[:, 1:])], axis=1)
    return nll, state


def forget_ttt(config: MoshiConfig, params, state):
    """The state with TTT as it was at the start; attention keeps its cache."""
    fresh = fresh_state(config, params, state[0].attention.position.shape[0])
    return tuple(old._replace(ttt=new.ttt) for old, new in zip(state, fresh, strict=True))


def delayed_tokens(config: MoshiConfig, codes: np.ndarray) -> np.ndarray:
    """Delayed tokens [K, T + max_delay + 1], long enough for the last frame of the latest stream to be predicted."""
    num_positions = codes.shape[1] + config.max_delay + 1
    return delayed_positions(codes, 0, num_positions, config.delays, config.initial_tokens)


def _undelayed(config: MoshiConfig, nll: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Scores [1 + dep_q, positions] back at their frames; NaN where the target is missing."""
    frames = codes.shape[1]
    own = config.delays[: 1 + config.dep_q]
    aligned = np.stack([nll[k, shift : shift + frames] for k, shift in enumerate(own)]).astype(np.float32)
    return np.where(codes[: 1 + config.dep_q] >= 0, aligned, np.nan).astype(np.float32)
