"""NLL of masked spans of held-out recordings: fixed spans, the same for every model on the same dataset."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ttt_jax.data.reader import TokenDataset
from ttt_jax.data.spans import MaskedBatch, mask_spans, num_masked
from ttt_jax.data.tokens import MISSING
from ttt_jax.evaluation.statistics import Estimate, mean_over_recordings
from ttt_jax.models.infill import Infill, InfillConfig, first_masked, masked_nll

ROWS = 8
SEED = 0


@dataclasses.dataclass(frozen=True)
class Spans:
    """How recordings are cut and masked.

    Attributes:
      num_frames: of the crops that a recording is cut into, one after the other.
      masked_share: of a crop's frames that are masked.
      shortest_span: frames.
      longest_span: frames.
    """

    num_frames: int = 512
    masked_share: float = 0.3
    shortest_span: int = 16
    longest_span: int = 96


@dataclasses.dataclass(frozen=True)
class InfillNLL:
    """The result; estimates are means in nats per masked token of audio, with intervals over recordings.

    Attributes:
      split: of the dataset.
      num_recordings: scored.
      num_frames: in all of them.
      frame_rate_hz: frames per second.
      spans: how they were cut and masked.
      segment: frames that attention sees.
      ssm_layer: of the model, None without TTT.
      model: of all masked tokens.
      seen: of those with visible frames in a segment that attention sees.
      unseen: of the others, about which only TTT can tell anything but what is usual. None where segments overlap:
        there attention reaches further from layer to layer.
      unigram: of all by the frequencies in training recordings.
      seen_unigram: the same of `seen`.
      unseen_unigram: the same of `unseen`.
      by_codebook: the model's mean of every codebook.
      unigram_by_codebook: the same of the unigram.
    """

    split: str
    num_recordings: int
    num_frames: int
    frame_rate_hz: float
    spans: Spans
    segment: int
    ssm_layer: str | None
    model: Estimate
    seen: Estimate
    unseen: Estimate
    unigram: Estimate
    seen_unigram: Estimate
    unseen_unigram: Estimate
    by_codebook: list[float]
    unigram_by_codebook: list[float]


def infill_nll(
    config: InfillConfig, params: Any, held_out: TokenDataset, train: TokenDataset, spans: Spans, *, split: str
) -> InfillNLL:
    """Score every recording of a split.

    Args:
      config: of the model.
      params: its parameter tree.
      held_out: recordings to score.
      train: recordings of the unigram.
      spans: how to cut and mask; a model has learned what it was trained on.
      split: name of `held_out`, for the result.

    Raises:
      ValueError: the dataset's streams are not the model's, or there are no recordings.
    """
    info = held_out.info
    there, needed = (
        (2 * info.num_codebooks, info.card, info.text_card),
        (config.num_codebooks, config.card, config.text_card),
    )
    if there != needed:
        raise ValueError(
            f"--data: expected the model's codebooks, cards of audio and text {needed}, the dataset has {there}; "
            "pass the dataset that it was trained on, or one with its codec and tokenizer."
        )
    if len(held_out) == 0:
        raise ValueError("held_out: expected at least one recording, got none.")
    table = jnp.asarray(_unigram_nll(train), jnp.float32)
    scores = np.zeros((len(held_out), 2, 3, config.num_codebooks))
    score = jax.jit(functools.partial(_scores, config))
    for owners, batch in tqdm(_batches(held_out, spans), desc="masked spans", unit="batch"):
        frames = first_masked(batch.masked, num_masked(spans.num_frames, spans.masked_share))
        rows = np.asarray(score(params, table, batch, frames, _unseen(batch, config)), np.float64)
        np.add.at(scores, owners, rows[: len(owners)])
    counts = scores[:, :, 2]  # [recordings, seen or not, codebooks]

    def estimate(which: int, *of: int) -> Estimate:
        sums, tokens = (x[:, list(of)].sum(axis=(1, 2)) for x in (scores[:, :, which], counts))
        return mean_over_recordings(sums, tokens)

    by_codebook = scores.sum(axis=(0, 1)) / np.maximum(counts.sum(axis=(0, 1)), 1)
    return InfillNLL(
        split=split,
        num_recordings=len(held_out),
        num_frames=int(held_out.num_frames.sum()),
        frame_rate_hz=info.frame_rate_hz,
        spans=spans,
        segment=config.segment,
        ssm_layer=config.ssm_layer,
        model=estimate(0, 0, 1),
        seen=estimate(0, 0),
        unseen=estimate(0, 1),
        unigram=estimate(1, 0, 1),
        seen_unigram=estimate(1, 0),
        unseen_unigram=estimate(1, 1),
        by_codebook=by_codebook[0].tolist(),
        unigram_by_codebook=by_codebook[1].tolist(),
    )


def _unigram_nll(train: TokenDataset) -> np.ndarray:
    """Nats of every code of every codebook, [num_codebooks, card], one count added to each."""
    counts = np.ones((2 * train.info.num_codebooks, train.info.card))
    for index in range(len(train)):
        for count, codes in zip(counts, train.codes(index)[1:], strict=True):
            count += np.bincount(codes[codes >= 0], minlength=len(count))
    return -np.log(counts / counts.sum(axis=1, keepdims=True))


def _batches(held_out: TokenDataset, spans: Spans) -> Iterator[tuple[list[int], MaskedBatch]]:
    """The crops of all recordings, the recording that each belongs to; empty rows fill up the last batch."""
    owners, rows = [], []
    for index in range(len(held_out)):
        codes = held_out.codes(index)
        for start in range(0, codes.shape[1], spans.num_frames):
            owners.append(index)
            rows.append(_row(codes[:, start : start + spans.num_frames], (SEED, index, start), spans))
            if len(rows) == ROWS:
                yield owners, _stacked(rows)
                owners, rows = [], []
    if rows:
        nothing = _row(np.zeros((1 + 2 * held_out.info.num_codebooks, 0), np.int32), (SEED,), spans)
        yield owners, _stacked([*rows, *[nothing] * (ROWS - len(rows))])


def _row(codes: np.ndarray, seed: tuple[int, ...], spans: Spans) -> tuple[np.ndarray, np.ndarray, int]:
    length = codes.shape[1]
    masked = np.zeros(spans.num_frames, bool)
    rng = np.random.default_rng(seed)
    masked[:length] = mask_spans(rng, length, spans.masked_share, spans.shortest_span, spans.longest_span)
    return np.pad(codes, ((0, 0), (0, spans.num_frames - length)), constant_values=MISSING), masked, length


def _stacked(rows: list[tuple[np.ndarray, np.ndarray, int]]) -> MaskedBatch:
    codes, masked, length = zip(*rows, strict=True)
    return MaskedBatch(np.stack(codes), np.stack(masked), np.array(length, np.int32))


def _unseen(batch: MaskedBatch, config: InfillConfig) -> np.ndarray:
    """Frames whose segment has no visible frame, bool [B, T]; none where segments overlap."""
    if config.overlap:
        return np.zeros(batch.masked.shape, bool)
    frames = batch.masked.shape[1]
    visible = ~batch.masked & (np.arange(frames) < batch.length[:, None])
    padded = np.pad(visible, ((0, 0), (0, -frames % config.segment)))
    segments = padded.reshape(len(visible), -1, config.segment).any(axis=2)
    return ~np.repeat(segments, config.segment, axis=1)[:, :frames]


def _scores(config: InfillConfig, params: Any, table: jax.Array, batch: MaskedBatch, frames: jax.Array, unseen):
    """[B, seen or not, (model, unigram, tokens), num_codebooks]: sums over the masked frames of each row."""
    logits: Any = Infill(config).apply({"params": params}, batch.codes, batch.masked, batch.length, frames)
    model, counted = masked_nll(logits, batch.codes, batch.masked, frames)
    codes = jnp.take_along_axis(batch.codes[:, 1:], frames[:, None], axis=2)
    unigram = jax.vmap(lambda nats, tokens: nats[jnp.maximum(tokens, 0)], (0, 1), 1)(table, codes)
    values = jnp.stack([model, unigram, jnp.ones_like(model)], axis=1) * counted[:, None]
    hidden = jnp.take_along_axis(unseen, frames, axis=1)[:, None, None]
    return jnp.stack([jnp.sum(jnp.where(which, values, 0), axis=-1) for which in (~hidden, hidden)], axis=1)
