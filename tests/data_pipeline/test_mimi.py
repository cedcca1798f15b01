import dataclasses
import itertools
import json
import pickle
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import soundfile

from ttt_jax.checkpoint import load, save_model
from ttt_jax.data import codecs, conversations, mimi, pipeline, prepare, reader, tokens

FRAME = 1920


@pytest.fixture(scope="module")
def codec(mimi_directory):
    return codecs.get_codec("mimi", mimi_directory)


@pytest.fixture(scope="module")
def golden(data_dir):
    """What the published implementation makes of some noise, with the weights of `mimi_directory`."""
    with np.load(data_dir / "mimi_tiny.npz") as file:
        return {name: file[name] for name in file}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Of a few frames, so that short audio fills several."""
    monkeypatch.setattr(mimi, "ENCODED_FRAMES", 5)
    monkeypatch.setattr(mimi, "DECODED_FRAMES", 3)


def noise(samples, seed=0):
    return (0.3 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def test_it_says_what_it_is(codec):
    assert (codec.name, codec.frame_rate_hz, codec.sample_rate_hz) == ("mimi", 12.5, 24000)
    assert (codec.num_codebooks, codec.card, codec.frame_samples) == (8, 64, FRAME)


@pytest.mark.parametrize("sizes", [[], [1] * 9, [FRAME - 1, 1, 12 * FRAME + 1], [0, 7, 0, 9 * FRAME, 3000]])
def test_any_split_into_blocks_gives_the_published_codes(codec, golden, sizes):
    """Several blocks and a padded last one, further than attention sees (10 frames)."""
    wav, encoder = golden["wav"][0, 0], codec.encoder()
    pieces = [encoder.push(block) for block in np.split(wav, np.cumsum(sizes))]
    codes = np.concatenate([*pieces, encoder.finish()], axis=1)
    assert codes.dtype == np.int32
    np.testing.assert_array_equal(codes, golden["codes"][0, :8])


@pytest.mark.parametrize("frames", [0, 1, 5, 6])
def test_the_last_frame_is_padded_with_silence(codec, frames):
    wav = noise(6 * FRAME)[: max(0, frames * FRAME - 700)]
    codes = codec.encode(wav)
    assert codes.shape == (8, frames)
    np.testing.assert_array_equal(codes, codec.encode(np.pad(wav, (0, -len(wav) % FRAME))))


def test_decoding_block_by_block_gives_the_published_wav(codec, golden):
    codes, published = golden["codes"][0, :8], golden["decoded"][0, 0]
    decoder = codec.decoder()
    wav = np.concatenate([decoder.push(block) for block in np.split(codes, [0, 1, 9], axis=1)])
    assert (wav.shape, wav.dtype) == ((codes.shape[1] * FRAME,), np.float32)
    np.testing.assert_allclose(wav, published, atol=1e-4)  # float32 sums in another order
    np.testing.assert_allclose(codec.decode(codes), published, atol=1e-4)


def test_missing_frames_decode_to_silence(codec, golden):
    codes = golden["codes"][0, :8, :9].copy()
    codes[3, 4] = -1
    wav = codec.decode(codes).reshape(9, FRAME)
    assert (wav[4] == 0).all()
    assert (np.abs(wav[[3, 5]]).max(axis=1) > 0).all()


def test_a_pickled_codec_encodes_the_same(codec):
    again = pickle.loads(pickle.dumps(codec))
    np.testing.assert_array_equal(again.encode(noise(FRAME)), codec.encode(noise(FRAME)))


def voice(path, seconds, rate=24000, channels=2, seed=0):
    soundfile.write(path, noise(round(seconds * rate) * channels, seed).reshape(-1, channels), rate, subtype="FLOAT")


def recordings(directory):
    found = [reader.open_dataset(directory, split) for split in reader.splits(directory)]
    return {split[i].id: split[i] for split in found for i in range(len(split))}


def test_a_folder_of_audio(mimi_directory, codec, tmp_path):
    """Two threads encode what other processes read; a bad file among them is skipped."""
    folder = tmp_path / "audio"
    folder.mkdir()
    voice(folder / "a.wav", 1.0)
    voice(folder / "b.wav", 0.7, channels=1)
    voice(folder / "c.wav", 0.01, rate=8000)
    soundfile.write(folder / "silent.wav", np.zeros(24000), 24000)
    voice(folder / "bad.wav", 1.0)
    (folder / "bad.json").write_text("{")
    options = {"codec": "mimi", "mimi": str(mimi_directory), "workers": 2}
    skipped = prepare.make(folder, tmp_path / "out", **options)
    assert list(skipped) == ["bad.wav"]
    found = recordings(tmp_path / "out")
    wav, _ = soundfile.read(folder / "a.wav", dtype="float32")
    for channel, streams in ((0, slice(1, 9)), (1, slice(9, 17))):
        np.testing.assert_array_equal(found["a.wav"].codes[streams], codec.encode(wav[:, channel]))
    assert {name: r.codes.shape[1] for name, r in found.items()} == {
        "a.wav": 13,
        "b.wav": 9,
        "c.wav": 1,
        "silent.wav": 13,
    }
    assert (found["b.wav"].codes[9:] == -1).all()
    info = reader.open_dataset(tmp_path / "out", "train").info
    assert (info.codec, info.num_codebooks, info.card) == ("mimi", 8, 64)
    assert codecs.codec_of(info) == codec
    prepare.make(folder, tmp_path / "four", **options, num_codebooks=4)
    four = recordings(tmp_path / "four")["a.wav"].codes
    np.testing.assert_array_equal(four[1:], found["a.wav"].codes[[1, 2, 3, 4, 9, 10, 11, 12]])


@pytest.mark.parametrize("change", ["weights", "codebooks"])
def test_a_mimi_that_was_converted_again_does_not_go_on_with_the_data_of_the_old_one(mimi_directory, tmp_path, change):
    """In the same directory, while half of the recordings were encoded."""
    folder, directory = tmp_path / "audio", tmp_path / "mimi"
    folder.mkdir()
    voice(folder / "a.wav", 0.3)
    shutil.copytree(mimi_directory, directory)
    prepare.make(folder, tmp_path / "out", codec="mimi", mimi=str(directory))
    (tmp_path / "out" / "tokens.json").unlink()
    config, params = load(directory)
    shutil.rmtree(directory)
    if change == "weights":
        params = jax.tree.map(lambda x: 2 * x, params)
    else:
        config = dataclasses.replace(config, num_codebooks=4)
    save_model(directory, config, params)
    for cached in (mimi.open_mimi, mimi._loaded):  # as in a new process
        cached.cache_clear()
    with pytest.raises(ValueError, match="codec_fingerprint was"):
        prepare.make(folder, tmp_path / "out", codec="mimi", mimi=str(directory))
    settings = json.loads((tmp_path / "out" / "build.json").read_text())
    del settings["codec_fingerprint"]  # as begun before there was one
    (tmp_path / "out" / "build.json").write_text(json.dumps(settings))
    prepare.make(folder, tmp_path / "out", codec="mimi", mimi=str(directory))


class Dies:
    id, version, cost = "dies", "", 1.0

    def read(self, codec):
        sys.exit(7)


class Endless:
    """Reads for ever; leaves a file when it begins."""

    version, cost = "", 2.0

    def __init__(self, name, begun):
        self.id, self.begun = name, begun

    def read(self, codec):
        self.begun.touch()
        blocks = itertools.repeat(np.zeros((1, FRAME), np.float32))
        return pipeline.Speech(blocks, lambda: None, dict)


def test_a_reader_that_dies_stops_the_others(codec, tmp_path):
    begun = tmp_path / "begun"
    plan = pipeline.Plan(tmp_path / "out", {}, codec, None, 100, workers=2)
    with pytest.raises(RuntimeError, match="process for 'dies' ended with exit code 7"):
        pipeline.build(plan, [Endless("endless", begun), Dies()], lambda ids: dict.fromkeys(ids, "train"))
    assert begun.exists()


def test_conversations_are_the_same_whatever_the_workers(mimi_directory, tmp_path, contents):
    options = {"hours": 0.005, "seed": 5, "min_minutes": 0.1, "max_minutes": 0.15}
    options |= {"codec": "mimi", "mimi": str(mimi_directory)}
    for workers in (1, 2):
        conversations.make(tmp_path / f"{workers}", **options, workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    recording = reader.open_dataset(tmp_path / "1", "train")[0]
    assert recording.codes.shape[0] == 17
    assert recording.codes.shape[1] == int(np.ceil(recording.metadata["duration_s"] * 12.5 - 1e-6))


def test_bad_input(mimi_directory, codec, tmp_path):
    with pytest.raises(ValueError, match=r"needs --mimi=DIR, a converted Mimi: python -m ttt_jax\.convert"):
        codecs.get_codec("mimi")
    with pytest.raises(ValueError, match=r"none does not exist.*`python -m ttt_jax.convert --source=mimi"):
        codecs.get_codec("mimi", tmp_path / "none")
    with pytest.raises(ValueError, match=r"num_codebooks: expected 1 to 16, .* got 17"):
        codecs.get_codec("mimi", mimi_directory, 17)
    with pytest.raises(ValueError, match="the codec codec2 has no weights"):
        codecs.get_codec("codec2", mimi_directory)
    with pytest.raises(ValueError, match="num_codebooks: the codec codec2 has 8, got 4"):
        codecs.get_codec("codec2", None, 4)
    with pytest.raises(ValueError, match="one channel"):
        codec.encode(np.zeros((2, FRAME)))
    with pytest.raises(ValueError, match="not finite"):
        codec.encode(np.full(FRAME, np.nan))
    with pytest.raises(ValueError, match=r"codes\[0, 2, 0\] = 64 is outside \[-1, 64\)"):
        codec.decode(np.array([[0], [0], [64]] + [[0]] * 5))
    info = tokens.TokenInfo("mimi", 12.5, 24000, 8, 64, 100, codec_directory=str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"weights were in .*gone: put them back there, or write .*tokens\.json"):
        codecs.codec_of(info)
    info = tokens.TokenInfo("mimi", 12.5, 24000, 8, 2048, 100, codec_directory=str(mimi_directory))
    with pytest.raises(ValueError, match=r"has codes in \[0, 64\), the dataset in \[0, 2048\)"):
        codecs.codec_of(info)


def test_the_program_says_what_is_missing(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(100), 8000)
    command = [sys.executable, "-m", "ttt_jax.data.prepare", f"--audio={tmp_path}", f"--output={tmp_path / 'out'}"]
    program = subprocess.run([*command, "--codec=mimi"], capture_output=True, text=True)
    assert program.returncode == 1
    assert "error: mimi: the codec mimi needs --mimi=DIR" in program.stderr
    assert not (tmp_path / "out").exists()
