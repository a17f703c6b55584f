"""The order without a table: a permutation, as random as one drawn from a table, and the same for ever."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from scipy import stats

from varprop.corpus.order import permuted


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 99, 100, 101, 1000, 65_537])
def test_every_image_occurs_once(size: int) -> None:
    for key in ((0, 0), (2**62, 3)):
        assert np.array_equal(np.sort(permuted(np.arange(size), size, key)), np.arange(size))


def test_a_part_is_permuted_as_the_whole() -> None:
    whole = permuted(np.arange(1000), 1000, (7, 0))
    numbers = np.array([[999, 0], [17, 17]])
    np.testing.assert_array_equal(permuted(numbers, 1000, (7, 0)), whole[numbers])
    assert permuted(np.array([], dtype=int), 10, (0, 0)).shape == (0,)


def test_the_order_does_not_change_between_versions() -> None:
    """A resumed run and another machine must see the same batches."""
    assert permuted(np.arange(8), 8, (0, 0)).tolist() == [3, 2, 7, 1, 5, 6, 0, 4]
    assert permuted(np.arange(3), 10**10, (1, 2)).tolist() == [6853486234, 6641248656, 3937567474]


@pytest.mark.parametrize("size", [3, 6, 30])
def test_each_place_is_as_likely_as_any_other(size: int) -> None:
    """Chi-squared over the table place x image of 1,000 keys; false-fail rate 1e-4 each, fixed keys."""
    counts = np.zeros((size, size))
    for key in range(1000):
        counts[np.arange(size), permuted(np.arange(size), size, (key, 0))] += 1
    statistic = ((counts - 1000 / size) ** 2).sum() / (1000 / size) * (size - 1) / size
    assert statistic < stats.chi2.isf(1e-4, (size - 1) ** 2)


def test_neighbours_part_and_epochs_are_unrelated() -> None:
    """Correlations over 100,003 numbers: five standard errors, false-fail rate 6e-7 each."""
    size = 100_003
    first, second, other = (permuted(np.arange(size), size, key) for key in ((0, 0), (0, 1), (1, 0)))
    pairs = [(first, np.arange(size)), (first[1:], first[:-1]), (first[317:], first[:-317]), (first, second)]
    for a, b in [*pairs, (first, other)]:
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / math.sqrt(size)
    # The gaps between neighbours of a random order: triangular law (Kolmogorov-Smirnov, 1e-4).
    gaps = np.diff(first)[::2] / size
    assert stats.kstest(gaps, stats.triang(0.5, loc=-1, scale=2).cdf).pvalue > 1e-4


def test_places_in_a_huge_range_cost_memory_of_the_batch_alone() -> None:
    """512 numbers of 10^15: a table would not fit; the time limit is 100 times what it takes."""
    start = time.process_time()
    images = permuted(np.arange(10**15 - 512, 10**15), 10**15, (0, 0))
    assert time.process_time() - start < 0.1
    assert len(np.unique(images)) == 512
    assert images.min() >= 0
    assert images.max() < 10**15
