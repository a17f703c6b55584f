"""Proofs of varprop/theory/overlap.py: closed forms for two experts, and cases without interaction of experts.

Two experts, one active: the same one is active with probability 1 - arccos(c) / pi (Sheppard 1899).
"""

from __future__ import annotations

import math

import mpmath
import numpy as np
import scipy.special

from proofs.check import Proof, close, normal_pair_average
from varprop.theory.gates import canonical, gate_first_moment, gate_second_moment
from varprop.theory.overlap import _own_gate, _own_series, gate_overlap, swap_rate

ORDER = "score_then_top_k"


def _pair(function, std, c):
    """E f(s x) f(s y) of a pair of correlation c."""
    other = math.sqrt(1 - c**2)
    return normal_pair_average(lambda x, w: function(std * x) * function(std * (c * x + other * w)))


def prove_ends(rule=gate_overlap):
    for n_experts, top_k, std, kinds in (
        (8, 2, 0.9, (True, False)),
        (64, 8, 1.0, (True, False)),
        (8, 8, 2.0, (True,)),
        (8, 2, 40.0, (True,)),
    ):
        for normalize in kinds:
            first = gate_first_moment(n_experts, top_k, std, normalize=normalize)
            second = gate_second_moment(n_experts, top_k, std, normalize=normalize)
            apart, equal = rule(n_experts, top_k, std, [0.0, 1.0], normalize=normalize)
            close(apart * n_experts / first**2, 1, 1e-5)
            close(equal / second, 1, 1e-5)


def prove_no_interaction(rule=gate_overlap):
    """Sigmoid scores with every expert active: experts do not see each other, O = E E[f f']."""
    for n_experts in (1, 4):
        for c in (0.2, 0.6, 0.95):
            expected = n_experts * _pair(scipy.special.expit, 1.5, c)
            close(rule(n_experts, n_experts, 1.5, c, normalize=False, router="sigmoid"), expected, 1e-6)


def prove_own_series():
    """h(z) = Phi(z) for one of two: E E[h h'] = 2 (1/4 + arcsin(c/2) / (2 pi))."""
    law = canonical(2, 1, True, "softmax", ORDER)
    series = _own_series(law, *_own_gate(law, 1.0))
    for c in (0.0, 0.3, 0.9, 1.0):
        value = float(np.polynomial.polynomial.polyval(c, series))
        close(value, 2 * (mpmath.mpf(1) / 4 + mpmath.asin(mpmath.mpf(c) / 2) / (2 * mpmath.pi)))


def prove_swap_rate(rule=swap_rate):
    """One of two: 1 / pi. Of three, by symmetry, half of the ties lie above the third: 3 / (2 pi)."""
    close(rule(canonical(2, 1, True, "softmax", ORDER), 1.0), 1 / mpmath.pi)
    close(rule(canonical(3, 1, True, "softmax", ORDER), 1.0), 3 / (2 * mpmath.pi))
    close(rule(canonical(3, 2, True, "softmax", ORDER), 1e-7), 3 / (8 * mpmath.pi), 1e-6)  # gates 1/2
    close(rule(canonical(3, 2, False, "softmax", ORDER), 1e-7), 3 / (18 * mpmath.pi), 1e-6)  # gates 1/3
    close(rule(canonical(2, 1, False, "sigmoid", ORDER), 1e-7), 1 / (4 * mpmath.pi), 1e-6)  # gates 1/2


def prove_two_experts(rule=gate_overlap):
    """One of two: 1 - arccos(c) / pi; both of two: 2 E[p p'], p the sigmoid of a logit difference. Fixed draws."""
    for c in (0.1, 0.4, 0.7, 0.9, 0.99):
        close(rule(2, 1, 1.0, c, normalize=True) * 2, 2 * (1 - mpmath.acos(c) / mpmath.pi), 3e-3)
        both = 2 * _pair(scipy.special.expit, 1.3 * 2**0.5, c)
        close(rule(2, 2, 1.3, c, normalize=True) * 2, 2 * both, 3e-3)


PROOFS = [
    Proof("O(0) = S_1^2 / E, O(1) = S_2 (1e-5)", "i.i.d. normal router logits", prove_ends),
    Proof("experts that do not compete (1e-6)", "sigmoid scores, all active", prove_no_interaction),
    Proof("own-expert series of one of two (1e-10)", "i.i.d. normal router logits", prove_own_series),
    Proof("slope at equal tokens: rate of swaps", "two and three experts", prove_swap_rate),
    Proof("overlap of two experts (3e-3, fixed draws)", "i.i.d. normal router logits", prove_two_experts),
]
