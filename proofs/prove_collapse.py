"""Proofs of varprop/theory/collapse.py."""

from __future__ import annotations

import sympy

from proofs.check import CASES, Proof, equal, expect, normal_moments
from varprop.theory.collapse import approach_exponent, correlation_drift, correlation_step, rank_collapse

q, a, v, p = sympy.symbols("q a v p", positive=True)
c, k, participation, overlap = sympy.symbols("c k Y X")


def prove_step(rule=correlation_step):
    """Two tokens x_t + f_t with f independent of x: the covariance over the second moment."""
    shared, own, other = sympy.symbols("z z_t z_s")
    f_shared, f_own, f_other = sympy.symbols("w w_t w_s")
    c0, k0 = sympy.Rational(1, 3), sympy.Rational(1, 4)
    first = sympy.sqrt(q) * (sympy.sqrt(c0) * shared + sympy.sqrt(1 - c0) * own)
    second = sympy.sqrt(q) * (sympy.sqrt(c0) * shared + sympy.sqrt(1 - c0) * other)
    first += sympy.sqrt(p) * (sympy.sqrt(k0) * f_shared + sympy.sqrt(1 - k0) * f_own)
    second += sympy.sqrt(p) * (sympy.sqrt(k0) * f_shared + sympy.sqrt(1 - k0) * f_other)
    moments = {x: normal_moments(1) for x in (shared, own, other, f_shared, f_own, f_other)}
    power = expect(first**2, moments)
    equal(power, q + p)
    equal(rule(q, c0, p, k0 * p), expect(first * second, moments) / power)


def prove_drift(rule=correlation_drift):
    """One block moves c by D / q' exactly, D with the increments of the block; and the gated form at X = Y = 0."""
    g = sympy.Function("g")
    power = a * (c + (1 - c) * participation) + v
    covariance = a * (c + (1 - c) * overlap) + v * k
    moved = correlation_step(q, c, power, covariance)
    equal(rule(c, a, v, k, participation, overlap), (moved - c) * (q + power))
    equal(rule(c, a, v, c * g(c)), c * (a * (1 - c) - v * (1 - g(c))))


def prove_exponent(rule=approach_exponent):
    """e' = D'(c*) e / q with q = (a c* + v) l is solved by l^(D'(c*) / (a c* + v))."""
    kernel = sympy.Function("kappa")
    slope = sympy.diff(correlation_drift(c, a, v, kernel(c)), c)
    derivative = sympy.symbols("s")
    slope = slope.subs(sympy.Derivative(kernel(c), c), derivative)
    slope = slope.subs(kernel(c), c * (a * c + v - a) / v)  # D(c*) = 0
    layer = sympy.symbols("l", positive=True)
    exponent = rule(c, a, v, derivative)
    equal(sympy.diff(layer**exponent, layer) / layer**exponent, sympy.simplify(slope / ((a * c + v) * layer)))
    g1 = sympy.symbols("g_1")
    equal(rule(1, a, v, 1 + g1), -(a - v * g1) / (a + v))


def prove_rank_collapse(rule=rank_collapse):
    """Three blocks x + alpha A x with A = 11'/T, then x + beta W x, on the Gram matrix of T = 4 tokens."""
    alpha, beta = sympy.symbols("alpha beta", positive=True)
    n_tokens, rho = 4, sympy.symbols("rho", positive=True)
    gram = sympy.Matrix(n_tokens, n_tokens, lambda i, j: 1 if i == j else rho)
    average = sympy.ones(n_tokens, n_tokens) / n_tokens
    for _ in range(3):
        gram = (gram + alpha**2 * average * gram * average.T).applyfunc(sympy.expand)  # W_V W_O zero-mean, unit gain
        gram = gram * (1 + beta**2)
    equal(rule(rho, (1 + alpha**2) ** 3, n_tokens), gram[0, 1] / gram[0, 0])  # pyright: ignore[reportOperatorIssue]


PROOFS = [
    Proof("token correlation after a residual sum", "branch uncorrelated with the stream", prove_step, CASES),
    Proof("drift of the token correlation", "exchangeable tokens", prove_drift),
    Proof("power law of the approach to c*", "infinitely many tokens, l -> infinity", prove_exponent),
    Proof("rank collapse (Noci et al.)", "uniform attention, linear feed-forward", prove_rank_collapse, CASES),
]
