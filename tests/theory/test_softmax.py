"""varprop.theory.softmax: known values, limits, extremes and sampled softmax weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varprop.errors import AssumptionError
from varprop.theory.softmax import softmax_moments, softmax_overlap, softmax_participation


@pytest.mark.parametrize("std, effective", [(0.82, 524), (1.5, 119), (2.5, 13.8), (4.0, 3.7)])
def test_effective_number_of_tokens(std, effective):
    digits = 0.5 if effective > 100 else 0.05  # the last digit given
    assert 1 / softmax_participation(1024, std) == pytest.approx(effective, abs=digits)


def test_large_number_limit():
    """E Y = e^{s^2} / T (1 + O(e^{s^2} / T))."""
    assert softmax_participation(8192, 0.5) * 8192 == pytest.approx(math.exp(0.25), rel=3 * math.exp(0.25) / 8192)


@settings(max_examples=40, deadline=None)
@given(n_tokens=st.integers(1, 10**7), std=st.floats(0.0, 50.0))
def test_bounds(n_tokens, std):
    value = softmax_participation(n_tokens, std)
    assert 1 / n_tokens * (1 - 1e-8) <= value <= 1 + 1e-8


def test_monotone_in_std_and_tokens():
    in_std = [softmax_participation(100, s) for s in (0, 0.1, 0.5, 1, 2, 4, 8, 16, 50)]
    assert in_std == sorted(in_std)
    in_tokens = [softmax_participation(n, 2.0) for n in (1, 2, 10, 100, 10**4, 10**7)]
    assert in_tokens == sorted(in_tokens, reverse=True)


@pytest.mark.parametrize("n_tokens, std, correlation", [(16, 1.0, 0.5), (64, 2.0, 0.3), (12, 3.0, 0.9)])
def test_against_drawn_weights(n_tokens, std, correlation):
    """40,000 draws; five standard errors of each mean: false-fail rate below 1e-5 over the whole test."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((40_000, n_tokens))
    other = correlation * z + math.sqrt(1 - correlation**2) * rng.standard_normal(z.shape)
    p, r = (np.exp(std * x) / np.exp(std * x).sum(axis=1, keepdims=True) for x in (z, other))
    moments = softmax_moments(n_tokens, std)
    pair = (p * z).sum(axis=1) ** 2 - (p**2 * z**2).sum(axis=1)
    cases = [
        ((p**2).sum(axis=1), moments.participation),
        (pair, moments.pair),
        ((p * (1 - p) * (z**2 - 1)).sum(axis=1), moments.diagonal),
        ((p * r).sum(axis=1), softmax_overlap(n_tokens, std, correlation)),
    ]
    for drawn, predicted in cases:
        assert abs(drawn.mean() - predicted) < 5 * drawn.std() / 200


def test_finite_width_against_drawn_tokens():
    """Tokens on the sphere of d = 32, heads of 8: participation and pair moment, five standard errors."""
    n_tokens, d_model, head_dim, std, draws = 24, 32, 8, 1.2, 60_000
    rng = np.random.default_rng(2)
    x = rng.standard_normal((draws, n_tokens))
    z = x * np.sqrt(d_model / (x**2 + rng.chisquare(d_model - 1, x.shape)))
    size = rng.chisquare(head_dim, (draws, 1)) / head_dim * rng.chisquare(d_model, (draws, 1)) / d_model
    p = np.exp(std * np.sqrt(size) * z)
    p /= p.sum(axis=1, keepdims=True)
    moments = softmax_moments(n_tokens, std, head_dim, d_model)
    pair = (p * z).sum(axis=1) ** 2 - (p**2 * z**2).sum(axis=1)
    for drawn, predicted in (((p**2).sum(axis=1), moments.participation), (pair, moments.pair)):
        assert abs(drawn.mean() - predicted) < 5 * drawn.std() / draws**0.5


def test_query_average_of_the_overlap():
    """Two Gaussian queries of correlation 0.4 in a head of 16, five standard errors."""
    n_tokens, head_dim, std, c, draws = 32, 16, 1.5, 0.4, 8_000
    rng = np.random.default_rng(3)
    q = rng.standard_normal((draws, head_dim))
    r = c * q + math.sqrt(1 - c**2) * rng.standard_normal(q.shape)
    k = rng.standard_normal((draws, n_tokens, head_dim))
    weights = []
    for query in (q, r):
        w = np.exp(std * np.einsum("nh,nth->nt", query, k) / head_dim**0.5)
        weights.append(w / w.sum(axis=1, keepdims=True))
    drawn = (weights[0] * weights[1]).sum(axis=1)
    assert abs(drawn.mean() - softmax_overlap(n_tokens, std, c, head_dim)) < 5 * drawn.std() / draws**0.5


@pytest.mark.parametrize("head_dim, error", [(None, 1e-5), (1, 3e-3), (8, 1e-3)])
def test_overlap_limits(head_dim, error):
    """The errors are the ones that the docstring states."""
    assert softmax_overlap(20, 0.0, 0.3, head_dim) == pytest.approx(1 / 20)
    assert softmax_overlap(20, 1.0, 1.0, head_dim) == pytest.approx(softmax_participation(20, 1.0, head_dim), rel=error)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: softmax_participation(0, 1.0), r"n_tokens=0 is too small; expected an integer >= 1"),
        (lambda: softmax_participation(4, -1.0), r"logit_std=-1.0 is outside the domain"),
        (lambda: softmax_overlap(4, 1.0, 1.5), r"correlation=1.5 is outside the domain; expected \[0, 1\]"),
    ],
)
def test_outside_the_domain(call, message):
    with pytest.raises(AssumptionError, match=message):
        call()
