"""stats: known values, limits and symmetries of the formulas; error rates are in tests/statistical."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats as distributions

from varprop import stats
from varprop.errors import ArgumentError
from varprop.log_mean import skewness_factor

P_VALUES = hnp.arrays(float, st.integers(1, 12), elements=st.floats(0, 1))
POSITIVE = hnp.arrays(float, st.integers(2, 12), elements=st.floats(0.5, 2.0))
ROUNDING = 1e-12  # a few hundred units of the last place: short sums of numbers of order one


def test_mean_and_stderr_follow_the_axis():
    values = np.arange(12.0).reshape(3, 4)
    mean, stderr = stats.mean_and_stderr(values, axis=1)
    assert mean == pytest.approx([1.5, 5.5, 9.5])
    assert stderr == pytest.approx(np.full(3, np.sqrt(5 / 3) / 2))
    assert stats.mean_and_stderr(values.T, axis=0)[0].tolist() == mean.tolist()


def test_equal_replicates_have_exactly_no_spread():
    assert stats.mean_and_stderr(np.full(7, 0.1))[1] == 0
    found = stats.log_mean(np.full(7, 0.1))
    assert (found.value, found.stderr, found.delta) == (np.log(0.1), 0, 0)


@pytest.mark.parametrize("function", [stats.mean_and_stderr, stats.log_mean, stats.t_interval, skewness_factor])
def test_one_replicate_is_too_few(function):
    with pytest.raises(ArgumentError, match=r"n=1 is too few replicates; expected at least 2"):
        function([1.0])


def test_t_interval_is_that_of_scipy():
    values = np.array([0.2, 0.5, 0.9, 1.4])
    expected = distributions.t.interval(0.9, 3, values.mean(), distributions.sem(values))
    assert stats.t_interval(values, level=0.9) == pytest.approx(expected, rel=ROUNDING)


EXACTLY = stats.known_log_mean(1.0)


def test_log_mean_of_zeros_is_minus_infinity_with_every_error():
    found = stats.log_mean(np.zeros((3, 2)))
    assert found.value.tolist() == [-np.inf, -np.inf]
    assert found.stderr.tolist() == found.delta.tolist() == found.mean_log_stderr.tolist() == [np.inf, np.inf]


def test_log_mean_with_some_zeros_adds_the_error_of_their_number():
    found = stats.log_mean([0.0, 1.0, 1.0, 2.0])
    logs = np.log([1.0, 1.0, 2.0])
    v = logs.var(ddof=1)
    assert float(found.delta) == pytest.approx(np.sqrt(1 / 6 + 2 / 12), rel=ROUNDING)  # s^2 = 2/3, m = 1
    assert float(found.stderr) == max(float(found.delta), np.sqrt(v / 3 + v**2 / 4 + 1 / 12))
    assert found.mean_log_stderr == np.inf
    wide = stats.log_mean([0.0, 1e-3, 1.0, 1e3])  # three values from 1e-3 to 1e3: the log-normal law decides
    v = np.log([1e-3, 1.0, 1e3]).var(ddof=1)
    assert float(wide.stderr) == pytest.approx(np.sqrt(v / 3 + v**2 / 4 + 1 / 12), rel=ROUNDING)


def test_one_value_above_zero_bounds_nothing():
    found = stats.log_mean([0.0, 0.0, 0.0, 2.0])
    assert found.stderr == np.inf
    assert stats.log_band_p_value(found, stats.known_log_mean(1e9), 0.0, 3) == 1
    assert stats.log_band_p_value(found, stats.known_log_mean(1e-9), 0.0, 3) > 0.3


def test_a_known_zero_with_an_error_is_no_exact_zero():
    assert stats.log_band_p_value(EXACTLY, stats.known_log_mean(0.0, 0.1), 0.0, 3) == 1


def test_log_mean_refuses_negative_values():
    with pytest.raises(ArgumentError, match=r"values=-1.0 is negative"):
        stats.log_mean([1.0, -1.0])


@given(POSITIVE, st.floats(1e-3, 1e3))
def test_log_mean_shifts_with_the_unit_and_its_error_does_not(values, unit):
    found, shifted = stats.log_mean(values), stats.log_mean(values * unit)
    for name in ("value", "mean_log"):
        assert getattr(shifted, name) == pytest.approx(getattr(found, name) + np.log(unit), abs=1e-10)
    for name in ("stderr", "delta", "mean_log_stderr"):  # differences of nearly equal logarithms
        assert getattr(shifted, name) == pytest.approx(getattr(found, name), abs=1e-7)
    assert shifted.skewness == pytest.approx(found.skewness, rel=1e-6)


@given(POSITIVE)
def test_log_error_is_at_least_the_delta_method(values):
    mean, stderr = stats.mean_and_stderr(values)
    found = stats.log_mean(values)
    assert found.delta == pytest.approx(stderr / mean, rel=1e-9)
    assert found.stderr >= found.delta


def test_skewness_is_that_of_scipy_beyond_two_errors_and_that_of_a_log_normal_law():
    values = 1 + 0.01 * np.random.default_rng(3).pareto(4, 200)
    error = np.sqrt(6 * 200 * 199 / (198 * 201 * 203))
    excess = distributions.skew(values, bias=False) - 2 * error
    expected = 2 * excess * values.mean() / (3 * values.std(ddof=1)) - 1
    assert expected > 10
    assert float(skewness_factor(values)) == pytest.approx(expected, rel=1e-9)
    assert skewness_factor(np.full(9, 0.3)) == skewness_factor([0.1, 0.9]) == 1


@given(st.floats(-2, 2), st.floats(0.01, 1), st.floats(0, 1), st.integers(1, 50))
def test_band_p_values_are_one_inside_and_students_outside(deviation, stderr, band, dof):
    p = float(stats.band_p_value(deviation, stderr, band, dof))
    plain = 2 * distributions.t.sf((abs(deviation) - band) / stderr, dof)
    assert p == pytest.approx(min(1, plain), abs=ROUNDING)
    on_log_scale = float(stats.log_band_p_value(known(deviation, stderr), EXACTLY, band, dof))
    assert 0 <= on_log_scale <= 1
    if abs(deviation) <= band:
        assert min(p, on_log_scale) >= 1 - ROUNDING  # exp and log may lift it over the edge
    elif deviation < 0:
        assert on_log_scale >= plain - ROUNDING


def known(deviation: float, stderr: float) -> stats.LogMean:
    """A mean exp(deviation) whose logarithm has this standard error."""
    return stats.known_log_mean(np.exp(deviation), stderr * np.exp(deviation))


def test_the_log_scale_is_careful_below():
    below = float(stats.log_band_p_value(known(-0.5, 0.1), EXACTLY, 0.1, 9))
    assert below == pytest.approx(2 * distributions.t.sf(4 / np.sqrt(1.4), 9), rel=1e-9)


def test_above_students_test_of_the_values_or_of_their_logarithms_decides():
    """The smaller p-value of the two: of the values where they are nearly equal, of the logs for a gross error."""
    rng = np.random.default_rng(8)
    near, gross = rng.normal(1.1, 0.1, 20), rng.lognormal(9.0, 1.0, 20)
    for values, test in (
        (near, distributions.ttest_1samp(near, 1)),
        (gross, distributions.ttest_1samp(np.log(gross), 0)),
    ):
        p = float(stats.log_band_p_value(stats.log_mean(values), EXACTLY, 0.0, 19))
        assert p == pytest.approx(test.pvalue, rel=1e-9)  # type: ignore[attr-defined]
    assert distributions.ttest_1samp(gross, 1).pvalue > 1e-4  # type: ignore[attr-defined]


@given(hnp.arrays(float, st.integers(3, 64), elements=st.floats(0.999, 1.001)), st.floats(2, 300))
def test_one_huge_replicate_cannot_reject(values, exponent):
    """Student's statistic of one huge value among equals is 1 at most, on both scales."""
    values[0] = np.exp(exponent)
    p = float(stats.log_band_p_value(stats.log_mean(values), EXACTLY, 0.0, len(values) - 1))
    assert p > 2 * distributions.t.sf(1.05, len(values) - 1)


def test_two_ensembles_are_compared_the_same_both_ways():
    rng = np.random.default_rng(4)
    a, b = stats.log_mean(rng.lognormal(0, 0.5, 30)), stats.log_mean(rng.lognormal(1, 0.3, 30))
    assert stats.log_band_p_value(a, b, 0.1, 29) == stats.log_band_p_value(b, a, 0.1, 29) < 1e-3
    assert stats.log_deviation(a, b) == -stats.log_deviation(b, a)


def test_an_exact_zero_is_decided_exactly_and_a_sample_of_zeros_is_not():
    nothing, zeros = stats.known_log_mean(0.0), stats.log_mean(np.zeros(3))
    for one in (nothing, zeros):
        assert stats.log_band_p_value(one, one, 0.0, 2) == stats.log_band_p_value(nothing, zeros, 0.0, 2) == 1
        assert stats.log_detectable_error(one, one, 0.1, 2, 0.01) == 0.1
    seen = stats.log_mean([0.0, 0.0, 1e-9])
    assert stats.log_band_p_value(seen, nothing, 0.5, 2) == stats.log_band_p_value(nothing, seen, 0.5, 2) == 0
    assert stats.log_band_p_value(zeros, EXACTLY, 0.5, 2) == stats.log_band_p_value(EXACTLY, zeros, 0.5, 2) == 1
    assert stats.log_detectable_error(zeros, EXACTLY, 0.5, 2, 0.01) >= stats.LARGEST_LOG
    assert stats.log_deviation(zeros, EXACTLY) == -stats.LARGEST_LOG


def test_the_factor_below_is_the_second_order_of_the_log_normal_likelihood_ratio():
    """Profile likelihood of the log-normal mean at distance D: w/n = D^2/v (1 + D) to leading orders in D and v."""
    variance, deviation = 1e-4, -3e-4  # D of the order of v: the neglected D^4/v^2 and D^2 terms are relative 1e-3

    def log_likelihood(s: np.ndarray) -> np.ndarray:
        return np.log(s) + (variance + (deviation + (s - variance) / 2) ** 2) / s

    grid = variance * (1 + np.linspace(-0.01, 0.01, 200_001))
    ratio = log_likelihood(grid).min() - np.log(variance) - 1
    third_order = (ratio + deviation**4 / variance**2 / 2 + deviation**2 / 2) / (deviation**2 / variance) - 1
    assert third_order == pytest.approx(deviation, rel=0.05)


@given(st.floats(0, 50))
def test_widened_below_inverts_the_widening(half):
    excess = float(stats.widened_below(half))
    assert excess / np.sqrt(1 + excess) == pytest.approx(half, rel=1e-9, abs=ROUNDING)


@given(st.floats(0.01, 30), st.floats(0.001, 2), st.floats(0.001, 2))
def test_log_excess_inverts_the_statistic(statistic, low, high):
    sides = stats.known_log_mean(1.0, low), stats.known_log_mean(1.0, high)
    excess = float(stats.log_excess(statistic, *sides))
    p = stats.log_band_p_value(known(-excess, low), stats.known_log_mean(1.0, high), 0.0, 9)
    if excess < 600:
        assert float(p) == pytest.approx(min(1, 2 * distributions.t.sf(statistic, 9)), rel=1e-6)


@settings(max_examples=50)
@given(hnp.arrays(float, st.integers(3, 12), elements=st.floats(0.5, 2.0), unique=True), st.floats(0.5, 0.999))
def test_log_ratio_interval_holds_what_the_test_keeps(values, level):
    low, high = stats.log_ratio_interval(values, 1.0, level=level)
    found = stats.log_mean(values)
    assert low < found.value < high
    for end in (low, high):
        if abs(end) < 600:
            p = stats.log_band_p_value(found, stats.known_log_mean(np.exp(end)), 0.0, len(values) - 1)
            assert float(p) == pytest.approx(1 - level, rel=1e-6)


@pytest.mark.parametrize("spread", [0.2, 1.0])
def test_log_ratio_interval_covers_a_log_normal_mean(spread):
    """40,000 samples of 12: coverage at least 0.95, by 4 standard errors (0.0044; fails wrongly with probability 3e-5).

    Student's interval of the values covers 0.938 and 0.86.
    """
    variance = np.log1p(spread**2)
    values = np.exp(np.sqrt(variance) * np.random.default_rng(6).standard_normal((12, 40_000)) - variance / 2)
    low, high = stats.log_ratio_interval(values)
    assert np.mean((low <= 0) & (high >= 0)) >= 0.95 - 0.0044


def test_detectable_factor_tends_to_the_normal_sum():
    expected = distributions.norm.isf(0.005) + distributions.norm.isf(0.1)
    assert stats.detectable_factor(10**8, 0.01) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("dof, level", [(1, 0.01), (3, 3e-4), (15, 3e-4)])
def test_detectable_factor_against_monte_carlo(dof, level):
    """The 0.9 quantile of (t S_2 - Z) / S_1 over 400,000 draws; 4 standard errors of that quantile, fail rate 6e-5."""
    rng = np.random.default_rng(dof)
    n = 400_000
    first, second = (np.sqrt(rng.chisquare(dof, n) / dof) for _ in range(2))
    needed = (distributions.t.isf(level / 2, dof) * second - rng.standard_normal(n)) / first
    half = 4 * np.sqrt(0.9 * 0.1 / n)
    low, high = np.quantile(needed, [0.9 - half, 0.9 + half])
    assert low < stats.detectable_factor(dof, level) < high


def test_detectable_error_known_without_error_is_the_band():
    assert stats.detectable_error(0.0, 0.03, 5, 0.01) == 0.03
    assert stats.log_detectable_error(EXACTLY, EXACTLY, 0.03, 5, 0.01) == 0.03


def test_detectable_error_on_the_log_scale_is_that_of_the_worse_side():
    found = stats.log_mean(np.random.default_rng(2).lognormal(0, 0.5, 20))
    k = stats.detectable_factor(19, 0.01)
    sides = stats.log_excess(k, found, EXACTLY), stats.log_excess(k, EXACTLY, found)
    assert float(stats.log_detectable_error(found, EXACTLY, 0.02, 19, 0.01)) == pytest.approx(0.02 + max(sides))


@pytest.mark.parametrize("arguments", [(0, 0.1, 0.9), (3, 0.0, 0.9), (3, 1.0, 0.9), (3, 0.1, 1.0)])
def test_detectable_factor_domain(arguments):
    with pytest.raises(ArgumentError):
        stats.detectable_factor(*arguments)


def test_holm_known_value():
    """The example of R's p.adjust(c(.01, .02, .03, .04, .05), "holm")."""
    rejected, adjusted = stats.holm([0.01, 0.02, 0.03, 0.04, 0.05], 0.05)
    assert adjusted == pytest.approx([0.05, 0.08, 0.09, 0.09, 0.09])
    assert rejected.tolist() == [True, False, False, False, False]


@given(P_VALUES, st.floats(0.001, 0.5))
def test_holm_lies_between_bonferroni_and_no_correction(p, level):
    rejected, adjusted = stats.holm(p, level)
    assert (adjusted >= p).all()
    assert (adjusted <= np.minimum(1, p * p.size) + ROUNDING).all()
    assert (rejected <= (p <= level)).all()
    assert ((p * p.size <= level) <= rejected).all()


@given(P_VALUES, st.randoms(use_true_random=False))
def test_holm_does_not_depend_on_order_or_shape(p, random):
    order = list(range(p.size))
    random.shuffle(order)
    assert stats.holm(p[order], 0.05)[1].tolist() == stats.holm(p, 0.05)[1][order].tolist()
    assert stats.holm(p[:, None], 0.05)[1].shape == (p.size, 1)


def test_holm_of_nothing_rejects_nothing():
    assert stats.holm([], 0.05)[0].size == 0


@pytest.mark.parametrize("p", [[-0.1], [1.1], [np.nan]])
def test_holm_domain(p):
    with pytest.raises(ArgumentError, match="p_values"):
        stats.holm(p, 0.05)


def test_clopper_pearson_known_value():
    """10 of 100: 0.0490 to 0.1762 in the tables of the exact interval."""
    assert stats.clopper_pearson(10, 100) == pytest.approx((0.0490, 0.1762), abs=5e-5)


@settings(max_examples=50)
@given(st.integers(1, 200), st.data())
def test_clopper_pearson_ends_have_their_tails(trials, data):
    successes = data.draw(st.integers(0, trials))
    low, high = stats.clopper_pearson(successes, trials)
    assert 0 <= low <= successes / trials <= high <= 1
    if 0 < successes < trials:
        assert distributions.binom.sf(successes - 1, trials, low) == pytest.approx(0.025, rel=1e-6)
        assert distributions.binom.cdf(successes, trials, high) == pytest.approx(0.025, rel=1e-6)


@pytest.mark.parametrize("arguments", [(0, 0, 0.95), (-1, 3, 0.95), (4, 3, 0.95), (1, 3, 1.0)])
def test_clopper_pearson_domain(arguments):
    with pytest.raises(ArgumentError):
        stats.clopper_pearson(*arguments)
