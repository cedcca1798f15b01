"""Means with confidence intervals over recordings: frames of one recording are not independent, recordings are."""

import dataclasses
import math

import numpy as np

NUM_RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean in nats per token with its 95 % interval (NaN with fewer than two recordings) and what it rests on."""

    mean: float
    low: float
    high: float
    num_tokens: int
    num_recordings: int


def mean_over_recordings(sums: np.ndarray, counts: np.ndarray, seed: int = 0) -> Estimate:
    """Token mean `sum(sums) / sum(counts)` and its bootstrap interval over recordings.

    Args:
      sums: [R], summed values of each recording.
      counts: [R], tokens behind each sum; recordings without any do not count.
      seed: of the resampling.
    """
    sums, counts = (np.asarray(x, np.float64)[np.asarray(counts) > 0] for x in (sums, counts))
    num_recordings, num_tokens = len(counts), int(counts.sum())
    if not num_recordings:
        return Estimate(math.nan, math.nan, math.nan, 0, 0)
    mean = float(sums.sum() / counts.sum())
    if num_recordings < 2:
        return Estimate(mean, math.nan, math.nan, num_tokens, num_recordings)
    drawn = np.random.default_rng(seed).integers(num_recordings, size=(NUM_RESAMPLES, num_recordings))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(mean, float(low), float(high), num_tokens, num_recordings)


def position_edges(context_frames: int, longest_frames: int) -> list[int]:
    """Bucket borders in frames: quarters of the attention context up to one context, then doubling.

    The last bucket reaches to the longest recording's end and is at least half as long as it would be in full.
    """
    edges = [0, max(1, context_frames // 4), max(2, context_frames // 2), max(3, context_frames)]
    while edges[-1] < longest_frames:
        edges.append(2 * edges[-1])
    kept = [edge for edge in edges if 3 * edge <= 2 * longest_frames]
    return [*kept, max(longest_frames, 1)]
