"""Masked spans: how many frames, how long, and the same ones for the same seed and step."""

import itertools

import numpy as np

from ttt_jax.data.spans import MaskedCrops, mask_spans, num_masked
from ttt_jax.data.tokens import TokenInfo


class Recordings:
    """As much of a TokenDataset as crops need."""

    info = TokenInfo("codec2", 12.5, 8000, num_codebooks=1, card=50, text_card=50)

    def __init__(self, *lengths):
        rng = np.random.default_rng(0)
        self.num_frames = np.array(lengths)
        self._codes = [rng.integers(0, 50, (3, n)).astype(np.int32) for n in lengths]

    def __len__(self):
        return len(self._codes)

    def codes(self, index):
        return self._codes[index]


def lengths_of_spans(masked):
    return [len(list(group)) for value, group in itertools.groupby(masked) if value]


def test_as_many_frames_as_asked_for_in_spans_of_the_lengths_asked_for():
    masks = [mask_spans(np.random.default_rng(i), 400, 0.3, 10, 40) for i in range(50)]
    assert {int(mask.sum()) for mask in masks} == {120}
    assert num_masked(400, 0.3) == 120
    spans = sorted(itertools.chain.from_iterable(map(lengths_of_spans, masks)))
    # One span of each mask is cut short; others may touch and be one.
    assert sum(span < 10 for span in spans) <= 50
    assert 10 < np.median(spans) < 60
    where = np.mean(masks, axis=0)[40:-40]  # the ends are in fewer spans
    assert where.min() > 0.1
    assert where.max() < 0.6


def test_short_rows_are_masked_too():
    assert mask_spans(np.random.default_rng(0), 5, 0.4, 16, 64).sum() == 2
    assert mask_spans(np.random.default_rng(0), 1, 0.1, 16, 64).sum() == 1
    assert mask_spans(np.random.default_rng(0), 0, 0.4, 16, 64).shape == (0,)


def test_batches_follow_from_seed_and_step_and_rows_from_their_place():
    data = Recordings(90, 200, 7)
    options = {"batch_size": 3, "num_frames": 40, "share": 0.5, "shortest": 4, "longest": 9}
    crops, again, other = (MaskedCrops(data, seed=seed, **options) for seed in (1, 1, 2))
    for a, b in zip(crops[5], again[5], strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.any(crops[5].masked != crops[6].masked)
    assert np.any(crops[5].masked != other[5].masked)
    last = MaskedCrops(data, seed=1, rows=[2], **options)[5]
    np.testing.assert_array_equal(last.codes[0], crops[5].codes[2])
    np.testing.assert_array_equal(last.masked[0], crops[5].masked[2])


def test_padding_is_neither_real_nor_masked():
    data = Recordings(7)
    batch = MaskedCrops(data, seed=0, batch_size=1, num_frames=20, share=0.5, shortest=2, longest=4)[0]
    assert batch.length.tolist() == [7]
    assert batch.masked.sum() == 4
    assert not batch.masked[0, 7:].any()
    np.testing.assert_array_equal(batch.codes[0, :, :7], data.codes(0))
    assert (batch.codes[0, :, 7:] == -1).all()
