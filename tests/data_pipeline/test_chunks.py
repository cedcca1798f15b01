import itertools

import numpy as np
import pytest

from ttt_jax.data.chunks import Crops, Stages, Walks
from ttt_jax.models import moshi

DELAYS, INITIAL = (0, 0, 2), (70, 80, 90)


class Numbered:
    """Recordings of three streams whose tokens number recording and frame."""

    def __init__(self, lengths):
        self.num_frames = np.array(lengths)

    def __len__(self):
        return len(self.num_frames)

    def codes(self, index):
        frames = np.arange(self.num_frames[index])
        return np.stack([1000 * index + frames + 100_000 * stream for stream in range(3)]).astype(np.int32)


def walks(lengths=(23, 5, 40, 1), *, batch_size=2, num_frames=8, **options) -> Walks:
    dataset = Numbered(lengths)
    return Walks(
        dataset, seed=3, batch_size=batch_size, num_frames=num_frames, delays=DELAYS, initial=INITIAL, **options
    )


def read_row(walk, row, steps):
    """The walks of a row: each the list of (tokens, length) of its chunks."""
    found = []
    for step in range(steps):
        chunk = walk[step]
        if chunk.reset[row]:
            found.append([])
        found[-1].append((chunk.tokens[row], int(chunk.length[row])))
    return found


@pytest.mark.parametrize("row", [0, 1])
def test_a_row_reads_whole_recordings_as_the_model_delays_them(row):
    dataset = Numbered((23, 5, 40, 1))
    seen = []
    for chunks in read_row(walks(), row, 60)[:-1]:
        read = np.concatenate([tokens[:, 1 : 1 + length] for tokens, length in chunks], axis=1)
        index = int(read[0, 0]) // 1000
        seen.append(index)
        codes = np.pad(dataset.codes(index), ((0, 0), (0, 2)), constant_values=-1)
        delayed = np.asarray(moshi.delay(codes[None], DELAYS, INITIAL))[0]
        np.testing.assert_array_equal(read, delayed[:, 1:])
        np.testing.assert_array_equal(chunks[0][0][:, 0], INITIAL)
        for (before, length), (after, _) in itertools.pairwise(chunks):
            assert length == 8
            np.testing.assert_array_equal(before[:, -1], after[:, 0])
        last, length = chunks[-1]
        assert 0 < length <= 8
        assert (last[:, 1 + length :] == -1).all()
    assert len(set(seen)) == 4


def test_an_epoch_has_every_recording_once():
    lengths = (23, 5, 40, 1, 9, 17)
    walk = walks(lengths, batch_size=3)
    starts = [int(tokens[0, 1]) // 1000 for row in range(3) for (tokens, _), *_ in read_row(walk, row, 40)[:2]]
    assert sorted(starts) == list(range(6))


def test_a_chunk_needs_none_before_it_and_rows_can_be_drawn_alone():
    forward = walks()
    seen = [forward[step] for step in range(30)]
    for step in (29, 3, 17):
        for got, want in zip(walks()[step], seen[step], strict=True):
            np.testing.assert_array_equal(got, want)
        for got, want in zip(walks(rows=range(1, 2))[step], seen[step], strict=True):
            np.testing.assert_array_equal(got, want[1:])
    other = Walks(Numbered((23, 5, 40, 1)), seed=4, batch_size=2, num_frames=8, delays=DELAYS, initial=INITIAL)
    assert any((other[step].tokens != seen[step].tokens).any() for step in range(6))


def test_recordings_cut_into_pieces():
    walk = walks((23, 5), batch_size=1, recording_frames=10)
    pieces = sorted(int(chunks[0][0][0, 1]) for chunks in read_row(walk, 0, 20)[:4])
    assert pieces == [0, 10, 20, 1000]
    for chunks in read_row(walk, 0, 20)[:4]:
        frames = sum(length for _, length in chunks) - max(DELAYS)
        first = int(chunks[0][0][0, 1])
        assert frames == {0: 10, 10: 10, 20: 3, 1000: 5}[first]
        np.testing.assert_array_equal(chunks[0][0][:, 0], INITIAL)


def test_crops_are_delayed_and_fresh():
    chunk = Crops(Numbered((30, 4)), seed=0, batch_size=3, num_frames=6, delays=DELAYS, initial=INITIAL)[5]
    assert chunk.tokens.shape == (3, 3, 7)
    assert chunk.reset.all()
    for row in chunk.tokens:
        np.testing.assert_array_equal(row[:, 0], INITIAL)
        np.testing.assert_array_equal(row[2, :3], [90] * 3)
        np.testing.assert_array_equal(row[2, 3:], np.where(row[0, 1:5] < 0, -1, row[0, 1:5] + 200_000))
    alone = Crops(
        Numbered((30, 4)), seed=0, batch_size=3, num_frames=6, delays=DELAYS, initial=INITIAL, rows=range(2, 3)
    )[5]
    np.testing.assert_array_equal(alone.tokens[0], chunk.tokens[2])


def test_stages_follow_each_other_and_the_last_has_no_end():
    stages = Stages([(2, "abc"), (3, "defg"), (1, "hijklmnop")])
    assert "".join(stages[step] for step in range(10)) == "abdefhijkl"


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="num_frames: expected a positive integer, got 0"):
        walks(num_frames=0)
    with pytest.raises(ValueError, match="batch_size: expected a positive integer, got -1"):
        walks(batch_size=-1)
    with pytest.raises(ValueError, match="at least one recording"):
        walks(())
