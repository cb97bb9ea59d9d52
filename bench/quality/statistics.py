"""Means with bootstrap intervals over groups, and differences of pairs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 4000


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


def bootstrap(groups: Sequence[Sequence[float]], seed: int = 0) -> Estimate:
    """The mean of all observations; groups (observations that hang together) are drawn anew.

    Percentile bootstrap: as many groups as there are, with replacement, and the mean over the
    observations of those. With one group the interval is not known: minus to plus infinity.
    """
    groups = [group for group in groups if len(group)]
    if not groups:
        raise ValueError("there are no observations, must be 1 or more")
    sums = np.array([float(np.sum(group)) for group in groups])
    counts = np.array([len(group) for group in groups])
    mean = float(sums.sum() / counts.sum())
    if len(groups) == 1:
        return Estimate(mean, -np.inf, np.inf)
    drawn = np.random.default_rng(seed).integers(len(groups), size=(RESAMPLES, len(groups)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Estimate(mean, float(low), float(high))


def difference(
    groups: Sequence[Sequence[float]], others: Sequence[Sequence[float]], seed: int = 0
) -> Estimate:
    """The mean of groups - others, pair by pair, both with the same observations in the same
    places: what the pairs share (the prompt, its difficulty) drops out."""
    if [len(group) for group in groups] != [len(other) for other in others]:
        raise ValueError("the two sides of a paired difference must have the same observations")
    return bootstrap([np.subtract(a, b).tolist() for a, b in zip(groups, others)], seed)
