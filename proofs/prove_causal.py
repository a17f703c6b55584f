"""Proofs of varprop/theory/causal.py: the constants by which laws of logits that are not normal enter."""

from __future__ import annotations

import sympy

from proofs.check import Proof, equal, expect, normal_moments
from varprop.theory.causal import CAP_VARIANCE, SPHERE_VARIANCE

z, cap, d = sympy.symbols("z cap d", positive=True)
variance = sympy.Symbol("variance", positive=True)


def _as_variance(fourth_cumulant):
    """The relative variance e of the logit variance that moves log(n Y) like this fourth cumulant.

    For many keys log(n Y) = log E e^{2 l} - 2 log E e^l = variance + (2^4 - 2) / 24 kappa_4; E over a variance of
    relative variance e adds e variance^2 / 2 to log E e^{variance}.
    """
    return sympy.Rational(2**4 - 2, 24) * fourth_cumulant * 2 / variance**2


def prove_cap_variance(rule=CAP_VARIANCE):
    """cap tanh(l / cap) = l - l^3 / (3 cap^2), to first order in 1 / cap^2."""
    bend = sympy.series(cap * sympy.tanh(z / cap), z, 0, 5).removeO()
    law = {z: normal_moments(variance, 12)}
    fourth = expect(bend**4, law) - 3 * expect(bend**2, law) ** 2
    first = sympy.expand(fourth).coeff(cap, -2)
    equal(sympy.nsimplify(rule) * variance, _as_variance(first))


def prove_sphere_variance(rule=SPHERE_VARIANCE):
    """|w|^2 of a row of keys: chi^2_d / d, variance 2 / d; E z^4 = 3 d / (d + 2) for a component on the sphere."""
    fourth = sympy.limit(d * (3 * d / (d + 2) - 3), d, sympy.oo) / d * variance**2
    equal(sympy.nsimplify(rule) / d, 2 / d + _as_variance(fourth))


PROOFS = [
    Proof("soft cap: relative variance -28/3 a w / cap^2", "many keys, first order in 1/cap^2", prove_cap_variance),
    Proof("tokens on a sphere: relative variance -5/d", "many keys, first order in 1/d", prove_sphere_variance),
]
