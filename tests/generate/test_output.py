import json

import numpy as np
import pytest
import soundfile

from ttt_jax.data.text import Word, load_tokenizer, read_alignments
from ttt_jax.generate import output

RATE = 24000


@pytest.mark.parametrize(("suffix", "container"), [(".wav", "WAV"), (".flac", "FLAC"), (".w64", "W64")])
def test_sound_grows_and_gets_its_name_at_the_end(tmp_path, suffix, container):
    path = tmp_path / f"moshi{suffix}"
    wav = np.random.default_rng(0).uniform(-1.5, 1.5, 5000).astype(np.float32)
    with output.SoundFile(path, RATE, 5000) as file:
        for block in np.split(wav, [1920, 1921]):
            file.write(block)
        assert not path.exists()
        file.finish()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert (soundfile.info(path).format, soundfile.info(path).subtype) == (container, "PCM_16")
    stored, rate = soundfile.read(path)
    assert rate == RATE
    np.testing.assert_allclose(stored, np.clip(wav, -1, 1 - 2**-15), atol=2**-16)


def test_a_long_wav_is_rf64(tmp_path, monkeypatch):
    monkeypatch.setattr(output, "WAV_BYTES", 9999)
    for samples, container in ((4999, "WAV"), (5000, "RF64")):
        with output.SoundFile(tmp_path / "moshi.wav", RATE, samples) as file:
            file.write(np.zeros(samples))
            file.finish()
        assert soundfile.info(tmp_path / "moshi.wav").format == container
        assert soundfile.info(tmp_path / "moshi.wav").frames == samples


def test_what_is_no_sound_is_refused(tmp_path):
    with output.SoundFile(tmp_path / "a.wav", RATE, 10) as file, pytest.raises(ValueError, match="not finite"):
        file.write(np.array([0.0, np.nan]))


@pytest.mark.parametrize("kind", [lambda path: output.SoundFile(path, RATE, 10), output.TextFile, output.WordsFile])
def test_what_is_not_finished_leaves_the_file_that_was_there(tmp_path, kind):
    path = tmp_path / "a.wav"
    path.write_text("before")
    with kind(path):
        assert (tmp_path / "a.wav.partial").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["a.wav"]
    assert path.read_text() == "before"


def words(tokenizer, stream):
    put = output.Words(tokenizer, 12.5)
    return [word for frame, token in enumerate(stream) for word in put.push(token, frame)] + put.finish()


def test_words_are_put_together_from_pieces(tokenizer):
    tokenizer = load_tokenizer(tokenizer)
    hello, lives, unknown = tokenizer.encode(["hello", "lives", "Anne"])
    assert len(lives) > 1
    stream = [-2, 3, 0, *hello, *lives[:1], 3, *lives[1:], 3, 3, 0, 2, 1, *unknown]
    found = words(tokenizer, stream)
    assert [word.text for word in found] == ["hello", "lives", "Anne"]
    first = 3 + len(hello)
    assert found[0] == Word("hello", 3 / 12.5, first / 12.5)
    assert found[1] == Word("lives", first / 12.5, (first + len(lives) + 1) / 12.5)
    assert words(tokenizer, [3, 0, -2]) == []


def test_files_of_words(tmp_path):
    said = [Word("hello", 0.08, 0.24), Word("\u00e9t\u00e9", 1 / 12.5, 5 / 3)]
    with output.TextFile(tmp_path / "a.txt") as text, output.WordsFile(tmp_path / "a.json") as timed:
        for word in said:
            text.write(word)
            timed.write(word)
        text.finish()
        timed.finish()
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "hello \u00e9t\u00e9\n"
    assert [word.text for word in read_alignments(tmp_path / "a.json")] == ["hello", "\u00e9t\u00e9"]
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["alignments"][1][1] == [0.08, 1.6667]
    with output.WordsFile(tmp_path / "none.json") as timed:
        timed.finish()
    assert read_alignments(tmp_path / "none.json") == []
