"""Words with times to a text stream at the codec's frame rate, and the tokenizer for them."""

import io
import json
import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import sentencepiece

END_OF_PADDING_ID = 0
TEXT_PADDING_ID = 3
RESERVED_IDS = 4  # <unk> doubles as end of padding, then <s>, </s> and <pad>
MAIN_SPEAKER = "SPEAKER_MAIN"

LatePieces = Literal["wait", "drop"]
"""What becomes of a word's pieces that have not had their turn when the next word starts; see `text_stream`."""


class Word(NamedTuple):
    """One spoken word and when it sounds, in seconds from the start of the recording."""

    text: str
    start_s: float
    end_s: float


def read_alignments(path: pathlib.Path) -> list[Word]:
    """The main speaker's words in a JSON file of moshi-finetune's layout, in order of their starts.

    Layout: {"alignments": [["word", [start_s, end_s], "SPEAKER_MAIN"], ...]}. Words of other speakers are left out.
    Raises ValueError for anything else.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["alignments"]
        words = [
            Word(str(text).strip(), float(start), float(end)) for text, (start, end), who in rows if who == MAIN_SPEAKER
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f'{path.name}: expected {{"alignments": [["word", [start_s, end_s], "{MAIN_SPEAKER}"], ...]}} ({error!r})'
        ) from error
    for word in words:
        if not 0 <= word.start_s <= word.end_s < math.inf:
            raise ValueError(
                f"{path.name}: {word.text!r} spans {word.start_s} to {word.end_s} s; expected 0 <= start <= end"
            )
    return sorted(words, key=lambda word: word.start_s)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train a sentencepiece unigram model; the same texts give the same bytes.

    Ids 0 to 3 are <unk> (also end of padding), <s>, </s>, <pad>. `vocab_size` is an upper limit: a small text gives
    a smaller vocabulary. Raises ValueError where there is no text, or `vocab_size` cannot hold its characters.
    """
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError("texts: expected the words of at least one training recording, got none")
    needed = len(set("".join(texts).replace(" ", ""))) + RESERVED_IDS + 1  # and the word boundary mark
    if vocab_size < needed:
        raise ValueError(
            f"vocab_size: expected at least {needed} (the text's characters and reserved ids), got {vocab_size}"
        )
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="unigram",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        character_coverage=1.0,
        unk_id=END_OF_PADDING_ID,
        bos_id=1,
        eos_id=2,
        pad_id=TEXT_PADDING_ID,
        num_threads=1,  # sums over threads are not reproducible
        minloglevel=2,
    )
    return model.getvalue()


def tokenizer_of_words(words: Sequence[str]) -> bytes:
    """Train a tokenizer to which each of a few words is one piece: on lines of them in random order."""
    rng = np.random.default_rng(0)
    return train_tokenizer([" ".join(rng.choice(words, 16)) for _ in range(200)], vocab_size=64)


def open_tokenizer(path: pathlib.Path) -> sentencepiece.SentencePieceProcessor:
    """Open any sentencepiece model; ValueError if there is none."""
    if not path.is_file():
        raise ValueError(f"tokenizer: expected a sentencepiece model, found no file at {path}")
    tokenizer = sentencepiece.SentencePieceProcessor()
    try:
        tokenizer.LoadFromSerializedProto(path.read_bytes())
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"tokenizer: {path} is not a sentencepiece model ({error})") from error
    return tokenizer


def load_tokenizer(path: pathlib.Path) -> sentencepiece.SentencePieceProcessor:
    """Open a sentencepiece model in which 0 is <unk> and 3 is <pad> or another control symbol; ValueError otherwise."""
    tokenizer = open_tokenizer(path)
    pad = TEXT_PADDING_ID
    is_padding = tokenizer.pad_id() == pad or (tokenizer.get_piece_size() > pad and tokenizer.is_control(pad))
    if tokenizer.unk_id() != END_OF_PADDING_ID or not is_padding:
        ids = (tokenizer.unk_id(), tokenizer.pad_id())
        raise ValueError(
            f"tokenizer: {path} has unk_id, pad_id = {ids}, expected (0, 3), which mark end of padding and padding; "
            "train one with --unk_id=0 --bos_id=1 --eos_id=2 --pad_id=3"
        )
    return tokenizer


def text_stream(
    words: Sequence[Word],
    tokenizer: sentencepiece.SentencePieceProcessor,
    num_frames: int,
    frame_rate_hz: float,
    *,
    late_pieces: LatePieces = "wait",
) -> np.ndarray:
    """Interleave words into one token per frame.

    A word's pieces stand one per frame from the frame in which it starts. Other frames hold padding (3); a padding
    frame before a word's first piece becomes end of padding (0). Pieces past the end, and unknown ones, whose id means
    end of padding, are left out.

    Args:
        words: in order of their starts.
        tokenizer: from `load_tokenizer`.
        num_frames: of the stream.
        frame_rate_hz: of the stream.
        late_pieces: "wait": a word begins where the one before has ended, at the earliest, so that none loses a piece.
            "drop": to the frame what moshi-finetune trains Moshi on; a word begins in its own frame and cuts off the
            one before, and words that do not last (start_s >= end_s) are left out.

    Returns:
        int32 [num_frames].
    """
    if late_pieces == "drop":
        words = [word for word in words if word.start_s < word.end_s]
        frames = [math.floor(word.start_s * frame_rate_hz) for word in words]
        ends = [*frames[1:], num_frames]
    else:
        # 1e-6 of a frame: a start written as a rounded decimal belongs to the frame it was meant for.
        frames = [math.floor(word.start_s * frame_rate_hz + 1e-6) for word in words]
        ends = [num_frames] * len(words)
    stream = np.full(num_frames, TEXT_PADDING_ID, np.int32)
    free = 0
    for word, frame, end in zip(words, frames, ends, strict=False):
        pieces = [piece for piece in tokenizer.encode(word.text) if piece >= RESERVED_IDS]
        start = max(free, frame)
        pieces = pieces[: max(0, min(end, num_frames) - start)]
        if not pieces:
            continue
        if start > 0 and stream[start - 1] == TEXT_PADDING_ID:
            stream[start - 1] = END_OF_PADDING_ID
        stream[start : start + len(pieces)] = pieces
        free = start + len(pieces)
    return stream
