"""NLL of whole recordings by position: whether the model predicts better the longer it has listened.

The same recordings are scored with the TTT state carried, with it reset at every segment, and with TTT off, so that the
difference is what the memory is worth. Intervals are over recordings.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from ttt_jax.data.codecs import codec_of
from ttt_jax.data.reader import TokenDataset
from ttt_jax.evaluation.baselines import StreamTable, empirical_entropy, fit_tables
from ttt_jax.evaluation.scoring import MEMORIES, Codes, check_streams, score_recordings
from ttt_jax.evaluation.statistics import Estimate, mean_over_recordings, position_edges
from ttt_jax.models.moshi import MoshiConfig

DECODED_FRAMES = 1000
SILENCE_DB = -30.0
"""A frame is silent when its level is this far below the recording's loud frames (95th percentile)."""

TEXT_SHARE_OF_ENTROPY = 1 / 3
AUDIO_MARGIN_NATS = 0.2
"""Bounds: text below a third of its stream's unigram entropy, every codebook this far below a bigram table."""

Masks = list[np.ndarray]


@dataclasses.dataclass(frozen=True)
class StreamSummary:
    """One predicted stream over all positions, in nats per token."""

    name: str
    model: Estimate
    unigram: float
    bigram: float
    unigram_entropy: float
    bound: float  # what a model that learned something stays below on held-out voices


@dataclasses.dataclass(frozen=True)
class Curve:
    """Mean NLL by position of one group of streams, frames and memory."""

    memory: str  # one of scoring.MEMORIES
    streams: str  # a stream's name, or "audio": the mean over codebooks
    frames: str  # "all", "silent" or "sounding"
    buckets: list[Estimate]
    beyond_context: Estimate  # over all frames further in than the longest window of a layer's attention


@dataclasses.dataclass(frozen=True)
class NLLByPosition:
    """The benchmark's result.

    Attributes:
      split: of the dataset.
      num_recordings: scored.
      num_frames: of all recordings together.
      frame_rate_hz: frames per second.
      context_frames: the longest attention context of the model's layers.
      segment_frames: what "reset" means: the TTT state forgets every so many frames.
      edges: B + 1 bucket borders, in frames.
      streams: text, then each codebook.
      curves: every memory, for text, audio and each codebook, for all, silent and sounding frames.
      gains: "reset" minus "carried" and "off" minus "carried" on the same recordings; positive where memory helps.
    """

    split: str
    num_recordings: int
    num_frames: int
    frame_rate_hz: float
    context_frames: int
    segment_frames: int
    edges: list[int]
    streams: list[StreamSummary]
    curves: list[Curve]
    gains: list[Curve]


def nll_by_position(
    config: MoshiConfig,
    params: Any,
    dataset: TokenDataset,
    train: TokenDataset,
    validation: TokenDataset | None,
    *,
    split: str,
    segment_frames: int | None = None,
    batch_size: int = 8,
) -> NLLByPosition:
    """Score `dataset`; `train` and `validation` make the tables it is compared with.

    Args:
      config: of the model.
      params: Moshi's parameter tree.
      dataset: held-out recordings, every one scored whole.
      train: recordings that the tables count.
      validation: recordings that choose the tables' smoothing; None keeps a fixed one.
      split: name of `dataset`'s split, for the result.
      segment_frames: frames between resets of the TTT state; None takes the model's attention context.
      batch_size: recordings walked side by side.

    Raises:
      ValueError: the dataset's streams are not the model's.
    """
    check_streams(config, dataset.info)
    context = config.longest_context
    segment = context if segment_frames is None else segment_frames
    recordings = Codes(dataset)
    lengths = dataset.num_frames
    memories = MEMORIES if config.ttt_layers else MEMORIES[:1]
    with tqdm(total=int(lengths.sum()) * len(memories), unit="frame", desc="scoring") as bar:
        scores = {
            memory: score_recordings(
                config,
                params,
                recordings,
                chunk_frames=segment,
                batch_size=batch_size,
                memory=memory,
                progress=bar.update,
            )
            for memory in memories
        }
    silent = [
        silent_frames(dataset[i].codes, dataset) for i in tqdm(range(len(dataset)), desc="levels", unit="recording")
    ]
    edges = position_edges(context, int(lengths.max(initial=1)))
    curves, gains = _curves(config, scores, silent, edges, context)
    return NLLByPosition(
        split=split,
        num_recordings=len(dataset),
        num_frames=int(lengths.sum()),
        frame_rate_hz=dataset.info.frame_rate_hz,
        context_frames=context,
        segment_frames=segment,
        edges=edges,
        streams=_summaries(
            config, scores["carried"], recordings, Codes(train), Codes(validation) if validation else ()
        ),
        curves=curves,
        gains=gains,
    )


def silent_frames(codes: np.ndarray, dataset: TokenDataset) -> np.ndarray:
    """[T] bool: whether the main speaker's audio, decoded by its codec, is `SILENCE_DB` below its loud frames."""
    info = dataset.info
    own = codes[1 : 1 + info.num_codebooks]
    frames = own.shape[1]
    if not frames or (own < 0).all():
        return np.ones(frames, bool)
    codec = codec_of(info)
    decoder, parts = codec.decoder(), []
    for start in range(0, frames, DECODED_FRAMES):  # hours of samples at once would be gigabytes
        wav = decoder.push(np.maximum(own[:, start : start + DECODED_FRAMES], 0))
        parts.append(np.square(wav.reshape(-1, codec.frame_samples), dtype=np.float64).mean(axis=1))
    power = np.concatenate(parts)
    loud = np.quantile(power, 0.95)
    return power <= loud * 10 ** (SILENCE_DB / 10)


def stream_names(config: MoshiConfig) -> list[str]:
    """Names of the predicted streams: text, then codebooks from 0."""
    return ["text", *(f"codebook {k}" for k in range(config.dep_q))]


def _summaries(config, scores, recordings: Sequence[np.ndarray], train, validation) -> list[StreamSummary]:
    cards = [config.text_card] + [config.card] * config.dep_q
    tables = fit_tables(train, cards, validation)
    own = [codes[: 1 + config.dep_q].copy() for codes in recordings]
    summaries = []
    for k, (name, card, table) in enumerate(zip(stream_names(config), cards, tables, strict=True)):
        held_out = [codes[k] for codes in own]
        bigram, entropy = _table_mean(table, held_out, "bigram_nll"), empirical_entropy(held_out, card)
        summaries.append(
            StreamSummary(
                name=name,
                model=_estimate([s[k] for s in scores]),
                unigram=_table_mean(table, held_out, "unigram_nll"),
                bigram=bigram,
                unigram_entropy=entropy,
                bound=TEXT_SHARE_OF_ENTROPY * entropy if name == "text" else bigram - AUDIO_MARGIN_NATS,
            )
        )
    return summaries


def _table_mean(table: StreamTable, held_out, method: str) -> float:
    return _estimate([getattr(table, method)(tokens) for tokens in held_out]).mean


def _estimate(values: list[np.ndarray]) -> Estimate:
    """Of [T] or [streams, T] arrays, one a recording, NaN where there is nothing."""
    sums = np.array([np.nansum(v) for v in values])
    return mean_over_recordings(sums, np.array([np.count_nonzero(~np.isnan(v)) for v in values]))


def _curves(config, scores, silent: Masks, edges, context) -> tuple[list[Curve], list[Curve]]:
    groups = {name: slice(k, k + 1) for k, name in enumerate(stream_names(config))} | {"audio": slice(1, None)}
    kinds = {
        "all": [np.ones_like(s) for s in silent],
        "silent": silent,
        "sounding": [~s for s in silent],
    }
    make = functools.partial(_curve, groups=groups, kinds=kinds, edges=edges, context=context)
    names = [(group, kind) for group in groups for kind in kinds]
    curves = [make(memory, scores[memory], group, kind) for memory in scores for group, kind in names]
    gains = []
    for memory in [m for m in scores if m != "carried"]:
        difference = [other - own for other, own in zip(scores[memory], scores["carried"], strict=True)]
        gains += [make(memory, difference, group, kind) for group, kind in names]
    return curves, gains


def _curve(memory, values, group, kind, *, groups, kinds, edges, context) -> Curve:
    chosen = [np.where(mask, v[groups[group]], np.nan) for v, mask in zip(values, kinds[kind], strict=True)]
    buckets = [_estimate([v[:, a:b] for v in chosen]) for a, b in itertools.pairwise(edges)]
    return Curve(memory, group, kind, buckets, _estimate([v[:, context:] for v in chosen]))
