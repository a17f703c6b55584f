"""Standard errors, intervals and tests with a stated error rate. The network is the replicate: one number per network.

Legend: n replicates x_i, mean m, sample standard deviation s, L = log(m / prediction), t_q(k) the upper q quantile of
Student's t with k degrees of freedom.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special
from scipy import stats as distributions

from varprop.errors import ArgumentError, require

Array = NDArray[np.float64]
POWER = 0.9
"""Probability with which an error of the size called detectable is found."""


def _replicates(values: ArrayLike, axis: int) -> Array:
    array = np.moveaxis(np.asarray(values, dtype=np.float64), axis, 0)
    require(len(array) >= 2, ArgumentError, "n", len(array), "too few replicates", "at least 2")
    return array


def mean_and_stderr(values: ArrayLike, axis: int = 0) -> tuple[Array, Array]:
    """Mean over independent replicates and its standard error s / sqrt(n).

    values: one number per network along `axis`, any unit. Exact for any distribution with a variance.
    Raises `ArgumentError` with fewer than 2 replicates. Source: textbook.

    >>> mean, stderr = mean_and_stderr([1.0, 2.0, 3.0])
    >>> float(mean), round(float(stderr), 4)
    (2.0, 0.5774)
    """
    array = _replicates(values, axis)
    return array.mean(axis=0), _spread(array) / math.sqrt(len(array))


def _spread(array: Array) -> Array:
    """Sample standard deviation over axis 0, and exactly 0 where all replicates are equal."""
    constant = (array == array[0]).all(axis=0)
    return np.where(constant, 0.0, array.std(axis=0, ddof=1))


def t_interval(values: ArrayLike, axis: int = 0, level: float = 0.95) -> tuple[Array, Array]:
    """Ends of the t interval of the mean, m -/+ t_{(1 - level) / 2}(n - 1) s / sqrt(n).

    level: coverage in (0, 1), exact for normal replicates. Raises `ArgumentError`. Source: Student 1908.

    >>> low, high = t_interval([1.0, 2.0, 3.0])
    >>> round(float(low), 3), round(float(high), 3)
    (-0.484, 4.484)
    """
    require(0 < level < 1, ArgumentError, "level", level, "outside the domain", "a number in (0, 1)")
    mean, stderr = mean_and_stderr(values, axis)
    half = distributions.t.isf((1 - level) / 2, np.shape(values)[axis] - 1) * stderr
    return mean - half, mean + half


def log_mean_and_stderr(values: ArrayLike, axis: int = 0) -> tuple[Array, Array]:
    """Logarithm of the mean of positive replicates and its standard error, safe for skewed replicates.

    The error is the larger of the delta method, s / (m sqrt(n)), and of the log-normal law, sqrt(v/n + v^2/(2(n-1)))
    with v the sample variance of log x. The first is too small exactly where the sample missed the large values and m
    is low; the second does not share that fault. Both tend to the same number for log-normal x; where they differ the
    larger is the careful one. Where some replicate is 0 only the first is used; where the mean is 0 the result is -inf
    with error 0. Raises `ArgumentError` for a negative value. Source: derived here; v-part of Cox in Land 1972.
    Checked by: tests/statistical/test_check_calibration.py.

    >>> log_mean, stderr = log_mean_and_stderr([2.0, 2.0, 2.0])
    >>> round(float(log_mean), 4), float(stderr)
    (0.6931, 0.0)
    """
    array = _replicates(values, axis)
    n = len(array)
    lowest = float(array.min(initial=0.0))
    require(lowest >= 0, ArgumentError, "values", lowest, "negative", "numbers >= 0")
    mean = array.mean(axis=0)
    positive = (array > 0).all(axis=0)
    logs = np.log(np.where(positive, array, 1.0))
    variance = _spread(logs) ** 2
    delta = _spread(array) / np.where(mean > 0, mean, 1.0) / math.sqrt(n)
    stderr = np.maximum(delta, np.sqrt(variance / n + variance**2 / (2 * (n - 1))))
    # The first replicate stands for the mean where all are equal: no rounding of the sum.
    centre = np.where((array == array[0]).all(axis=0), array[0], mean)
    log_mean = np.log(centre, out=np.full(centre.shape, -np.inf), where=centre > 0)
    return log_mean, stderr


def band_p_value(deviation: ArrayLike, stderr: ArrayLike, band: ArrayLike, dof: int, *, log_scale: bool) -> Array:
    """p-value of the composite hypothesis |true deviation| <= band.

    p = min(1, 2 P(T > excess / stderr')), excess = |deviation| - band, T Student with `dof` degrees of freedom: the
    hypothesis is rejected at level a exactly where the two-sided 1 - a interval of the deviation misses the band. As
    |deviation| - band <= |deviation - truth| for every truth in the band, the rate of false rejection is at most a.
    On the log scale stderr' = stderr sqrt(1 + excess) below the band (deviation < 0), stderr above: a sample that
    missed the large values has a low mean and a small spread at once. The factor is the second-order expansion of the
    likelihood ratio of a log-normal mean, w/n = D^2/v (1 + D) + O(D^4) at deviation D; it makes the test careful on the
    low side and is left out on the high side, where it would do the opposite. With stderr 0, p is 0 or 1.

    deviation: log(mean / prediction), or mean - prediction where not `log_scale`; stderr, band: the same unit.
    Source: derived here. Checked by: tests/statistical/test_check_calibration.py.

    >>> round(float(band_p_value(0.3, 0.1, 0.1, 30, log_scale=False)), 3)
    0.055
    >>> float(band_p_value(0.09, 0.001, 0.1, 30, log_scale=True))
    1.0
    """
    deviation, stderr, band = (np.asarray(a, dtype=np.float64) for a in (deviation, stderr, band))
    excess = np.abs(deviation) - band
    below = (deviation < 0) & (excess > 0) & log_scale
    widened = stderr * np.sqrt(1 + np.where(below, excess, 0.0))
    statistic = np.divide(excess, widened, out=np.where(excess > 0, np.inf, -np.inf), where=widened > 0)
    return np.minimum(1.0, 2 * distributions.t.sf(statistic, dof))


def log_ratio_interval(
    values: ArrayLike, prediction: ArrayLike = 1.0, axis: int = 0, level: float = 0.95
) -> tuple[Array, Array]:
    """Ends of the interval of log(true mean / prediction): the values that `band_p_value` does not reject.

    With L and its stderr from `log_mean_and_stderr` and h = t_{(1-level)/2}(n-1) stderr, the interval is
    [L - h, L + h^2/2 + h sqrt(1 + h^2/4)]: longer upwards. values > 0 along `axis`; prediction > 0, the same unit.

    >>> low, high = log_ratio_interval([0.9, 1.0, 1.1, 1.0])
    >>> round(float(low), 3), round(float(high), 3)
    (-0.131, 0.14)
    """
    require(0 < level < 1, ArgumentError, "level", level, "outside the domain", "a number in (0, 1)")
    log_mean, stderr = log_mean_and_stderr(values, axis)
    half = distributions.t.isf((1 - level) / 2, np.shape(values)[axis] - 1) * stderr
    centre = log_mean - np.log(np.asarray(prediction, dtype=np.float64))
    return centre - half, centre + widened_below(half)


def widened_below(half: ArrayLike) -> Array:
    """The excess D with D / sqrt(1 + D) = half: what `half` standard units become on the low side of the log scale."""
    half = np.asarray(half, dtype=np.float64)
    return half**2 / 2 + half * np.sqrt(1 + half**2 / 4)


@functools.cache
def detectable_factor(dof: int, level: float, power: float = POWER) -> float:
    """The k for which an error of k standard errors beyond the band is rejected at `level` with probability `power`.

    Solves P(Z + k S_1 > t_{level/2}(dof) S_2) = power, Z standard normal, S_1 and S_2 independent sqrt(chi^2_dof/dof):
    S_1 is the error of the standard error from which the claim is made, S_2 that of the repetition which has to reject,
    so that the claim holds on average over both. It tends to t_{level/2} + z_{1-power} for many replicates.
    dof >= 1; level and power in (0, 1). Quadrature over 256 x 256 quantile midpoints, relative error below 1 %.

    >>> round(detectable_factor(10**6, 0.05), 2)
    3.24
    >>> detectable_factor(3, 0.05) > detectable_factor(30, 0.05) > 3.24
    True
    """
    require(dof >= 1, ArgumentError, "dof", dof, "too small", "an integer >= 1")
    require(0 < level < 1, ArgumentError, "level", level, "outside the domain", "a number in (0, 1)")
    require(0 < power < 1, ArgumentError, "power", power, "outside the domain", "a number in (0, 1)")
    midpoints = (np.arange(256) + 0.5) / 256
    scale = np.sqrt(distributions.chi2.ppf(midpoints, dof) / dof)
    limit = float(distributions.t.isf(level / 2, dof)) * scale

    def missing(k: float) -> float:
        return float(special.ndtr(k * scale[:, None] - limit[None, :]).mean()) - power

    high = float(limit[-1]) + 10.0
    while missing(high) < 0:
        high *= 2
    return float(optimize.root_scalar(missing, bracket=(0.0, high), method="brentq", xtol=1e-6).root)


def detectable_error(stderr: ArrayLike, band: ArrayLike, dof: int, level: float, *, log_scale: bool) -> Array:
    """Smallest true |deviation| that `band_p_value` would reject at `level` with probability `POWER`, either side.

    band + k stderr with k = `detectable_factor`; on the log scale its larger, low side: band + D with
    D / sqrt(1 + D) = k stderr. Known without error (stderr 0): band itself. Unit: that of `stderr`.

    >>> round(float(detectable_error(0.01, 0.05, 63, 0.01, log_scale=False)), 4)
    0.0906
    """
    shift = detectable_factor(dof, level) * np.asarray(stderr, dtype=np.float64)
    return np.asarray(band, dtype=np.float64) + (widened_below(shift) if log_scale else shift)


def holm(p_values: ArrayLike, level: float) -> tuple[NDArray[np.bool_], Array]:
    """Holm's step-down procedure: which hypotheses to reject, and their adjusted p-values.

    Sorted p_(1) <= ... <= p_(m): adjusted p_(i) = max_{j <= i} min(1, (m - j + 1) p_(j)); rejected where <= level.
    The chance of any false rejection is at most `level` under every dependence. p_values: any shape, in [0, 1].
    Raises `ArgumentError`. Source: Holm 1979.

    >>> rejected, adjusted = holm([0.01, 0.04, 0.03], 0.05)
    >>> rejected.tolist(), adjusted.round(3).tolist()
    ([True, False, False], [0.03, 0.06, 0.06])
    """
    p = np.asarray(p_values, dtype=np.float64)
    require(bool(((p >= 0) & (p <= 1)).all()), ArgumentError, "p_values", p.tolist(), "outside the domain", "[0, 1]")
    require(0 < level < 1, ArgumentError, "level", level, "outside the domain", "a number in (0, 1)")
    order = np.argsort(p, axis=None, kind="stable")
    steps = np.maximum.accumulate(p.ravel()[order] * np.arange(p.size, 0, -1))
    adjusted = np.empty(p.size)
    adjusted[order] = np.minimum(1.0, steps)
    adjusted = adjusted.reshape(p.shape)
    return adjusted <= level, adjusted


def clopper_pearson(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Exact interval of a binomial probability from `successes` in `trials`; coverage at least `level`.

    Ends: the (1 - level)/2 quantile of Beta(k, n - k + 1) and the (1 + level)/2 quantile of Beta(k + 1, n - k); 0 at
    k = 0 and 1 at k = n. Raises `ArgumentError` unless 0 <= k <= n, n >= 1. Source: Clopper and Pearson 1934.

    >>> low, high = clopper_pearson(0, 100)
    >>> low, round(high, 4)
    (0.0, 0.0362)
    """
    require(trials >= 1, ArgumentError, "trials", trials, "too small", "an integer >= 1")
    require(0 <= successes <= trials, ArgumentError, "successes", successes, "outside the domain", f"0..{trials}")
    require(0 < level < 1, ArgumentError, "level", level, "outside the domain", "a number in (0, 1)")
    tail = (1 - level) / 2
    low = distributions.beta.ppf(tail, successes, trials - successes + 1) if successes else 0.0
    high = distributions.beta.isf(tail, successes + 1, trials - successes) if successes < trials else 1.0
    return float(low), float(high)
