"""Proofs of varprop/theory/key_mask.py, by summing over all masks or all numbers of kept keys."""

from __future__ import annotations

import itertools
import math

import mpmath
import numpy as np
import sympy

from proofs.check import CASES, Proof, close, equal
from varprop.theory.key_mask import binomial_nodes, kept_form, kept_inverse, kept_inverse_square, masked_output_form

rho = sympy.Symbol("rho", positive=True)


def _kept(n_keys, power, density):
    """E n^-power, n = 1 + Bin(n_keys - 1, density)."""
    m = n_keys - 1
    return sum(math.comb(m, b) * density**b * (1 - density) ** (m - b) / (1 + b) ** power for b in range(m + 1))


def prove_kept_inverse(rule=kept_inverse):
    for n in range(1, 7):
        equal(rule(sympy.Integer(n), rho, sympy), _kept(sympy.Integer(n), 1, rho))
        close(rule(n, 0.3), _kept(n, 1, mpmath.mpf(0.3)))
    close(rule(50, 1e-300), 1)


def prove_kept_inverse_square(rule=kept_inverse_square):
    for density in (0.03, 0.5, 1.0):
        values = rule(40, density)
        for n in (1, 2, 3, 17, 40):
            close(n * values[n - 1], n * _kept(n, 2, mpmath.mpf(density)))


def prove_masked_output(rule=masked_output_form, size=3):
    """Own weight 0 always kept, the others with probability rho."""
    p, v = sympy.symbols(f"p0:{size}"), [[sympy.Symbol(f"V{min(i, j)}{max(i, j)}") for j in range(3)] for i in range(3)]
    indices = list(itertools.product(range(size), repeat=2))
    total = 0
    for mask in itertools.product((0, 1), repeat=size - 1):
        kept = (1, *mask)
        chance = sympy.prod([rho if b else 1 - rho for b in mask])
        total += chance * sum(kept[i] * kept[j] * p[i] * p[j] * v[i][j] for i, j in indices)
    form = sum(p[i] * p[j] * v[i][j] for i, j in indices)
    squares = sum(p[i] ** 2 * v[i][i] for i in range(size))
    equal(rule(form, squares, p[0] ** 2 * v[0][0], p[0] * sum(p[j] * v[0][j] for j in range(size)), rho), total)


def prove_binomial_nodes(rule=binomial_nodes):
    """All moments below degree 10 for m = 12, and every function for m < 5."""
    for m, density in ((12, 0.3), (3, 0.7), (0, 0.5), (1, 0.1)):
        nodes, probability = rule(np.array([m]), density)
        for power in range(10):
            exact = sum(
                mpmath.binomial(m, b) * mpmath.mpf(density) ** b * (1 - mpmath.mpf(density)) ** (m - b) * b**power
                for b in range(m + 1)
            )
            close(probability[0] @ nodes[0] ** power, exact, 1e-11)
        if m < 5:
            close(probability[0] @ (1 / (1 + nodes[0])), _kept(m + 1, 1, mpmath.mpf(density)), 1e-11)


def prove_kept_form(rule=kept_form, size=4):
    root = np.random.default_rng(0).standard_normal((size, size))
    values, allowed, density = root @ root.T, np.tri(size, dtype=bool), 0.4
    known = np.zeros(size)
    for t in range(size):
        for mask in itertools.product((0, 1), repeat=t):
            kept = np.array([*mask, 1] + [0] * (size - t - 1))
            chance = np.prod([density if b else 1 - density for b in mask])
            known[t] += chance * kept @ values @ kept / kept.sum() ** 2
    for actual, expected in zip(rule(values, allowed, allowed.sum(axis=1), density), known, strict=True):
        close(actual, expected)


PROOFS = [
    Proof("E 1/n of the kept keys, N = 1..6", "independent masks, own key kept", prove_kept_inverse, CASES),
    Proof("E 1/n^2 by its recursion (1e-10)", "independent masks, own key kept", prove_kept_inverse_square),
    Proof("p'Cp after a mask on the weights", "independent masks, own weight kept", prove_masked_output, CASES),
    Proof("Gauss rule of a binomial law (1e-11)", "none", prove_binomial_nodes),
    Proof("p'Vp over kept keys at zero logits (1e-10)", "independent masks, own key kept", prove_kept_form),
]
