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
    log_mean, stderr = stats.log_mean_and_stderr(np.full(7, 0.1))
    assert (log_mean, stderr) == (np.log(0.1), 0)


@pytest.mark.parametrize("function", [stats.mean_and_stderr, stats.log_mean_and_stderr, stats.t_interval])
def test_one_replicate_is_too_few(function):
    with pytest.raises(ArgumentError, match=r"n=1 is too few replicates; expected at least 2"):
        function([1.0])


def test_t_interval_is_that_of_scipy():
    values = np.array([0.2, 0.5, 0.9, 1.4])
    expected = distributions.t.interval(0.9, 3, values.mean(), distributions.sem(values))
    assert stats.t_interval(values, level=0.9) == pytest.approx(expected, rel=ROUNDING)


def test_log_mean_of_zeros_is_minus_infinity_without_error():
    log_mean, stderr = stats.log_mean_and_stderr(np.zeros((3, 2)))
    assert log_mean.tolist() == [-np.inf, -np.inf]
    assert stderr.tolist() == [0, 0]


def test_log_mean_with_some_zeros_uses_the_delta_method():
    log_mean, stderr = stats.log_mean_and_stderr([0.0, 1.0, 2.0])
    assert log_mean == 0
    assert float(stderr) == pytest.approx(1 / np.sqrt(3), rel=ROUNDING)


def test_log_mean_refuses_negative_values():
    with pytest.raises(ArgumentError, match=r"values=-1.0 is negative"):
        stats.log_mean_and_stderr([1.0, -1.0])


@given(POSITIVE, st.floats(1e-3, 1e3))
def test_log_mean_shifts_with_the_unit_and_its_error_does_not(values, unit):
    log_mean, stderr = stats.log_mean_and_stderr(values)
    shifted, same = stats.log_mean_and_stderr(values * unit)
    assert shifted == pytest.approx(log_mean + np.log(unit), abs=1e-10)
    assert same == pytest.approx(stderr, abs=1e-7)  # differences of nearly equal logarithms


@given(POSITIVE)
def test_log_error_is_at_least_the_delta_method(values):
    mean, stderr = stats.mean_and_stderr(values)
    assert stats.log_mean_and_stderr(values)[1] >= stderr / mean * (1 - ROUNDING)


@given(st.floats(-2, 2), st.floats(0.01, 1), st.floats(0, 1), st.integers(1, 50), st.booleans())
def test_band_p_value_is_one_inside_and_at_least_the_interval_outside(deviation, stderr, band, dof, log_scale):
    p = float(stats.band_p_value(deviation, stderr, band, dof, log_scale=log_scale))
    plain = 2 * distributions.t.sf((abs(deviation) - band) / stderr, dof)
    assert 0 <= p <= 1
    assert p >= min(1, plain) - ROUNDING
    if abs(deviation) <= band:
        assert p == 1


def test_without_a_band_the_plain_test_is_students():
    p = stats.band_p_value(0.3, 0.1, 0.0, 9, log_scale=False)
    assert float(p) == pytest.approx(2 * distributions.t.sf(3, 9), rel=ROUNDING)


def test_the_log_scale_is_careful_below_and_plain_above():
    above = float(stats.band_p_value(0.5, 0.1, 0.1, 9, log_scale=True))
    below = float(stats.band_p_value(-0.5, 0.1, 0.1, 9, log_scale=True))
    assert above == pytest.approx(2 * distributions.t.sf(4, 9), rel=ROUNDING)
    assert below == pytest.approx(2 * distributions.t.sf(4 / np.sqrt(1.4), 9), rel=ROUNDING)


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


def test_log_ratio_interval_holds_what_the_test_keeps():
    values = np.array([0.8, 1.0, 1.3, 1.1, 0.9])
    low, high = stats.log_ratio_interval(values, 1.0, level=0.99)
    log_mean, stderr = stats.log_mean_and_stderr(values)
    for end in (low, high):
        p = stats.band_p_value(log_mean - end, stderr, 0.0, 4, log_scale=True)
        assert float(p) == pytest.approx(0.01, rel=1e-9)
    assert high - log_mean > log_mean - low


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
    assert stats.detectable_error(0.0, 0.03, 5, 0.01, log_scale=True) == 0.03


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
