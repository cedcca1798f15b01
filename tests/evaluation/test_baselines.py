import numpy as np

from ttt_jax.evaluation.baselines import PRIOR_STRENGTHS, empirical_entropy, fit_table


def test_tables_are_distributions_and_skip_gaps():
    rng = np.random.default_rng(0)
    table = fit_table([rng.integers(0, 5, 200), np.array([1, -1, 2])], card=5)
    np.testing.assert_allclose(table.unigram.sum(), 1)
    for before in range(5):
        nll = [table.bigram_nll(np.array([before, now]))[1] for now in range(5)]
        np.testing.assert_allclose(np.exp(-np.array(nll)).sum(), 1)
    nll = table.bigram_nll(np.array([3, -1, 2, 2]))
    np.testing.assert_array_equal(np.isnan(nll), [False, True, False, False])
    np.testing.assert_allclose(nll[[0, 2]], table.unigram_nll(np.array([3, 2])))
    assert table.pairs.sum() == 199


def test_a_bigram_finds_what_follows_and_validation_sets_its_smoothing():
    cycle = np.arange(300) % 6
    table = fit_table([cycle], card=6, validation=[cycle])
    assert table.prior_strength == min(PRIOR_STRENGTHS)
    assert table.bigram_nll(cycle)[1:].max() < 0.1
    assert table.unigram_nll(cycle).min() > 1.7
    noise = np.random.default_rng(0).integers(0, 6, 300)
    assert fit_table([cycle], card=6, validation=[noise]).prior_strength == max(PRIOR_STRENGTHS)


def test_empirical_entropy():
    np.testing.assert_allclose(empirical_entropy([np.array([0, 1, -1]), np.array([2, 3])], 9), np.log(4))
    assert np.isnan(empirical_entropy([np.array([-1])], 9))
