"""Counts against the distribution they should come from."""

import math

import numpy as np


def assert_fits(observed, probabilities):
    """Chi-squared: the statistic of ``observed`` is not beyond five standard deviations of its distribution."""
    observed, probabilities = np.asarray(observed, float), np.asarray(probabilities, float)
    expected = observed.sum() * probabilities / probabilities.sum()
    assert expected.min() >= 5
    freedom = len(observed) - 1
    statistic = ((observed - expected) ** 2 / expected).sum()
    # Wilson and Hilferty: the cube root of chi-squared / k is nearly normal
    deviation = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert deviation < 5, f"chi-squared {statistic:.1f} at {freedom} degrees of freedom"


def assert_alike(first, second):
    """Chi-squared of two samples of about the same size: they are of one distribution."""
    first, second = np.asarray(first, float), np.asarray(second, float)
    assert_fits(2 * first, first + second)
