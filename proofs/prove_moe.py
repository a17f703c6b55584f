"""Proofs of varprop/theory/moe.py: limits of the gate law, direct integrals for few experts, shared experts.

With E = 3, a and b are the distances of two logits to the third; their joint density is exp(-(a^2 + b^2 - ab) / 3) /
(2 pi sqrt 3), restricted to the quadrant that the top k defines.
"""

from __future__ import annotations

import math

import mpmath
import numpy as np
import sympy

from proofs.check import Proof, close, equal, expect, normal_average, normal_moments, plane_integral
from varprop.theory.moe import gate_second_moment, mix_shared


def prove_limits(rule=gate_second_moment):
    for n_experts, top_k in ((1, 1), (4, 2), (16, 16)):
        close(rule(n_experts, top_k, 0.0, normalize=True), mpmath.mpf(1) / top_k)
        close(rule(n_experts, top_k, 0.0, normalize=False), mpmath.mpf(top_k) / n_experts**2)
        close(rule(n_experts, top_k, 1e-4, normalize=True), mpmath.mpf(1) / top_k, 1e-7)
        close(rule(n_experts, top_k, 1e-4, normalize=False) * n_experts**2 / top_k, 1, 1e-3)
    close(rule(8, 1, 1.3, normalize=True), 1)
    close(rule(5, 5, 1.3, normalize=True), mpmath.mpf(rule(5, 5, 1.3, normalize=False)))


def prove_two_experts(rule=gate_second_moment):
    std, root = 1.3, math.sqrt(2)

    def larger(z):
        return 1 / (1 + mpmath.exp(-std * root * z))

    close(rule(2, 1, std, normalize=False), 2 * normal_average(lambda z: larger(z) ** 2, 0, 12), 1e-9)
    close(rule(2, 2, std, normalize=True), normal_average(lambda z: 1 - 2 * larger(z) * (1 - larger(z))), 1e-9)
    top = normal_average(lambda z: 2 * mpmath.ncdf(z) / (1 + mpmath.exp(-std * z)) ** 2)
    close(rule(2, 1, std, normalize=False, router="sigmoid"), top, 1e-9)


def _quadrant(function):
    """3 times the integral over a, b > 0: the sum over which expert is singled out."""

    def weighted(a, b):
        return function(a, b) * np.exp(-(a**2 + b**2 - a * b) / 3) / (2 * np.pi * 3**0.5)

    return 3 * plane_integral(weighted, [0, 3, 16])


def prove_three_experts(rule=gate_second_moment):
    std = 0.9

    def largest(a, b):  # one active: the other two logits lie a and b below it
        return 1 / (1 + np.exp(-std * a) + np.exp(-std * b)) ** 2

    def two_largest(a, b, below):  # two active, a and b above the smallest, which enters the sum as `below`
        x, y = np.exp(std * a), np.exp(std * b)
        return (x**2 + y**2) / (below + x + y) ** 2

    close(rule(3, 1, std, normalize=False), _quadrant(largest), 1e-8)
    close(rule(3, 2, std, normalize=False), _quadrant(lambda a, b: two_largest(a, b, 1)), 1e-8)
    normalised = _quadrant(lambda a, b: two_largest(a, b, 0))
    close(rule(3, 2, std, normalize=True), normalised, 1e-8)
    close(rule(3, 2, std, normalize=False, gate_order="top_k_then_score"), normalised, 1e-8)


def prove_mix_shared(rule=mix_shared):
    shared, routed = sympy.symbols("f_S f_R")
    first, second = sympy.symbols("v_S v_R", positive=True)
    moments = {shared: normal_moments(first), routed: normal_moments(second)}
    equal(rule(second, first, 4, "sum"), expect((shared + routed) ** 2, moments))
    equal(rule(second, first, 4, "mean"), expect(((shared + 4 * routed) / 5) ** 2, moments))


PROOFS = [
    Proof("gate limits: k = 1, k = E, flat logits", "i.i.d. normal router logits", prove_limits),
    Proof("two experts, softmax and sigmoid (1e-9)", "i.i.d. normal router logits", prove_two_experts),
    Proof("three experts, one or two active (1e-8)", "i.i.d. normal router logits", prove_three_experts),
    Proof("shared and routed outputs add in variance", "independent zero-mean experts", prove_mix_shared),
]
