import dataclasses

import numpy as np

from ttt_jax.evaluation import baselines
from ttt_jax.evaluation.baselines import PRIOR_STRENGTHS, empirical_entropy, fit_tables


def fit(train, card, validation=()):
    """The table of recordings of one stream."""
    return fit_tables([t[None] for t in train], [card], [t[None] for t in validation])[0]


def test_tables_are_distributions_and_skip_gaps():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 5, 200)
    table = fit([tokens, np.array([1, -1, 2])], card=5)
    np.testing.assert_allclose(table.unigram.sum(), 1)
    for before in range(5):
        nll = [table.bigram_nll(np.array([before, now]))[1] for now in range(5)]
        np.testing.assert_allclose(np.exp(-np.array(nll)).sum(), 1)
    nll = table.bigram_nll(np.array([3, -1, 2, 2]))
    np.testing.assert_array_equal(np.isnan(nll), [False, True, False, False])
    np.testing.assert_allclose(nll[[0, 2]], table.unigram_nll(np.array([3, 2])))
    assert table.row_totals.sum() == 199
    followed = np.sum((tokens[:-1] == 2) & (tokens[1:] == 4))
    expected = (followed + 10 * table.unigram[4]) / (np.sum(tokens[:-1] == 2) + 10)
    np.testing.assert_allclose(table.bigram_nll(np.array([2, 4]))[1], -np.log(expected))


def test_a_bigram_finds_what_follows_and_validation_sets_its_smoothing():
    cycle = np.arange(300) % 6
    table = fit([cycle], card=6, validation=[cycle])
    assert table.prior_strength == min(PRIOR_STRENGTHS)
    assert table.bigram_nll(cycle)[1:].max() < 0.1
    assert table.unigram_nll(cycle).min() > 1.7
    noise = np.random.default_rng(0).integers(0, 6, 300)
    assert fit([cycle], card=6, validation=[noise]).prior_strength == max(PRIOR_STRENGTHS)


def test_tables_do_not_depend_on_how_many_pairs_are_counted_at_a_time(monkeypatch):
    rng = np.random.default_rng(0)
    recordings = [rng.integers(-1, 9, size) for size in (0, 1, 50, 200, 3, 120)]
    whole = fit(recordings, card=9)
    monkeypatch.setattr(baselines, "_FEW", 10)
    for name, value in dataclasses.asdict(fit(recordings, card=9)).items():
        np.testing.assert_array_equal(value, getattr(whole, name), err_msg=name)
    numbers = np.concatenate([r[:-1] * 9 + r[1:] for r in recordings if len(r)])
    numbers = numbers[np.concatenate([(r[:-1] >= 0) & (r[1:] >= 0) for r in recordings if len(r)])]
    pairs, counts = np.unique(numbers, return_counts=True)
    np.testing.assert_array_equal(whole.pairs, pairs)
    np.testing.assert_array_equal(whole.pair_counts, counts)


def test_streams_have_tables_of_their_own_and_may_be_missing():
    codes = np.stack([np.arange(40) % 4, np.full(40, -1)])
    present, missing = fit_tables([codes, codes[:, :1]], [4, 9], [codes])
    assert present.bigram_nll(codes[0])[1:].max() < 0.2
    assert np.isnan(missing.bigram_nll(codes[1])).all()
    np.testing.assert_allclose(missing.bigram_nll(np.array([3, 3])), np.log(9))


def test_empirical_entropy():
    np.testing.assert_allclose(empirical_entropy([np.array([0, 1, -1]), np.array([2, 3])], 9), np.log(4))
    assert np.isnan(empirical_entropy([np.array([-1])], 9))
