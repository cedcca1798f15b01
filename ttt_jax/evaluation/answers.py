"""Planted facts that a recording asks for: when, after how long, and the ways in which the answer might have sounded.

Every candidate takes the place of the answer from its first frame on. While text is scored, the speaker's audio is
withheld from that frame on, and while audio is scored the text is: either would give the answer away to the other, and
to its own later tokens. The other speaker's streams stay as they were in the frame before, for what is recorded there
tells how long the right answer took. All candidates are treated alike, the right one too.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import sentencepiece
import soxr

from ttt_jax.data.codecs import codec_of
from ttt_jax.data.speech import Voice, espeak
from ttt_jax.data.text import RESERVED_IDS, Word, text_stream
from ttt_jax.data.tokens import MISSING, Recording, TokenInfo
from ttt_jax.data.topics import FACTS, MAIN

_LEAD_FRAMES = 4  # of speech before the value that a codec hears first, as it heard the recording


class Candidates(NamedTuple):
    """Ways to answer, the right one first.

    Attributes:
      codes: int32 [N, 1 + 2 n, W], all streams from the answer's first frame on.
      scored: bool [N, 1 + n, W], the main speaker's tokens that make up the answer.
    """

    codes: np.ndarray
    scored: np.ndarray


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer to a question about a planted fact.

    Attributes:
      frame: the first one in which the value sounds.
      gap_s: seconds from the end of the latest mention before the question to the start of the answer's value.
      num_mentions: of the fact before the question, earlier answers among them.
      held_out: whether training never met the value as a fact.
      heard: whether only the other speaker has mentioned it, so that no text stream ever held it.
      text: candidates for the text stream; None where the recorded one does not spell the value.
      audio: the same for the codebooks, all synthesized in one way; None where that cannot be done.
      recorded: the recorded answer's codebooks alone (N = 1).
    """

    frame: int
    gap_s: float
    num_mentions: int
    held_out: bool
    heard: bool
    text: Candidates | None
    audio: Candidates | None
    recorded: Candidates


def find_answers(
    recording: Recording, info: TokenInfo, tokenizer: sentencepiece.SentencePieceProcessor | None, *, synthesize: bool
) -> list[Answer]:
    """The answers of a recording of `ttt_jax.data.conversations`, in order of time.

    Answers to questions before which the fact was never mentioned are left out: there is nothing to recall.

    Args:
      recording: with "facts", "spoken" and "voices" in its metadata; without facts it has no answers.
      info: of its dataset.
      tokenizer: of its dataset; None leaves the text candidates out.
      synthesize: whether to make audio candidates, with the voice of the recording.
    """
    facts, spoken = (recording.metadata.get(name, []) for name in ("facts", "spoken"))
    found = []
    for number, answer in enumerate(spoken):
        if answer["role"] != "answer":
            continue
        before = [event for event in spoken[:number] if event["fact"] == answer["fact"]]
        asked_s = max((event["start_s"] for event in before if event["role"] == "question"), default=answer["start_s"])
        mentions = [e for e in before if e["role"] in ("mention", "answer") and e["end_s"] <= asked_s]
        if not mentions:
            continue
        fact = facts[answer["fact"]]
        found.append(
            Answer(
                frame=answer["start_frame"],
                gap_s=answer["start_s"] - max(mention["end_s"] for mention in mentions),
                num_mentions=len(mentions),
                held_out=bool(fact["held_out"]),
                heard=all(mention["speaker"] != MAIN for mention in mentions),
                text=None if tokenizer is None else text_candidates(recording.codes, answer, fact, info, tokenizer),
                audio=audio_candidates(recording, answer, fact, info) if synthesize else None,
                recorded=_recorded(recording.codes, answer, info),
            )
        )
    return found


def text_candidates(
    codes: np.ndarray,
    answer: dict[str, Any],
    fact: dict[str, Any],
    info: TokenInfo,
    tokenizer: sentencepiece.SentencePieceProcessor,
) -> Candidates | None:
    """The value and each distractor as the text stream would spell them from where the recorded value stands.

    Words of a distractor start in the frames in which the value's words start (with another number of words: in even
    parts of its span); what is scored is the pieces of the words, no padding.

    Returns None where the value is not found in the recorded stream, or a candidate has no piece that can be written.
    """
    values = [fact["value"], *fact["distractors"]]
    if not all(_pieces(value, tokenizer) for value in values):
        return None
    frame = answer["start_frame"]
    starts = _word_starts(codes[0], fact["value"].split(), tokenizer, frame, answer["end_frame"])
    if starts is None:
        return None
    streams = []
    for value in values:
        words = value.split()
        at = np.interp(np.arange(len(words)) / len(words), np.linspace(0, 1, len(starts)), starts)
        timed = [Word(word, float(start) - frame, float(start) - frame) for word, start in zip(words, at, strict=True)]
        longest = int(starts[-1]) - frame + len(_pieces(value, tokenizer))
        stream = text_stream(timed, tokenizer, longest, frame_rate_hz=1.0)  # times are frames already
        streams.append(stream[: 1 + np.flatnonzero(stream >= RESERVED_IDS)[-1]])
    own = np.full((len(values), 1 + info.num_codebooks, max(map(len, streams))), MISSING, np.int32)
    for way, stream in enumerate(streams):
        own[way, 0, : len(stream)] = stream
    # Pieces of the word before may reach into these frames; they are given, not scored.
    lead = int(starts[0]) - frame
    own[:, 0, :lead] = codes[0, frame : frame + lead]
    scored = own >= RESERVED_IDS
    scored[:, :, :lead] = False
    return Candidates(_with_other(own, codes, frame, info), scored)


def _pieces(text: str, tokenizer: sentencepiece.SentencePieceProcessor) -> list[int]:
    """The pieces that a text stream holds of words: unknown ones it leaves out."""
    return [piece for word in text.split() for piece in tokenizer.encode(word) if piece >= RESERVED_IDS]


def _word_starts(
    stream: np.ndarray, words: Sequence[str], tokenizer: sentencepiece.SentencePieceProcessor, first: int, end: int
) -> np.ndarray | None:
    """Frames in which the words' pieces begin, and the one after the last piece: [words + 1]; None if not found.

    The first piece must lie in [first, end): the stream may be late when the words before are long.
    """
    pieces = [_pieces(word, tokenizer) for word in words]
    wanted = np.concatenate(pieces)
    at = first + np.flatnonzero(stream[first : end + 2 * len(wanted)] >= RESERVED_IDS)
    for offset in range(len(at) - len(wanted) + 1):
        here = at[offset : offset + len(wanted)]
        if here[0] < end and np.array_equal(stream[here], wanted):
            begins = np.cumsum([0, *map(len, pieces[:-1])])
            return np.append(here[begins], here[-1] + 1)
    return None


def audio_candidates(
    recording: Recording, answer: dict[str, Any], fact: dict[str, Any], info: TokenInfo
) -> Candidates | None:
    """The value and each distractor spoken by the recording's own voice in the answer's sentence, through the codec.

    All are scored over the same frames, from the value's first to the last in which any of them still speaks: what ends
    sooner is followed by silence. The right one is synthesized anew like the others.

    Returns None for facts and voices that are not of `ttt_jax.data.conversations` or `ttt_jax.data.quiz`.
    """
    line, voice = _answer_line(fact), recording.metadata.get("voices", {}).get(MAIN)
    if line is None or voice is None:
        return None
    codec = codec_of(info)
    clips = [
        _speak(line, value, Voice(**voice), answer["start_s"], info) for value in (fact["value"], *fact["distractors"])
    ]
    longest = max(map(len, clips))
    encoded = [codec.encode(np.pad(clip, (0, longest - len(clip)))) for clip in clips]
    own = np.full((len(clips), 1 + info.num_codebooks, encoded[0].shape[1] - _LEAD_FRAMES), MISSING, np.int32)
    own[:, 1:] = np.stack(encoded)[:, :, _LEAD_FRAMES:]
    return Candidates(_with_other(own, recording.codes, answer["start_frame"], info), own >= 0)


def _answer_line(fact: dict[str, Any]) -> str | None:
    """What the main speaker says, with {value} for the fact's value."""
    if "answer" in fact:
        return fact["answer"]
    lines = FACTS.get(fact["kind"])
    return None if lines is None else lines["own" if fact["owner"] == MAIN else "their"][2]


def _speak(line: str, value: str, voice: Voice, start_s: float, info: TokenInfo) -> np.ndarray:
    """Samples of the line with the value, at the codec's rate.

    They are cut so that the value starts in frame `_LEAD_FRAMES`, and as late in it as the recorded value in its own.
    """
    before, after = line.split("{value}")
    words = [*before.split(), *(value + after).split()]
    utterance = espeak().say(words, voice)
    wav = soxr.resample(utterance.wav, espeak().sample_rate_hz, info.sample_rate_hz)
    value_at = utterance.spans[len(before.split()), 0] / espeak().sample_rate_hz
    phase_s = start_s - int(start_s * info.frame_rate_hz) / info.frame_rate_hz
    lead = round((_LEAD_FRAMES / info.frame_rate_hz + phase_s - value_at) * info.sample_rate_hz)
    return np.pad(wav, (lead, 0)) if lead > 0 else wav[-lead:]


def _recorded(codes: np.ndarray, answer: dict[str, Any], info: TokenInfo) -> Candidates:
    own = codes[None, : 1 + info.num_codebooks, answer["start_frame"] : answer["end_frame"]].copy()
    own[:, 0] = MISSING
    return Candidates(_with_other(own, codes, answer["start_frame"], info), own >= 0)


def _with_other(own: np.ndarray, codes: np.ndarray, frame: int, info: TokenInfo) -> np.ndarray:
    """All streams: the main speaker's `own [N, 1 + n, W]` and the other's as in the frame before `frame`."""
    before = codes[1 + info.num_codebooks :, frame - 1] if frame else np.full(info.num_codebooks, MISSING)
    other = np.broadcast_to(before[None, :, None], (len(own), info.num_codebooks, own.shape[2]))
    return np.concatenate([own, other], axis=1).astype(np.int32)
