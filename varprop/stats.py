"""Standard errors, intervals and tests with a stated error rate. The network is the replicate: one number per network.

Legend: n replicates x_i, mean m, sample standard deviation s, L = log(m / prediction), t_q(k) the upper q quantile of
Student's t with k degrees of freedom.
"""

from __future__ import annotations

import functools
import math
from dataclasses import fields

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special
from scipy import stats as distributions

from varprop.errors import ArgumentError, require
from varprop.log_mean import LogMean, known_log_mean, log_mean, replicates, sample_spread

Array = NDArray[np.float64]
POWER = 0.9
"""Probability with which an error of the size called detectable is found."""
LARGEST_LOG = float(np.log(np.finfo(np.float64).max))
"""Stands for an infinite log ratio, since a result holds finite numbers only."""


def mean_and_stderr(values: ArrayLike, axis: int = 0) -> tuple[Array, Array]:
    """Mean over independent replicates and its standard error s / sqrt(n).

    values: one number per network along `axis`, any unit. Exact for any distribution with a variance.
    Raises `ArgumentError` with fewer than 2 replicates. Source: textbook.

    >>> mean, stderr = mean_and_stderr([1.0, 2.0, 3.0])
    >>> float(mean), round(float(stderr), 4)
    (2.0, 0.5774)
    """
    array = replicates(values, axis)
    return array.mean(axis=0), sample_spread(array) / math.sqrt(len(array))


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


def band_p_value(deviation: ArrayLike, stderr: ArrayLike, band: ArrayLike, dof: int) -> Array:
    """p-value of the composite hypothesis |true deviation| <= band, of a deviation mean - prediction.

    p = min(1, 2 P(T > excess / stderr)), excess = |deviation| - band, T Student with `dof` degrees of freedom: the
    hypothesis is rejected at level a exactly where the two-sided 1 - a interval of the deviation misses the band. As
    |deviation| - band <= |deviation - truth| for every truth in the band, the rate of false rejection is at most a.
    With stderr 0, p is 0 or 1. deviation, stderr, band: the same unit. Source: derived here.

    >>> round(float(band_p_value(0.3, 0.1, 0.1, 30)), 3)
    0.055
    """
    deviation, stderr, band = (np.asarray(a, dtype=np.float64) for a in (deviation, stderr, band))
    excess = np.abs(deviation) - band
    return _two_sided(_quotient(excess, stderr), dof)


def _two_sided(statistic: Array, dof: int) -> Array:
    return np.minimum(1.0, 2 * distributions.t.sf(statistic, dof))


def _quotient(excess: Array, width: Array) -> Array:
    """excess / width, infinite with its sign where the width is 0."""
    sign = np.where(excess > 0, np.inf, -np.inf)
    return np.divide(excess, width, out=np.broadcast_to(sign, np.shape(excess + width)).copy(), where=width > 0)


def _statistic(excess: Array, low: LogMean, high: LogMean) -> Array:
    """Student's statistic of log(mean of `high`) - log(mean of `low`) - band = excess > 0; increasing in the excess.

    The low side may have missed large values: its error is widened to stderr sqrt(1 + c excess), c its
    `skewness_factor`. For c = 1 that is the second-order expansion of the likelihood ratio of a log-normal mean,
    w/n = D^2/v (1 + D) + O(D^4) at deviation D.
    The high side may have drawn one huge value, which must not decide. Two statistics are bounded then, and the larger
    counts: Student's on the scale of the values, whose error is delta excess / (1 - exp(-excess)) on the log scale; and
    Student's of log x, as E log x <= log E x makes a mean of log x above the band a mean above it.
    """
    inner = np.maximum(excess, 0.0)
    below = low.stderr * np.sqrt(1 + low.skewness * inner)
    stretch = np.divide(inner, -np.expm1(-inner), out=np.ones(inner.shape), where=inner > 0)
    linear = _quotient(excess, np.hypot(below, high.delta * stretch))
    distance = _distance(high)
    logarithmic = _quotient(excess - distance, np.hypot(below, high.mean_log_stderr))
    return np.maximum(linear, logarithmic)


def _distance(side: LogMean) -> Array:
    """log m - mean of log x, at least 0; 0 where m is 0."""
    with np.errstate(invalid="ignore"):
        return np.maximum(0.0, np.nan_to_num(side.value - side.mean_log))


def _sides(deviation: Array, estimate: LogMean, prediction: LogMean) -> tuple[LogMean, LogMean]:
    """The lower and the higher of the two, element by element."""
    below = deviation < 0
    names = [field.name for field in fields(LogMean)]
    pick = [(np.where(below, getattr(estimate, n), getattr(prediction, n))) for n in names]
    other = [(np.where(below, getattr(prediction, n), getattr(estimate, n))) for n in names]
    return LogMean(*pick), LogMean(*other)


def log_deviation(estimate: LogMean, prediction: LogMean) -> Array:
    """log(mean of the estimate / mean of the prediction): 0 where both are 0, -/+ `LARGEST_LOG` where one is."""
    with np.errstate(invalid="ignore"):
        return np.clip(np.nan_to_num(estimate.value - prediction.value), -LARGEST_LOG, LARGEST_LOG)


def log_band_p_value(estimate: LogMean, prediction: LogMean, band: ArrayLike, dof: int) -> Array:
    """p-value of the hypothesis |log(true mean / true prediction)| <= band, as `band_p_value` on the log scale.

    Student's t of a statistic that stays valid for skewed positive replicates: on the low side its error is widened for
    the large values that a sample missed; on the high side it is bounded, so that one huge replicate cannot reject.
    One side known exactly is `known_log_mean`; exactly 0 against what is above 0 gives p = 0, an all-zero sample p = 1
    against anything. band: log ratio >= 0. Source: derived here (`_statistic`).
    Exactness: for log-normal and gamma replicates of any spread up to 3 of the logarithm, from 3 replicates on and at
    levels from 1e-3 on, the rate of false rejection is at most the level, to a tenth of it; up to three times the level
    for inverse Gaussian ones with a spread of twice the mean; where some replicates of the sample are 0, at most the
    level. Without bound for rare large values that most samples miss, or rare zeros of which a sample of otherwise
    nearly equal values holds none, as for every test of a mean (Bahadur and Savage
    1956). Checked by: tests/statistical/test_check_calibration.py.

    >>> networks = np.array([0.9, 1.0, 1.1, 1.0])
    >>> float(log_band_p_value(log_mean(networks), known_log_mean(1.2), 0.3, 3))
    1.0
    >>> float(log_band_p_value(log_mean([1.0] * 63 + [1e6]), known_log_mean(1.0), 0.0, 63).round(2))
    0.32
    """
    deviation = log_deviation(estimate, prediction)
    excess = np.abs(deviation) - np.asarray(band, dtype=np.float64)
    statistic = _statistic(excess, *_sides(deviation, estimate, prediction))
    p_value = np.where(excess > 0, _two_sided(statistic, dof), 1.0)
    nothing = np.logical_or(exactly_zero(estimate), exactly_zero(prediction)) & (np.abs(deviation) == LARGEST_LOG)
    return np.where(nothing, 0.0, p_value)  # 0 against what is above 0


def exactly_zero(side: LogMean) -> NDArray[np.bool_]:
    """Where a mean is known to be 0, which no sample shows."""
    return np.isneginf(side.value) & (side.stderr == 0)


def log_excess(statistic: ArrayLike, low: LogMean, high: LogMean) -> Array:
    """The log ratio that gives Student's statistic this value, to a relative 1e-8; `LARGEST_LOG` where none does.

    >>> exactly = known_log_mean(1.0)
    >>> round(float(log_excess(3.0, known_log_mean(1.0, 0.1), exactly)), 4) == round(float(widened_below(0.3)), 4)
    True
    """
    shape = np.broadcast_shapes(np.shape(statistic), np.shape(low.value), np.shape(high.value))
    lower, upper = np.full(shape, 1e-15), np.full(shape, LARGEST_LOG)
    for _ in range(32):
        middle = np.sqrt(lower * upper)
        enough = _statistic(middle, low, high) >= np.asarray(statistic)
        lower, upper = np.where(enough, lower, middle), np.where(enough, middle, upper)
    return np.where((low.stderr == 0) & (high.delta == 0), 0.0, upper)


def log_ratio_interval(
    values: ArrayLike, prediction: ArrayLike = 1.0, axis: int = 0, level: float = 0.95
) -> tuple[Array, Array]:
    """Ends of the interval of log(true mean / prediction): the values that `log_band_p_value` does not reject.

    Longer upwards, for the large values that the sample may have missed. values >= 0 along `axis`; prediction > 0, the
    same unit. Where all values but one are 0 the upper end is `LARGEST_LOG`; where all are, the lower one is
    -`LARGEST_LOG`. Raises `ArgumentError`.

    >>> low, high = log_ratio_interval([0.9, 1.0, 1.1, 1.0])
    >>> round(float(low), 3), round(float(high), 3)
    (-0.133, 0.14)
    """
    require(0 < level < 1, ArgumentError, "level", level, "outside the domain", "a number in (0, 1)")
    found = log_mean(values, axis)
    exactly = known_log_mean(np.ones(found.value.shape))
    limit = distributions.t.isf((1 - level) / 2, np.shape(values)[axis] - 1)
    centre = found.value - np.log(np.asarray(prediction, dtype=np.float64))
    low, high = centre - log_excess(limit, exactly, found), centre + log_excess(limit, found, exactly)
    high = np.where(np.isinf(found.stderr), LARGEST_LOG, high)
    return np.clip(low, -LARGEST_LOG, LARGEST_LOG), np.clip(high, -LARGEST_LOG, LARGEST_LOG)


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


def detectable_error(stderr: ArrayLike, band: ArrayLike, dof: int, level: float) -> Array:
    """Smallest true |deviation| that `band_p_value` would reject at `level` with probability `POWER`: band + k stderr.

    k = `detectable_factor`. Known without error (stderr 0): band itself. Unit: that of `stderr`.

    >>> round(float(detectable_error(0.01, 0.05, 63, 0.01)), 4)
    0.0906
    """
    return np.asarray(band, dtype=np.float64) + detectable_factor(dof, level) * np.asarray(stderr, dtype=np.float64)


def log_detectable_error(
    estimate: LogMean, prediction: LogMean, band: ArrayLike, dof: int, level: float, power: float = POWER
) -> Array:
    """Smallest |log ratio| that `log_band_p_value` would reject at `level` with probability `power`, on either side.

    band + the larger of the two excesses whose statistic is `detectable_factor`; the band where both means are 0.

    >>> exactly = known_log_mean(1.0)
    >>> round(float(log_detectable_error(known_log_mean(1.0, 0.01), exactly, 0.05, 63, 0.01)), 4)
    0.0914
    """
    k = detectable_factor(dof, level, power)
    worse = np.maximum(log_excess(k, estimate, prediction), log_excess(k, prediction, estimate))
    both_zero = (estimate.value == -np.inf) & (prediction.value == -np.inf)
    return np.asarray(band, dtype=np.float64) + np.where(both_zero, 0.0, worse)


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
