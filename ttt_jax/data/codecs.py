"""Audio codecs: waveforms in blocks to codes, and codes back to a waveform."""

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from ttt_jax.data.text import END_OF_PADDING_ID, TEXT_PADDING_ID
from ttt_jax.data.tokens import TokenInfo

if TYPE_CHECKING:
    from ttt_jax.data.mimi import MimiCodec


type Codec = Codec2 | MimiCodec
"""Picklable; what is documented in `Codec2` both have."""

_SUBFRAMES = 2  # 40 ms Codec2 frames per 80 ms frame
_FIELD_BITS = (
    9,
    9,
    4,
    6,
)  # first and second stage of the spectral VQ, energy, pitch: the order in which 700C packs them
_SHIFTS = np.array([23, 14, 10, 4], np.uint32)  # the 28 bits are left-aligned in a big-endian 32-bit word
_MASKS = np.array([(1 << bits) - 1 for bits in _FIELD_BITS], np.uint32)


def _import_pycodec2():
    try:
        import pycodec2
    except ImportError as error:
        raise ImportError("the codec2 codec needs pycodec2: pip install 'ttt-jax[demo]'") from error
    return pycodec2


class Codec2:
    """Codec2 700C, a 700 bit/s speech vocoder, as eight codebooks at 12.5 Hz.

    Two 40 ms frames make one 80 ms frame; each gives four fields, in time order: the two stages of the spectral vector
    quantizer (9 bits each), energy (4 bits) and pitch (6 bits). Source: Rowe, "Codec 2 700C" (2017); mode 700C of
    libcodec2. Digital silence is one constant frame.

    Attributes:
        name: what `get_codec` knows it by.
        frame_rate_hz: frames per second.
        sample_rate_hz: of the audio it reads and writes.
        num_codebooks: codes per frame.
        card: codes lie in [0, card).
        frame_samples: samples per frame.
        directory: of its weights; None where it has none.
        fingerprint: of its weights and of how they are used; None where it has none.
        shares_a_process: whether it takes so long to start that one process encodes all recordings.
    """

    name = "codec2"
    frame_rate_hz = 12.5
    sample_rate_hz = 8000
    num_codebooks = _SUBFRAMES * len(_FIELD_BITS)
    card = 512
    frame_samples = 640
    directory = None
    fingerprint = None
    shares_a_process = False

    def encoder(self) -> "Codec2Encoder":
        """A fresh streaming encoder for one channel."""
        return Codec2Encoder()

    def encode(self, wav: np.ndarray) -> np.ndarray:
        """Encode float [S] in [-1, 1] at 8 kHz -> int32 [8, ceil(S / 640)]; the last frame is padded with silence."""
        encoder = self.encoder()
        return np.concatenate([encoder.push(wav), encoder.finish()], axis=1)

    def decoder(self) -> "Codec2Decoder":
        """A fresh streaming decoder for one channel."""
        return Codec2Decoder()

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Decode int [8, T] -> float32 [640 T] at 8 kHz; frames with a -1 are silent."""
        return self.decoder().push(codes)


class Codec2Decoder:
    """Decodes one channel block by block; any split into blocks gives the same samples."""

    def __init__(self):
        self._codec = _import_pycodec2().Codec2(700)  # type: ignore[attr-defined]

    def push(self, codes: np.ndarray) -> np.ndarray:
        """Take int [8, T] and return float32 [640 T] at 8 kHz; frames with a -1 are silent."""
        codes = np.asarray(codes)
        limits = np.tile(_MASKS.astype(np.int64), _SUBFRAMES)[:, None]
        if codes.ndim != 2 or codes.shape[0] != Codec2.num_codebooks or not np.issubdtype(codes.dtype, np.integer):
            raise ValueError(f"codes: expected integers [{Codec2.num_codebooks}, T], got {codes.dtype} {codes.shape}")
        missing = (codes == -1).any(axis=0)
        codes = np.where(missing, 0, codes)
        # A model's softmax spans `card`, wider than the energy and pitch fields: nearest value that exists.
        fields = np.clip(codes, 0, limits).T.reshape(-1, len(_FIELD_BITS)).astype(np.uint32)
        packed = np.bitwise_or.reduce(fields << _SHIFTS, axis=1).astype(">u4").tobytes()
        samples = [self._codec.decode(packed[i : i + 4]) for i in range(0, len(packed), 4)]
        wav = np.concatenate(samples).astype(np.float32) / 32768 if samples else np.zeros(0, np.float32)
        return np.where(np.repeat(missing, Codec2.frame_samples), np.float32(0), wav)


class Codec2Encoder:
    """Encodes one channel block by block; any split into blocks gives the same codes."""

    def __init__(self):
        self._codec = _import_pycodec2().Codec2(700)  # type: ignore[attr-defined]
        self._pending = np.zeros(0, np.int16)

    def push(self, wav: np.ndarray) -> np.ndarray:
        """Take float [S] in [-1, 1] and return int32 [8, t]: the whole frames that are complete by now."""
        wav = check_channel(wav)
        samples = np.clip(np.rint(wav * 32768), -32768, 32767).astype(np.int16)
        samples = np.concatenate([self._pending, samples])
        whole = len(samples) // Codec2.frame_samples * Codec2.frame_samples
        self._pending = samples[whole:]
        step = Codec2.frame_samples // _SUBFRAMES
        packed = b"".join(self._codec.encode(samples[i : i + step]) for i in range(0, whole, step))
        words = np.frombuffer(packed, ">u4").astype(np.uint32)
        fields = (words[:, None] >> _SHIFTS) & _MASKS
        return fields.reshape(-1, Codec2.num_codebooks).T.astype(np.int32)

    def finish(self) -> np.ndarray:
        """The frame still open, padded with silence: int32 [8, 1], or [8, 0] if none is open."""
        missing = -len(self._pending) % Codec2.frame_samples
        return self.push(np.zeros(missing, np.float32))


def check_channel(wav: np.ndarray) -> np.ndarray:
    """The sound as an array [S]; ValueError where it has another shape or samples that are not finite."""
    wav = np.asarray(wav)
    if wav.ndim != 1:
        raise ValueError(f"wav: expected one channel of shape [samples], got {wav.shape}")
    if not np.isfinite(wav).all():
        raise ValueError("wav: holds samples that are not finite; expected floats in [-1, 1]")
    return wav


CODECS = ("codec2", "mimi")


def get_codec(name: str, directory: str | os.PathLike | None = None, num_codebooks: int | None = None) -> Codec:
    """The codec of that name.

    Args:
        name: one of `CODECS`.
        directory: of the converted Mimi, which needs one.
        num_codebooks: per frame; None takes all of Codec2, and of Mimi what its checkpoint says.

    Raises:
        ValueError: an unknown name, weights for a codec without, none or other weights for Mimi, or a number of
            codebooks that the codec does not have.
    """
    if name not in CODECS:
        raise ValueError(f"codec: expected one of {list(CODECS)}, got {name!r}")
    if name == "mimi":
        if directory is None:
            raise ValueError(
                "mimi: the codec mimi needs --mimi=DIR, a converted Mimi: "
                "python -m ttt_jax.convert --source=mimi --input=FILE.safetensors --output=DIR"
            )
        from ttt_jax.data.mimi import open_mimi

        return open_mimi(os.fspath(directory), num_codebooks)
    if directory is not None:
        raise ValueError(f"mimi: the codec {name} has no weights, got {directory}; did you mean --codec=mimi?")
    if num_codebooks not in (None, Codec2.num_codebooks):
        raise ValueError(f"num_codebooks: the codec {name} has {Codec2.num_codebooks}, got {num_codebooks}")
    return Codec2()


def info_of(codec: Codec, text_card: int) -> TokenInfo:
    """What a dataset says of itself that `codec` and a tokenizer of `text_card` tokens make."""
    return TokenInfo(
        codec=codec.name,
        frame_rate_hz=codec.frame_rate_hz,
        sample_rate_hz=codec.sample_rate_hz,
        num_codebooks=codec.num_codebooks,
        card=codec.card,
        text_card=text_card,
        text_padding_id=TEXT_PADDING_ID,
        end_of_padding_id=END_OF_PADDING_ID,
        codec_directory=codec.directory,
    )


def codec_of(info: TokenInfo) -> Codec:
    """The codec that a dataset was made with; ValueError where its weights are no longer what they were."""
    try:
        codec = get_codec(info.codec, info.codec_directory, info.num_codebooks)
    except ValueError as error:
        raise ValueError(
            f"the dataset's codec cannot be opened: {error}. Its weights were in {info.codec_directory}: put them back "
            "there, or write where they are now as codec_directory into the dataset's tokens.json"
        ) from error
    if info.codec_directory is not None and codec.card != info.card:
        raise ValueError(
            f"the dataset's codec: {info.codec_directory} has codes in [0, {codec.card}), the dataset in "
            f"[0, {info.card}); it holds another {info.codec} than the data was made with"
        )
    return codec


def encode_blocks(blocks: Iterable[np.ndarray], codec: Codec) -> np.ndarray:
    """Encode a stream of float [channels, samples] blocks, each channel by its own encoder.

    Returns:
        int32 [channels * num_codebooks, T], at least one frame, channel by channel.
    """
    encoders = None
    parts = []
    for block in blocks:
        encoders = encoders or [codec.encoder() for _ in block]
        parts.append(np.concatenate([e.push(channel) for e, channel in zip(encoders, block, strict=True)]))
    if encoders is None:
        raise ValueError("blocks: expected at least one block of audio, got none")
    parts.append(np.concatenate([encoder.finish() for encoder in encoders]))
    codes = np.concatenate(parts, axis=1)
    if codes.shape[1] == 0:  # less than one resampled sample: still one frame
        frame = codec.encode(np.zeros(codec.frame_samples, np.float32))
        codes = np.concatenate([frame] * len(encoders))
    return codes
