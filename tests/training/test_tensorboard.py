import io
import struct
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from matplotlib.figure import Figure
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from ttt_jax.training.tensorboard import TensorBoard, losses_figure


def read_file(path):
    """Events of one TFRecord file: length, its checksum, data, its checksum; a torn last record is left out."""
    content, at, events = path.read_bytes(), 0, []
    while at + 12 <= len(content):
        (length,) = struct.unpack("<Q", content[at : at + 8])
        assert struct.unpack("<I", content[at + 8 : at + 12]) == (masked_crc32c(content[at : at + 8]),)
        data, end = content[at + 12 : at + 12 + length], at + 16 + length
        if end > len(content):
            break
        assert struct.unpack("<I", content[end - 4 : end]) == (masked_crc32c(data),)
        events.append(Event.FromString(data))
        at = end
    return events


def shown(workdir):
    """(tag, step) -> value as TensorBoard shows it: files by name; a start at step s forgets steps >= s before it."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        first, *events = read_file(path)
        assert first.file_version == "brain.Event:2"
        for event in events:
            if event.session_log.status == SessionLog.START:
                found = [(step, value) for step, value in found if step < event.step]
            found += [(event.step, value) for value in event.summary.value]
    assert len({(value.tag, step) for step, value in found}) == len(found)
    return {(value.tag, step): value for step, value in found}


def flat(line):
    """Scalars of a line of metrics.jsonl by tag and step."""
    (kind,) = line.keys() - {"step"}
    values = {}
    for name, value in line[kind].items():
        numbers = {f"{name}/{i}": v for i, v in enumerate(value)} if isinstance(value, list) else {name: value}
        values |= {(f"{kind}/{tag}", line["step"]): number for tag, number in numbers.items()}
    return values


def scalars(workdir):
    found = shown(workdir).items()
    return {place: value.simple_value for place, value in found if value.WhichOneof("value") == "simple_value"}


def test_needs_no_tensorflow():
    code = "import sys, ttt_jax.training.tensorboard; sys.exit('tensorflow' in sys.modules)"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_scalars_are_named_by_their_place_and_on_the_disk_at_once(tmp_path):
    with TensorBoard(tmp_path, 0) as board:
        board.scalars(3, {"train": {"loss": np.float32(0.5), "audio": np.arange(2.0), "ttt": {"gate": 1}}})
        expected = {"train/loss": 0.5, "train/audio/0": 0, "train/audio/1": 1, "train/ttt/gate": 1}
        assert scalars(tmp_path) == {(tag, 3): value for tag, value in expected.items()}


def test_what_a_killed_run_wrote_beyond_the_resumed_step_is_forgotten(tmp_path):
    for start in (0, 3, 0):  # the last one: killed before its first checkpoint
        with TensorBoard(tmp_path, start) as board:
            for step in range(start + 1, 6):
                board.scalars(step, {"loss": float(10 * start + step)})
        path = max((tmp_path / "tensorboard").iterdir())
        whole = path.read_bytes()
        path.write_bytes(whole + whole[:30])  # the kill tears a record
        assert scalars(tmp_path) == {
            ("loss", step): 10.0 * start + step if step > start else float(step) for step in range(1, 6)
        }


def test_images_are_png(tmp_path):
    figure = Figure(figsize=(2, 1), dpi=50, facecolor=(1, 0, 0))
    with TensorBoard(tmp_path, 0) as board:
        board.image(7, "picture", figure)
        board.image(7, "losses", losses_figure({"text": 1.0, "audio": np.arange(8.0), "loss": 3.0}))
    found = shown(tmp_path)
    pixels = np.asarray(Image.open(io.BytesIO(found["picture", 7].image.encoded_image_string)))
    assert pixels.shape[:2] == (50, 100)
    assert (pixels[..., :3] == [255, 0, 0]).all()
    assert (found["picture", 7].image.height, found["picture", 7].image.width) == (50, 100)
    bars = np.asarray(Image.open(io.BytesIO(found["losses", 7].image.encoded_image_string)))[..., :3]
    assert len(np.unique(bars.reshape(-1, 3), axis=0)) > 3


@pytest.mark.parametrize("channels", [(), (1,), (2,)])
def test_audio_is_wav(tmp_path, channels):
    wav = np.random.default_rng(0).uniform(-1.2, 1.2, (800, *channels))
    with TensorBoard(tmp_path, 0) as board:
        board.audio(2, "speech", wav, 8000)
    audio = shown(tmp_path)["speech", 2].audio
    samples, rate = soundfile.read(io.BytesIO(audio.encoded_audio_string))
    assert (rate, audio.sample_rate, audio.length_frames) == (8000, 8000, 800)
    # 16 bits: half a step of rounding, and one of 32768 levels against 32767.
    np.testing.assert_allclose(samples, np.clip(wav, -1, 1).reshape(samples.shape), rtol=0, atol=1.5 / 32768)


@pytest.mark.parametrize(
    "wav", [np.zeros((4, 3)), np.zeros(0), np.zeros((1, 2, 3)), np.zeros(4, np.int16), np.array([0, np.nan])]
)
def test_bad_audio(tmp_path, wav):
    with TensorBoard(tmp_path, 0) as board, pytest.raises(ValueError, match="wav: expected"):
        board.audio(1, "speech", wav, 8000)


def test_training_writes_what_metrics_has(undisturbed):
    expected = {place: value for line in undisturbed.lines() for place, value in flat(line).items()}
    assert {kind for tag, _ in expected for kind in [tag.split("/")[0]]} == {"train", "diagnostics", "validation"}
    found = scalars(undisturbed.workdir)
    assert found.keys() == expected.keys()
    np.testing.assert_allclose(list(found.values()), [expected[place] for place in found], rtol=1e-7)  # float32
    images = [place for place, value in shown(undisturbed.workdir).items() if value.WhichOneof("value") == "image"]
    assert images == [("validation/losses", step) for step in (25, 50, 60)]


def test_a_killed_run_shows_every_step_once(new_run):
    process = new_run.start()
    new_run.wait(process, lambda: new_run.last_step() >= 18)
    process.kill()
    process.communicate()
    code, output = new_run.finish("--config.log.every_steps=3", "--config.log.audio_every_steps=30")
    assert code == 0, output
    expected = {place: value for line in new_run.lines() for place, value in flat(line).items()}
    found = scalars(new_run.workdir)
    assert found.keys() == expected.keys()
    np.testing.assert_allclose(list(found.values()), [expected[place] for place in found], rtol=1e-7)
    spoken = {place: value for place, value in shown(new_run.workdir).items() if value.WhichOneof("value") == "audio"}
    assert spoken.keys() == {("continuation", 30), ("continuation", 60)}
    wav, rate = soundfile.read(io.BytesIO(spoken["continuation", 60].audio.encoded_audio_string))
    assert (wav.shape, rate) == ((60 * 640, 2), 8000)
