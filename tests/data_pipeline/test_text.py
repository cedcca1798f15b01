import io
import json

import numpy as np
import pytest
import sentencepiece

from ttt_jax.data import text
from ttt_jax.data.text import Word

LINES = ["hello there my name is Anna", "my sister lives in Paris", "hello my name is Thomas"] * 5


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(text.train_tokenizer(LINES, 60))
    return text.load_tokenizer(path)


class Letters:
    """Every letter is a piece of its own (a = 4, b = 5, ...): streams that can be written down by hand."""

    def encode(self, word):
        return [ord(letter) - ord("a") + 4 for letter in word]


def stream(words, num_frames, **options):
    return text.text_stream(words, Letters(), num_frames, 12.5, **options).tolist()  # type: ignore[arg-type]


def test_words_stand_where_they_start():
    # Frames are 80 ms: "abc" starts in frame 2, "d" in frame 7, "e" in frame 8.
    words = [Word("abc", 0.16, 0.4), Word("d", 0.6, 0.63), Word("e", 0.64, 0.7)]
    assert stream(words, 12) == [3, 0, 4, 5, 6, 3, 0, 7, 8, 3, 3, 3]


def test_a_long_word_delays_the_next():
    assert stream([Word("abcd", 0.0, 0.1), Word("ef", 0.1, 0.2)], 8) == [4, 5, 6, 7, 8, 9, 3, 3]


def test_late_pieces_dropped_as_moshi_finetune_does():
    drop = {"late_pieces": "drop"}
    words = [Word("abcd", 0.0, 0.1), Word("ef", 0.1, 0.2), Word("g", 0.64, 0.7)]
    assert stream(words, 10, **drop) == [4, 8, 9, 3, 3, 3, 3, 0, 10, 3]
    # Of two words that start in one frame the later one stays, whatever is left of the one before.
    assert stream([Word("abc", 0.0, 0.1), Word("de", 0.09, 0.1), Word("fg", 0.1, 0.2)], 5, **drop) == [4, 9, 10, 3, 3]
    # A word that does not last neither stands nor cuts off.
    assert stream([Word("abc", 0.0, 0.3), Word("d", 0.1, 0.1)], 4, **drop) == [4, 5, 6, 3]
    # 2.32 * 12.5 is a little less than 29 in binary, and the frame is the one below it.
    assert stream([Word("a", 2.32, 2.4)], 30, **drop)[27:] == [0, 4, 3]
    assert stream([Word("abcd", 0.08, 0.3)], 3, **drop) == [0, 4, 5]


def test_pieces_past_the_end_are_left_out():
    assert stream([Word("a", 0.24, 0.3), Word("bcd", 0.32, 0.4)], 5) == [3, 3, 0, 4, 5]
    assert stream([Word("a", 5.0, 6.0)], 2) == [3, 3]
    assert stream([], 3) == [3, 3, 3]
    assert stream([Word("a", 0.0, 0.1)], 0) == []


def test_rounded_starts_belong_to_their_frame():
    """0.24 * 12.5 is 3 up to rounding; so is every multiple of 80 ms."""
    for frame in range(1000):
        assert stream([Word("a", round(frame * 0.08, 2), frame * 0.08 + 0.1)], frame + 1)[-1] == 4


def test_trained_tokenizer_reserves_its_ids_and_restores_words(tokenizer):
    assert [tokenizer.id_to_piece(i) for i in range(4)] == ["<unk>", "<s>", "</s>", "<pad>"]
    for word in ("hello", "Anna", "Paris"):
        pieces = tokenizer.encode(word)
        assert min(pieces) >= text.RESERVED_IDS
        assert tokenizer.decode(pieces) == word


def test_training_is_deterministic_and_shrinks_to_the_text(tokenizer):
    assert text.train_tokenizer(LINES, 60) == text.train_tokenizer(LINES, 60)
    assert text.train_tokenizer(LINES, 60) != text.train_tokenizer(LINES, 24)
    assert tokenizer.get_piece_size() <= 60


def test_unknown_letters_never_become_end_of_padding(tokenizer):
    assert 0 in tokenizer.encode("\u0416")
    out = text.text_stream([Word("\u0416", 0.0, 0.1), Word("my", 0.4, 0.5)], tokenizer, 10, 12.5)
    assert np.flatnonzero(out == 0).tolist() == [4]


def test_read_alignments(tmp_path):
    path = tmp_path / "a.json"
    rows = [["b", [1.0, 1.2], "SPEAKER_MAIN"], ["x", [0.2, 0.3], "SPEAKER_01"], ["a", [0.5, 0.7], "SPEAKER_MAIN"]]
    path.write_text(json.dumps({"alignments": rows}))
    assert text.read_alignments(path) == [Word("a", 0.5, 0.7), Word("b", 1.0, 1.2)]
    path.write_text(json.dumps({"alignments": [[" a ", [0.5, 0.7], "SPEAKER_MAIN"]]}))
    assert text.read_alignments(path) == [Word("a", 0.5, 0.7)]


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"alignments": [["a", 1.0, "SPEAKER_MAIN"]]}',
     '{"alignments": [["a", [2.0, 1.0], "SPEAKER_MAIN"]]}',
     '{"alignments": [["a", [NaN, 1.0], "SPEAKER_MAIN"]]}'],
)  # fmt: skip
def test_broken_alignments_name_the_file(tmp_path, content):
    path = tmp_path / "broken.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"broken\.json.*expected"):
        text.read_alignments(path)


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="at least one training recording"):
        text.train_tokenizer([" "], 100)
    with pytest.raises(ValueError, match="vocab_size: expected at least"):
        text.train_tokenizer(LINES, 8)
    with pytest.raises(ValueError, match="no file at"):
        text.load_tokenizer(tmp_path / "none.model")
    (tmp_path / "bad.model").write_bytes(b"\x01\x02")
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        text.load_tokenizer(tmp_path / "bad.model")


def write_model(path, **options):
    model = io.BytesIO()
    options |= {"vocab_size": 40, "hard_vocab_limit": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(LINES), model_writer=model, **options)
    path.write_bytes(model.getvalue())


def test_other_reserved_ids_are_refused(tmp_path):
    write_model(tmp_path / "other.model")
    with pytest.raises(ValueError, match=r"unk_id, pad_id = \(0, -1\), expected \(0, 3\)"):
        text.load_tokenizer(tmp_path / "other.model")
    write_model(tmp_path / "moved.model", unk_id=1, bos_id=0, pad_id=3)
    with pytest.raises(ValueError, match=r"unk_id, pad_id = \(1, 3\), expected \(0, 3\)"):
        text.load_tokenizer(tmp_path / "moved.model")


@pytest.mark.parametrize("options", [{"pad_id": 3, "pad_piece": "[PAD]"}, {"control_symbols": "[PAD]"}])
def test_padding_may_have_another_name(tmp_path, options):
    write_model(tmp_path / "named.model", **options)
    assert text.load_tokenizer(tmp_path / "named.model").id_to_piece(3) == "[PAD]"
