"""Reading audio files of any length in blocks, resampled as they stream."""

import pathlib
from collections.abc import Iterator

import numpy as np
import soundfile
import soxr

SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")
BLOCK_SECONDS = 30.0


class BadRecordingError(Exception):
    """A recording that cannot be used; the message says why in a few words."""


def num_channels(path: pathlib.Path) -> int:
    """Channels of an audio file; BadRecordingError if it is empty, unreadable, or has more than two."""
    channels = _header(path).channels
    if channels not in (1, 2):
        raise BadRecordingError(f"{channels} channels; expected 1, or 2 with one speaker in each")
    return channels


def duration_s(path: pathlib.Path) -> float:
    """Seconds that an audio file lasts, as its header tells; BadRecordingError if it is empty or unreadable."""
    return _header(path).duration


def _header(path: pathlib.Path):
    if path.stat().st_size == 0:
        raise BadRecordingError("the file is empty (0 bytes)")
    try:
        return soundfile.info(path)
    except soundfile.SoundFileError as error:
        raise BadRecordingError(f"not readable as audio: {error}") from error


def read_blocks(path: pathlib.Path, sample_rate_hz: int, block_seconds: float = BLOCK_SECONDS) -> Iterator[np.ndarray]:
    """Stream a file as float32 [channels, samples] blocks at `sample_rate_hz`; memory does not grow with its length.

    Raises:
        BadRecordingError: unreadable, cut short, without samples, or with samples that are not finite.
    """
    num_read = 0
    try:
        with soundfile.SoundFile(path) as file:
            resampler = soxr.ResampleStream(file.samplerate, sample_rate_hz, file.channels, dtype="float32")
            size = max(1, round(block_seconds * file.samplerate))
            while True:
                block = file.read(size, dtype="float32", always_2d=True)
                if not np.isfinite(block).all():
                    raise BadRecordingError(f"samples that are not finite after {num_read / file.samplerate:.2f} s")
                num_read += len(block)
                last = len(block) < size
                yield resampler.resample_chunk(block, last=last).T
                if last:
                    break
            expected = file.frames
    except soundfile.SoundFileError as error:
        raise BadRecordingError(f"unreadable after {num_read} samples: {error}") from error
    if num_read == 0:
        raise BadRecordingError("no samples")
    if num_read < expected:
        raise BadRecordingError(f"cut short: {num_read} of {expected} samples could be read")
