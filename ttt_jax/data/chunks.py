"""What one update reads: random crops, or recordings walked from their start to their end with the state carried."""

import bisect
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from ttt_jax.data.reader import TokenDataset, crops
from ttt_jax.models.moshi import delayed_positions


class Chunk(NamedTuple):
    """Delayed tokens of B rows; the model reads positions `[:, :, :-1]` and predicts positions `[:, :, 1:]`."""

    tokens: np.ndarray  # [B, 1 + n_q, n + 1] int32, -1 where there is none
    length: np.ndarray  # [B] int32: positions that are read, of n
    reset: np.ndarray  # [B] bool: rows that start afresh; the others go on where the chunk before ended


class Chunks(Protocol):
    """Random access by update: `chunks[i]` follows from the seed and i alone."""

    def __getitem__(self, step: int, /) -> Chunk: ...


class Crops:
    """Every chunk is a batch of random crops of `num_frames` frames, each a fresh start."""

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        seed: int,
        batch_size: int,
        num_frames: int,
        delays: Sequence[int],
        initial: Sequence[int],
        rows: Sequence[int] | None = None,
    ):
        """Args as `Walks`'."""
        _check_positive(batch_size=batch_size)
        self._crops = crops(dataset, seed=seed, num_frames=num_frames)
        self._batch_size = batch_size
        self._positions = functools.partial(delayed_positions, delays=delays, initial=initial)
        self._num_frames = num_frames
        self._rows = range(batch_size) if rows is None else rows

    def __getitem__(self, step: int) -> Chunk:
        codes = [np.asarray(self._crops[step * self._batch_size + row]) for row in self._rows]
        tokens = np.stack([self._positions(c, 0, self._num_frames + 1) for c in codes])
        rows = len(self._rows)
        return Chunk(tokens, np.full(rows, self._num_frames, np.int32), np.ones(rows, bool))


class Walks:
    """Every row walks through recordings, `num_frames` frames per chunk; a recording's first chunk resets its row.

    The recordings of an epoch come in a random order, dealt out to the rows in turn.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        seed: int,
        batch_size: int,
        num_frames: int,
        delays: Sequence[int],
        initial: Sequence[int],
        recording_frames: int | None = None,
        rows: Sequence[int] | None = None,
    ):
        """Plans the walks; reads no recording yet.

        Args:
            dataset: Recordings to walk through.
            seed: Of the order of recordings.
            batch_size: Rows walking side by side, in all processes together.
            num_frames: Frames per chunk.
            delays: Of each stream, in frames: `MoshiConfig.delays`.
            initial: Each stream's initial token: `MoshiConfig.initial_tokens`.
            recording_frames: Longer recordings are cut into pieces of so many frames, each a recording of its own;
                None leaves them whole.
            rows: Which of the `batch_size` rows are drawn here; None draws all.

        Raises:
            ValueError: A size below 1, or no recordings.
        """
        _check_positive(batch_size=batch_size, num_frames=num_frames, recording_frames=recording_frames or 1)
        if len(dataset) == 0:
            raise ValueError("dataset: expected at least one recording, got none")
        self._dataset = dataset
        self._pieces = [
            (index, start, min(recording_frames or int(total), int(total) - start))
            for index, total in enumerate(dataset.num_frames)
            for start in range(0, int(total), recording_frames or max(int(total), 1))
        ]
        self._batch_size = batch_size
        self._num_frames = num_frames
        self._max_delay = max(delays)
        self._positions = functools.partial(delayed_positions, delays=delays, initial=initial)
        self._ends: dict[int, list[int]] = {row: [] for row in (range(batch_size) if rows is None else rows)}
        self._order = functools.lru_cache(maxsize=4)(
            lambda epoch: np.random.default_rng((seed, epoch)).permutation(len(self._pieces))
        )

    def __getitem__(self, step: int) -> Chunk:
        tokens, length, reset = zip(*(self._row(row, step) for row in self._ends), strict=True)
        return Chunk(np.stack(tokens), np.array(length, np.int32), np.array(reset))

    def _row(self, row: int, step: int) -> tuple[np.ndarray, int, bool]:
        ends = self._ends[row]  # the step at which each recording of this row is through
        while not ends or ends[-1] <= step:
            _, _, frames = self._piece(row, len(ends))
            ends.append((ends[-1] if ends else 0) + math.ceil((frames + self._max_delay) / self._num_frames))
        number = bisect.bisect_right(ends, step)
        index, start, frames = self._piece(row, number)
        position = (step - (ends[number - 1] if number else 0)) * self._num_frames
        codes = self._dataset.codes(index)[:, start : start + frames]
        tokens = self._positions(codes, position, self._num_frames + 1)
        return tokens, min(self._num_frames, frames + self._max_delay - position), position == 0

    def _piece(self, row: int, number: int) -> tuple[int, int, int]:
        """Recording, first frame and frames of the `number`-th walk of a row."""
        epoch, place = divmod(number * self._batch_size + row, len(self._pieces))
        return self._pieces[self._order(epoch)[place]]


class Stages:
    """One after the other: each of `stages` for its number of updates, counted from 0 in each, the last without end."""

    def __init__(self, stages: Sequence[tuple[int, Chunks]]):
        """`stages` are (updates, chunks); the updates of the last are not read."""
        self._starts = np.cumsum([0, *(steps for steps, _ in stages[:-1])])
        self._chunks = [chunks for _, chunks in stages]

    def __getitem__(self, step: int) -> Chunk:
        stage = int(np.searchsorted(self._starts, step, side="right")) - 1
        return self._chunks[stage][step - int(self._starts[stage])]


def _check_positive(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value}")
