"""Proofs of varprop/theory/linear.py."""

from __future__ import annotations

import itertools
from typing import Any

import mpmath
import sympy

from proofs.check import Proof, close, equal, expect, normal_moments
from varprop.theory.linear import (
    bernoulli_excess_kurtosis,
    bernoulli_retained_variance,
    linear_second_moment,
    magnitude_retained_variance,
    ranked_moment,
)

FAN_IN = 3
density, factor, std = sympy.symbols("rho f sigma", positive=True)
inputs = sympy.symbols(f"u:{FAN_IN}", positive=True)


def _mask_average(function):
    """Sum over all 0/1 masks of P(mask) * function(mask)."""
    total = 0
    for mask in itertools.product((0, 1), repeat=FAN_IN):
        total += density ** sum(mask) * (1 - density) ** (FAN_IN - sum(mask)) * function(mask)
    return total


def _moment(mask, power):
    """E y^power of y = sum_j m_j f w_j u_j for a given mask, over Gaussian w."""
    weights = sympy.symbols(f"w:{FAN_IN}")
    y = sum(m * factor * w * u for m, w, u in zip(mask, weights, inputs, strict=True))
    return expect(y**power, {w: normal_moments(std**2) for w in weights})


def prove_second_moment(rule=linear_second_moment, retained=bernoulli_retained_variance):
    actual = rule(sum(u**2 for u in inputs) / FAN_IN, FAN_IN * std**2, retained(density, factor))
    equal(actual, _mask_average(lambda mask: _moment(mask, 2)))


def prove_kurtosis(rule=bernoulli_excess_kurtosis):
    fourth = _mask_average(lambda mask: _moment(mask, 4))
    second = _mask_average(lambda mask: _moment(mask, 2))
    kurtosis = FAN_IN * sum(u**4 for u in inputs) / sum(u**2 for u in inputs) ** 2
    equal(rule(density, kurtosis, FAN_IN), fourth / second**2 - 3)


def prove_magnitude(rule=magnitude_retained_variance):
    tau, w = sympy.symbols("tau w", positive=True)
    normal = sympy.exp(-(w**2) / 2) / sympy.sqrt(2 * sympy.pi)
    kept = 2 * sympy.integrate(w**2 * normal, (w, tau, sympy.oo))
    share = sympy.integrate(2 * normal, (w, 0, tau))
    equal(rule(1 - share, sympy), kept.rewrite(sympy.erf))


def _largest_moment(rank: int, group: int, power: int) -> Any:
    """E |w|^power of the rank-th largest of `group` standard normal magnitudes."""
    count = rank * mpmath.binomial(group, rank)

    def integrand(w):
        above = mpmath.erfc(w / mpmath.sqrt(2))
        return w**power * count * above ** (rank - 1) * (1 - above) ** (group - rank) * 2 * mpmath.npdf(w)

    return mpmath.quad(integrand, [0, 2, 5, 12])


def prove_ranked(rule=ranked_moment):
    close(rule(1, 2, 2), mpmath.mpf(1) / 2 + 1 / mpmath.pi)  # E max(a^2, b^2) = 1 + 2 / pi
    for kept, group, power in ((2, 4, 2), (1, 3, 4)):
        close(rule(kept, group, power), sum(_largest_moment(r, group, power) for r in range(1, kept + 1)) / group)


PROOFS = [
    Proof("second moment of a Bernoulli-masked output", "independent mask, Gaussian weights", prove_second_moment),
    Proof("its excess kurtosis", "independent mask, Gaussian weights", prove_kurtosis),
    Proof("variance kept by a magnitude mask", "Gaussian weights, infinite matrix", prove_magnitude),
    Proof("moments kept by an n-of-m mask (1e-10)", "Gaussian weights", prove_ranked),
]
