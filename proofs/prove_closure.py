"""Proofs of varprop/theory/closure.py: the expansion by Taylor and Wick, what the equivalent set is exact for."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import mpmath
import numpy as np
import sympy

from proofs.check import CASES, PROVED, Proof, close, equal, expect, normal_average, normal_moments
from varprop.theory.closure import equivalent_keys, iid_third_order, pair_factor, second_order, third_order
from varprop.theory.softmax_table import softmax_table

s, c, k = sympy.symbols("s c k", positive=True)


def _symmetric(name: str, size: int) -> np.ndarray:
    return np.array([[sympy.Symbol(f"{name}{min(i, j)}{max(i, j)}") for j in range(size)] for i in range(size)])


def _taylor(form: Any, logits: list[Any], covariance: Any) -> Any:
    """E form(l) to second order in l: half the sum of second derivatives at 0 times covariances."""
    zero = dict.fromkeys(logits, 0)
    pairs = itertools.product(range(len(logits)), repeat=2)
    return sum(sympy.diff(form, logits[a], logits[b]).subs(zero) * covariance(a, b) for a, b in pairs) / 2


def prove_second_order(rule=second_order):
    """Two queries over three keys with any base weights, value Gram matrix and logit covariance."""
    size = 3
    values, keys = _symmetric("V", size), _symmetric("S", size)
    m, a = sympy.symbols("m0:4", positive=True), sympy.symbols("a0:2", positive=True)
    rows = [[m[0], m[1], 1 - m[0] - m[1]], [m[2], m[3], 1 - m[2] - m[3]]]
    weights = np.array([*rows, rows[0]], dtype=object)
    terms = rule(values, keys, weights)
    logits = sympy.symbols(f"l0:{2 * size}")
    p = [[rows[t][j] * sympy.exp(logits[size * t + j]) for j in range(size)] for t in range(2)]
    p = [[x / sum(row) for x in row] for row in p]

    def covariance(x, y):
        t, u = x // size, y // size
        return (a[t] if t == u else sympy.sqrt(a[0] * a[1]) * k) * keys[x % size, y % size]

    indices = list(itertools.product(range(size), repeat=2))
    pair: Any = sum(p[0][i] * p[1][j] * values[i, j] for i, j in indices)
    own: Any = sum(p[0][i] * p[0][j] * values[i, j] for i, j in indices)
    known = sympy.sqrt(a[0] * a[1]) * k * terms.together[0, 1] + a[0] * terms.shift[0, 1] + a[1] * terms.shift[1, 0]
    zero = dict.fromkeys(logits, 0)
    equal(terms.mean[0, 1], pair.subs(zero))
    equal(sympy.expand(known), sympy.expand(_taylor(pair, list(logits), covariance)))
    known = a[0] * (terms.together[0, 0] + 2 * terms.shift[0, 0])
    equal(sympy.expand(known), sympy.expand(_taylor(own, list(logits), covariance)))
    for spread, matrix in ((terms.value_spread, values), (terms.logit_spread, keys)):
        diagonal = sum(rows[0][j] * matrix[j, j] for j in range(size))
        equal(spread[0], diagonal - sum(rows[0][i] * rows[0][j] * matrix[i, j] for i, j in indices))


def prove_equivalent_keys(rule=equivalent_keys):
    n, v, w = sympy.symbols("n v w", positive=True)
    share = 1 - 1 / n
    for actual, expected in zip(rule(v * share, w * share, v * w * share / n), (n, v, w), strict=True):
        equal(actual, expected)
    for groups, copies in ((2, 1), (3, 2), (4, 1)):  # equicorrelated groups of equal tokens
        block = sympy.ones(copies, copies)
        matrix = np.array(sympy.kronecker_product((1 - c) * sympy.eye(groups) + c * sympy.ones(groups, groups), block))
        size = groups * copies
        terms = second_order(matrix, matrix, np.full((size, size), sympy.Rational(1, size)))
        second = terms.together[0, 0] + 2 * terms.shift[0, 0]
        for actual, expected in zip(
            rule(terms.value_spread[0], terms.logit_spread[0], second), (groups, 1 - c, 1 - c), strict=True
        ):
            equal(actual, expected)


def prove_two_keys(rule=equivalent_keys):
    """Any two keys: E p'Vp = X + v (Y(2, a w) - 1/2), with p (1 - p) for D ~ N(0, a (S_11 + S_22 - 2 S_12))."""
    values, keys, a = np.array([[1.0, 0.3], [0.3, 1.4]]), np.array([[1.0, -0.2], [-0.2, 1.0]]), 1.7
    terms = second_order(values, keys, np.full((1, 2), 0.5))
    second = terms.together[0, 0] + 2 * terms.shift[0, 0]
    n, v, w = rule(terms.value_spread[0], terms.logit_spread[0], second)
    close(n, 2)

    def sigmoid(z):
        return 1 / (1 + mpmath.exp(-math.sqrt(a * 2.4) * z))

    product = normal_average(lambda z: sigmoid(z) * (1 - sigmoid(z)))
    mean_form = 1.2 - product * (2.4 - 0.6)  # p V_11 + q V_22 - p q (V_11 + V_22 - 2 V_12), E p = 1/2
    close(terms.mean[0, 0] + v * ((1 - 2 * product) - 0.5), mean_form)
    close(softmax_table().participation(n, a * w), 1 - 2 * product, 1e-6)


def prove_integration_by_parts():
    """F'(s) = E sum p_j g_j = s E sum_jk S_jk dp_j/dl_k = s (sum p_j S_jj - p'Sp): Stein's lemma, then the softmax."""
    size = 3
    keys, logits = _symmetric("S", size), sympy.symbols(f"l0:{size}")
    total = sum(sympy.exp(x) for x in logits)
    p = [sympy.exp(x) / total for x in logits]
    indices = list(itertools.product(range(size), repeat=2))
    slope = sum(keys[i, j] * sympy.diff(p[i], logits[j]) for i, j in indices)
    equal(slope, sum(p[i] * keys[i, i] for i in range(size)) - sum(p[i] * p[j] * keys[i, j] for i, j in indices))


def _log_mean_series(rows: list[list[Any]], order: int) -> list[Any]:
    """E of the coefficients of s^m in log mean_j e^{s g_j}, g = rows @ z, z independent standard normal."""
    z = sympy.symbols(f"z0:{len(rows[0])}")
    g = [sum(x * y for x, y in zip(row, z, strict=True)) for row in rows]
    moments = [sum(x**m for x in g) / sympy.Integer(len(g) * math.factorial(m)) for m in range(1, order + 1)]
    series: list[Any] = [0] * (order + 1)
    for power in range(1, order + 1):  # log(1 + y) = sum (-1)^(power + 1) y^power / power
        for parts in itertools.product(range(1, order + 1), repeat=power):
            if sum(parts) <= order:
                sign = sympy.Rational((-1) ** (power + 1), power)
                series[sum(parts)] += sign * sympy.prod([moments[m - 1] for m in parts])
    law = {x: normal_moments(1, order) for x in z}
    return [expect(series[m], law) if m in (2, 4, 6) else 0 for m in range(order + 1)]


EXAMPLES = (
    [[1, 0], [sympy.Rational(3, 5), sympy.Rational(4, 5)]],
    [[1, 0], [sympy.Rational(3, 5), sympy.Rational(4, 5)], [sympy.Rational(-5, 13), sympy.Rational(12, 13)]],
    [[1, 0, 0], [0, 1, 0], [sympy.Rational(2, 3), sympy.Rational(1, 3), sympy.Rational(2, 3)]],
)


def prove_third_order(rule=third_order):
    """S_bar, Q and R of 1 - F'(s) / s = 1 - 2 f_2 - 4 f_4 s^2 - 6 f_6 s^4 for three unit-diagonal S."""
    for rows in EXAMPLES:
        matrix = np.array(sympy.Matrix(rows) * sympy.Matrix(rows).T)
        series, size = _log_mean_series(rows, 6), len(rows)
        terms = second_order(matrix, matrix, np.full((size, size), sympy.Rational(1, size)))
        equal(terms.mean[0, 0], 1 - 2 * series[2])
        equal(terms.together[0, 0] + 2 * terms.shift[0, 0], -4 * series[4])
        equal(rule(matrix), -6 * series[6])


def prove_iid_third_order(rule=iid_third_order):
    w = sympy.Symbol("w", positive=True)
    for n in (2, 3, 4, 7):
        equal(rule(sympy.Integer(n), w), third_order(np.array(w * sympy.eye(n))))


def prove_pair_factor(rule=pair_factor):
    z, n, variance = sympy.symbols("z n variance", positive=True)
    factor = functools.partial(rule, xp=sympy)
    equal(sympy.limit(factor(k, z, z, 0), z, 0), k)
    equal(factor(0, z, z, 0), 0)
    # many keys: log-normal sums, n sum_j p_tj p_uj -> E e^{l + l'} / (E e^l E e^l') = e^{k z}
    joint = sympy.exp((2 * z + 2 * k * z) / 2) / sympy.exp(z / 2) ** 2
    equal(1 + z * factor(k, z, z, 0), joint)
    # a fluctuating k: E e^{k L} for normal k
    x = sympy.Symbol("x", real=True)
    density = sympy.exp(-((x - k) ** 2) / (2 * variance)) / sympy.sqrt(2 * sympy.pi * variance)
    average = sympy.integrate(sympy.expand(density * sympy.exp(x * n), power_exp=False), (x, -sympy.oo, sympy.oo))
    equal(1 + z * factor(k, n, z, variance), sympy.simplify(average))
    for step in (1e-9, 0.3, 2.0):
        close(rule(0.4, step, step, 0.1), mpmath.expm1(0.4 * step + step**2 / 20) / step)


PROOFS = [
    Proof("second order of E p_t' V p_u", "Gaussian logits, any V, S and base weights", prove_second_order, CASES),
    Proof("equivalent set exact: equicorrelated, groups of copies", "second order", prove_equivalent_keys, CASES),
    Proof("equivalent set of two keys, one example (1e-10; table 1e-6)", "Gaussian logits", prove_two_keys),
    Proof("F'(s) = s (mean S_jj - E p'Sp)", "Gaussian logits", prove_integration_by_parts, CASES),
    Proof(
        "S_bar, Q, R are cumulants of the logits (three S)", "Gaussian logits, unit diagonal", prove_third_order, CASES
    ),
    Proof("third order of i.i.d. keys, n = 2, 3, 4, 7", "i.i.d. logits", prove_iid_third_order, CASES),
    Proof("pair factor: small logits, k = 0, many keys, fluctuating k", "Gaussian logits", prove_pair_factor, PROVED),
]
