"""varprop.theory.activation: kernels against sampling-free references, properties, truncation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varprop.errors import AssumptionError
from varprop.theory.activation import (
    CLOSED_FORMS,
    activation_derivative_kernel,
    activation_derivative_second_moment,
    activation_fourth_moment,
    activation_kernel,
    activation_mean,
    activation_second_moment,
    activation_square_kernel,
    kurtosis_response,
    kurtosis_sensitivity,
    series_error,
)
from varprop.theory.hermite import hermite_expansion
from varprop.theory.quadrature import chi_square_nodes, gram_root, hermite_basis

NAMES = ["identity", "relu", "relu2", "gelu", "gelu_tanh", "silu"]


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(NAMES), variance=st.floats(0.01, 10.0), c=st.floats(-1.0, 1.0))
def test_kernel_is_bounded_by_the_second_moment(name, variance, c):
    top = float(activation_second_moment(name, variance))
    value = float(activation_kernel(name, variance, np.array(c)))
    assert abs(value) <= top * (1 + 1e-9)


PAIRS = {
    "value": (activation_kernel, activation_second_moment),
    "derivative": (activation_derivative_kernel, activation_derivative_second_moment),
    "square": (activation_square_kernel, activation_fourth_moment),
}


@pytest.mark.parametrize("name", [*NAMES, "sigmoid"])
@pytest.mark.parametrize("rules", PAIRS.values(), ids=PAIRS)
def test_kernel_at_full_correlation_is_the_second_moment(name, rules):
    """To rounding at any variance: the series ends in a term for the orders it leaves out."""
    kernel, single = rules
    variance = np.array([1e-6, 0.05, 0.8, 3.0, 400.0, 1e6, 1e12])
    np.testing.assert_allclose(kernel(name, variance, 1.0), single(name, variance), rtol=1e-11)


@pytest.mark.parametrize("name", [*NAMES, "sigmoid"])
@pytest.mark.parametrize("rules", PAIRS.values(), ids=PAIRS)
def test_kernels_broadcast_and_are_symmetric(name, rules):
    kernel, _ = rules
    variance, c = np.array([0.3, 1.0, 60.0]), np.array([[1.0, 0.4, -0.2], [0.4, 1.0, 0.9], [-0.2, 0.9, 1.0]])
    pairs = kernel(name, variance[:, None], c, variance[None, :])
    assert pairs.shape == (3, 3)
    np.testing.assert_allclose(pairs, pairs.T, rtol=1e-11, atol=1e-13)
    for i in range(3):
        for j in range(3):
            one = kernel(name, variance[i], c[i, j], variance[j])
            assert np.shape(one) == ()
            assert pairs[i, j] == pytest.approx(float(one), rel=1e-10)
    uncorrelated = activation_kernel(name, 0.3, 0.0, 2.0)
    assert uncorrelated == pytest.approx(float(activation_mean(name, 0.3) * activation_mean(name, 2.0)), abs=1e-12)


@pytest.mark.parametrize("name", ["silu", "gelu_tanh", "sigmoid", "gelu"])
def test_truncation_error(name):
    """The claim of `activation_kernel` up to variance 20, and what it is above, where silu becomes relu."""
    for kernel in PAIRS:
        assert np.all(series_error(name, np.geomspace(1e-6, 20, 40), kernel) < 1e-11)
    large = np.geomspace(20, 1e12, 40)
    if name != "sigmoid":  # a step at large variances
        assert np.all(series_error(name, large) < 1e-5)
        assert np.all(series_error(name, large, "square") < 3e-8)
        assert np.all(series_error(name, large, "derivative") < 0.02)
    assert series_error("gelu", 400.0) == 0


@pytest.mark.parametrize("c", [0.9, 0.99, 0.999])
def test_silu_at_a_large_variance_against_a_plane_rule(c):
    """Variance 400: a relative error below the bound `series_error` |c|^512. Trapezium rule, step 0.01."""
    variance = 400.0
    z = np.arange(-9, 9, 0.01)
    density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi) * 0.01

    def silu(h):
        return h / (1 + np.exp(-h))

    first, second = silu(20 * z)[:, None], silu(20 * (c * z[:, None] + np.sqrt(1 - c**2) * z))
    expected = density @ (first * second) @ density / activation_second_moment("silu", variance)
    actual = activation_kernel("silu", variance, c) / activation_second_moment("silu", variance)
    assert abs(float(actual) - expected) < 1e-12 + series_error("silu", variance) * c**512


def test_known_values():
    """Independent codes: GELU kernels at variance 1 (erf and tanh), swish; Cho and Saul's kernels; Kedia et al."""
    assert activation_kernel("gelu", 1.0, [1.0, 0.5]) == pytest.approx([0.425221483, 0.227294915], abs=5e-10)
    assert activation_kernel("gelu_tanh", 1.0, [1.0, 0.5]) == pytest.approx([0.425193711, 0.227267076], abs=5e-10)
    assert activation_second_moment("silu", 1.0) == pytest.approx(0.355775520, abs=5e-10)
    assert activation_kernel("silu", 1.0, 0.5) == pytest.approx(0.183169663, abs=5e-10)
    theta = np.array([0.1, 1.0, 2.5])  # J_n / pi is the kernel over both signs: twice ours
    j_0, j_1 = np.pi - theta, np.sin(theta) + (np.pi - theta) * np.cos(theta)
    j_2 = 3 * np.sin(theta) * np.cos(theta) + (np.pi - theta) * (1 + 2 * np.cos(theta) ** 2)
    np.testing.assert_allclose(activation_derivative_kernel("relu", 1.0, np.cos(theta)), j_0 / (2 * np.pi))
    np.testing.assert_allclose(activation_kernel("relu", 2.0, np.cos(theta), 0.5), j_1 / (2 * np.pi))
    np.testing.assert_allclose(activation_kernel("relu2", 2.0, np.cos(theta), 0.5), j_2 / (2 * np.pi))
    r, s2 = np.array([-0.5, 0.0, 0.7]), 1.7
    covariance = s2 * (np.pi * r + np.sqrt(1 - r**2) - r * np.arccos(r) - 1) / (2 * np.pi)
    centred = activation_kernel("relu", s2, r) - activation_mean("relu", s2) ** 2
    np.testing.assert_allclose(centred, covariance, rtol=1e-12)
    np.testing.assert_allclose(activation_derivative_kernel("relu", s2, r), 0.25 + np.arcsin(r) / (2 * np.pi))


def test_many_variances_agree_with_one_by_one():
    rng = np.random.default_rng(0)
    variance, c = np.exp(rng.uniform(-6, 6, 200)), rng.uniform(-1, 1, 200)
    each = [float(activation_kernel("silu", v, x)) for v, x in zip(variance, c, strict=True)]
    scale = activation_second_moment("silu", variance)
    np.testing.assert_allclose(activation_kernel("silu", variance, c) / scale, each / scale, atol=1e-12)


def test_interpolation_in_the_variance():
    """h^4 has the coefficients v^2 (3, 6 sqrt 2, 2 sqrt 6) at any variance."""
    variance = np.geomspace(1e-3, 1e3, 57)
    expansion = hermite_expansion(lambda h: h**4, variance)
    for actual, expected in zip(expansion.even, (3, 6 * 2**0.5, 24**0.5), strict=True):
        np.testing.assert_allclose(actual / variance**2, expected, rtol=1e-12)
    np.testing.assert_allclose(expansion.second_moment / variance**4, 105, rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_variance_zero_and_tiny(name):
    for kernel, single in PAIRS.values():
        values = np.array([kernel(name, v, 0.5) for v in (0.0, 1e-300, 1e-12)] + [single(name, 0.0)])
        assert np.isfinite(values).all()
    assert activation_kernel(name, 0.0, 1.0) == 0
    assert activation_mean(name, 0.0) == 0
    assert activation_kernel(name, 0.0, 0.5, 3.0) == 0
    assert np.isfinite(kurtosis_response(name, [0.0, 1e-9, 1e9])).all()
    assert activation_kernel("sigmoid", 0.0, 0.5) == 0.25


@pytest.mark.parametrize(
    "call",
    [
        lambda: activation_kernel("silu", -1.0, 0.5),
        lambda: activation_kernel("relu", float("nan"), 0.5),
        lambda: activation_kernel("relu", float("inf"), 0.5),
        lambda: activation_kernel("silu", 1e13, 0.5),
        lambda: activation_kernel("silu", "1", 0.5),
        lambda: activation_kernel("silu", True, 0.5),
        lambda: activation_kernel("silu", None, 0.5),
        lambda: activation_kernel("silu", [[1.0], [1.0, 2.0]], 0.5),
        lambda: activation_kernel("gelu", 1.0, 1.5),
        lambda: activation_kernel("silu", 1.0, np.array([0.5, np.nan])),
        lambda: activation_kernel("silu", 1.0, 0.5, -2.0),
        lambda: activation_kernel(3, 1.0, 0.5),  # type: ignore[arg-type]
        lambda: activation_derivative_second_moment("swish", 1.0),
        lambda: activation_fourth_moment("silu", np.array([True])),
        lambda: activation_mean("gelu", -1),
        lambda: kurtosis_response("gelu", "x"),
    ],
)
def test_bad_input(call):
    with pytest.raises(AssumptionError, match=r"^[a-z_]+=.* is .*; expected "):
        call()


def test_gelu_tanh_is_close_to_gelu():
    """The approximation's own error is 1e-3 at most in absolute value."""
    grid = np.linspace(-1, 1, 9)
    difference = activation_kernel("gelu", 1.0, grid) - activation_kernel("gelu_tanh", 1.0, grid)
    assert np.abs(difference).max() < 2e-3


@pytest.mark.parametrize("name", ["silu", "gelu", "relu2"])
def test_kurtosis_sensitivity_against_a_scale_mixture(name):
    """h = sqrt(1 + e) or sqrt(1 - e) times a normal has excess kurtosis 3 e^2."""
    e = 0.05
    mixture = np.mean([activation_second_moment(name, 0.8 * (1 + e)), activation_second_moment(name, 0.8 * (1 - e))])
    change = abs(float(mixture / activation_second_moment(name, 0.8) - 1))
    assert change == pytest.approx(kurtosis_sensitivity(name, 0.8) * 3 * e**2, rel=0.01)  # next order: e^2


def test_relu_needs_no_gaussian():
    assert kurtosis_sensitivity("relu", 1.0) == 0


def test_unknown_activation():
    with pytest.raises(AssumptionError, match="activation='tanh' is unknown; expected one of identity"):
        activation_second_moment("tanh", 1.0)
    assert "tanh" not in CLOSED_FORMS


def test_nodes():
    nodes, basis = hermite_basis(30)
    np.testing.assert_allclose(basis @ basis.T, np.eye(30), atol=1e-12)
    assert basis[0] ** 2 @ nodes**6 == pytest.approx(15)
    for degrees in (1, 2, 64):
        x, p = chi_square_nodes(8, degrees)
        assert p @ x**3 == pytest.approx((degrees + 2) * (degrees + 4) / degrees**2)


def test_gram_root_of_equal_and_of_indefinite_tokens():
    ones = np.ones((1, 4, 4))
    root = gram_root(ones)
    np.testing.assert_allclose(root @ root.swapaxes(-1, -2), ones, atol=1e-8)
    indefinite = np.array([[[1.0, 1.0 + 1e-6], [1.0 + 1e-6, 1.0]]])
    root = gram_root(indefinite)
    np.testing.assert_allclose(root @ root.swapaxes(-1, -2), indefinite, atol=1e-5)
