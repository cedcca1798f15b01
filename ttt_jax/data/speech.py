"""Synthesis with espeak-ng and the times of its words, through the library's C callback.

The library keeps state between calls that changes later audio, so audio is reproducible only in a process that has not
synthesized before; `pipeline.run_in_fresh_processes` provides one per recording.
"""

import ctypes
import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# From speak_lib.h of espeak-ng 1.52.
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_INITIALIZE_DONT_EXIT = 0x8000
_POSITION_CHARACTER = 1
_CHARS_UTF8 = 1
_EVENT_LIST_TERMINATED = 0
_EVENT_WORD = 1
_PARAMETER_RATE = 1
_PARAMETER_PITCH = 3
_SILENCE = 64 / 32768  # espeak's pauses are exact zeros; decaying tails below this are not heard


class _EventId(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8))


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    )


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


@dataclasses.dataclass(frozen=True)
class Voice:
    """An espeak-ng voice: name such as "en-us+f3", speaking rate in words per minute, pitch from 0 to 100."""

    name: str
    rate_wpm: int
    pitch: int


class Utterance(NamedTuple):
    """Synthesized words.

    Attributes:
        wav: float32 [samples] in [-1, 1] at `Espeak.sample_rate_hz`, from the first sound to the last.
        spans: int64 [words, 2], each word's first sample and the one after its last.
    """

    wav: np.ndarray
    spans: np.ndarray


class Espeak:
    """The process's espeak-ng library."""

    def __init__(self):
        try:
            import espeakng_loader
        except ImportError as error:
            raise ImportError("synthesis needs espeakng-loader: pip install 'ttt-jax[demo]'") from error
        self._lib = ctypes.CDLL(espeakng_loader.get_library_path())
        data = str(espeakng_loader.get_data_path()).encode()
        self.sample_rate_hz = self._lib.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 0, data, _INITIALIZE_DONT_EXIT)
        if self.sample_rate_hz <= 0:
            raise RuntimeError(f"espeak-ng could not be initialized with the data at {data.decode()}")
        self._lib.espeak_ng_SetRandSeed(ctypes.c_long(0))  # else the breath of some voices depends on the clock
        self._samples: list[np.ndarray] = []
        self._words: list[tuple[int, int]] = []
        self._callback = _Callback(self._receive)  # kept: the library holds only a pointer
        self._lib.espeak_SetSynthCallback(self._callback)

    def _receive(self, wav, count, events) -> int:
        if wav and count > 0:
            self._samples.append(np.ctypeslib.as_array(wav, (count,)).copy())
        i = 0
        while events[i].type != _EVENT_LIST_TERMINATED:
            if events[i].type == _EVENT_WORD:
                self._words.append((events[i].text_position - 1, events[i].sample))
            i += 1
        return 0

    def say(self, words: Sequence[str], voice: Voice) -> Utterance:
        """Speak the words as one text; punctuation attached to them shapes the melody and the pauses.

        ValueError for an unknown voice, or words that give no sound.
        """
        if self._lib.espeak_SetVoiceByName(voice.name.encode()) != 0:
            raise ValueError(f"voice: espeak-ng has none named {voice.name!r}")
        self._lib.espeak_SetParameter(_PARAMETER_RATE, voice.rate_wpm, 0)
        self._lib.espeak_SetParameter(_PARAMETER_PITCH, voice.pitch, 0)
        self._samples, self._words = [], []
        text = " ".join(words).encode() + b"\0"
        status = self._lib.espeak_Synth(text, len(text), 0, _POSITION_CHARACTER, 0, _CHARS_UTF8, None, None)
        if status != 0 or not self._samples:
            raise ValueError(f"words: espeak-ng could not speak {' '.join(words)!r} (status {status})")
        wav = np.concatenate(self._samples).astype(np.float32) / 32768
        loud = np.flatnonzero(np.abs(wav) > _SILENCE)
        if len(loud) == 0:
            raise ValueError(f"words: {' '.join(words)!r} gives no sound")
        first, last = int(loud[0]), int(loud[-1]) + 1
        starts = np.clip(word_starts(words, self._words, last), first, last - 1)
        ends = [_last_sound(wav, start, end) for start, end in zip(starts, [*starts[1:], last], strict=True)]
        return Utterance(wav[first:last], np.stack([starts, ends], axis=1) - first)


@functools.cache
def espeak() -> Espeak:
    """The library can be initialized once per process."""
    return Espeak()


def word_starts(words: Sequence[str], events: Sequence[tuple[int, int]], end: int) -> np.ndarray:
    """Start sample of each word of `" ".join(words)` from events (character, sample) in order of time, int64 [words].

    espeak speaks some pairs ("for the") as one word with one event, and may place an event inside the word before its
    own. So an event in a word that has one already belongs to the next word, and words left without share the time up
    to the next event in proportion to their letters.
    """
    offsets = np.cumsum([0] + [len(word) + 1 for word in words])
    starts = np.full(len(words), -1, np.int64)
    latest = -1
    for position, sample in events:
        word = int(np.searchsorted(offsets, position, side="right")) - 1
        word = max(word, latest + 1) if word <= latest else word
        if latest < word < len(words):
            starts[word] = sample
            latest = word
    known = np.flatnonzero(starts >= 0)
    anchors = np.concatenate([starts[known], [end]])
    letters = np.concatenate([offsets[known], [offsets[-1]]])
    if len(known) == 0 or known[0] != 0:
        anchors, letters = np.concatenate([[0], anchors]), np.concatenate([[0], letters])
    return np.interp(offsets[:-1], letters, anchors).astype(np.int64)


def _last_sound(wav: np.ndarray, start: int, end: int) -> int:
    """The sample after a word's last sound, so that a pause behind it does not count as the word."""
    loud = np.flatnonzero(np.abs(wav[start:end]) > _SILENCE)
    return int(start + loud[-1] + 1) if len(loud) else int(end)
