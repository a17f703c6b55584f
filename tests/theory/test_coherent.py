"""varprop.theory.coherent: drawn streams, masked maps, and the closed forms against numerical optima."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from varprop.errors import AssumptionError
from varprop.theory.coherent import (
    break_even_common_factor,
    break_even_density,
    coherent_correlation,
    coherent_second_moment,
    coherent_share,
    critical_correlation,
    log_share,
    masked_noise_factor,
    mitigation_onset,
    optimal_density,
)

power = st.floats(1e-2, 1e2)
layers = st.integers(2, 100)


def masked_share(density, layer, noise, common, start, spread=0.0):
    factor = masked_noise_factor(density, spread, noise)
    return coherent_share(layer, noise, common, start, factor, density**2)


def test_drawn_streams():
    """4,000 streams of 16 entries: z below 4.5 (false-fail rate 7e-6 per layer); a 3 % error would be seen."""
    rng = np.random.default_rng(0)
    noise, common, start, n = 0.6, 0.2, 1.5, 4000
    x = start**0.5 * rng.standard_normal((n, 16))
    m = common**0.5 * rng.standard_normal((n, 16))
    for layer in range(1, 25):
        x = x + m + noise**0.5 * rng.standard_normal((n, 16))
        each = np.mean(x**2, axis=1)
        z = (each.mean() - coherent_second_moment(layer, noise, common, start)) / (each.std(ddof=1) / n**0.5)
        assert abs(z) < 4.5
    f = m + noise**0.5 * rng.standard_normal((n, 16))
    r = np.sum(x * f) / np.sqrt(np.sum(x**2) * np.sum(f**2))
    assert r == pytest.approx(float(coherent_correlation(24, noise, common, start)), abs=0.02)  # 5 standard errors


def test_masked_map_of_coherent_and_random_weights():
    """E|y|^2 over 3,000 masks and noises at d = 64: 4.5 standard errors, of about 0.7 % each."""
    rng = np.random.default_rng(1)
    d, density, n = 64, 0.3, 3000
    u = rng.standard_normal(d)
    matrix = rng.standard_normal((4, d)) * 0.1 + 0.05 * np.sign(u)
    noise = rng.standard_normal((n, 4, d)) * 0.1
    y = ((rng.random((n, 4, d)) < density) * (matrix + noise)) @ u
    each = np.mean(y**2, axis=1)
    coherent, spread = np.mean((matrix @ u) ** 2), np.mean(matrix**2 @ u**2)
    random = 0.01 * np.sum(u**2)
    expected = masked_noise_factor(density, spread, random) * random + density**2 * coherent
    assert abs(each.mean() - expected) < 4.5 * each.std(ddof=1) / n**0.5


@given(layer=layers, noise=power, common=power, start=power, spread=st.floats(0, 1))
def test_optimal_density_is_the_numerical_maximum(layer, noise, common, start, spread):
    """To 1e-6 of the density: the vertex of a parabola through three shares; and no density on a grid does better."""
    best = optimal_density(layer, noise, common, start, spread)
    assume(1e-6 < best < 0.999)
    step = 1e-4

    def share(log_density):
        return masked_share(np.exp(log_density), layer, noise, common, start, spread)

    low, middle, high = (share(np.log(best) + k * step) for k in (-1, 0, 1))
    curvature = low - 2 * middle + high
    assume(abs(curvature) > 1e-10 * middle)  # else rounding, not the maximum, sets the vertex
    assert abs(step * (low - high) / (2 * curvature)) < 1e-6 + 1e-16 * middle / abs(curvature)
    assert max(share(x) for x in np.log(np.geomspace(1e-6, 1.0, 200))) <= middle * (1 + 1e-12)


@given(layer=layers, noise=power, common=power, start=power, density=st.floats(0.01, 0.999))
def test_break_even(layer, noise, common, start, density):
    even = break_even_density(layer, noise, common, start)
    difference = masked_share(density, layer, noise, common, start) / masked_share(1.0, layer, noise, common, start) - 1
    assume(abs(density / even - 1) > 1e-6)
    assert (difference > 1e-12) == (even < density < 1) or abs(difference) < 1e-9
    factor = break_even_common_factor(layer, noise, common, start, density)
    if factor > 0:
        share = coherent_share(layer, noise, common, start, density, factor)
        assert share == pytest.approx(coherent_share(layer, noise, common, start), rel=1e-9)


@given(layer=layers, noise=power, start=power, factor=st.floats(0.01, 0.99))
def test_masking_never_raises_the_share_of_uncorrelated_blocks(layer, noise, start, factor):
    assert coherent_share(layer, noise, 0.0, start, factor) < coherent_share(layer, noise, 0.0, start)
    assert optimal_density(layer, noise, 0.0, start) == break_even_density(layer, noise, 0.0, start) == np.inf


@given(layer=layers, noise=power, common=power, start=power, factor=st.floats(0.01, 0.99))
def test_a_smaller_scale_or_less_noise_lowers_the_share_and_evens_the_log_share(layer, noise, common, start, factor):
    at = layer, noise, common, start
    assert coherent_share(*at, factor, factor) < coherent_share(*at)
    assert coherent_share(*at, factor, 1.0) < coherent_share(*at)

    def log(scale):
        before, after = (coherent_second_moment(n, noise, common, start, scale, scale) for n in (layer - 1, layer))
        return log_share(before, after, start, after)

    assert log(factor) > log(1.0)


@given(layer=st.integers(4, 100), increment=power, start=power)
def test_critical_correlation_is_where_the_optimum_passes_one(layer, increment, start):
    least = critical_correlation(layer, increment, start)
    assume(least < 0.6)
    for r, helps in ((least * 0.999, False), (least * 1.001, True)):
        noise, common = (1 - r**2) * increment, r**2 * increment
        assert (optimal_density(layer, noise, common, start) < 1) == helps
        assert (mitigation_onset(noise, common, start) < layer) == helps


def test_limits():
    assert optimal_density(5, 1.0, 1.0, 0.0) == 0.0  # the share rises as far as the density falls
    assert optimal_density(1, 1.0, 1.0, 1.0) == np.inf
    assert optimal_density(5, 0.0, 1.0, 1.0) == np.inf  # purely coherent: U = rho^2 b / (q_0 + rho^2 b l^2)
    assert optimal_density(5, 1e-3, 1e-9, 1e3, 1.0) > 0  # no cancellation for b < w
    assert coherent_share(3, 0.0, 0.0, 0.0) == 0.0
    assert coherent_share(np.array([1, 2]), 1.0, 0.0, 1.0).tolist() == [0.5, 1 / 3]
    assert mitigation_onset(np.array([0.75, 1.0]), np.array([0.25, 0.0])).tolist() == [
        pytest.approx(3.1299, abs=1e-4),
        np.inf,
    ]


@pytest.mark.parametrize("bad", ["x", None, float("nan"), float("inf"), -1.0, True])
def test_bad_input_is_one_line(bad):
    for call in (
        lambda: coherent_second_moment(bad, 1.0, 1.0),
        lambda: coherent_share(1, bad, 1.0),
        lambda: optimal_density(3, 1.0, bad),
        lambda: mitigation_onset(1.0, 1.0, bad),
        lambda: critical_correlation(3, bad),
        lambda: masked_noise_factor(bad),
        lambda: log_share(bad, 2.0, 1.0, 2.0),
    ):
        with pytest.raises(AssumptionError, match=r"^\w+=.* expected [^\n]*$"):
            call()
