"""What a token dataset holds: its description on disk and the rules every code obeys."""

import dataclasses
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np

INFO_FILE = "tokens.json"
TOKENIZER_FILE = "tokenizer.model"
MISSING = -1  # a stream that does not exist, Moshi's "no embedding, masked from the loss"


class Recording(NamedTuple):
    """One whole recording.

    Attributes:
        id: unique inside its dataset.
        codes: int32 [1 + 2 * num_codebooks, T]: the main speaker's text, the main speaker's codebooks, the other's.
        metadata: whatever the program that made it recorded, JSON types only.
    """

    id: str
    codes: np.ndarray
    metadata: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class TokenInfo:
    """Describes the streams of a token dataset.

    Attributes:
        codec: name of the audio codec (`codecs.codec_of` opens it).
        frame_rate_hz: frames per second.
        sample_rate_hz: rate of the audio the codec reads and writes.
        num_codebooks: codebooks per speaker.
        card: audio codes lie in [0, card).
        text_card: text tokens lie in [0, text_card).
        text_padding_id: the text token of a frame where no word piece is due.
        end_of_padding_id: the text token of a padding frame that a word follows.
        codec_directory: where the codec's weights were when the data was made; None where it has none.
    """

    codec: str
    frame_rate_hz: float
    sample_rate_hz: int
    num_codebooks: int
    card: int
    text_card: int
    text_padding_id: int = 3
    end_of_padding_id: int = 0
    codec_directory: str | None = None

    @property
    def num_streams(self) -> int:
        """Streams per recording: text and both speakers' codebooks."""
        return 1 + 2 * self.num_codebooks

    def cards(self) -> np.ndarray:
        """Cardinality of each stream, int32 [num_streams]."""
        return np.array([self.text_card] + [self.card] * (2 * self.num_codebooks), np.int32)


def check_codes(codes: np.ndarray, info: TokenInfo, where: str) -> None:
    """Raise ValueError unless `codes` [num_streams, T] are integers, each -1 or inside its stream's cardinality."""
    if codes.ndim != 2 or codes.shape[0] != info.num_streams or not np.issubdtype(codes.dtype, np.integer):
        raise ValueError(
            f"{where}: expected integer codes of shape [{info.num_streams}, frames], got {codes.dtype} {codes.shape}; "
            "the data was made for another codec: prepare it again"
        )
    bad = (codes < MISSING) | (codes >= info.cards()[:, None])
    if bad.any():
        stream, frame = np.argwhere(bad)[0]
        raise ValueError(
            f"{where}: stream {stream} holds {codes[stream, frame]} at frame {frame}, expected -1 or a code in "
            f"[0, {info.cards()[stream]}); the recording does not belong to its {INFO_FILE}: prepare the data again"
        )


def info_to_json(info: TokenInfo, num_frames: dict[str, list[int]]) -> str:
    """The text of tokens.json: the description and, per split, every recording's length in frames."""
    return json.dumps({**dataclasses.asdict(info), "num_frames": num_frames}, indent=1) + "\n"


def info_from_json(path: pathlib.Path) -> tuple[TokenInfo, dict[str, list[int]]]:
    """Read tokens.json; ValueError if it is not one."""
    try:
        fields = json.loads(path.read_text())
        num_frames = {split: [int(n) for n in lengths] for split, lengths in fields.pop("num_frames").items()}
        info = TokenInfo(**fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a token dataset's description ({error!r}); expected the JSON that "
            "`python -m ttt_jax.data.prepare` writes last: make the dataset again in a new directory"
        ) from error
    for name in ("num_codebooks", "card", "text_card", "sample_rate_hz", "frame_rate_hz"):
        value = getattr(info, name)
        if not isinstance(value, int | float) or value <= 0:
            raise ValueError(f"{path}: {name} must be a positive number, got {value!r}; make the dataset again")
    return info, num_frames
