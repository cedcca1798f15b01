import numpy as np
import pytest

from ttt_jax.evaluation.statistics import mean_over_recordings, position_edges


def test_mean_weighs_tokens_and_interval_covers_recordings():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(100):
        values = rng.normal(3, 1, 30)  # one value a recording, its tokens all alike
        estimate = mean_over_recordings(values * 50, np.full(30, 50), seed=trial)
        hits += estimate.low < 3 < estimate.high
    assert 88 <= hits <= 100  # binomial around 95, bootstrap a little narrow at 30
    weighted = mean_over_recordings(np.array([2.0, 30.0]), np.array([1, 10]))
    assert weighted.mean == pytest.approx(32 / 11)
    assert (weighted.num_tokens, weighted.num_recordings) == (11, 2)


def test_too_little_data_gives_no_interval():
    one = mean_over_recordings(np.array([2.0, 0.0]), np.array([4, 0]))
    assert one.mean == 0.5
    assert np.isnan([one.low, one.high]).all()
    assert np.isnan(mean_over_recordings(np.zeros(2), np.zeros(2)).mean)


@pytest.mark.parametrize(
    ("context", "longest", "edges"),
    [
        (100, 1300, [0, 25, 50, 100, 200, 400, 800, 1300]),
        (100, 1000, [0, 25, 50, 100, 200, 400, 1000]),
        (100, 30, [0, 30]),
        (4, 0, [0, 1]),
    ],
)
def test_buckets_double_from_the_context_on(context, longest, edges):
    assert position_edges(context, longest) == edges
