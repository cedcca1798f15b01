import numpy as np
import pytest
import soundfile
import soxr

from ttt_jax.data import audio

FORMATS = [("wav", "WAV", "PCM_16"), ("flac", "FLAC", "PCM_16"), ("ogg", "OGG", "VORBIS"), ("opus", "OGG", "OPUS"),
           ("mp3", "MP3", "MPEG_LAYER_III")]  # fmt: skip


def tones(seconds, rate, channels):
    t = np.arange(round(seconds * rate)) / rate
    return np.stack([0.3 * np.sin(2 * np.pi * hz * t) for hz in (300, 1100)[:channels]], axis=1)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(("suffix", "container", "subtype"), FORMATS)
def test_every_format_reads_resampled(tmp_path, suffix, container, subtype, channels):
    path = tmp_path / f"tone.{suffix}"
    soundfile.write(path, tones(1.0, 48000, channels), 48000, format=container, subtype=subtype)
    assert audio.num_channels(path) == channels
    wav = np.concatenate(list(audio.read_blocks(path, 8000, block_seconds=0.13)), axis=1)
    assert wav.shape[0] == channels
    assert wav.dtype == np.float32
    assert abs(wav.shape[1] - 8000) <= 400  # mp3 pads up to two of its 1152-sample frames
    for channel, hz in zip(wav, (300, 1100), strict=False):
        spectrum = np.abs(np.fft.rfft(channel[1000:7000]))
        assert abs(spectrum.argmax() / 0.75 - hz) < 3


def test_blocks_equal_one_shot_resampling(tmp_path):
    wav = tones(2.0, 44100, 2).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", wav, 44100, subtype="FLOAT")
    blocks = list(audio.read_blocks(tmp_path / "a.wav", 8000, block_seconds=0.31))
    assert len(blocks) == 7
    # float32 filters; both paths run the same filter over the same samples
    np.testing.assert_allclose(np.concatenate(blocks, axis=1).T, soxr.resample(wav, 44100, 8000), atol=1e-6)


@pytest.mark.parametrize("samples", [1, 100])
def test_less_than_a_frame_is_still_audio(tmp_path, samples):
    soundfile.write(tmp_path / "a.wav", np.full(samples, 0.5), 8000)
    assert sum(block.shape[1] for block in audio.read_blocks(tmp_path / "a.wav", 8000)) == samples


def read(path):
    audio.num_channels(path)
    return list(audio.read_blocks(path, 8000, block_seconds=0.5))


def test_bad_files_say_why(tmp_path):
    empty, text, silent, nan = (tmp_path / f"{name}.wav" for name in ("empty", "text", "silent", "nan"))
    empty.touch()
    text.write_text("not audio")
    soundfile.write(silent, np.zeros(0), 8000)
    wav = np.zeros(8000)
    wav[6000] = np.nan
    soundfile.write(nan, wav, 8000, subtype="FLOAT")
    soundfile.write(tmp_path / "three.wav", np.zeros((10, 3)), 8000)
    soundfile.write(tmp_path / "whole.flac", np.random.default_rng(0).uniform(-0.5, 0.5, 40000), 8000)
    content = (tmp_path / "whole.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(content[: len(content) // 2])
    reasons = {
        empty: "0 bytes",
        text: "not readable as audio",
        silent: "no samples",
        nan: r"not finite after 0\.50 s",
        tmp_path / "three.wav": "3 channels; expected 1, or 2",
        tmp_path / "cut.flac": "cut short|unreadable after",
    }
    for path, reason in reasons.items():
        with pytest.raises(audio.BadRecordingError, match=reason):
            read(path)
