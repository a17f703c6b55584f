"""`LogMean`: the logarithm of a mean of replicates >= 0, and what is known of its error.

Legend: n replicates x_i, k of them above 0, mean m, sample standard deviation s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from varprop.errors import ArgumentError, require

Array = NDArray[np.float64]


def replicates(values: ArrayLike, axis: int) -> Array:
    """The values with their replicates along the first axis, at least 2 of them."""
    array = np.moveaxis(np.asarray(values, dtype=np.float64), axis, 0)
    require(len(array) >= 2, ArgumentError, "n", len(array), "too few replicates", "at least 2")
    return array


def sample_spread(array: Array) -> Array:
    """Sample standard deviation over axis 0, and exactly 0 where all replicates are equal."""
    constant = (array == array[0]).all(axis=0)
    return np.where(constant, 0.0, array.std(axis=0, ddof=1))


@dataclass(frozen=True)
class LogMean:
    """Logarithm of the mean of replicates >= 0, with what is known of its error: arrays of one shape.

    stderr: on the low side, where a sample has missed large values: the larger of the delta method, s / (m sqrt(n)),
    and of the log-normal law, sqrt(v/k + v^2/(2(k-1)) + (n-k)/(nk)), v the sample variance of log x over the k values
    above 0; the last term is the binomial error of k. The first is too small exactly where m is low; the second does
    not share that fault. Infinite for k <= 1: where all values but one are 0, nothing bounds the mean from above.
    delta: s / (m sqrt(n)), and with 0 < k < n two more zeros, sqrt(s^2 / (m^2 n) + 2/(nk)): where few values are 0,
    Student's error of their share is too small. skewness: see `skewness_factor`.
    mean_log, mean_log_stderr: mean of log x (below log m) and its standard error, infinite where a value is 0.
    """

    value: Array
    stderr: Array
    delta: Array
    skewness: Array
    mean_log: Array
    mean_log_stderr: Array


def log_mean(values: ArrayLike, axis: int = 0) -> LogMean:
    """`LogMean` of replicates >= 0 along `axis`.

    Where all are 0 the logarithm is -inf and every error infinite: n zeros are a sample, too, and no exact 0.
    Raises `ArgumentError` for a negative value. Source: derived here; v-part of Cox in Land 1972.
    Checked by: tests/statistical/test_check_calibration.py.

    >>> found = log_mean([2.0, 2.0, 2.0])
    >>> round(float(found.value), 4), float(found.stderr), float(log_mean([0.0, 0.0, 2.0]).stderr)
    (0.6931, 0.0, inf)
    """
    array = replicates(values, axis)
    n = len(array)
    lowest = float(array.min(initial=0.0))
    require(lowest >= 0, ArgumentError, "values", lowest, "negative", "numbers >= 0")
    mean = array.mean(axis=0)
    above = array > 0
    count = above.sum(axis=0)
    logs = np.log(np.where(above, array, 1.0))
    mean_log = logs.sum(axis=0) / np.maximum(count, 1)
    rest = np.where(above, logs - mean_log, 0.0)
    constant = (array == array[0]).all(axis=0)
    variance = np.where(constant, 0.0, (rest**2).sum(axis=0) / np.maximum(count - 1, 1))
    known = (count > 1) | (n == count)
    k = np.maximum(count, 2)
    wide = np.sqrt(variance / k + variance**2 / (2 * (k - 1)) + (n - k) / (n * k))
    delta = sample_spread(array) / np.where(mean > 0, mean, 1.0) / math.sqrt(n)
    more = np.sqrt(delta**2 + 2 / (n * np.maximum(count, 1)))
    delta = np.where(count == n, delta, np.where(count > 0, more, np.inf))
    # The first replicate stands for the mean where all are equal: no rounding of the sum.
    centre = np.where(constant, array[0], mean)
    value = np.log(centre, out=np.full(centre.shape, -np.inf), where=centre > 0)
    return LogMean(
        value=value,
        stderr=np.where(known, np.maximum(delta, wide), np.inf),
        delta=delta,
        skewness=skewness_factor(array),
        mean_log=np.where(count == n, mean_log, value),
        mean_log_stderr=np.where(count == n, np.sqrt(variance / n), np.inf),
    )


def known_log_mean(mean: ArrayLike, stderr: ArrayLike = 0.0) -> LogMean:
    """`LogMean` of a mean that is known with this standard error (0 = exactly), both in the unit of the mean.

    >>> float(known_log_mean(2.0, 0.1).stderr)
    0.05
    """
    mean, stderr = np.broadcast_arrays(np.asarray(mean, dtype=np.float64), np.asarray(stderr, dtype=np.float64))
    value = np.log(mean, out=np.full(mean.shape, -np.inf), where=mean > 0)
    error = np.divide(stderr, mean, out=np.where(stderr > 0, np.inf, 0.0), where=mean > 0)
    return LogMean(value, error, error, np.ones(mean.shape), value, error)


def expected_log_mean(spread: ArrayLike, n: int) -> LogMean:
    """`LogMean` of n log-normal replicates of mean 1 and standard deviation `spread`, each part at its expectation.

    >>> round(float(expected_log_mean(0.1, 100).stderr), 6), round(float(expected_log_mean(2.0, 100).stderr), 3)
    (0.01, 0.2)
    """
    spread = np.asarray(spread, dtype=np.float64)
    variance = np.log1p(spread**2)
    delta = spread / math.sqrt(n)
    return LogMean(
        value=np.zeros(spread.shape),
        stderr=np.maximum(delta, np.sqrt(variance / n + variance**2 / (2 * (n - 1)))),
        delta=delta,
        skewness=np.ones(spread.shape),
        mean_log=-variance / 2,
        mean_log_stderr=np.sqrt(variance / n),
    )


def skewness_factor(values: ArrayLike, axis: int = 0) -> Array:
    """c = max(1, 2 (g - 2 e) / (3 s / m) - 1): the skewness g of the sample against that of a log-normal law.

    g: adjusted Fisher-Pearson; e = sqrt(6 n (n - 1) / ((n - 2)(n + 1)(n + 3))), its standard error for normal
    replicates: only what is beyond two of them counts. Student's statistic of replicates of skewness g lacks the term
    g t^2 / (3 sqrt(n)) (Johnson 1978, Hall 1992); for the deviation D = log(m / truth) < 0 that divides D / stderr by
    sqrt(1 + (2 g m / (3 s) - 1) |D|) to second order. A log-normal law of small spread has g = 3 s / m, hence the
    least value 1: few networks miss the tail that they come from. n <= 2: 1.

    >>> rare = 1 + 0.1 * np.random.default_rng(0).pareto(4, 4000)
    >>> bool(skewness_factor(rare) > 10), float(skewness_factor([1.0, 2.0, 3.0]))
    (True, 1.0)
    """
    array = replicates(values, axis)
    n, mean, spread = len(array), array.mean(axis=0), sample_spread(array)
    if n <= 2:
        return np.ones(mean.shape)
    scale = np.where(spread > 0, spread, 1.0)
    standard = (array - mean) / scale
    skewness = (standard * standard * standard).sum(axis=0) * n / ((n - 1) * (n - 2))
    error = math.sqrt(6 * n * (n - 1) / ((n - 2) * (n + 1) * (n + 3)))
    return np.maximum(1.0, 2 * (skewness - 2 * error) * mean / (3 * scale) - 1)
