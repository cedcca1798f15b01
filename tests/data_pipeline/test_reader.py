import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from ttt_jax.data import reader
from ttt_jax.data.builder import load_builder
from ttt_jax.data.text import load_tokenizer


@pytest.fixture(scope="module")
def train(small_dataset):
    return reader.open_dataset(small_dataset, "train")


def test_recordings_are_whole(small_dataset, train):
    assert len(train) >= 1
    for i in range(len(train)):
        recording = train[i]
        assert recording.codes.shape == (17, train.num_frames[i])
        assert recording.codes.dtype == np.int32
        assert recording.metadata["split"] == "train"
        assert abs(recording.metadata["duration_s"] * 12.5 - train.num_frames[i]) <= 1
    assert train[-1].id == train[len(train) - 1].id
    assert (small_dataset / "wav" / "conversation-5-00001.wav").is_file()


def test_the_first_recordings_alone(small_dataset, train):
    one = train.first(1)
    assert len(one) == 1
    assert one.num_frames.tolist() == train.num_frames[:1].tolist()
    assert one[0].id == train[0].id
    with pytest.raises(IndexError, match="outside this split of 1 recordings"):
        one[1]
    assert len(train.first(100)) == len(train)


def test_the_codes_last_asked_for_are_kept(train, monkeypatch):
    read = []

    class Source:
        def __getitem__(self, index):
            read.append(index)
            return train._source[0]

    monkeypatch.setattr(reader, "_CACHE_BYTES", 2 * train[0].codes.nbytes)
    dataset = reader.TokenDataset(Source(), train.info, train.num_frames[:1].tolist() * 3)
    for index in (0, 1, 0, 2, 0, 1, 1):
        np.testing.assert_array_equal(dataset.codes(index), train[0].codes)
    assert read == [0, 1, 2, 1]


def test_it_is_an_ordinary_tfds_dataset(small_dataset, train):
    builder = load_builder(small_dataset)
    assert isinstance(builder, tfds.core.DatasetBuilder)
    source = builder.as_data_source(split="train")
    np.testing.assert_array_equal(source[0]["codes"].T, train[0].codes)
    assert "tensorflow" not in sys.modules


def test_the_answer_to_a_question_stands_in_the_text_at_its_time(small_dataset):
    tokenizer = load_tokenizer(small_dataset / "tokenizer.model")
    found = 0
    for split in ("train", "test"):
        dataset = reader.open_dataset(small_dataset, split)
        assert dataset.info.text_card == tokenizer.get_piece_size()
        for i in range(len(dataset)):
            codes, metadata = dataset[i].codes, dataset[i].metadata
            for entry in metadata["spoken"]:
                if entry["role"] == "answer":
                    window = codes[0, entry["start_frame"] : entry["start_frame"] + 40]
                    heard = tokenizer.decode([int(piece) for piece in window if piece > 3])
                    fact = metadata["facts"][entry["fact"]]
                    if 0 not in tokenizer.encode(fact["value"]):  # letters that training never had are left out
                        assert fact["value"] in heard
                        found += 1
    assert found >= 1


def test_batches_are_crops_of_recordings(train):
    drawn = reader.crops(train, seed=0, num_frames=32)
    batch = [drawn[i] for i in range(4)]
    everything = [train[i].codes for i in range(len(train))]
    for crop in batch:
        assert crop.shape == (17, 32)
        assert crop.dtype == np.int32
        assert any(
            (np.lib.stride_tricks.sliding_window_view(codes, 32, axis=1)[:, start] == crop).all()
            for codes in everything
            for start in range(codes.shape[1] - 31)
        )


def test_a_step_needs_no_steps_before_it(train):
    forward = reader.crops(train, seed=1, num_frames=16)
    seen = [forward[step] for step in range(6)]
    resumed = reader.crops(train, seed=1, num_frames=16)
    for step in (5, 3, 4):
        np.testing.assert_array_equal(resumed[step], seen[step])
    assert not np.array_equal(seen[0], seen[1])
    assert not np.array_equal(seen[0], reader.crops(train, seed=2, num_frames=16)[0])
    assert reader.crops(train, seed=1, num_frames=16)[10**9].shape == (17, 16)


def test_another_process_draws_the_same_crops(small_dataset, train):
    code = (
        "import sys; from ttt_jax.data.reader import crops, open_dataset\n"
        "b = crops(open_dataset(sys.argv[1], 'train'), seed=9, num_frames=20)[11]\n"
        "sys.stdout.write(b.tobytes().hex())"
    )
    out = subprocess.run([sys.executable, "-c", code, small_dataset], capture_output=True, text=True, check=True).stdout
    assert out == reader.crops(train, seed=9, num_frames=20)[11].tobytes().hex()


class Counting:
    """A dataset whose text stream numbers its frames over all recordings."""

    def __init__(self, lengths):
        self.num_frames = np.array(lengths)
        offsets = np.cumsum([0, *lengths])
        self._codes = [np.tile(np.arange(a, b), (17, 1)) for a, b in zip(offsets[:-1], offsets[1:], strict=True)]  # noqa: RUF007

    def __len__(self):
        return len(self._codes)

    def codes(self, index):
        return self._codes[index]


def test_frames_are_about_equally_likely_and_short_recordings_padded():
    dataset = Counting([400, 100, 5, 20])
    crops = reader.crops(dataset, seed=0, num_frames=20)  # type: ignore[arg-type]
    drawn = np.stack([crops[i] for i in range(4000)])[:, 0]
    assert (drawn[(drawn == 500).any(axis=1)] == [500, 501, 502, 503, 504] + [-1] * 15).all()
    counts = np.bincount(drawn[drawn >= 0], minlength=525)
    # 80 000 frames over weights 400 + 100 + 20 + 20. A recording's ends are in fewer crops, so compare averages;
    # a recording of 20 frames is drawn 4000 / 27 times, give or take 8 %.
    for part in (counts[:400], counts[400:500], counts[500:505], counts[505:525]):
        assert abs(part.mean() * 540 / 80000 - 1) < 0.25
    assert counts[20:380].max() < 1.5 * counts[20:380].min()


def test_a_missing_dataset_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no finished token dataset.*ttt_jax\.data\.prepare"):
        reader.open_dataset(tmp_path / "nowhere", "train")
    with pytest.raises(FileNotFoundError, match=r"no finished token dataset.*ttt_jax\.data\.prepare"):
        reader.splits(tmp_path / "nowhere")


def test_splits_are_those_that_can_be_opened(small_dataset):
    assert reader.splits(small_dataset) == ["train", "test"]
    for split in reader.splits(small_dataset):
        assert len(reader.open_dataset(small_dataset, split)) >= 1


def test_bad_input(small_dataset, train):
    with pytest.raises(ValueError, match=r"split: expected one of \['train', 'test'\].*got 'tset'"):
        reader.open_dataset(small_dataset, "tset")
    with pytest.raises(IndexError, match="outside this split"):
        train[len(train)]
    with pytest.raises(ValueError, match="num_frames: expected a positive integer, got 0"):
        reader.crops(train, seed=0, num_frames=0)


def test_codes_outside_the_described_cardinality(small_dataset, tmp_path):
    shutil.copytree(small_dataset, tmp_path / "copy")
    description = tmp_path / "copy" / "tokens.json"
    fields = json.loads(description.read_text())
    description.write_text(json.dumps({**fields, "card": 300}))
    with pytest.raises(
        ValueError, match=r"recording 'conversation-5-00000': stream 1 holds \d+ at frame \d+, expected -1 or"
    ):
        reader.open_dataset(tmp_path / "copy", "train")[0]
    fields["num_frames"]["train"].append(5)
    description.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="do not belong together"):
        reader.open_dataset(tmp_path / "copy", "train")
