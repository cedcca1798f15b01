import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile

from ttt_jax.data import conversations, reader


def test_same_bytes_with_another_number_of_workers(small_dataset, small_settings, tmp_path, contents):
    conversations.make(tmp_path / "again", **small_settings, keep_wav=1, workers=1)
    assert contents(tmp_path / "again") == contents(small_dataset)


def test_a_killed_program_resumes_to_the_same_bytes(small_dataset, small_settings, tmp_path, contents):
    output = tmp_path / "killed"
    flags = [f"--{name}={value}" for name, value in small_settings.items()]
    command = [
        sys.executable,
        "-m",
        "ttt_jax.data.conversations",
        f"--output={output}",
        "--keep_wav=1",
        "--workers=1",
        *flags,
    ]
    program = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while program.poll() is None and not list(output.glob(".work/*.npz")):
        time.sleep(0.002)
    os.kill(program.pid, signal.SIGKILL)
    assert program.wait() == -signal.SIGKILL
    with pytest.raises(FileNotFoundError, match="no finished token dataset"):
        reader.open_dataset(output, "train")
    done = {p: p.stat().st_mtime_ns for p in output.glob(".work/*.npz")}
    assert done
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert contents(output) == contents(small_dataset)
    assert "tokenizing: 100%" in again.stderr


def test_a_channel_sounds_while_its_words_do_and_is_silent_otherwise(small_dataset):
    """The kept audio, the text stream and the noted times agree."""
    recording = reader.open_dataset(small_dataset, "test")[0]
    wav, rate = soundfile.read(small_dataset / "wav" / f"{recording.id}.wav")
    assert wav.shape[1] == 2
    assert abs(len(wav) / rate - recording.metadata["duration_s"]) < 1e-3
    both = (np.abs(wav) > 0.01).all(axis=1)
    assert both.mean() < 0.001  # turns do not overlap
    for entry in recording.metadata["spoken"]:
        channel = 0 if entry["speaker"] == "main" else 1
        part = wav[int(entry["start_s"] * rate) : int(entry["end_s"] * rate)]
        assert part[:, channel].std() > 0.01
        assert np.abs(part[:, 1 - channel]).max() < 1e-3
    frames = wav[: len(wav) // 640 * 640].reshape(-1, 640, 2).std(axis=1)
    text = recording.codes[0][: len(frames)]
    first = np.flatnonzero(text > 3)[0]
    assert frames[:first, 0].max(initial=0) < 1e-3
    pieces = frames[text > 3, 0]
    assert (pieces > 1e-3).mean() > 0.9  # the last piece of a short word may stand just behind its sound


def test_the_silent_channel_is_the_codecs_constant(small_dataset):
    codes = reader.open_dataset(small_dataset, "train")[0].codes
    assert (codes[9:17, :3] == codes[9:17, :1]).all()  # the main speaker opens
    assert len(np.unique(codes[1:9, 3:10], axis=1).T) > 3


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="0 < min_minutes <= max_minutes, got 3 and 2"):
        conversations.make(tmp_path / "out", hours=1, seed=0, min_minutes=3, max_minutes=2)
    with pytest.raises(ValueError, match="codec: expected one of"):
        conversations.make(tmp_path / "out", hours=1, seed=0, codec="mp3")
    assert not (tmp_path / "out").exists()
