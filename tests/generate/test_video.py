"""Samples of a Video-DiT as a GIF and as latents."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ttt_jax import save_model
from ttt_jax.data import moving_shapes
from ttt_jax.generate import video
from ttt_jax.models.video_dit import VideoDiT, VideoDiTConfig

CONFIG = VideoDiTConfig(
    **{"model_dim": 16, "num_heads": 1, "num_layers": 1, "text_dim": 16, "time_embed_dim": 8, "patch_size": 4},
    **{"in_channels": 3, "attn_length": 2, "ssm_layer": "ttt_linear", "mini_batch_size": 8},
)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """An untrained model and a dataset."""
    root = tmp_path_factory.mktemp("video")
    moving_shapes.make(root / "data", num_videos=42, scenes=2, scene_frames=2, size=12)
    inputs = jnp.zeros((1, 1, 3, 4, 4)), jnp.zeros((1, 1, 1, 16)), jnp.zeros(1, jnp.int32)
    save_model(root / "model", CONFIG, jax.jit(VideoDiT(CONFIG).init)(jax.random.key(0), *inputs)["params"])
    return str(root / "model"), str(root / "data")


def test_a_gif_shows_samples_above_the_videos_of_their_captions(directories, tmp_path):
    path = tmp_path / "new" / "samples.gif"
    samples, videos = video.run(*directories, str(path), split="test", number=2, first=1, num_steps=2)
    assert samples.shape == (2, 5, 3, 12, 12)
    assert videos[0].id == "21"
    with Image.open(path) as gif:
        assert gif.n_frames == 5
        gif.seek(3)
        pixels = np.asarray(gif.convert("RGB")).astype(float) / 127.5 - 1
    top = video.LINE + 12 * video.ZOOM + video.MARGIN + video.LINE
    shown = pixels[top : top + 120, video.MARGIN : video.MARGIN + 120][5::10, 5::10].transpose(2, 0, 1)
    np.testing.assert_allclose(shown, videos[0].video[3].astype(float), atol=0.1)  # GIFs have a palette
    shown = pixels[video.LINE : video.LINE + 120, video.MARGIN : video.MARGIN + 120][5::10, 5::10].transpose(2, 0, 1)
    assert np.corrcoef(shown.ravel(), np.clip(samples[0, 3], -1, 1).ravel())[0, 1] > 0.95


def test_what_cannot_be_shown_is_named(directories, tmp_path, monkeypatch):
    options = {"split": "test", "number": 1, "first": 0}
    with pytest.raises(ValueError, match=r"output: expected a name that ends in \.gif or \.npy, got 'x\.mp4'"):
        video.run(*directories, "x.mp4", **options)
    with pytest.raises(ValueError, match="number: expected at most 3 after first=0, got 9"):
        video.run(*directories, "x.gif", **options | {"number": 9})
    monkeypatch.setattr(video, "load", lambda _: (dataclasses.replace(CONFIG, in_channels=16), None))
    with pytest.raises(ValueError, match=r"latents of 16 channels are no pixels.*\.npy"):  # before anything is sampled
        video.run(*directories, str(tmp_path / "x.gif"), **options)
