"""Proofs of varprop/theory/norm.py."""

from __future__ import annotations

from typing import Any

import sympy

from proofs.check import Proof, equal, expect, normal_moments
from varprop.theory.norm import (
    centred_second_moment,
    cosine_mean,
    cosine_variance,
    eps_fluctuation,
    normalised_covariance,
    normalised_second_moment,
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


def prove_covariance(rule=normalised_covariance):
    equal(rule(_dot(x, y), _dot(x, x), _dot(y, y), eps, sympy), _dot(_rms(x), _rms(y)))


def prove_centred(rule=centred_second_moment):
    mean = sum(x) / D
    variance = sum((v - mean) ** 2 for v in x) / D
    equal(rule(q, D), expect(variance, {v: normal_moments(q) for v in x}))


def _delta_method():
    """Second-order mean and first-order variance of S_ab / sqrt(S_aa S_bb), S = Wishart of d degrees over d."""
    c, d = sympy.symbols("c d", positive=True)
    s = sympy.symbols("s_ab s_aa s_bb", positive=True)
    pairs = ((0, 1), (0, 0), (1, 1))
    truth: Any = sympy.Matrix([[1, c], [c, 1]])

    def covariance(i, j):
        (a, b), (e, f) = pairs[i], pairs[j]
        return (truth[a, e] * truth[b, f] + truth[a, f] * truth[b, e]) / d

    cosine = s[0] / sympy.sqrt(s[1] * s[2])
    at = {s[0]: c, s[1]: 1, s[2]: 1}
    indices = [(i, j) for i in range(3) for j in range(3)]
    mean = c + sum(sympy.diff(cosine, s[i], s[j]).subs(at) * covariance(i, j) for i, j in indices) / 2
    slopes = [sympy.diff(cosine, v).subs(at) for v in s]
    return c, d, mean, sum(slopes[i] * slopes[j] * covariance(i, j) for i, j in indices)


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


PROOFS = [
    Proof("second moment after an RMS norm", "one token", prove_second_moment),
    Proof("covariance after an RMS norm", "two tokens", prove_covariance),
    Proof("mean variance that a layer norm divides by", "independent centred entries", prove_centred),
    Proof("mean of a cosine", "Gaussian entries, O(1/d)", prove_cosine_mean),
    Proof("variance of a cosine", "Gaussian entries, O(1/d)", prove_cosine_variance),
    Proof("bias that eps leaves", "Gaussian entries, O(1/d)", prove_eps_fluctuation),
]
