"""Proofs of varprop/theory/fluctuation.py and branch_noise.py: fourth moments of Gaussian tokens, weights and units."""

from __future__ import annotations

import itertools
from typing import Any

import mpmath
import numpy as np
import sympy

from proofs.check import CASES, Proof, close, equal, expect, normal_average, normal_moments
from varprop.theory.branch_noise import PATTERNS, activation_unit, mean_covariance, normal_unit, rectified_moments
from varprop.theory.fluctuation import (
    averaged_attention_variance,
    feed_forward_relative_variance,
    gaussian_covariance,
    gaussian_relative_variance,
    gram_covariance,
)

c, d, n, q, z = sympy.symbols("c d n q z", positive=True)
T = sympy.Symbol("T", positive=True, integer=True)


def _tokens(n_tokens, n_coordinates):
    """Tokens x[t][i] of unit variance and correlation c, and the moments of the normals they are made of."""
    common, own = sympy.symbols(f"g:{n_coordinates}"), sympy.symbols(f"e:{n_tokens}_:{n_coordinates}")
    tokens = [
        [sympy.sqrt(c) * common[i] + sympy.sqrt(1 - c) * own[t * n_coordinates + i] for i in range(n_coordinates)]
        for t in range(n_tokens)
    ]
    return tokens, {symbol: normal_moments(1) for symbol in (*common, *own)}


def _covariance(first, second, moments):
    return expect(first * second, moments) - expect(first, moments) * expect(second, moments)


def prove_gaussian_power(rule=gaussian_relative_variance):
    for n_tokens, degrees in ((1, 1), (2, 2), (3, 1)):
        tokens, moments = _tokens(n_tokens, degrees)
        power = sum(x**2 for token in tokens for x in token) / (n_tokens * degrees)
        equal(rule(c, n_tokens, degrees), _covariance(power, power, moments))


def prove_gaussian_covariance(rule=gaussian_covariance):
    n_tokens, degrees = 3, 1
    tokens, moments = _tokens(n_tokens, degrees)
    power = q * sum(token[0] ** 2 for token in tokens) / n_tokens
    mean = q * (sum(token[0] for token in tokens) / n_tokens) ** 2
    stated = rule(q, c, n_tokens, degrees)
    for i, j in itertools.product(range(2), repeat=2):
        equal(stated[i, j], _covariance((power, mean)[i], (power, mean)[j], moments))


def prove_patterns(rule=mean_covariance):
    """The sums over all (a, b), (c, d): each quadruple falls into one pattern."""
    symbols = sympy.symbols("k:7")
    for n_tokens in (1, 2, 3, 4, 5):
        sums = [0, 0, 0]
        for a, b, u, v in itertools.product(range(n_tokens), repeat=4):
            value = symbols[PATTERNS.index(_canonical(a, b, u, v))]
            sums[2] += value / sympy.Integer(n_tokens) ** 4
            sums[1] += value / sympy.Integer(n_tokens) ** 3 if a == b else 0
            sums[0] += value / sympy.Integer(n_tokens) ** 2 if a == b and u == v else 0
        for stated, total in zip(rule(symbols, sympy.Integer(n_tokens)), sums, strict=True):
            equal(stated, total)


def _canonical(a, b, u, v):
    """The pattern of Cov(K_ab, K_uv): K is symmetric, and so is the covariance."""
    orders = [(a, b, u, v), (b, a, u, v), (a, b, v, u), (b, a, v, u)]
    orders += [(w, x, y, z) for y, z, w, x in orders]
    for order in orders:
        names: dict[int, int] = {}
        renamed = tuple(names.setdefault(token, len(names)) for token in order)
        if renamed in PATTERNS:
            return renamed
    raise AssertionError((a, b, u, v))


def prove_wishart_patterns(rule=mean_covariance):
    """With Cov(W_ab, W_cd) = (G_ac G_bd + G_ad G_bc) / n the patterns give `gaussian_covariance`, for every T."""

    def entry(a, b):
        return q if a == b else q * c

    wishart = [(entry(a, u) * entry(b, v) + entry(a, v) * entry(b, u)) / n for a, b, u, v in PATTERNS]
    stated, expected = rule(wishart, T), gaussian_covariance(q, c, T, n)
    for value, other in zip(stated, (expected[0, 0], expected[0, 1], expected[1, 1]), strict=True):
        equal(value, other)


def prove_telescoping(rule=gaussian_covariance):
    """A branch F added to a stream X: Var(2 x.f) makes the Wishart law of X + F out of those of X and F."""
    v, k = sympy.symbols("v k", positive=True)  # F: second moment v, correlation k
    total = rule(q + v, (q * c + v * k) / (q + v), T, n) - rule(q, c, T, n) - rule(v, k, T, n)
    equal(total[0, 0], 4 * q * v * (1 + (T - 1) * c * k) / (T * n))  # 4/(T^2 n) sum_ts G_ts K_ts
    equal(total[1, 1], 4 * q * v * (1 + (T - 1) * c) * (1 + (T - 1) * k) / (T**2 * n))  # 4/n G_s K_s of the mean token


def prove_gram_covariance(rule=gram_covariance):
    root = np.array([[1.0, 0.0, 0.0], [0.4, 0.9, 0.0], [-0.3, 0.2, 1.1]])
    gram, t = root @ root.T, range(3)
    diagonal, flat = np.eye(3) / 3, np.full((3, 3), 1 / 9)
    for i, left in enumerate((diagonal, flat)):
        for j, right in enumerate((diagonal, flat)):
            pairs = itertools.product(t, repeat=4)
            total = sum(
                left[a, b] * right[u, v] * (gram[a, u] * gram[b, v] + gram[a, v] * gram[b, u]) for a, b, u, v in pairs
            )
            close(rule(gram, 7)[i, j], mpmath.mpf(total) / 7, 1e-13)


def prove_feed_forward(rule=feed_forward_relative_variance):
    """E over output weights w of the squared power, for any inner units; then the moments of two i.i.d. units."""
    fourth, pair, kappa = sympy.symbols("m_4 m_2 kappa", positive=True)
    moment: dict[tuple[int, ...], Any] = {
        (0, 0, 0): 1,
        (2, 0, 0): 1,
        (1, 1, 0): c,
        (4, 0, 0): fourth,
        (2, 2, 0): pair,
        (2, 1, 1): z,
    }
    for n_tokens, d_model, d_ff in ((2, 2, 2), (3, 1, 2)):
        w, a = sympy.symbols(f"w:{d_model}_:{d_ff}"), sympy.symbols(f"a:{n_tokens}_:{d_ff}")
        rows = [w[i * d_ff : (i + 1) * d_ff] for i in range(d_model)]
        units = [a[t * d_ff : (t + 1) * d_ff] for t in range(n_tokens)]
        outputs = [sum(x * y for x, y in zip(row, unit, strict=True)) for row in rows for unit in units]
        power = expect(sum(y**2 for y in outputs) ** 2, {x: normal_moments(1) for x in w})
        square = sum(
            value * sympy.Mul(*(moment[_sorted(powers[j::d_ff])] for j in range(d_ff)))
            for powers, value in sympy.Poly(power, *a).terms()
        )
        mean = n_tokens * d_model * d_ff
        equal(rule(c, fourth, pair, n_tokens, d_model, d_ff), square / mean**2 - 1)
    equal(rule(c, kappa, pair, 1, d, n), 2 / d + (kappa - 1) / n * (1 + 2 / d))


def _sorted(powers):
    """Powers of one unit over tokens, largest first, padded to three tokens: tokens are exchangeable."""
    return tuple(sorted((*powers, *(0,) * (3 - len(powers))), reverse=True))


def prove_attention(rule=averaged_attention_variance):
    """Given head outputs o[t][h], power has mean tr K / T and variance 2/d sum K_ts^2 / T^2, K = sum_h o_h o_h' / n.

    Two tokens, head_dim 1, two heads that share keys or do not; then E over o by Isserlis.
    """
    for group in (1, 2):
        first, second = 0, 0
        for t, s in itertools.product(range(2), repeat=2):
            for h, g in itertools.product(range(2), repeat=2):
                # K_tt K_ss and K_ts^2 over heads h and g
                first += _isserlis([(t, h), (t, h), (s, g), (s, g)], group)
                second += _isserlis([(t, h), (s, h), (t, g), (s, g)], group)
        equal(rule(c, z, 2, d, 2, 1, group), (first + 2 * second / d) / 16 - 1)
    kappa, heads, size = sympy.symbols("kappa n_h g", positive=True)
    r = 2 * (1 + (size - 1) * kappa**2) / (heads * n)
    equal(rule(c, kappa, 1, d, heads, n, size), (1 + 2 / d) * (1 + r) - 1)


def _isserlis(indices, group):
    a, b, u, v = indices
    pairs = (((a, b), (u, v)), ((a, u), (b, v)), ((a, v), (b, u)))
    return sum(_form(*one, group) * _form(*other, group) for one, other in pairs)


def _form(first, second, group):
    """E o o' of (token, head) pairs: 1, c across tokens, z across heads of a group, 0 across groups."""
    (t, h), (s, g) = first, second
    if h != g:
        return z if group == 2 else 0
    return 1 if t == s else c


def _normal_fourth(correlation):
    return normal_unit(correlation).fourth


def prove_normal_unit(rule=_normal_fourth):
    tokens, moments = _tokens(4, 1)
    x = [token[0] for token in tokens]
    for value, (a, b, u, v) in zip(rule(c), PATTERNS, strict=True):
        equal(value, expect(x[a] * x[b] * x[u] * x[v], moments))


def prove_rectified(rule=rectified_moments):
    for mean, std in ((0.7, 1.3), (-1.1, 0.4)):
        moments = rule(np.array(mean), std, 8)
        for power in (1, 2, 3, 4, 8):
            # an integral from the kink upwards, of a smooth function
            exact = normal_average(lambda x, k=power, m=mean, s=std: (m + s * x) ** k, -mean / std, 14)
            close(moments[power], exact)


def _activation_fourth(activation, variance, correlation):
    return activation_unit(activation, variance, correlation).fourth


def prove_activation_unit(rule=_activation_fourth):
    """Against one-dimensional mpmath integrals at c = 0 (independent tokens) and c = 1 (equal tokens)."""
    functions = {
        "silu": lambda h: h / (1 + mpmath.exp(-h)),
        "gelu": lambda h: h * mpmath.ncdf(h),
        "relu": lambda h: max(h, mpmath.mpf(0)),
    }
    root = mpmath.sqrt(1.7)
    for name, phi in functions.items():
        one, two, three, four = (normal_average(lambda x, p=phi, k=k: p(root * x) ** k) for k in (1, 2, 3, 4))
        independent = (four, two**2, three * one, two * one**2, two**2, two * one**2, one**4)
        for actual, apart in zip(rule(name, 1.7, 0.0), independent, strict=True):
            close(actual, apart)
        for actual in rule(name, 1.7, 1.0):
            close(actual, four)


def prove_activation_pair(rule=_activation_fourth):
    """E relu(h)^2 relu(h')^2 is the arc-cosine kernel of order 2."""
    for correlation in (0.2, 0.6, 0.9):
        angle = mpmath.acos(correlation)
        kernel = 3 * mpmath.sin(angle) * mpmath.cos(angle) + (mpmath.pi - angle) * (1 + 2 * mpmath.cos(angle) ** 2)
        close(rule("relu", 1.0, correlation)[1], kernel / (2 * mpmath.pi))


PROOFS = [
    Proof("Var q / q^2 = (2/n)(1 + (T-1) c^2)/T", "exchangeable Gaussian tokens", prove_gaussian_power, CASES),
    Proof(
        "covariance of q and of the mean token's power",
        "exchangeable Gaussian tokens",
        prove_gaussian_covariance,
        CASES,
    ),
    Proof("seven covariances of a Gram matrix give Var q, Cov, Var s", "exchangeable tokens", prove_patterns, CASES),
    Proof("Wishart patterns give the Gaussian law, every T", "exchangeable tokens", prove_wishart_patterns),
    Proof("output weights telescope over depth", "Gaussian output weights", prove_telescoping),
    Proof("(2/n) tr(A G B G), one token Gram matrix (1e-13)", "Wishart matrix", prove_gram_covariance),
    Proof(
        "relative variance of a feed-forward, exact", "i.i.d. inner units, Gaussian output", prove_feed_forward, CASES
    ),
    Proof(
        "relative variance of attention values, with groups", "fixed patterns, Gaussian values", prove_attention, CASES
    ),
    Proof("fourth moments of a normal unit (Wick)", "exchangeable Gaussian tokens", prove_normal_unit),
    Proof("E max(h, 0)^k by recursion", "normal h", prove_rectified),
    Proof("fourth moments of an activation, c = 0 and 1", "exchangeable Gaussian tokens", prove_activation_unit),
    Proof("fourth moments of relu, c = 0.2, 0.6, 0.9", "exchangeable Gaussian tokens", prove_activation_pair),
]
