"""Files that grow while a conversation goes on and get their names when it has ended."""

import json
import os
import pathlib

import numpy as np
import sentencepiece
import soundfile

from ttt_jax.data.text import MAIN_SPEAKER, RESERVED_IDS, Word

FORMATS = {".wav": "WAV", ".flac": "FLAC", ".w64": "W64"}
SUBTYPE, BYTES_PER_SAMPLE = "PCM_16", 2
WAV_BYTES = 2**32 - 2**16  # what the 32-bit sizes of a WAV file can tell; longer ones are RF64


class PartialFile:
    """A file under the name `NAME.partial`, as long as it is not finished; a context that leaves nothing of it."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.partial = path.with_name(path.name + ".partial")

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self.close()
        self.partial.unlink(missing_ok=True)

    def close(self) -> None:
        """Ends writing."""
        raise NotImplementedError

    def finish(self) -> None:
        """Gives the file its name, in the place of any that had it."""
        self.close()
        os.replace(self.partial, self.path)


class SoundFile(PartialFile):
    """One channel of 16-bit sound, without loss: .wav (RF64 where it gets too long for one), .flac or .w64.

    Args:
        path: of the file; its suffix says the format.
        sample_rate_hz: of the samples.
        num_samples: about how many there will be.
    """

    def __init__(self, path: pathlib.Path, sample_rate_hz: int, num_samples: int):
        super().__init__(path)
        is_long = path.suffix == ".wav" and num_samples * BYTES_PER_SAMPLE > WAV_BYTES
        container = "RF64" if is_long else FORMATS[path.suffix]
        self._file = soundfile.SoundFile(self.partial, "w", sample_rate_hz, 1, SUBTYPE, format=container)

    def write(self, samples: np.ndarray) -> None:
        """Appends float `[S]`; what lies outside [-1, 1] is clipped. ValueError for what is not finite."""
        if not np.isfinite(samples).all():
            raise ValueError("the model's sound is not finite; are its weights damaged?")
        # Here rather than by libsndfile, which rounds otherwise in every format.
        self._file.write(np.clip(np.rint(samples * 32768), -32768, 32767).astype(np.int16))

    def close(self) -> None:
        """Ends writing."""
        self._file.close()


class TextFile(PartialFile):
    """Words, separated by blanks."""

    def __init__(self, path: pathlib.Path):
        super().__init__(path)
        self._file = self.partial.open("w", encoding="utf-8")

    def write(self, word: Word) -> None:
        """Appends a word."""
        self._file.write(f" {word.text}" if self._file.tell() else word.text)
        self._file.flush()

    def close(self) -> None:
        """Ends writing."""
        if not self._file.closed:
            self._file.write("\n")
            self._file.close()


class WordsFile(PartialFile):
    """Words and their times in moshi-finetune's layout, which `ttt_jax.data.prepare` reads."""

    def __init__(self, path: pathlib.Path):
        super().__init__(path)
        self._file = self.partial.open("w", encoding="utf-8")
        self._file.write('{"alignments": [')
        self._separator = "\n"

    def write(self, word: Word) -> None:
        """Appends a word."""
        row = [word.text, [round(word.start_s, 4), round(word.end_s, 4)], MAIN_SPEAKER]
        self._file.write(self._separator + json.dumps(row, ensure_ascii=False))
        self._file.flush()
        self._separator = ",\n"

    def close(self) -> None:
        """Ends writing."""
        if not self._file.closed:
            self._file.write("\n]}\n")
            self._file.close()


class Words:
    """Puts words together from the text tokens of successive frames.

    A word lasts from the frame of its first piece to the end of that of its last.
    """

    def __init__(self, tokenizer: sentencepiece.SentencePieceProcessor, frame_rate_hz: float):
        self._tokenizer = tokenizer
        self._rate = frame_rate_hz
        self._pieces: list[int] = []
        self._first = self._last = 0

    def push(self, token: int, frame: int) -> list[Word]:
        """Takes the token of a frame and returns the words that it ends."""
        if token < RESERVED_IDS:
            return []
        starts = self._tokenizer.id_to_piece(token).startswith("\u2581")
        ended = self.finish() if starts else []
        if not self._pieces:
            self._first = frame
        self._pieces.append(token)
        self._last = frame
        return ended

    def finish(self) -> list[Word]:
        """The word that is open, if there is one."""
        text = self._tokenizer.decode(self._pieces).strip()
        self._pieces = []
        return [Word(text, self._first / self._rate, (self._last + 1) / self._rate)] if text else []
