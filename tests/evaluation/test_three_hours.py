"""A three-hour recording from wav to scores: whole, and in memory that does not grow with its length."""

import resource
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from ttt_jax.data.reader import crops, open_dataset
from ttt_jax.evaluation.scoring import score_recordings

RATE_HZ = 8000
HOURS = 3

PREPARE_AND_TELL_PEAK = """
import pathlib, resource, sys
from ttt_jax.data import prepare
if __name__ == "__main__":
    prepare.make(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), workers=1)
    print(max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
"""


def write_wav(path, seconds):
    """Bursts of noise, minute by minute."""
    rng = np.random.default_rng(0)
    envelope = np.repeat(rng.uniform(0, 0.3, 60), RATE_HZ)
    with soundfile.SoundFile(path, "w", RATE_HZ, 1, "PCM_16") as wav:
        for _ in range(0, seconds, 60):
            wav.write(envelope * rng.standard_normal(60 * RATE_HZ))


def prepare(folder, output) -> int:
    """Prepare in a process of its own; returns its peak memory in KiB."""
    script = folder.parent / "prepare_and_tell_peak.py"
    script.write_text(PREPARE_AND_TELL_PEAK)
    command = [sys.executable, script, folder, output]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=True)
    return int(done.stdout.split()[-1])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("hours")
    peaks = {}
    for name, seconds in (("short", 60), ("long", HOURS * 3600)):
        (root / name).mkdir()
        write_wav(root / name / "recording.wav", seconds)
        peaks[name] = prepare(root / name, root / f"{name}-tokens")
    return root / "long-tokens", peaks


def test_preparing_streams_the_audio(dataset):
    _, peaks = dataset
    samples_kib = HOURS * 3600 * RATE_HZ * 4 / 1024
    assert peaks["long"] - peaks["short"] < samples_kib / 4


def test_tokens_are_whole_and_scored_to_the_last_frame(dataset, config, params):
    directory, _ = dataset
    recordings = open_dataset(directory, "train")
    frames = round(HOURS * 3600 * 12.5)
    assert recordings.num_frames.tolist() == [frames]
    codes = recordings[0].codes
    assert codes.shape == (17, frames)
    assert crops(recordings, seed=0, num_frames=64)[3].shape == (17, 64)

    own = np.where(codes[: config.num_streams] < 0, -1, codes[: config.num_streams] % config.card)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    score_recordings(config, params, [own[:, :2000]], chunk_frames=500, batch_size=1)
    short = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    scores = score_recordings(config, params, [own], chunk_frames=500, batch_size=1)[0]
    long = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert np.isfinite(scores[1:]).all()
    assert np.isnan(scores[0]).all()  # no transcript, nothing to predict
    # Tokens and scores themselves are about 5 MiB; states or activations of 135 000 frames would be hundreds.
    assert long - short < 50_000, (before, short, long)
