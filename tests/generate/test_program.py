"""`python -m ttt_jax.generate` as a function: files in, files out."""

import dataclasses
import os
import shutil
import signal
import threading
import time

import numpy as np
import pytest
import soundfile
import soxr

import ttt_jax
from ttt_jax.data.audio import BadRecordingError
from ttt_jax.data.text import load_tokenizer, read_alignments, train_tokenizer
from ttt_jax.generate import program
from ttt_jax.models.moshi import MoshiConfig
from ttt_jax.models.moshi.insertion import without_ttt

FRAME = 1920


@pytest.fixture(scope="module")
def options(directories, speech, tokenizer, tmp_path_factory):
    """A second of the second speaker; what the flags say is replaced by the tests."""
    user = tmp_path_factory.mktemp("user") / "user.wav"
    wav, rate = soundfile.read(speech)
    soundfile.write(user, wav[: round(1.02 * rate)], rate)
    flags = {"checkpoint": directories[0], "mimi": directories[1], "input": user, "tokenizer": tokenizer}
    return lambda output, **others: program.Options(**{**flags, "output": output, "channel": "right", **others})


def read(path):
    wav, rate = soundfile.read(path, dtype="int16")
    assert rate == 24000
    return wav


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
    """The whole second at once: report, sound, words."""
    folder = tmp_path_factory.mktemp("whole")
    files = {"text": folder / "moshi.txt", "words": folder / "moshi.json"}
    report = program.run(options(folder / "moshi.wav", **files))
    assert sorted(path.name for path in folder.iterdir()) == ["moshi.json", "moshi.txt", "moshi.wav"]
    return report, read(folder / "moshi.wav"), files


def test_the_output_is_as_long_as_the_input(whole):
    report, wav, _ = whole
    assert report.frames == 13  # 1.02 s are 12.75 frames
    assert wav.shape == (13 * FRAME,)
    assert len(np.unique(wav)) > 1000
    assert not report.stopped
    assert "13 frames (1.04 s) in " in str(report)
    assert "ms a frame, real-time factor" in str(report)


def test_text_and_words_say_the_same(whole, tokenizer):
    _, _, files = whole
    words = read_alignments(files["words"])
    assert files["text"].read_text(encoding="utf-8") == " ".join(word.text for word in words) + "\n"
    assert words
    assert all(0 <= word.start_s < word.end_s <= 1.04 + 1e-6 for word in words)


def test_stopping_and_going_on_gives_the_same_sound(options, whole, tmp_path):
    first = options(tmp_path / "1.flac", frames=5, save_state=tmp_path / "a")
    second = options(tmp_path / "2.w64", start_frame=5, frames=1, load_state=tmp_path / "a", save_state=tmp_path / "b")
    third = options(tmp_path / "3.wav", start_frame=6, load_state=tmp_path / "b", seed=7)
    assert [program.run(part).frames for part in (first, second, third)] == [5, 1, 7]
    parts = [read(tmp_path / name) for name in ("1.flac", "2.w64", "3.wav")]
    np.testing.assert_array_equal(np.concatenate(parts), whole[1])
    program.run(options(tmp_path / "anew.wav", start_frame=5, frames=1))
    assert (read(tmp_path / "anew.wav") != parts[1]).any()


def test_the_seed_and_the_sampling_matter(options, whole, tmp_path):
    program.run(options(tmp_path / "other.wav", seed=1))
    assert (read(tmp_path / "other.wav") != whole[1]).any()
    program.run(options(tmp_path / "again.wav"))
    np.testing.assert_array_equal(read(tmp_path / "again.wav"), whole[1])


def test_channels(options, whole, tmp_path):
    wav, rate = soundfile.read(options(None).input)
    soundfile.write(tmp_path / "right.wav", wav[:, 1], rate)
    program.run(options(tmp_path / "mono.wav", input=tmp_path / "right.wav", channel="mix"))
    np.testing.assert_array_equal(read(tmp_path / "mono.wav"), whole[1])
    frames = {name: np.concatenate(list(program.input_frames(options(None).input, 24000, FRAME, name)))
              for name in program.CHANNELS}  # fmt: skip
    np.testing.assert_allclose(frames["mix"], (frames["left"] + frames["right"]) / 2, atol=1e-6)
    assert (frames["left"] != frames["right"]).any()


@pytest.mark.parametrize("rate", [8000, 24000, 44100])
def test_input_is_cut_into_frames_of_the_resampled_sound(tmp_path, rate):
    wav = np.random.default_rng(0).uniform(-0.5, 0.5, round(0.3 * rate)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", wav, rate, subtype="FLOAT")
    frames = list(program.input_frames(tmp_path / "a.wav", 24000, FRAME, "mix"))
    assert [frame.shape for frame in frames] == [(FRAME,)] * 4
    together = np.concatenate(frames)
    np.testing.assert_allclose(together[:7200], soxr.resample(wav, rate, 24000), atol=1e-5)
    assert (together[7200:] == 0).all()
    soundfile.write(tmp_path / "one.wav", np.zeros(1), 96000)
    assert [frame.shape for frame in program.input_frames(tmp_path / "one.wav", 24000, FRAME, "mix")] == [(FRAME,)]


def test_silence_around_the_input(options, tmp_path):
    """As if the file had begun and ended with it."""
    wav, rate = soundfile.read(options(None).input)
    soundfile.write(tmp_path / "padded.wav", np.pad(wav[:6400], ((1280, 640), (0, 0))), rate)
    soundfile.write(tmp_path / "bare.wav", wav[:6400], rate)
    program.run(options(tmp_path / "1.wav", input=tmp_path / "padded.wav"))
    program.run(options(tmp_path / "2.wav", input=tmp_path / "bare.wav", silence_before=0.16, silence_after=0.03))
    one, two = read(tmp_path / "1.wav"), read(tmp_path / "2.wav")
    assert len(one) == len(two) == 13 * FRAME
    # The filters ring across the cuts, so the codes may differ there; in the silence before, nothing does.
    np.testing.assert_array_equal(one[: 2 * FRAME], two[: 2 * FRAME])


def test_ttt_off_is_the_model_without_its_branch(options, moshi, whole, tmp_path):
    program.run(options(tmp_path / "off.wav", ttt="off"))
    ttt_jax.save_model(tmp_path / "closed", moshi[0], without_ttt(moshi[1]))
    program.run(options(tmp_path / "closed.wav", checkpoint=tmp_path / "closed"))
    np.testing.assert_array_equal(read(tmp_path / "off.wav"), read(tmp_path / "closed.wav"))
    program.run(options(tmp_path / "on.wav", ttt="on"))
    np.testing.assert_array_equal(read(tmp_path / "on.wav"), whole[1])
    assert (read(tmp_path / "off.wav") != whole[1]).any()


def test_a_signal_ends_the_conversation_with_whole_files(options, tmp_path):
    """A minute of silence, which also works; SIGTERM while it is talked to."""
    soundfile.write(tmp_path / "silence.wav", np.zeros(60 * 24000), 24000)
    partial = tmp_path / "moshi.wav.partial"

    def kill():
        while not partial.exists() or partial.stat().st_size < 10 * FRAME:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    given = {"input": tmp_path / "silence.wav", "channel": "mix", "save_state": tmp_path / "state"}
    report = program.run(options(tmp_path / "moshi.wav", **given))
    thread.join()
    assert report.stopped
    assert 5 < report.frames < 750
    assert len(read(tmp_path / "moshi.wav")) == report.frames * FRAME
    assert not partial.exists()
    given |= {"load_state": tmp_path / "state", "save_state": None, "start_frame": report.frames, "frames": 2}
    assert program.run(options(tmp_path / "rest.wav", **given)).frames == 2


def test_an_input_that_breaks_leaves_nothing(options, tmp_path):
    wav = np.zeros(24000, np.float32)
    wav[20000] = np.nan
    soundfile.write(tmp_path / "nan.wav", np.tile(wav, 40), 24000, subtype="FLOAT")
    output = tmp_path / "out"
    output.mkdir()
    flags = {"input": tmp_path / "nan.wav", "channel": "mix", "text": output / "a.txt", "save_state": output / "state"}
    with pytest.raises(BadRecordingError, match="not finite"):
        program.run(options(output / "a.wav", **flags))
    assert not list(output.iterdir())


def test_models_without_a_voice_write_text(options, save_random, tokenizer, tmp_path):
    pieces = load_tokenizer(tokenizer).get_piece_size()
    sizes = {"dim": 16, "num_heads": 2, "num_layers": 1, "context": 8, "depformer_dim": 8, "depformer_num_heads": 2}
    config = MoshiConfig(**sizes, text_card=pieces, n_q=2, dep_q=0, card=32, delays=(0, 0, 0), model_type="stt")
    model = save_random(config)
    report = program.run(options(None, checkpoint=model, words=tmp_path / "heard.json", frames=9))
    assert report.frames == 9
    assert read_alignments(tmp_path / "heard.json")
    with pytest.raises(ValueError, match=r"--output: .*model only writes text; leave the flag out"):
        program.run(options(tmp_path / "a.wav", checkpoint=model))
    with pytest.raises(ValueError, match=r"--text: .*model only writes text; name a file for it"):
        program.run(options(None, checkpoint=model))


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"checkpoint": "none"}, r"--checkpoint: .*none does not exist.*python -m ttt_jax\.convert --source=moshi"),
        ({"mimi": "none"}, r"--mimi: .*none does not exist.*python -m ttt_jax\.convert --source=mimi"),
        ({"mimi": "moshi"}, "--mimi: expected a Mimi, .*moshi holds a Moshi"),
        ({"input": "none.wav"}, "--input: there is no file at .*none.wav"),
        ({"input": "text.wav"}, "--input: .*text.wav: not readable as audio"),
        ({"input": "three.wav"}, "--input: .*three.wav: 3 channels"),
        ({"input": "mono.wav"}, "--channel: .*mono.wav has one channel only"),
        ({"output": "mono.wav", "input": "mono.wav"}, "--output: .*mono.wav is the file of --input"),
        ({"text": "a", "words": "a"}, "--words: .*a is the file of --text; choose another name"),
        ({"output": None}, "--output: expected the name of a sound file"),
        ({"output": "a.mp3"}, r"--output: expected a name that ends in \.wav, \.flac, \.w64, got .*a\.mp3"),
        ({"words": "a.json", "tokenizer": "none.model"}, "--tokenizer: .*none.model is none"),
        (
            {"words": "a.json", "tokenizer": "other.model"},
            "--tokenizer: .*other.model has 13 pieces, .* = 24",
        ),
        ({"words": "a.json", "tokenizer": "text.wav"}, "tokenizer: .*text.wav is not a sentencepiece model"),
        ({"save_state": "mono.wav"}, "--save_state: .*mono.wav exists"),
        ({"load_state": "none"}, "--load_state: .*none holds no conversation"),
        ({"start_frame": 99}, "--start_frame: .*user.wav has no frame 99"),
        ({"conditions": {"description": "good"}}, "conditions must be among"),
    ],
)
def test_bad_flags_say_what_to_do_and_leave_nothing(options, directories, tmp_path, flags, reason):
    (tmp_path / "text.wav").write_text("not audio")
    for name, channels in (("mono", 1), ("three", 3)):
        soundfile.write(tmp_path / f"{name}.wav", np.zeros((100, channels)), 24000)
    (tmp_path / "other.model").write_bytes(train_tokenizer(["hello my name"], 20))
    before = sorted(path.name for path in tmp_path.iterdir())
    paths = {name: tmp_path / value if isinstance(value, str) else value for name, value in flags.items()}
    if flags.get("mimi") == "moshi":
        paths["mimi"] = directories[0]
    given = {"output": tmp_path / "moshi.wav", **paths}
    with pytest.raises(ValueError, match=reason):
        program.run(options(given.pop("output"), **given))
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_models_that_do_not_fit(options, moshi, mimi, save_random, tmp_path):
    plain = save_random(dataclasses.replace(moshi[0], ttt=None))
    with pytest.raises(ValueError, match=r"--ttt=on: .*model has no TTT layers\. Insert some .* --ttt=CONFIG"):
        program.run(options(tmp_path / "a.wav", checkpoint=plain, ttt="on"))
    wide = dataclasses.replace(mimi[0], bins=64)
    ttt_jax.save_model(tmp_path / "wide", wide, mimi[1])
    with pytest.raises(ValueError, match=r"mimi: its codes lie in \[0, 64\), the model's in \[0, 32\)"):
        program.run(options(tmp_path / "a.wav", mimi=tmp_path / "wide"))


def test_the_tokenizer_beside_the_weights_is_found(options, moshi, tokenizer, tmp_path):
    ttt_jax.save_model(tmp_path / "moshi", *moshi)
    given = {"checkpoint": tmp_path / "moshi", "tokenizer": None, "frames": 3, "text": tmp_path / "a.txt"}
    with pytest.raises(ValueError, match=r"--tokenizer: --text and --words need .*moshi.tokenizer\.model is none"):
        program.run(options(tmp_path / "a.wav", **given))
    shutil.copy(tokenizer, tmp_path / "moshi" / "tokenizer.model")
    program.run(options(tmp_path / "a.wav", **given))
    assert (tmp_path / "a.txt").exists()
