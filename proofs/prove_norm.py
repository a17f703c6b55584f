"""Proofs of varprop/theory/norm.py."""

from __future__ import annotations

from typing import Any

import sympy

from proofs.check import CASES, Proof, equal, expect, normal_moments
from varprop.theory.norm import (
    centred_correlation,
    centred_second_moment,
    cosine_mean,
    cosine_variance,
    eps_fluctuation,
    normalised_covariance,
    normalised_covariance_mean,
    normalised_second_moment,
    normalised_second_moment_mean,
)

D = 3
eps, q = sympy.symbols("epsilon q", positive=True)
x, y = sympy.symbols(f"x:{D}", real=True), sympy.symbols(f"y:{D}", real=True)


def _rms(vector):
    return [v / sympy.sqrt(sum(w**2 for w in vector) / D + eps) for v in vector]


def _dot(a, b):
    return sum(i * j for i, j in zip(a, b, strict=True)) / D


def prove_second_moment(rule=normalised_second_moment):
    equal(rule(_dot(x, x), eps), _dot(_rms(x), _rms(x)))


def prove_gain(rule=normalised_second_moment):
    # entries whose squares have one mean: E sum g^2 u^2 / d = mean g^2 * E u^2
    gains, square = sympy.symbols(f"g:{D}"), sympy.symbols("u2", positive=True)
    mean = sum(g**2 for g in gains) / D
    equal(rule(q, eps, mean).subs(q, eps * square / (1 - square)), sum(g**2 * square for g in gains) / D)


def prove_covariance(rule=normalised_covariance):
    equal(rule(_dot(x, y), _dot(x, x), _dot(y, y), eps, sympy), _dot(_rms(x), _rms(y)))


def prove_centred(rule=centred_second_moment):
    shift = sympy.symbols("m", real=True)
    mean = sum(x) / D
    variance: Any = sum((v - mean) ** 2 for v in x) / D
    shifted = variance.subs({v: v + shift for v in x}, simultaneous=True)
    equal(rule(q + shift**2, D, shift**2), expect(shifted, {v: normal_moments(q) for v in x}))


def prove_centred_correlation(rule=centred_correlation):
    def centred(vector):
        return [v - sum(vector) / D for v in vector]

    first, second = (1, 2, 5), (4, 3, 7)  # means of one sign: mean_correlation 1
    numbers = [[sympy.Integer(v) for v in vector] for vector in (first, second)]
    shares = [(sum(v) / D) ** 2 / _dot(v, v) for v in numbers]
    a, b = (centred(v) for v in numbers)
    before = _dot(*numbers) / sympy.sqrt(_dot(numbers[0], numbers[0]) * _dot(numbers[1], numbers[1]))
    equal(rule(before, *shares, 1, sympy), _dot(a, b) / sympy.sqrt(_dot(a, a) * _dot(b, b)))
    c, share, other, r = sympy.symbols("c a b r", positive=True)  # and for symbols: covariance less product of means
    expected = (c - r * sympy.sqrt(share) * sympy.sqrt(other)) / sympy.sqrt((1 - share) * (1 - other))
    equal(rule(c, share, other, r, sympy), expected)


def _delta_method(eps_over_q=(0, 0)):
    """Second-order mean, first-order variance of S_ab / sqrt((S_aa + e)(S_bb + e')), S Wishart of d degrees over d."""
    c, d = sympy.symbols("c d", positive=True)
    s = sympy.symbols("s_ab s_aa s_bb", positive=True)
    pairs = ((0, 1), (0, 0), (1, 1))
    truth: Any = sympy.Matrix([[1, c], [c, 1]])

    def covariance(i, j):
        (a, b), (e, f) = pairs[i], pairs[j]
        return (truth[a, e] * truth[b, f] + truth[a, f] * truth[b, e]) / d

    cosine = s[0] / sympy.sqrt((s[1] + eps_over_q[0]) * (s[2] + eps_over_q[1]))
    at = {s[0]: c, s[1]: 1, s[2]: 1}
    indices = [(i, j) for i in range(3) for j in range(3)]
    second = sum(sympy.diff(cosine, s[i], s[j]).subs(at) * covariance(i, j) for i, j in indices) / 2
    slopes = [sympy.diff(cosine, v).subs(at) for v in s]
    return c, d, cosine.subs(at) + second, sum(slopes[i] * slopes[j] * covariance(i, j) for i, j in indices)


def prove_covariance_mean(rule=normalised_covariance_mean):
    e, f = sympy.symbols("e f", positive=True)
    c, d, mean, _ = _delta_method((e, f))
    equal(rule(c, 1 / (1 + e), 1 / (1 + f), d, sympy), mean)
    equal(rule(c, sympy.Integer(1), sympy.Integer(1), d, sympy), cosine_mean(c, d))


def prove_cosine_mean(rule=cosine_mean):
    c, d, mean, _ = _delta_method()
    equal(rule(c, d), mean)


def prove_cosine_variance(rule=cosine_variance):
    c, d, _, variance = _delta_method()
    equal(rule(c, d), variance)


def prove_eps_fluctuation(rule=eps_fluctuation):
    d = sympy.symbols("d", positive=True)
    second_order = sympy.diff(normalised_second_moment(q, eps), q, 2) * (2 * q**2 / d) / 2
    equal(rule(q, eps, d), -second_order / normalised_second_moment(q, eps))


def prove_second_moment_mean(rule=normalised_second_moment_mean):
    nu = sympy.symbols("nu", positive=True)
    second_order = sympy.diff(normalised_second_moment(q, eps), q, 2) * (nu * q**2) / 2
    equal(rule(q, eps, nu), normalised_second_moment(q, eps) + second_order)


PROOFS = [
    Proof("second moment after an RMS norm", "one token", prove_second_moment, CASES),
    Proof("gain vector: mean of g^2", "exchangeable entries", prove_gain, CASES),
    Proof("mean second moment where the norm fluctuates", "second order", prove_second_moment_mean),
    Proof("covariance after an RMS norm", "two tokens", prove_covariance, CASES),
    Proof("its mean with eps", "Gaussian entries, O(1/d)", prove_covariance_mean),
    Proof("mean variance that a layer norm divides by", "independent entries of one mean", prove_centred, CASES),
    Proof("correlation left by a layer norm", "two tokens", prove_centred_correlation, CASES),
    Proof("mean of a cosine", "Gaussian entries, O(1/d)", prove_cosine_mean),
    Proof("variance of a cosine", "Gaussian entries, O(1/d)", prove_cosine_variance),
    Proof("bias that eps leaves", "Gaussian entries, O(1/d)", prove_eps_fluctuation),
]
