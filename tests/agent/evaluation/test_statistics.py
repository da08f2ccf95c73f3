"""Statistics of few runs, against scipy's and by hand."""

import numpy as np
import pytest

from longdream.agent.evaluation.statistics import interquartile_mean, interval, probability_of_improvement


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 30])
def test_the_interquartile_mean_is_scipys_trimmed_mean(n: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    scores = np.random.default_rng(n).normal(size=(5, n))
    np.testing.assert_allclose(interquartile_mean(scores), stats.trim_mean(scores, 0.25, axis=1))


def test_the_probability_of_improvement_is_that_of_mann_and_whitney() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    ours, theirs = rng.integers(0, 6, 9), rng.integers(0, 6, 7)
    known = stats.mannwhitneyu(ours, theirs).statistic / (len(ours) * len(theirs))
    assert probability_of_improvement(ours, theirs) == pytest.approx(known)
    assert probability_of_improvement(np.ones(3), np.zeros(2)) == 1
    assert probability_of_improvement(np.ones(3), np.ones(2)) == 0.5


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    hits = [low <= 3 <= high for low, high in (interval(mean, rng.normal(3, 1, 30), seed=i) for i in range(200))]
    assert 0.88 < np.mean(hits) < 0.99  # the bootstrap of 30 values is a little too narrow


def mean(scores: np.ndarray) -> np.ndarray:
    return scores.mean(-1)


def test_every_group_is_drawn_from_by_itself() -> None:
    """As the strata of a stratified bootstrap: no score of one group ends up in the other."""
    low, high = interval(lambda a, b: b.min(-1) - a.max(-1), np.array([0.0, 1.0]), np.array([5.0, 6.0, 7.0]))
    assert (low, high) == (4.0, 6.0)  # 7 - 0 is drawn less than once in a hundred times
