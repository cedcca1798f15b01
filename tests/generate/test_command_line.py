"""Weights and speech in, speech out, by the programs alone."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from safetensors.numpy import save_file

from ttt_jax.convert import synthetic
from ttt_jax.data.text import read_alignments


@pytest.fixture
def run(tmp_path):
    """A program of the library; what one has compiled the next one finds."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

    def run(module, *arguments):
        command = [sys.executable, "-m", f"ttt_jax.{module}", *arguments]
        program = subprocess.run(command, capture_output=True, text=True, env=os.environ | cache)
        assert program.returncode == 0, program.stderr
        return program

    return run


@pytest.fixture
def kyutais(moshi, mimi, mimi_tensors, tokenizer, tmp_path):
    """A folder as Kyutai's: two models and the tokenizer."""
    folder = tmp_path / "kyutai"
    synthetic.write(dataclasses.replace(moshi[0], ttt=None), folder, dtype="float32", seed=0)
    shutil.copy(tokenizer, folder / "tokenizer_spm_32k_3.model")
    save_file(mimi_tensors, folder / "mimi.safetensors")
    (folder / "mimi.json").write_text(json.dumps(mimi[0].to_kyutai()))
    return folder


def test_from_weights_and_speech_to_speech(run, kyutais, speech, tmp_path):
    models = {name: tmp_path / name for name in ("moshi", "mimi")}
    inserted = '--ttt={"layers": [1]}'
    run(
        "convert", "--source=moshi", f"--input={kyutais / 'model.safetensors'}", f"--output={models['moshi']}", inserted
    )
    mimis = (f"--input={kyutais / 'mimi.safetensors'}", f"--config={kyutais / 'mimi.json'}")
    run("convert", "--source=mimi", *mimis, f"--output={models['mimi']}")
    # Without --mimi, which lies beside Moshi.
    given = (f"--checkpoint={models['moshi']}", f"--input={speech}", "--channel=right")
    program = run("generate", *given, f"--output={tmp_path / 'moshi.wav'}", f"--words={tmp_path / 'words.json'}")
    heard = soundfile.info(speech)
    frames = int(np.ceil(heard.frames * 3 / 1920))  # 8 kHz to 24
    wav, rate = soundfile.read(tmp_path / "moshi.wav", dtype="int16")
    assert (wav.shape, rate) == ((1920 * frames,), 24000)
    assert len(np.unique(wav)) > 1000
    assert f"{frames} frames" in program.stderr
    assert "real-time factor" in program.stderr
    assert read_alignments(tmp_path / "words.json")
    # In two parts, by two processes.
    state, parts = tmp_path / "state", [tmp_path / "1.wav", tmp_path / "2.wav"]
    first = run("generate", *given, "--frames=9", f"--save_state={state}", f"--output={parts[0]}")
    assert f"to go on: --load_state={state} --start_frame=9" in first.stderr
    run("generate", *given, f"--load_state={state}", "--start_frame=9", f"--output={parts[1]}")
    both = [soundfile.read(part, dtype="int16")[0] for part in parts]
    np.testing.assert_array_equal(np.concatenate(both), wav)


def test_a_user_without_weights_is_told_what_to_do(speech, tmp_path):
    arguments = [f"--checkpoint={tmp_path / 'moshi'}", f"--mimi={tmp_path / 'mimi'}", f"--input={speech}"]
    command = [sys.executable, "-m", "ttt_jax.generate", *arguments, f"--output={tmp_path / 'moshi.wav'}"]
    program = subprocess.run(command, capture_output=True, text=True)
    assert program.returncode == 1
    assert "Traceback" not in program.stderr
    assert "error: --checkpoint:" in program.stderr
    assert "python -m ttt_jax.convert --source=moshi --input=kyutai/moshiko-pytorch-bf16" in program.stderr
    assert not list(tmp_path.iterdir())
