"""Statistics of few runs: interquartile means, bootstrap intervals and the probability of improvement.

After Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (arXiv 2108.13264).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95


def interquartile_mean(scores: np.ndarray) -> np.ndarray:
    """Mean of the middle half of the scores `(..., n)`: a quarter of them, rounded down, is left out at each end."""
    ordered = np.sort(scores, axis=-1)
    cut = scores.shape[-1] // 4
    return ordered[..., cut : scores.shape[-1] - cut].mean(-1)


def probability_of_improvement(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Share of the pairs of a score `(..., n)` of ours and one `(..., m)` of theirs in which ours is higher; ties count
    half (the statistic of Mann and Whitney over n m)."""
    difference = ours[..., :, None] - theirs[..., None, :]
    return ((difference > 0) + 0.5 * (difference == 0)).mean((-1, -2))


def interval(statistic: Callable[..., np.ndarray], *groups: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The 95% percentile interval of a statistic of groups of scores, each `(n,)`, by the stratified bootstrap: every
    group is drawn from anew, with replacement, as many scores as it has. A group of one score says nothing of spread.

    Args:
        statistic: of resampled groups, each `(RESAMPLES, n)`, to `(RESAMPLES,)`.
    """
    rng = np.random.default_rng(seed)
    drawn = [group[rng.integers(len(group), size=(RESAMPLES, len(group)))] for group in groups]
    low, high = np.quantile(statistic(*drawn), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
