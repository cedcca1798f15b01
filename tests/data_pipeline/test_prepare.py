import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from ttt_jax.data import prepare, reader
from ttt_jax.data.codecs import Codec2
from ttt_jax.data.text import load_tokenizer


def voice(seconds, rate=16000, hz=150):
    t = np.arange(round(seconds * rate)) / rate
    return 0.05 * sum(np.sin(2 * np.pi * hz * k * t) for k in range(1, 8)) * (1 + np.sin(2 * np.pi * 2 * t))


@pytest.fixture
def folder(tmp_path):
    audio = tmp_path / "audio"
    (audio / "sub").mkdir(parents=True)
    soundfile.write(audio / "mono.wav", voice(2.0), 16000)
    soundfile.write(audio / "sub" / "stereo.flac", np.stack([voice(3.0), voice(3.0, hz=220)], axis=1), 16000)
    soundfile.write(audio / "b.ogg", voice(1.0), 16000)
    soundfile.write(audio / "c.opus", voice(1.0), 16000, format="OGG", subtype="OPUS")
    soundfile.write(audio / "d.mp3", voice(1.0), 16000)
    words = [
        ["hello", [0.4, 0.7], "SPEAKER_MAIN"],
        ["nobody", [0.5, 0.6], "SPEAKER_01"],
        ["Anna", [1.2, 1.6], "SPEAKER_MAIN"],
    ]
    (audio / "sub" / "stereo.json").write_text(json.dumps({"alignments": words}))
    (audio / "mono.json").write_text(json.dumps({"alignments": words[:1]}))
    (audio / "notes.txt").write_text("not audio, not asked for")
    return audio


def recordings(output):
    found = {}
    for split in ("train", "validation", "test"):
        try:
            dataset = reader.open_dataset(output, split)
        except ValueError:
            continue
        found |= {dataset[i].id: dataset[i] for i in range(len(dataset))}
    return found


def test_a_folder_of_every_format(folder, tmp_path):
    output = tmp_path / "out"
    assert prepare.make(folder, output, vocab_size=40, workers=2) == {}
    found = recordings(output)
    assert sorted(found) == ["b.ogg", "c.opus", "d.mp3", "mono.wav", "sub/stereo.flac"]
    stereo, mono, plain = (found[name].codes for name in ("sub/stereo.flac", "mono.wav", "b.ogg"))
    assert stereo.shape == (17, 38)
    assert stereo.min() >= 0
    assert (mono[9:] == -1).all()
    assert mono[:9].min() >= 0
    assert (plain[[0, *range(9, 17)]] == -1).all()
    left, rate = soundfile.read(folder / "sub" / "stereo.flac", dtype="float32")
    assert rate == 16000
    import soxr

    for channel, streams in ((0, slice(1, 9)), (1, slice(9, 17))):
        expected = Codec2().encode(soxr.resample(left[:, channel], 16000, 8000))
        assert (stereo[streams, :-1] == expected[:, :-1]).mean() > 0.99  # float32 filters may round a sample apart


def test_alignments_fill_the_text_stream_of_the_main_speaker(folder, tmp_path):
    output = tmp_path / "out"
    prepare.make(folder, output, vocab_size=40, workers=2)
    tokenizer = load_tokenizer(output / "tokenizer.model")
    text = recordings(output)["sub/stereo.flac"].codes[0].tolist()
    hello, anna = tokenizer.encode("hello"), tokenizer.encode("Anna")
    assert text[:4] == [3, 3, 3, 3]
    assert text[4] == 0  # 0.4 s is frame 5, "Anna" at 1.2 s frame 15
    assert text[5 : 5 + len(hello)] == hello
    known = [piece for piece in anna if piece > 3]
    assert text[15 : 15 + len(known)] == known
    nothing_else = set(range(38)) - {4, 14} - set(range(5, 5 + len(hello))) - set(range(15, 15 + len(known)))
    assert {text[i] for i in nothing_else} == {3}


def run(*arguments):
    command = [sys.executable, "-m", "ttt_jax.data.prepare", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_program_lists_skipped_files_and_exits_3(folder, tmp_path):
    (folder / "empty.wav").touch()
    soundfile.write(folder / "one.wav", np.full(1, 0.1), 8000)
    nan = voice(1.0)
    nan[100] = np.nan
    soundfile.write(folder / "nan.wav", nan, 16000, subtype="FLOAT")
    soundfile.write(folder / "words.wav", voice(1.0), 16000)
    (folder / "words.json").write_text('{"alignments": 3}')
    arguments = [f"--audio={folder}", f"--output={tmp_path / 'out'}", "--vocab_size=40"]
    first = run(*arguments)
    assert first.returncode == 3, first.stderr
    assert "empty.wav: the file is empty" in first.stderr
    assert "nan.wav: samples that are not finite" in first.stderr
    assert "words.wav: words.json: expected" in first.stderr
    found = recordings(tmp_path / "out")
    assert len(found) == 6
    assert found["one.wav"].codes.shape == (17, 1)
    again = run(*arguments)
    assert again.returncode == 3
    assert "finished already" in again.stdout
    assert "3 files were skipped" in again.stderr
    other = run(*arguments, "--seed=1")
    assert other.returncode == 1
    assert "seed was 0, is 1" in other.stderr


def test_beam_writes_the_same_dataset(folder, tmp_path, contents):
    """On two worker processes of Beam's local runner, which share nothing with the program but the disk."""
    (folder / "empty.wav").touch()
    soundfile.write(folder / "words.wav", voice(1.0), 16000)
    (folder / "words.json").write_text('{"alignments": 3}')
    skipped = prepare.make(folder, tmp_path / "plain", vocab_size=40, workers=2)
    options = "--direct_num_workers=2 --direct_running_mode=multi_processing"
    arguments = [f"--audio={folder}", f"--output={tmp_path / 'beam'}", "--vocab_size=40", f"--beam_options={options}"]
    program = run(*arguments)
    assert program.returncode == 3, program.stderr
    assert sorted(skipped) == ["empty.wav", "words.wav"]
    assert all(f"{name}: {reason}" in program.stderr for name, reason in skipped.items())
    assert contents(tmp_path / "beam") == contents(tmp_path / "plain")


def test_a_given_tokenizer_is_kept(folder, tmp_path):
    prepare.make(folder, tmp_path / "first", vocab_size=40)
    model = tmp_path / "first" / "tokenizer.model"
    prepare.make(folder, tmp_path / "second", tokenizer=model)
    assert (tmp_path / "second" / "tokenizer.model").read_bytes() == model.read_bytes()
    with pytest.raises(ValueError, match="no file at"):
        prepare.make(folder, tmp_path / "third", tokenizer=tmp_path / "none.model")


def test_splits_follow_from_names_and_are_never_empty():
    fractions = {"seed": 0, "test_fraction": 0.2, "validation_fraction": 0.1}
    names = [f"{i}.wav" for i in range(2000)]
    splits = prepare.split_by_name(names, **fractions)
    shares = [sum(s == split for s in splits.values()) / 2000 for split in ("train", "validation", "test")]
    np.testing.assert_allclose(shares, [0.7, 0.1, 0.2], atol=0.03)
    some = prepare.split_by_name(names[::-3], **fractions)
    assert all(splits[name] == split for name, split in some.items())
    for i in range(50):
        assert {"train", "test"} <= set(prepare.split_by_name([f"{i}a", f"{i}b"], **fractions).values())
        assert prepare.split_by_name([f"{i}"], **fractions) == {f"{i}": "train"}


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="audio: expected a folder"):
        prepare.make(tmp_path / "none", tmp_path / "out")
    with pytest.raises(ValueError, match=r"expected files ending in \.wav"):
        prepare.make(tmp_path, tmp_path / "out")
    soundfile.write(tmp_path / "a.wav", np.zeros(100), 8000)
    with pytest.raises(ValueError, match="two shares"):
        prepare.make(tmp_path, tmp_path / "out", test_fraction=0.7, validation_fraction=0.3)
    with pytest.raises(ValueError, match=r"codec: expected one of"):
        prepare.make(tmp_path, tmp_path / "out", codec="mp3")
    assert not (tmp_path / "out").exists()
