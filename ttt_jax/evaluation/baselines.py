"""What a table can do: unigram and bigram models of each stream, the floor that a trained model has to beat."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

PRIOR_STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
_FEW = 100_000  # pairs that are not worth sorting


@dataclasses.dataclass(frozen=True)
class StreamTable:
    """Counts of one stream's tokens, alone and after the token one frame before.

    Attributes:
      unigram: [card], probabilities with one added count each.
      row_totals: [card], how often a token has been followed by any other.
      pairs: [P], sorted numbers `previous * card + present` of the pairs that were seen.
      pair_counts: [P], how often.
      prior_strength: pseudo-counts of the unigram that every row is smoothed with.
    """

    unigram: np.ndarray
    row_totals: np.ndarray
    pairs: np.ndarray
    pair_counts: np.ndarray
    prior_strength: float = 10.0

    def unigram_nll(self, tokens: np.ndarray) -> np.ndarray:
        """Nats of each token of [T]; NaN where there is none (-1)."""
        return np.where(tokens >= 0, -np.log(self.unigram[np.maximum(tokens, 0)]), np.nan)

    def bigram_nll(self, tokens: np.ndarray) -> np.ndarray:
        """Nats of each token of [T] given the frame before (the first frame, or one after a gap, by the unigram)."""
        nll = self.unigram_nll(tokens)
        before, now = _neighbours(tokens)
        pair = before * len(self.unigram) + now
        at = np.minimum(np.searchsorted(self.pairs, pair), len(self.pairs) - 1)
        count = np.where(self.pairs[at] == pair, self.pair_counts[at], 0) if len(self.pairs) else np.zeros(len(pair))
        prior = self.prior_strength * self.unigram[now]
        seen = (tokens[:-1] >= 0) & (tokens[1:] >= 0)
        nll[1:][seen] = -np.log((count + prior) / (self.row_totals[before] + self.prior_strength))
        return nll


def fit_tables(
    train: Iterable[np.ndarray], cards: Sequence[int], validation: Iterable[np.ndarray] = ()
) -> list[StreamTable]:
    """A table for each of the first `len(cards)` streams of recordings [streams, T], read one recording at a time.

    Args:
      train: recordings that are counted.
      cards: vocabulary of each stream.
      validation: recordings whose likelihood chooses the smoothing, stream by stream.
    """
    counters = [_Counter(card) for card in cards]
    for codes in train:
        for counter, tokens in zip(counters, codes, strict=False):
            counter.add(tokens)
    tables = [counter.table() for counter in counters]
    held_out = [codes[: len(cards)].copy() for codes in validation]
    return [_smoothed(table, [codes[k] for codes in held_out]) for k, table in enumerate(tables)]


class _Counter:
    def __init__(self, card: int):
        self.card = card
        self.counts = np.ones(card)
        self.pairs = np.zeros(0, np.int64)
        self.pair_counts = np.zeros(0)
        self.waiting: list[np.ndarray] = []

    def add(self, tokens: np.ndarray) -> None:
        self.counts += np.bincount(tokens[tokens >= 0], minlength=self.card)
        before, now = _neighbours(tokens)
        self.waiting.append(before * self.card + now)
        # As many as there are pairs, so that each is sorted a few times, however many recordings there are.
        if sum(map(len, self.waiting)) > max(len(self.pairs), _FEW):
            self._sort()

    def _sort(self) -> None:
        new = np.concatenate([np.zeros(0, np.int64), *self.waiting])
        weights = np.concatenate([self.pair_counts, np.ones(len(new))])
        self.pairs, where = np.unique(np.concatenate([self.pairs, new]), return_inverse=True)
        self.pair_counts = np.bincount(where, weights, minlength=len(self.pairs))
        self.waiting = []

    def table(self) -> StreamTable:
        self._sort()
        totals = np.bincount(self.pairs // self.card, self.pair_counts, minlength=self.card)
        return StreamTable(self.counts / self.counts.sum(), totals, self.pairs, self.pair_counts)


def _neighbours(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of [T] that follow another, and the one before each."""
    before, now = tokens[:-1].astype(np.int64), tokens[1:].astype(np.int64)
    both = (before >= 0) & (now >= 0)
    return before[both], now[both]


def _smoothed(table: StreamTable, validation: Sequence[np.ndarray]) -> StreamTable:
    if not any((tokens >= 0).any() for tokens in validation):
        return table
    candidates = [dataclasses.replace(table, prior_strength=strength) for strength in PRIOR_STRENGTHS]
    return min(candidates, key=lambda t: np.nanmean(np.concatenate([t.bigram_nll(tokens) for tokens in validation])))


def empirical_entropy(recordings: Iterable[np.ndarray], card: int) -> float:
    """Entropy in nats of a stream's own token frequencies: the least that any unigram table could score on it."""
    counts = np.zeros(card)
    for tokens in recordings:
        counts += np.bincount(tokens[tokens >= 0], minlength=card)
    if not counts.sum():
        return float("nan")
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())
