"""varprop.theory.feed_forward: limits, drawn networks, tokens of different second moments, bad input."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varprop.errors import AssumptionError
from varprop.spec import TensorRow
from varprop.theory.activation import silu
from varprop.theory.feed_forward import (
    FeedForwardGains,
    feed_forward_covariance,
    feed_forward_gains,
    feed_forward_gram,
    feed_forward_mask_factor,
    feed_forward_second_moment,
)

NAMES = ["identity", "relu", "relu2", "gelu", "gelu_tanh", "silu"]
GAINS = FeedForwardGains(0.8, 0.7, 0.6)


def rows(*names: str) -> dict[str, TensorRow]:
    return {name: TensorRow(name, name, 1, (8, 4), 4, 8, 0.0, 0.5, 1.0, None) for name in names}


@settings(max_examples=60, deadline=None)
@given(
    activation=st.sampled_from(NAMES),
    gated=st.booleans(),
    m=st.floats(1e-6, 500.0),
    d=st.sampled_from([16, 256, np.inf]),
)
def test_equal_tokens_have_the_second_moment_as_their_covariance(activation, gated, m, d):
    top = feed_forward_second_moment(m, GAINS, activation, gated)
    assert feed_forward_covariance(m, m, 1.0, GAINS, activation, gated, d) == pytest.approx(top, rel=1e-10)


@pytest.mark.parametrize("gated", [True, False])
def test_drawn_networks_with_two_raw_tokens(gated):
    """d = 16, d_ff = 24, tokens of second moments 1.5 and 0.4 at cosine 0.7, fixed: exact at any width.

    The network is the replicate: 20,000, standard error about 1 %; false-fail rate 1e-4 (4 standard errors), an error
    of 6 % would be seen.
    """
    d, d_ff, n, c = 16, 24, 20_000, 0.7
    rng = np.random.default_rng(3)
    basis = np.linalg.qr(rng.standard_normal((d, 2)))[0].T * np.sqrt(d)
    tokens = np.stack([np.sqrt(1.5) * basis[0], np.sqrt(0.4) * (c * basis[0] + np.sqrt(1 - c**2) * basis[1])])
    inner, up = (rng.standard_normal((n, d_ff, d)) * np.sqrt(g / d) @ tokens.T for g in (GAINS.inner, GAINS.up))
    hidden = silu(inner) * (up if gated else 1.0)
    output = np.sqrt(GAINS.down / d_ff) * rng.standard_normal((n, d, d_ff)) @ hidden
    drawn = np.mean(output[:, :, 0] * output[:, :, 1], axis=1), np.mean(output[:, :, 1] ** 2, axis=1)
    expected = (
        feed_forward_covariance(1.5, 0.4, c, GAINS, "silu", gated),
        feed_forward_second_moment(0.4, GAINS, "silu", gated),
    )
    for values, value in zip(drawn, expected, strict=True):
        assert abs(values.mean() - value) < 4 * values.std(ddof=1) / n**0.5


@pytest.mark.parametrize("d", [16, 32, 64])
def test_average_over_uncorrelated_directions(d):
    """Two uniform directions: density (1 - r^2)^((d - 3) / 2). The three-point rule is right to O(1/d^2)."""
    r, weight = np.polynomial.legendre.leggauss(400)
    density = weight * (1 - r**2) ** ((d - 3) / 2)
    for gated in (True, False):
        exact = density @ feed_forward_covariance(1.0, 1.0, r, GAINS, "silu", gated) / density.sum()
        assert abs(feed_forward_covariance(1.0, 1.0, 0.0, GAINS, "silu", gated, d) - exact) < 0.05 / d**2


def test_gram_has_both_rules_and_equal_tokens_take_one_variance():
    gram = np.array([[[2.0, 0.6, 0.0], [0.6, 1.0, 0.3], [0.0, 0.3, 0.5]]])
    for activation, gated in (("silu", True), ("gelu", False)):
        matrices = rows("gate", "up", "down") if gated else rows("up", "down")
        gains = feed_forward_gains(matrices)
        output = feed_forward_gram(gram, matrices, activation, gated, 64)
        np.testing.assert_allclose(output, output.swapaxes(-1, -2), rtol=1e-12)
        diagonal = feed_forward_second_moment(np.array([2.0, 1.0, 0.5]), gains, activation, gated)
        np.testing.assert_allclose(output[0].diagonal(), diagonal, rtol=1e-12)
        pair = feed_forward_covariance(2.0, 1.0, 0.6 / 2**0.5, gains, activation, gated, 64)
        assert output[0, 0, 1] == pytest.approx(float(pair), rel=1e-12)
    ones = np.full((2, 3, 3), 0.5) + 0.5 * np.eye(3)
    nearly = ones + 1e-12 * np.diag([1.0, 0.0, 0.0])
    close = [feed_forward_gram(g, rows("gate", "up", "down"), "silu", True, 64) for g in (ones, nearly)]
    np.testing.assert_allclose(*close, rtol=1e-10)


def test_zero_tokens_and_gains_that_are_arrays():
    zero = feed_forward_gram(np.zeros((1, 3, 3)), rows("gate", "up", "down"), "silu", True, 64)
    np.testing.assert_allclose(zero, 0.0, atol=1e-100)
    gains = FeedForwardGains(np.array([0.5, 1.0]), 1.0, np.array([1.0, 2.0]))
    many = feed_forward_covariance(1.0, 2.0, 0.3, gains, "silu", True, 128)
    each = [
        feed_forward_covariance(1.0, 2.0, 0.3, FeedForwardGains(i, 1.0, o), "silu", True, 128)
        for i, o in ((0.5, 1.0), (1.0, 2.0))
    ]
    np.testing.assert_allclose(many, each, rtol=1e-12)


def test_masked_swiglu_lies_between_half_and_one_of_the_product():
    density = np.linspace(0.01, 1, 30)
    for gain in (1e-3, 0.8, 50.0):
        gains = FeedForwardGains(gain, gain, gain)
        factor = feed_forward_mask_factor(FeedForwardGains(density, density, density), gains, "silu", gated=True)
        assert np.all(factor / density**3 <= 1 + 1e-12)
        assert np.all(factor / density**3 >= 0.5)
        assert np.all(np.diff(factor) > 0)


@pytest.mark.parametrize(
    "call",
    [
        lambda: feed_forward_second_moment(-1.0, GAINS, "silu", True),
        lambda: feed_forward_second_moment("1", GAINS, "silu", True),
        lambda: feed_forward_second_moment(1.0, GAINS, "tanh", True),
        lambda: feed_forward_second_moment(1.0, FeedForwardGains(-1.0, 1.0, 1.0), "relu", True),
        lambda: feed_forward_covariance(1.0, float("nan"), 0.0, GAINS, "silu", True),
        lambda: feed_forward_covariance(1.0, 1.0, 1.1, GAINS, "silu", True),
        lambda: feed_forward_mask_factor(GAINS, FeedForwardGains(0.0, 1.0, 1.0), "silu", True),
    ],
)
def test_bad_input(call):
    with pytest.raises(AssumptionError, match="expected"):
        call()
