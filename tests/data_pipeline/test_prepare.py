import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from ttt_jax.data import prepare, reader
from ttt_jax.data.codecs import Codec2
from ttt_jax.data.text import load_tokenizer, train_tokenizer


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


@pytest.fixture
def listed(tmp_path):
    """A dataset in moshi-finetune's layout, and a tokenizer for it."""
    folder = tmp_path / "talks" / "stereo"
    folder.mkdir(parents=True)
    rows = []
    for name, seconds, rate in (("a", 2.0, 24000), ("b", 1.5, 44100)):
        soundfile.write(folder / f"{name}.wav", np.stack([voice(seconds, rate), voice(seconds, rate, 220)], 1), rate)
        words = [["hello", [0.4, 0.7], "SPEAKER_MAIN"], ["you", [0.5, 0.6], "SPEAKER_01"]]
        words.append(["there", [0.5, 0.9], "SPEAKER_MAIN"])  # a frame after "hello", which is several pieces long
        (folder / f"{name}.json").write_text(json.dumps({"alignments": words}))
        rows.append({"path": f"stereo/{name}.wav", "duration": seconds})
    (folder / "not listed.wav").touch()
    (tmp_path / "tokenizer.model").write_bytes(train_tokenizer(["hello you there"], 30))
    path = tmp_path / "talks" / "talks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_dataset_of_moshi_finetune(listed, tmp_path):
    tokenizer = tmp_path / "tokenizer.model"
    assert prepare.make(None, tmp_path / "out", dataset=listed, tokenizer=tokenizer) == {}
    found = recordings(tmp_path / "out")
    assert sorted(found) == ["stereo/a.wav", "stereo/b.wav"]
    codes = found["stereo/a.wav"].codes
    assert codes.shape == (17, 25)
    hello, there = load_tokenizer(tokenizer).encode(["hello", "there"])
    assert codes[0, 4 : 6 + len(there)].tolist() == [0, hello[0], *there]
    assert (codes[1:9, 3:20] != codes[9:, 3:20]).any()
    # The same files in a folder give the same codes: what a row adds is what it promises.
    prepare.make(listed.parent / "stereo", tmp_path / "folder", tokenizer=tokenizer)
    np.testing.assert_array_equal(recordings(tmp_path / "folder")["a.wav"].codes, codes)


def test_rows_that_do_not_fit_their_files_are_skipped(listed, tmp_path):
    folder = listed.parent
    for name in ("silent", "untold", "short"):
        soundfile.write(folder / f"{name}.wav", np.zeros((8000, 2)), 8000)
        (folder / f"{name}.json").write_text('{"alignments": []}')
    (folder / "untold.json").unlink()
    rows = [("silent", 1.0), ("untold", 1), ("short", 9.0), ("gone", 1.0)]
    with listed.open("a") as file:
        file.writelines(json.dumps({"path": f"{name}.wav", "duration": length}) + "\n\n" for name, length in rows)
    arguments = [f"--dataset={listed}", f"--output={tmp_path / 'out'}", f"--tokenizer={tmp_path / 'tokenizer.model'}"]
    program = run(*arguments)
    assert program.returncode == 3, program.stderr
    for name, reason in (
        ("untold.wav", f"no word times at {folder / 'untold.json'}"),
        ("short.wav", "lasts 1.00 s, its row says 9.00 s"),
        ("gone.wav", f"no audio at {folder / 'gone.wav'}"),
    ):
        assert f"  {name}: {reason}" in program.stderr
    silent = recordings(tmp_path / "out")["silent.wav"].codes
    assert (silent[0] == 3).all()
    assert (silent[1:9] == silent[9:]).all()


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"duration": 1.0}', "line 3 has no path; expected"),
        ('["a.wav", 1.0]', "line 3 has no path"),
        ('{"path": "c.wav", "dura', r"line 3 is not JSON .*; expected .*Was the file cut short\?"),
        ('{"path": "c.wav", "duration": "long"}', "line 3: expected a duration in seconds, got 'long'"),
        ('{"path": "c.wav", "duration": -1}', "line 3: expected a duration in seconds, got -1"),
        ('{"path": "c.wav", "duration": NaN}', "line 3: expected a duration in seconds, got nan"),
        ('{"path": "stereo/a.wav"}', "line 3 names 'stereo/a.wav' again"),
    ],
)
def test_bad_rows_name_their_line(listed, tmp_path, row, reason):
    with listed.open("a") as file:
        file.write(row)
    with pytest.raises(ValueError, match=f"dataset: .*{reason}"):
        prepare.make(None, tmp_path / "out", dataset=listed)
    assert not (tmp_path / "out").exists()


def test_one_of_folder_and_dataset(listed, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(ValueError, match="audio, dataset: expected one of the two"):
        prepare.make(listed.parent, output, dataset=listed)
    with pytest.raises(ValueError, match="audio, dataset: expected one of the two"):
        prepare.make(None, output)
    with pytest.raises(ValueError, match="there is none at"):
        prepare.make(None, output, dataset=tmp_path / "none.jsonl")
    listed.write_text("\n")
    with pytest.raises(ValueError, match="holds none"):
        prepare.make(None, output, dataset=listed)


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
