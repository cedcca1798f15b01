"""Crops of recordings with masked spans, for models that fill them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ttt_jax.data.reader import TokenDataset, crops


class MaskedBatch(NamedTuple):
    """B rows of T frames."""

    codes: np.ndarray  # [B, 1 + 2 * num_codebooks, T] int32, -1 where there is none
    masked: np.ndarray  # [B, T] bool: frames to be filled
    length: np.ndarray  # [B] int32: real frames, at the start of each row


def num_masked(frames: int, share: float) -> int:
    """How many of a row's frames are masked, at least one."""
    return min(frames, max(1, round(share * frames)))


def mask_spans(rng: np.random.Generator, frames: int, share: float, shortest: int, longest: int) -> np.ndarray:
    """Masked spans at random places: bool [frames], of which exactly `num_masked(frames, share)` are True.

    Spans are drawn until there are enough, lengths evenly from `shortest` to `longest` frames and starts evenly; the
    last one is cut short. Spans that touch or overlap are one.
    """
    masked, wanted = np.zeros(frames, bool), num_masked(frames, share) if frames else 0
    while (missing := wanted - int(masked.sum())) > 0:
        span = min(int(rng.integers(shortest, longest + 1)), frames)
        start = int(rng.integers(frames - span + 1))
        fresh = start + np.flatnonzero(~masked[start : start + span])
        masked[fresh[:missing]] = True
    return masked


class MaskedCrops:
    """Random crops with masked spans; `[i]` follows from the seed and i alone."""

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        seed: int,
        batch_size: int,
        num_frames: int,
        share: float,
        shortest: int,
        longest: int,
        rows: Sequence[int] | None = None,
    ):
        """Reads no recording yet.

        Args:
            dataset: Recordings.
            seed: Of crops and spans.
            batch_size: Rows of a batch, in all processes together.
            num_frames: Frames of a crop; a shorter recording is padded with -1.
            share: Of a row's real frames that are masked.
            shortest: Frames of a span.
            longest: Frames of a span.
            rows: Which of the `batch_size` rows are drawn here; None draws all.

        Raises:
            ValueError: No recordings, or no frames.
        """
        self._crops = crops(dataset, seed=seed, num_frames=num_frames)
        self._seed = seed
        self._batch_size = batch_size
        self._spans = (share, shortest, longest)
        self._rows = range(batch_size) if rows is None else rows

    def __getitem__(self, step: int) -> MaskedBatch:
        rows = [self._row(step * self._batch_size + row) for row in self._rows]
        codes, masked, length = zip(*rows, strict=True)
        return MaskedBatch(np.stack(codes), np.stack(masked), np.array(length, np.int32))

    def _row(self, index: int) -> tuple[np.ndarray, np.ndarray, int]:
        codes = np.asarray(self._crops[index])
        real = np.flatnonzero((codes >= 0).any(axis=0))
        length = int(real[-1]) + 1 if len(real) else 0
        masked = np.zeros(codes.shape[1], bool)
        masked[:length] = mask_spans(np.random.default_rng((self._seed, index)), length, *self._spans)
        return codes, masked, length
