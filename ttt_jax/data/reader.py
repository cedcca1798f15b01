"""Opening a token dataset and drawing crops from it, by index alone."""

import collections
import json
import pathlib
import threading
from collections.abc import Sequence

import grain
import numpy as np

from ttt_jax.data.builder import load_builder
from ttt_jax.data.tokens import INFO_FILE, MISSING, Recording, TokenInfo, check_codes, info_from_json

_CACHE_BYTES = 1 << 30
_NUM_CROPS = 1 << 62  # crops are drawn without end


class TokenDataset:
    """One split: `len(dataset)` recordings, `dataset[i]` -> Recording with codes int32 [streams, T].

    Attributes:
        info: TokenInfo of the dataset.
        num_frames: int64 [len(self)], each recording's length.
    """

    def __init__(self, source, info: TokenInfo, num_frames: Sequence[int] | np.ndarray):
        self._source = source
        self.info = info
        self.num_frames = np.asarray(num_frames, np.int64)
        self._cache: collections.OrderedDict[int, np.ndarray] = collections.OrderedDict()
        self._cache_room = _CACHE_BYTES
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.num_frames)

    def first(self, number: int) -> "TokenDataset":
        """Its first `number` recordings, or all if there are not as many."""
        return TokenDataset(self._source, self.info, self.num_frames[:number])

    def __getitem__(self, index: int) -> Recording:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is outside this split of {len(self)} recordings")
        record = self._source[index % len(self)]
        name = record["id"].decode()
        codes = np.ascontiguousarray(record["codes"].T, np.int32)
        check_codes(codes, self.info, f"recording {name!r}")
        return Recording(name, codes, json.loads(record["metadata"].decode()))

    def codes(self, index: int) -> np.ndarray:
        """`self[index].codes`; a gibibyte of those last asked for is kept: crops and walks come back to them."""
        with self._lock:
            codes = self._cache.get(index)
            if codes is not None:
                self._cache.move_to_end(index)
                return codes
        codes = self[index].codes
        with self._lock:
            if index not in self._cache and codes.nbytes <= _CACHE_BYTES:
                self._cache[index] = codes
                self._cache_room -= codes.nbytes
                while self._cache_room < 0:
                    self._cache_room += self._cache.popitem(last=False)[1].nbytes
        return codes


def open_dataset(directory: str | pathlib.Path, split: str) -> TokenDataset:
    """Open one split ("train", "validation" or "test") of a finished dataset directory.

    Raises:
        FileNotFoundError: there is no finished dataset.
        ValueError: the split does not exist, or the dataset's description is broken.
    """
    directory = pathlib.Path(directory)
    info, num_frames = _finished(directory)
    if split not in num_frames:
        raise ValueError(f"split: expected one of {list(num_frames)}, which {directory} holds, got {split!r}")
    source = load_builder(directory).as_data_source(split=split)  # pyright: ignore[reportCallIssue]
    if len(source) != len(num_frames[split]):
        raise ValueError(
            f"{directory / INFO_FILE} lists {len(num_frames[split])} {split} recordings, "
            f"the dataset holds {len(source)}; its files do not belong together: make the dataset again"
        )
    return TokenDataset(source, info, num_frames[split])


def splits(directory: str | pathlib.Path) -> list[str]:
    """Names of the splits that a finished dataset directory holds; a small dataset may lack validation.

    Raises:
        FileNotFoundError: there is no finished dataset.
        ValueError: the dataset's description is broken.
    """
    _, num_frames = _finished(pathlib.Path(directory))
    return list(num_frames)


def _finished(directory: pathlib.Path) -> tuple[TokenInfo, dict[str, list[int]]]:
    if not (directory / INFO_FILE).is_file():
        raise FileNotFoundError(
            f"no finished token dataset at {directory} (no {INFO_FILE}); make one with "
            f"`python -m ttt_jax.data.prepare --audio=DIR --output={directory}` or "
            f"`python -m ttt_jax.data.conversations --hours=8 --output={directory}`, or rerun the one that was stopped"
        )
    return info_from_json(directory / INFO_FILE)


def crops(dataset: TokenDataset, *, seed: int, num_frames: int) -> grain.MapDataset:
    """Random crops by index: `crops(...)[i]` -> codes int32 [streams, num_frames].

    A crop follows from (seed, i) alone. A recording is drawn in proportion to its length and the crop's start
    uniformly, so every frame is about equally likely; a recording shorter than the crop is padded with -1 at its end.

    Raises:
        ValueError: `num_frames` below 1, or no recordings.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames: expected a positive integer, got {num_frames}")
    if len(dataset) == 0:
        raise ValueError("dataset: expected at least one recording, got none")
    weights = np.maximum(dataset.num_frames, num_frames).cumsum()

    def crop(_: int, rng: np.random.Generator) -> np.ndarray:
        index = int(np.searchsorted(weights, rng.integers(weights[-1]), side="right"))
        codes = dataset.codes(index)
        start = int(rng.integers(max(1, codes.shape[1] - num_frames + 1)))
        piece = codes[:, start : start + num_frames]
        return np.pad(piece, ((0, 0), (0, num_frames - piece.shape[1])), constant_values=MISSING)

    return grain.MapDataset.range(_NUM_CROPS).seed(seed).random_map(crop)
