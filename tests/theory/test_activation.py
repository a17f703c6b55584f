"""varprop.theory.activation: kernels against sampling-free references, properties, truncation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varprop.errors import AssumptionError
from varprop.theory.activation import (
    CLOSED_FORMS,
    activation_kernel,
    activation_second_moment,
    kurtosis_sensitivity,
    series_error,
)
from varprop.theory.quadrature import chi_square_nodes, gram_root, hermite_basis

NAMES = ["identity", "relu", "relu2", "gelu", "gelu_tanh", "silu"]


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(NAMES), variance=st.floats(0.01, 10.0), c=st.floats(-1.0, 1.0))
def test_kernel_is_bounded_by_the_second_moment(name, variance, c):
    top = float(activation_second_moment(name, variance))
    value = float(activation_kernel(name, variance, np.array(c)))
    assert abs(value) <= top * (1 + 1e-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("variance", [0.05, 0.8, 3.0])
def test_kernel_at_full_correlation_is_the_second_moment(name, variance):
    top = float(activation_second_moment(name, variance))
    tolerance = 1e-12 + series_error(name, variance)  # rounding, and the truncation that the series states
    assert float(activation_kernel(name, variance, np.array(1.0))) == pytest.approx(top, rel=tolerance)


@pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
def test_truncation_error_is_small_at_the_variances_of_the_presets(name):
    assert series_error(name, 0.3) < 1e-10
    assert series_error(name, 1.0) < 1e-10
    assert series_error(name, 4.0) < 1e-5


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
