"""Datasets of videos: latents and the embeddings of their scenes' texts, written once and drawn by index alone."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from ttt_jax.data.builder import VideoRecords, load_builder, write_records
from ttt_jax.data.pipeline import quiet
from ttt_jax.files import new_directory, write_atomically
from ttt_jax.models.video_dit.diffusion import sample_latent

INFO_FILE = "videos.json"
EMPTY_TEXT_FILE = "empty_text.npy"


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What the videos of a dataset have in common.

    Attributes:
        num_frames: latent frames of a video.
        channels: of a latent.
        height: rows of a latent.
        width: columns of a latent.
        num_scenes: texts of a video.
        text_length: tokens of a text.
        text_dim: width of a token's embedding.
        has_moments: the records hold a VAE's mean and logvar, twice the channels, to draw latents from.
        scale: what latents are multiplied with when they are read; the `scaling_factor` of a VAE.
    """

    num_frames: int
    channels: int
    height: int
    width: int
    num_scenes: int
    text_length: int
    text_dim: int
    has_moments: bool = False
    scale: float = 1.0

    @property
    def record_shape(self) -> tuple[int, int, int, int]:
        """Of a video as it is stored."""
        return self.num_frames, self.channels * (1 + self.has_moments), self.height, self.width

    @property
    def text_shape(self) -> tuple[int, int, int]:
        """Of the texts of a video."""
        return self.num_scenes, self.text_length, self.text_dim


def write(
    output: str | pathlib.Path,
    info: VideoInfo,
    empty_text: np.ndarray,
    records: Mapping[str, Sequence[str]],
    make_example: Callable[[str], dict[str, Any]],
) -> None:
    """Writes a dataset. The directory appears whole or not at all.

    Args:
        output: Must not exist yet.
        info: Of the videos.
        empty_text: The embedding of no text, float [text_length, text_dim], for what is trained and sampled without.
        records: split -> names of its videos.
        make_example: name -> {id, video, text, captions}, see `VideoRecords`.

    Raises:
        FileExistsError: `output` exists.
        ValueError: There is nothing to train on, or `empty_text` has another shape.
    """
    if not records.get("train"):
        raise ValueError("records: expected at least one video to train on, got none")
    if empty_text.shape != info.text_shape[1:]:
        raise ValueError(
            f"empty_text: expected shape {list(info.text_shape[1:])}, that of the other texts, got "
            f'{list(empty_text.shape)}; embed "" with the same model and padding'
        )
    with new_directory(output) as staging:
        with quiet():
            write_records(
                staging,
                VideoRecords,
                records=records,
                make_example=make_example,
                video_shape=info.record_shape,
                text_shape=info.text_shape,
            )
        np.save(staging / EMPTY_TEXT_FILE, empty_text.astype(np.float32))
        numbers = {split: len(names) for split, names in records.items() if names}
        write_atomically(
            staging / INFO_FILE, json.dumps({**dataclasses.asdict(info), "num_videos": numbers}, indent=1) + "\n"
        )


class Video(NamedTuple):
    """One video as it is stored."""

    id: str
    video: np.ndarray  # float16 `VideoInfo.record_shape`
    text: np.ndarray  # float16 `VideoInfo.text_shape`
    captions: list[str]  # of each scene; empty where they are unknown


class VideoDataset:
    """One split: `len(dataset)` videos, `dataset[i]` -> Video.

    Attributes:
        info: VideoInfo of the dataset.
        empty_text: float32 [text_length, text_dim].
    """

    def __init__(self, source: Any, info: VideoInfo, empty_text: np.ndarray):
        self._source = source
        self.info = info
        self.empty_text = empty_text

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Video:
        record = self._source[index]
        captions = json.loads(record["captions"].decode())
        return Video(record["id"].decode(), record["video"], record["text"], captions)


def splits(directory: str | pathlib.Path) -> list[str]:
    """Names of the splits that a dataset holds; see `open_videos` for errors."""
    return list(_description(pathlib.Path(directory))[1])


def open_videos(directory: str | pathlib.Path, split: str) -> VideoDataset:
    """Opens one split ("train", "validation" or "test") of a dataset.

    Raises:
        FileNotFoundError: There is none.
        ValueError: The split does not exist, or the dataset's description is broken.
    """
    directory = pathlib.Path(directory)
    info, numbers = _description(directory)
    if split not in numbers:
        raise ValueError(f"split: expected one of {list(numbers)}, which {directory} holds, got {split!r}")
    source = load_builder(directory).as_data_source(split=split)  # pyright: ignore[reportCallIssue]
    return VideoDataset(source, info, np.load(directory / EMPTY_TEXT_FILE))


def _description(directory: pathlib.Path) -> tuple[VideoInfo, dict[str, int]]:
    path = directory / INFO_FILE
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist: no dataset of videos there. Make one with `python -m ttt_jax.data.moving_shapes "
            f"--output={directory}`, or of latents that you have with `python -m ttt_jax.data.latents --help`"
        )
    try:
        fields = json.loads(path.read_text())
        numbers = {split: int(number) for split, number in fields.pop("num_videos").items()}
        return VideoInfo(**fields), numbers
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is not the description of a dataset of videos ({error!r}); make the dataset again"
        ) from error


class VideoBatch(NamedTuple):
    """B videos with their texts."""

    video: np.ndarray  # [B, frames, channels, h, w] float32
    text: np.ndarray  # [B, scenes, L, width] float32; of dropped rows the empty text in every scene
    key: np.ndarray  # [B, 2] uint32: of each row's timestep and noise


class VideoBatches:
    """`batches[i]` follows from (seed, i) alone: every video once an epoch, each epoch in another order."""

    def __init__(
        self,
        dataset: VideoDataset,
        *,
        seed: int,
        batch_size: int,
        text_dropout: float,
        rows: Sequence[int] | None = None,
    ):
        """Reads no video yet.

        Args:
            dataset: What to draw from.
            seed: Of the order, the latents that are drawn from moments, the texts dropped, and the keys.
            batch_size: Rows, in all processes together.
            text_dropout: Probability that a row, all its scenes together, has the empty text in place of its own.
            rows: Which of the `batch_size` rows are drawn here; None draws all.
        """
        self._rows = range(batch_size) if rows is None else rows
        self._batch_size = batch_size

        def draw(index: int, rng: np.random.Generator) -> VideoBatch:
            video, info = dataset[index], dataset.info
            latent = sample_latent(video.video, rng) if info.has_moments else video.video.astype(np.float32)
            is_dropped = rng.random() < text_dropout
            text = np.broadcast_to(dataset.empty_text, info.text_shape) if is_dropped else video.text
            key = rng.integers(1 << 32, size=2, dtype=np.uint32)
            return VideoBatch(np.float32(info.scale) * latent, text.astype(np.float32), key)

        self._draws = grain.MapDataset.range(len(dataset)).seed(seed).shuffle().repeat().random_map(draw)

    def __getitem__(self, step: int) -> VideoBatch:
        drawn = [self._draws[step * self._batch_size + row] for row in self._rows]
        return VideoBatch(*(np.stack(leaves) for leaves in zip(*drawn, strict=True)))
