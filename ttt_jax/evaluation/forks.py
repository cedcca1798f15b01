"""Likelihoods of what might have been said at some frames of a recording, all from the very state before them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.evaluation.scoring import (
    check_at_least_one,
    delayed_tokens,
    forget_ttt,
    fresh_state,
    nll_of_next,
    with_memory,
)
from ttt_jax.models.moshi import Moshi, MoshiConfig

_SHORTEST = 8  # positions per call; longer ones are rounded up to powers of two, so that few lengths compile

# One recording at a time: on one core several side by side are read no faster, and stop at different frames.


class Fork(NamedTuple):
    """What might come instead of what was recorded.

    Attributes:
      frame: the first one that differs.
      codes: int32 [N, 1 + n_q, W], N ways in which all streams might go on from there for W frames; -1 is no token.
    """

    frame: int
    codes: np.ndarray


def score_forks(
    config: MoshiConfig,
    params: Any,
    codes: np.ndarray,
    forks: Sequence[Fork],
    *,
    reset_frames: int,
    chunk_frames: int = 64,
    memory: str = "carried",
    progress: Callable[[int], object] = lambda frames: None,
) -> list[np.ndarray]:
    """Negative log-likelihoods of each fork's tokens, from the state that has read a recording up to the fork.

    The state goes on with the recording as it is: each way starts from a copy. So memory does not grow with the
    recording, and no score knows what was recorded from the fork's frame on.

    Args:
      config: of the model.
      params: Moshi's parameter tree; never changed.
      codes: the recording, [1 + n_q, T] int32.
      forks: in any order, each at a frame in [0, T].
      reset_frames: with `memory="reset"`, the TTT state is reset after every so many frames of the recording (never
        inside a fork).
      chunk_frames: most frames per call; changes nothing but speed.
      memory: one of `scoring.MEMORIES`; attention carries its cache in all of them.
      progress: called with the number of frames just read.

    Returns:
      Per fork, [N, 1 + dep_q, W] float32 in nats, text first; NaN where there is no token.

    Raises:
      ValueError: an unknown memory, sizes below 1, or a fork outside the recording.
    """
    check_at_least_one(reset_frames=reset_frames, chunk_frames=chunk_frames)
    params = with_memory(params, memory)
    outside = [fork.frame for fork in forks if not 0 <= fork.frame <= codes.shape[1]]
    if outside:
        raise ValueError(f"forks: expected frames in [0, {codes.shape[1]}], the recording's, got {outside[0]}.")
    delayed = delayed_tokens(config, codes)
    state, position = fresh_state(config, params, 1), 0
    scores = [np.zeros(0, np.float32)] * len(forks)
    for index in sorted(range(len(forks)), key=lambda i: forks[i].frame):
        # Token `stop` is the last before any stream's token of the fork's frame; it predicts the first of them.
        stop = forks[index].frame + min(config.delays)
        while position < stop:
            end = min(stop, position + chunk_frames)
            if memory == "reset":
                end = min(end, (position // reset_frames + 1) * reset_frames)
            tokens = np.full((1, config.num_streams, chunk_frames), -1, np.int32)
            tokens[0, :, : end - position] = delayed[:, position:end]
            state = _read(config, params, state, tokens, np.array([end - position], np.int32))
            if memory == "reset" and end % reset_frames == 0:
                state = forget_ttt(config, params, state)
            progress(end - position)
            position = end
        scores[index] = _score_fork(config, params, state, delayed[:, stop:], forks[index].codes)
    return scores


def _score_fork(config: MoshiConfig, params, state, recorded: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """[N, 1 + dep_q, W] of `codes [N, K, W]`; `recorded [K, ...]` is delayed, from the first token not read."""
    ways, _, frames = codes.shape
    own = 1 + config.dep_q
    first = [1 + shift - min(config.delays) for shift in config.delays]  # token of a stream's first frame in `codes`
    needed = frames + max(first[:own]) - 1
    width = max(_SHORTEST, 1 << (needed - 1).bit_length())
    tokens = np.full((ways, config.num_streams, width + max(first)), -1, np.int32)
    for k, start in enumerate(first):
        tokens[:, k, :start] = recorded[k, :start]
        tokens[:, k, start : start + frames] = codes[:, k]
    with_audio = bool((codes[:, 1:own] >= 0).any())
    length = np.full(ways, needed, np.int32)
    nll = np.asarray(_score_copies(config, with_audio, params, state, tokens[:, :, : width + 1], length))
    scores = np.full((ways, own, frames), np.nan, np.float32)
    for k in range(nll.shape[1]):
        scores[:, k] = nll[:, k, first[k] - 1 : first[k] - 1 + frames]
    return np.where(codes[:, :own] >= 0, scores, np.nan).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _read(config: MoshiConfig, params, state, tokens, length):
    """The state after `length [B]` of `tokens [B, K, n]`."""
    return Moshi(config).apply({"params": params}, tokens, state, length, method="temporal")[2]  # pyright: ignore


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score_copies(config: MoshiConfig, with_audio: bool, params, state, tokens, length):
    """Scores of `tokens [N, K, n + 1]`, each row from a copy of the state of one row."""
    copies = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (tokens.shape[0], *leaf.shape[1:])), state)
    return nll_of_next(config, params, copies, tokens, length, with_audio=with_audio)[0]
