"""Moving shapes do what their captions say, and batches of videos follow from (seed, step)."""

import json

import numpy as np
import pytest

from ttt_jax.data import moving_shapes, videos

SIZES = {"scenes": 2, "scene_frames": 2, "size": 12}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("shapes") / "dataset"
    moving_shapes.make(directory, num_videos=24, **SIZES)
    return directory


@pytest.fixture
def train(directory):
    return videos.open_videos(directory, "train")


def centre(frame):
    """Row and column of a shape, as the mean of what is brighter than the background."""
    rows, columns = np.nonzero(frame.max(axis=0) > 0)
    return np.array([rows.mean(), columns.mean()])


@pytest.mark.parametrize("index", range(12))
def test_a_shape_moves_as_each_caption_says_and_goes_on_where_it_was(index):
    video, captions = moving_shapes.film(3, index, scenes=3, scene_frames=4, size=16)
    assert video.shape == (13, 3, 16, 16)
    for scene, caption in enumerate(captions):
        colour, kind, _, direction = caption.split()
        assert caption.split()[:2] == captions[0].split()[:2]
        step = moving_shapes.DIRECTIONS[direction]
        for frame in range(4 * scene, 4 * scene + 4):
            np.testing.assert_allclose(centre(video[frame + 1]) - centre(video[frame]), step, atol=1e-6)
            lit = video[frame].max(axis=0) > 0
            assert lit.sum() == {"square": 25, "disc": 13, "cross": 9}[kind]
            np.testing.assert_array_equal(
                np.unique(video[frame][:, lit], axis=1)[:, 0], np.float32(moving_shapes.COLOURS[colour])
            )


def test_captions_are_embedded_by_their_words():
    one, other = moving_shapes.embed("red square moves up"), moving_shapes.embed("red disc moves up")
    assert one.shape == (4, 16)
    np.testing.assert_array_equal(one[[0, 2, 3]], other[[0, 2, 3]])
    assert np.abs(one[1] - other[1]).max() > 0.1
    np.testing.assert_allclose(moving_shapes.embed("red")[0, :2], one[0, :2])
    with pytest.raises(ValueError, match="caption: expected at most 4 words, got 5"):
        moving_shapes.embed("a red square moves up")


def test_a_picture_too_small_is_refused():
    with pytest.raises(ValueError, match=r"size: expected at least 13 for scene_frames=4.*size=12"):
        moving_shapes.film(0, 0, size=12)


def test_every_video_comes_once_an_epoch_in_an_order_of_the_seed(train):
    def order(seed):
        batches = videos.VideoBatches(train, seed=seed, batch_size=2, text_dropout=0.0)
        return [batches[i].video[row].tobytes() for i in range(len(train) // 2) for row in range(2)]

    assert len(train) == 20
    names = {train[i].video.astype(np.float32).tobytes() for i in range(len(train))}
    assert set(order(0)) == names
    assert sorted(order(0)) == sorted(order(1))
    assert order(0) != order(1)


def test_a_batch_follows_from_seed_and_step_and_processes_share_its_rows(train):
    options = {"seed": 1, "batch_size": 6, "text_dropout": 0.5}
    whole, again = videos.VideoBatches(train, **options), videos.VideoBatches(train, **options)
    again[0]
    for x, y in zip(whole[7], again[7], strict=True):
        np.testing.assert_array_equal(x, y)
    part = videos.VideoBatches(train, **options, rows=[2, 5])
    for x, y in zip(whole[7], part[7], strict=True):
        np.testing.assert_array_equal(x[[2, 5]], y)
    assert len({tuple(key) for i in range(9) for key in whole[i].key}) == 54


def test_texts_are_dropped_whole_as_often_as_asked(train):
    batches = videos.VideoBatches(train, seed=0, batch_size=20, text_dropout=0.25)
    empty = np.concatenate([batches[i].text for i in range(20)]) == train.empty_text
    is_dropped = empty.all(axis=(1, 2, 3))
    assert 0.18 < is_dropped.mean() < 0.32  # of 400: three standard deviations of 0.022
    assert not empty[~is_dropped][:, :, 0].any()


def test_latents_are_drawn_from_moments_anew_and_scaled(tmp_path):
    moments = np.stack([np.full((2, 2, 4), 3.0), np.full((2, 2, 4), np.log(0.25))], axis=1).astype(np.float16)
    info = videos.VideoInfo(2, 1, 2, 4, 1, 3, 5, has_moments=True, scale=0.5)
    text = np.ones((1, 3, 5), np.float16)
    example = {"id": "a", "video": moments, "text": text, "captions": json.dumps([])}
    videos.write(tmp_path / "d", info, np.zeros((3, 5)), {"train": ["a"]}, lambda name: example)
    batches = videos.VideoBatches(videos.open_videos(tmp_path / "d", "train"), seed=0, batch_size=20, text_dropout=0.0)
    drawn = np.concatenate([batches[i].video for i in range(10)])
    assert drawn.shape == (200, 2, 1, 2, 4)
    np.testing.assert_allclose(drawn.mean(), 1.5, atol=0.02)
    np.testing.assert_allclose(drawn.std(), 0.25, atol=0.02)


def test_what_is_missing_is_named(directory, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python -m ttt_jax\.data\.moving_shapes --output=\S+nowhere"):
        videos.open_videos(tmp_path / "nowhere", "train")
    with pytest.raises(ValueError, match=r"split: expected one of \['train', 'validation', 'test'\].*'tran'"):
        videos.open_videos(directory, "tran")
    with pytest.raises(FileExistsError):
        moving_shapes.make(directory, num_videos=3, **SIZES)
    info = videos.VideoInfo(5, 3, 12, 12, 2, 4, 16)
    with pytest.raises(ValueError, match=r"empty_text: expected shape \[4, 16\].*got \[3, 16\]"):
        videos.write(tmp_path / "d", info, np.zeros((3, 16)), {"train": ["a"]}, lambda name: {})
    assert not (tmp_path / "d").exists()
