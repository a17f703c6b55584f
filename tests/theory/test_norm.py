"""varprop.theory.norm: exact laws of the cosine, drawn streams, bad input."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.special

from varprop.errors import AssumptionError
from varprop.theory.norm import (
    centred_correlation,
    centred_second_moment,
    cosine_mean,
    cosine_variance,
    norm_degrees,
    norm_gram,
    normalised_covariance,
    normalised_covariance_mean,
    normalised_second_moment,
    normalised_second_moment_mean,
)


def exact_cosine(c, d):
    """Mean and variance of the cosine of two Gaussian vectors of d entries (Hotelling 1953)."""
    ratio = np.exp(
        2 * scipy.special.gammaln((d + 1) / 2) - scipy.special.gammaln(d / 2) - scipy.special.gammaln(d / 2 + 1)
    )
    mean = c * ratio * scipy.special.hyp2f1(0.5, 0.5, d / 2 + 1, c**2)
    square = 1 - (d - 1) / d * (1 - c**2) * scipy.special.hyp2f1(1, 1, d / 2 + 1, c**2)
    return mean, square - mean**2


@pytest.mark.parametrize("d", [4, 8, 16, 64])
def test_cosine_is_right_to_second_order_in_the_width(d):
    c = np.linspace(-1, 1, 41)
    mean, variance = exact_cosine(c, d)
    assert np.abs(cosine_mean(c, d) - mean).max() < 0.18 / d**2
    assert np.abs(cosine_variance(c, d) - variance).max() < 0.83 / d**2


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_drawn_tokens_with_eps_and_mean(kind):
    """Pairs of tokens at d = 32, eps = q / 3; entries of mean 0.5 for the layer norm, which removes it.

    The draw is the replicate: 200,000 of them, standard error about 0.0003; checked at 4 of them plus the next order,
    1/d^2 = 0.001. A missing 1/d term (0.004 to 0.014) would be seen. False-fail rate below 1e-3.
    """
    n, d, c, eps = 200_000, 32, 0.6, 1 / 3
    rng = np.random.default_rng(2)
    x, other = rng.standard_normal((2, n, d))
    y = c * x + (1 - c**2) ** 0.5 * other
    shift = 0.5 if kind == "layer" else 0.0
    tokens = [z + shift - (z + shift).mean(axis=1, keepdims=True) if kind == "layer" else z for z in (x, y)]
    first, second = (z / np.sqrt(np.mean(z**2, axis=1, keepdims=True) + eps) for z in tokens)
    q = centred_second_moment(1 + shift**2, d, shift**2) if kind == "layer" else 1.0
    degrees = norm_degrees(kind, d)
    t = normalised_second_moment(q, eps)
    product, square = np.mean(first * second, axis=1), np.mean(first**2, axis=1)
    expected = float(normalised_covariance_mean(c, t, t, degrees))
    assert np.mean(product) == pytest.approx(expected, abs=4 * product.std() / n**0.5 + 1 / d**2)
    mean = normalised_second_moment_mean(q, eps, 2 / degrees)
    assert np.mean(square) == pytest.approx(mean, abs=4 * square.std() / n**0.5 + 1 / d**2)
    assert mean == pytest.approx(float(normalised_covariance_mean(1.0, t, t, degrees)), rel=1e-12)


def test_gain_vector():
    gain = np.array([0.5, 1.5])
    assert normalised_second_moment(3.0, 1.0, np.mean(gain**2)) == pytest.approx(0.75 * 1.25)
    assert normalised_covariance(1.0, 3.0, 3.0, 1.0, gain_square=1.25) == pytest.approx(0.3125)


def test_layer_norm_removes_a_common_mean():
    assert centred_correlation(0.3, 0.0) == pytest.approx(0.3)
    assert centred_correlation(1.0, 0.9) == pytest.approx(1.0)
    shares = np.array([0.0, 0.2, 0.5])
    assert np.all(np.diff(centred_correlation(0.5, shares)) < 0)


def test_norm_gram_of_equal_moments():
    gram = np.array([[2.0, 1.0], [1.0, 2.0]])
    np.testing.assert_allclose(norm_gram(gram, "rms", 0.0, 8), [[1, 0.5], [0.5, 1]])
    np.testing.assert_allclose(norm_gram(gram, "layer", 0.25, 8), np.array([[1.75, 0.875], [0.875, 1.75]]) / 2)


@pytest.mark.parametrize(
    "call",
    [
        lambda: cosine_mean(1.5, 8),
        lambda: cosine_mean("0.5", 8),
        lambda: cosine_mean(0.5, 0),
        lambda: cosine_variance(None, 8),
        lambda: normalised_second_moment(0.0, 0.0),
        lambda: normalised_second_moment(float("nan"), 1.0),
        lambda: normalised_second_moment(-1.0, 1.0),
        lambda: normalised_covariance(0.0, np.array([1.0, 0.0]), 1.0, 0.0),
        lambda: normalised_second_moment_mean(1.0, 0.1, True),
        lambda: normalised_covariance_mean(0.5, 1.2, 1.0, 8),
        lambda: norm_degrees("layer", 1),
        lambda: norm_degrees("batch", 8),
        lambda: centred_correlation(0.5, 1.0),
        lambda: centred_second_moment(1.0, float("inf")),
    ],
)
def test_bad_input(call):
    with pytest.raises(AssumptionError, match=r"^[a-z_ +]+=.* is .*; expected "):
        call()
