"""What a table can do: unigram and bigram models of each stream, the floor that a trained model has to beat."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

PRIOR_STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


@dataclasses.dataclass(frozen=True)
class StreamTable:
    """Counts of one stream's tokens, alone and after the token one frame before.

    Attributes:
      unigram: [card], probabilities with one added count each.
      pairs: [card, card], counts of (previous, present).
      prior_strength: pseudo-counts of the unigram that every row of `pairs` is smoothed with.
    """

    unigram: np.ndarray
    pairs: np.ndarray
    prior_strength: float = 10.0

    def unigram_nll(self, tokens: np.ndarray) -> np.ndarray:
        """Nats of each token of [T]; NaN where there is none (-1)."""
        return np.where(tokens >= 0, -np.log(self.unigram[np.maximum(tokens, 0)]), np.nan)

    def bigram_nll(self, tokens: np.ndarray) -> np.ndarray:
        """Nats of each token of [T] given the frame before (the first frame, or one after a gap, by the unigram)."""
        nll = self.unigram_nll(tokens)
        before, now = tokens[:-1], tokens[1:]
        both = (before >= 0) & (now >= 0)
        count = self.pairs[before[both], now[both]]
        total = self.pairs.sum(axis=1)[before[both]]
        probability = (count + self.prior_strength * self.unigram[now[both]]) / (total + self.prior_strength)
        nll[1:][both] = -np.log(probability)
        return nll


def fit_table(train: Iterable[np.ndarray], card: int, validation: Sequence[np.ndarray] = ()) -> StreamTable:
    """A stream's table from its training tokens ([T] each), smoothed as suits the validation tokens best."""
    counts, pairs = np.ones(card), np.zeros((card, card), np.float64)
    for tokens in train:
        counts += np.bincount(tokens[tokens >= 0], minlength=card)
        both = (tokens[:-1] >= 0) & (tokens[1:] >= 0)
        np.add.at(pairs, (tokens[:-1][both], tokens[1:][both]), 1)
    table = StreamTable(counts / counts.sum(), pairs)
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
