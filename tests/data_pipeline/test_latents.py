"""Embedded videos as ttt-video-dit stores them, in safetensors."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from ttt_jax.data import latents, videos

SHAPES = {"video": (3, 4, 2, 6), "text": (5, 7)}


@pytest.fixture
def folder(tmp_path):
    """Four rows of two scenes."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(4):
        names = {f"v{i}": "video", f"t{i}a": "text", f"t{i}b": "text"}
        for name, kind in names.items():
            save_file({"x": rng.standard_normal(SHAPES[kind]).astype(np.float32)}, tmp_path / f"{name}.safetensors")
        video, *texts = (f"{name}.safetensors" for name in names)
        rows.append({"vid_emb": video, "text_chunk_emb": texts})
    save_file({"x": np.zeros(SHAPES["text"], np.float32)}, tmp_path / "empty.safetensors")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def make(folder):
    latents.make(folder / "rows.jsonl", folder / "empty.safetensors", folder / "dataset", held_out=4)
    return folder / "dataset"


def test_rows_become_a_dataset(folder):
    train = videos.open_videos(make(folder), "train")
    assert train.info == videos.VideoInfo(3, 2, 2, 6, 2, 5, 7, has_moments=True, scale=0.7)
    assert len(train) == 3
    assert len(videos.open_videos(folder / "dataset", "validation")) == 1
    stored = latents.read_tensor(folder / "v1.safetensors").astype(np.float16)
    np.testing.assert_array_equal(train[1].video, stored)
    np.testing.assert_array_equal(train[1].text[1], latents.read_tensor(folder / "t1b.safetensors").astype(np.float16))
    batch = videos.VideoBatches(train, seed=0, batch_size=2, text_dropout=0.0)[0]
    assert batch.video.shape == (2, 3, 2, 2, 6)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"vid_emb": "a b.pt", "text_chunk_emb": ["t0a.safetensors"]}',
            r"a b\.pt: .*\n.*torch\.load.* '.*b\.pt'\nand",
        ),
        ('{"vid_emb": "no.safetensors", "text_chunk_emb": ["t0a.safetensors"]}', r"no\.safetensors does not exist"),
        ('{"vid_emb": "v0.safetensors"}', r'rows\.jsonl:1: expected \{"vid_emb": FILE, "text_chunk_emb": \[FILE'),
        ("oops", r"rows\.jsonl:1: expected"),
        (
            '\n{"vid_emb": "v0.safetensors", "text_chunk_emb": ["t0a.safetensors"]}\n\n'
            '{"vid_emb": "t0a.safetensors", "text_chunk_emb": ["t0a.safetensors"]}',
            r"rows\.jsonl:4: expected a tensor of shape",
        ),
        ('{"vid_emb": "t0a.safetensors", "text_chunk_emb": ["t0a.safetensors"]}', r"got shapes \(5, 7\) and"),
    ],
)
def test_what_cannot_be_read_is_named(folder, line, message):
    (folder / "rows.jsonl").write_text(line + "\n")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make(folder)
    assert not (folder / "dataset").exists()
