"""Proofs of varprop/theory/attention.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import sympy

from proofs.check import CASES, Proof, close, equal, expect, normal_moments
from varprop.theory.attention import incoherent_average, key_factor, value_key_coupling

T = 3
c, d, n = sympy.symbols("c d n", positive=True)
p, r = sympy.symbols(f"p:{T}"), sympy.symbols(f"r:{T}")


def _summing_to_one(expression):
    return sympy.sympify(expression).subs({p[-1]: 1 - sum(p[:-1]), r[-1]: 1 - sum(r[:-1])})


def prove_incoherent_average(rule=incoherent_average):
    overlap = sum(a * b for a, b in zip(p, r, strict=True))
    form = sympy.Add(*(p[j] * r[k] * (1 if j == k else c) for j in range(T) for k in range(T)))
    equal(_summing_to_one(rule(c, overlap)), _summing_to_one(form))
    equal(rule(c, sympy.Rational(1, T)), form.subs(dict.fromkeys((*p, *r), sympy.Rational(1, T))))


def _posterior_shift(size=2):
    """S and the first-order shift of C_ab by Bayes: sum_cd Cov(C_ab, C_cd) d log-likelihood / dC_cd.

    Cov is that of a Wishart matrix of d degrees; the keys have n columns.
    """
    truth: Any = sympy.Matrix(size, size, lambda i, j: 1 if i == j else c)
    keys: Any = sympy.Matrix(size, size, lambda i, j: sympy.Symbol(f"S{min(i, j)}{max(i, j)}"))
    slope = truth.inv() * (keys - n * truth) * truth.inv() / 2
    indices = [(i, j) for i in range(size) for j in range(size)]

    def shift(a, b):
        return sum((truth[a, i] * truth[b, j] + truth[a, j] * truth[b, i]) / d * slope[i, j] for i, j in indices)

    return keys, shift


def prove_posterior():
    keys, shift = _posterior_shift()
    equal(shift(0, 1), (keys[0, 1] - n * c) / d)
    equal(shift(0, 0), (keys[0, 0] - n) / d)


def _cosine_covariance(truth, j, k, a):
    """d Cov(cosine_jk, W_aa) of a Wishart matrix W: Cov(W_jk, W_aa) - C_jk (Cov(W_jj, W_aa) + Cov(W_kk, W_aa)) / 2."""
    return 2 * truth[j][a] * truth[k][a] - truth[j][k] * (truth[j][a] ** 2 + truth[k][a] ** 2)


def prove_coupling(rule=value_key_coupling):
    """Average over the key component that all tokens share, for one query direction (n = 1), and many keys.

    Keys are those of normalised tokens: h = h' (1 - (W_aa - 1) / 2) removes from the posterior shift of the cosines
    Cov(cosine_jk, W_aa) g_a, g_a = ((C^-1 h)_a h_a - 1) / 2. Tokens other than j, k have one coefficient, which
    multiplies sum_a g_a, a constant over (j, k) that drops out because the weights add up to 1. C^-1 h -> z /
    sqrt(1 - c) for many keys.
    """
    common, z = sympy.symbols("xi"), sympy.symbols(f"z:{T}")
    h = [sympy.sqrt(c) * common + sympy.sqrt(1 - c) * zj for zj in z]
    g = [(zj / sympy.sqrt(1 - c) * hj - 1) / 2 for zj, hj in zip(z, h, strict=True)]
    truth = [[1 if a == b else c for a in range(T)] for b in range(T)]
    total, pair, diagonal = 0, 0, 0
    for j in range(T):
        for k in range(T):
            if j != k:
                shift = h[j] * h[k] - c - c * (h[j] ** 2 - 1 + h[k] ** 2 - 1) / 2
                other = next(a for a in range(T) if a not in (j, k))
                rest = _cosine_covariance(truth, j, k, other)
                shift -= sum((_cosine_covariance(truth, j, k, a) - rest) * g[a] for a in (j, k))
                total += p[j] * p[k] * shift / d
                pair += p[j] * p[k] * z[j] * z[k]
                diagonal += p[j] * p[k] * (z[j] ** 2 - 1)
    equal(rule(c, pair, diagonal, d), expect(total, {common: normal_moments(1)}))


def prove_small_logit_coupling(rule=value_key_coupling):
    """s^2 E[k K(dC) + 2 H(dC)] over dC = cosines of Wishart tokens, many keys: K = (1 - c)^2 / d by double centring.

    -2 H = 2 Var_j(mean_k dC_jk), dC_jk = dW_jk - c (dW_jj + dW_kk) / 2 with W = y y' / d,
    y_j = sqrt(c) x + sqrt(1 - c) e_j. Its part in e_j alone is
    sqrt(c (1 - c)) (1 - c) x.e_j - c (1 - c) (e_j.e_j - d) / 2.
    """
    correlation = sympy.Symbol("k", positive=True)
    own = c * (1 - c) * (1 - c) ** 2 + (c * (1 - c) / 2) ** 2 * 2  # variances d of x.e_j, 2 d of e_j.e_j
    s2 = sympy.Symbol("s2", positive=True)
    known = s2 * (correlation * (1 - c) ** 2 - 2 * own) / d
    moment = s2 * (1 - c)  # pair and diagonal of small logits of variance s^2 (1 - c): tilted mean squared
    equal(rule(c, correlation * moment, moment, d), known)


def prove_iid_coupling(rule=value_key_coupling):
    """For i.i.d. tokens: E[(sum p g)^2 - sum p^2 g^2] / (s^2 d), g = s z."""
    s, z = sympy.symbols("s", positive=True), sympy.symbols(f"z:{T}")
    pair = sum(p[j] * p[k] * z[j] * z[k] for j in range(T) for k in range(T) if j != k)
    g = [s * zj for zj in z]
    known = sum(a * b for a, b in zip(p, g, strict=True)) ** 2 - sum(a**2 * b**2 for a, b in zip(p, g, strict=True))
    equal(rule(0, pair, sympy.Symbol("any"), d), known / (s**2 * d))


def prove_key_factor(rule=key_factor):
    """A A' has the moments of W W' for W of i.i.d. N(0, 1/d): means delta_ij, variances (1 + delta_ij) / d."""
    head_dim, d_model, draws = 3, 5, 200_000
    factor = rule(head_dim, d_model, (draws,), np.random.default_rng(0))
    square = factor @ factor.swapaxes(-1, -2)
    diagonal = np.diagonal(square, axis1=-2, axis2=-1)
    off = square[:, [0, 0, 1], [1, 2, 2]]
    tolerance = 6 * 1.5 / draws**0.5  # six standard errors; the largest standard deviation below is under 1.5
    close(diagonal.mean(), 1, tolerance)
    close((diagonal**2).mean(), 1 + 2 / d_model, tolerance)
    close(off.mean(), 0, tolerance)
    close((off**2).mean(), 1 / d_model, tolerance)


PROOFS = [
    Proof(
        "p'Cp = c + (1 - c) sum p^2, uniform limit",
        "weights sum to 1, one correlation",
        prove_incoherent_average,
        CASES,
    ),
    Proof("E[C | keys] = C + (S - head_dim C) / d", "Wishart fluctuations, first order", prove_posterior, CASES),
    Proof("value-key coupling", "exchangeable tokens, many keys, first order in 1/d", prove_coupling, CASES),
    Proof("its small-logit form, for two queries", "many keys, first order in s^2 and 1/d", prove_small_logit_coupling),
    Proof("its form for i.i.d. tokens", "i.i.d. tokens", prove_iid_coupling, CASES),
    Proof("Bartlett factor of a key matrix (sampled, 6 standard errors)", "Gaussian weights", prove_key_factor),
]
