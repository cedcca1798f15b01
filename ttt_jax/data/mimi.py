"""Mimi as the codec of a dataset: Kyutai's neural codec, converted to a checkpoint of this library."""

import dataclasses
import functools
import hashlib
import itertools
import pathlib
import threading
from typing import Any

import numpy as np

from ttt_jax.data.codecs import check_channel
from ttt_jax.models import mimi
from ttt_jax.models.mimi import MimiConfig

ENCODED_FRAMES = 125
DECODED_FRAMES = 25
"""Frames of one call; what is left over is decoded frame by frame, and encoded with silence behind it."""

_LOADING = threading.Lock()  # several threads may ask at the same time


@dataclasses.dataclass(frozen=True)
class MimiCodec:
    """Mimi, as `codecs.Codec`; `open_mimi` makes it.

    It is picklable, and reads the parameters when a process first encodes or decodes, on JAX's default device.

    Attributes:
        directory: of the checkpoint.
        config: of the model in it; its `num_codebooks` are used.
    """

    directory: str
    config: MimiConfig

    name = "mimi"
    shares_a_process = True

    @property
    def frame_rate_hz(self) -> float:
        """Frames per second."""
        return self.config.frame_rate

    @property
    def sample_rate_hz(self) -> int:
        """Of the audio it reads and writes."""
        return self.config.sample_rate

    @property
    def num_codebooks(self) -> int:
        """Codes per frame."""
        return self.config.num_codebooks

    @property
    def card(self) -> int:
        """Codes lie in [0, card)."""
        return self.config.bins

    @property
    def frame_samples(self) -> int:
        """Samples per frame."""
        return self.config.frame_samples

    @property
    def fingerprint(self) -> str:
        """Of the checkpoint's files and the config; reads the files."""
        digest = hashlib.sha256(repr(self.config).encode())
        root = pathlib.Path(self.directory)
        for path in sorted(root.rglob("*")):
            if path.is_file():
                digest.update(path.relative_to(root).as_posix().encode())
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()[:24]

    def encoder(self) -> "MimiEncoder":
        """A fresh streaming encoder for one channel."""
        return MimiEncoder(self)

    def encode(self, wav: np.ndarray) -> np.ndarray:
        """Encode float [S] in [-1, 1] -> int32 [num_codebooks, ceil(S / frame_samples)], the last frame padded."""
        encoder = self.encoder()
        return np.concatenate([encoder.push(wav), encoder.finish()], axis=1)

    def decoder(self) -> "MimiDecoder":
        """A fresh streaming decoder for one channel."""
        return MimiDecoder(self)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Decode int [num_codebooks, T] -> float32 [frame_samples * T]; frames with a -1 are silent."""
        return self.decoder().push(codes)


@functools.cache
def open_mimi(directory: str, num_codebooks: int | None = None) -> MimiCodec:
    """The Mimi in a checkpoint of this library.

    Args:
        directory: as `ttt_jax.load` reads it.
        num_codebooks: how many to use, the first ones; None takes what the checkpoint says.

    Raises:
        ValueError: no Mimi there, or one of fewer codebooks.
    """
    from ttt_jax.checkpoint import load_config  # here, since reading audio needs none of it

    config = load_config(directory, "mimi", "mimi")
    if num_codebooks is not None:
        if not 1 <= num_codebooks <= config.n_q:
            raise ValueError(f"num_codebooks: expected 1 to {config.n_q}, which {directory} has, got {num_codebooks}")
        config = dataclasses.replace(config, num_codebooks=num_codebooks)
    return MimiCodec(str(pathlib.Path(directory).absolute()), config)


def _params(directory: str) -> Any:
    with _LOADING:
        return _loaded(directory)


@functools.cache
def _loaded(directory: str) -> Any:
    from ttt_jax.checkpoint import load

    return load(directory)[1]


@functools.cache
def _jitted() -> tuple[Any, Any]:
    import jax

    encode, decode = (
        jax.jit(step, static_argnums=0, donate_argnums=2) for step in (mimi.encode_step, mimi.decode_step)
    )
    return encode, decode


class MimiEncoder:
    """Encodes one channel block by block; any split into blocks gives the same codes."""

    def __init__(self, codec: MimiCodec):
        self._config, self._params = codec.config, _params(codec.directory)
        self._state = mimi.init_encoder_state(self._config, self._params, 1)
        self._pending = np.zeros(0, np.float32)

    def push(self, wav: np.ndarray) -> np.ndarray:
        """Take float [S] in [-1, 1] and return int32 [num_codebooks, t]: the frames that are done by now."""
        wav = check_channel(wav)
        samples = np.concatenate([self._pending, wav.astype(np.float32)])
        size = ENCODED_FRAMES * self._config.frame_samples
        whole = len(samples) // size * size
        self._pending = samples[whole:]
        codes = [self._encode(samples[i : i + size]) for i in range(0, whole, size)]
        return np.concatenate([np.zeros((self._config.num_codebooks, 0), np.int32), *codes], axis=1)

    def finish(self) -> np.ndarray:
        """The frames still open, the last one padded with silence: int32 [num_codebooks, t]. Ends the stream."""
        frames = -(-len(self._pending) // self._config.frame_samples)
        missing = -len(self._pending) % (ENCODED_FRAMES * self._config.frame_samples)
        return self.push(np.zeros(missing, np.float32))[:, :frames]

    def _encode(self, samples: np.ndarray) -> np.ndarray:
        codes, self._state = _jitted()[0](self._config, self._params, self._state, samples[None, None])
        return np.asarray(codes[0])


class MimiDecoder:
    """Decodes one channel block by block; any split into blocks gives the same samples."""

    def __init__(self, codec: MimiCodec):
        self._config, self._params = codec.config, _params(codec.directory)
        self._state = mimi.init_decoder_state(self._config, self._params, 1)

    def push(self, codes: np.ndarray) -> np.ndarray:
        """Take int [num_codebooks, T] and return float32 [frame_samples * T]; frames with a -1 are silent."""
        codes = np.asarray(codes)
        mimi.check_codes(self._config, codes[None])
        whole = codes.shape[1] // DECODED_FRAMES * DECODED_FRAMES
        starts = [*range(0, whole, DECODED_FRAMES), *range(whole, codes.shape[1]), codes.shape[1]]
        wav = [self._decode(codes[:, a:b]) for a, b in itertools.pairwise(starts)]
        return np.concatenate([np.zeros(0, np.float32), *wav])

    def _decode(self, codes: np.ndarray) -> np.ndarray:
        wav, self._state = _jitted()[1](self._config, self._params, self._state, codes[None].astype(np.int32))
        return np.asarray(wav[0, 0], np.float32)
