"""Proofs of varprop/theory/gates.py: limits of the gate law, direct integrals for few experts.

With E = 3, a and b are the distances of two logits to the third; their joint density is exp(-(a^2 + b^2 - ab) / 3) /
(2 pi sqrt 3), restricted to the quadrant that the top k defines.
"""

from __future__ import annotations

import math

import mpmath
import numpy as np

from proofs.check import Proof, close, normal_average, plane_integral
from varprop.theory.gates import gate_first_moment, gate_second_moment


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

    close(rule(2, 1, std, normalize=False), 2 * normal_average(lambda z: larger(z) ** 2, 0, 12), 1e-10)
    close(rule(2, 2, std, normalize=True), normal_average(lambda z: 1 - 2 * larger(z) * (1 - larger(z))), 1e-10)
    top = normal_average(lambda z: 2 * mpmath.ncdf(z) / (1 + mpmath.exp(-std * z)) ** 2)
    close(rule(2, 1, std, normalize=False, router="sigmoid"), top, 1e-10)


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

    close(rule(3, 1, std, normalize=False), _quadrant(largest), 1e-10)
    close(rule(3, 2, std, normalize=False), _quadrant(lambda a, b: two_largest(a, b, 1)), 1e-10)
    normalised = _quadrant(lambda a, b: two_largest(a, b, 0))
    close(rule(3, 2, std, normalize=True), normalised, 1e-10)
    close(rule(3, 2, std, normalize=False, gate_order="top_k_then_score"), normalised, 1e-10)


def prove_first_moment(rule=gate_first_moment):
    std = 1.3
    larger = normal_average(lambda z: 2 * mpmath.ncdf(z) / (1 + mpmath.exp(-std * z)))
    close(rule(2, 1, std, normalize=False, router="sigmoid"), larger)
    close(
        rule(2, 1, std, normalize=False), 2 * normal_average(lambda z: 1 / (1 + mpmath.exp(-std * 2**0.5 * z)), 0, 12)
    )
    close(rule(3, 2, 0.9, normalize=False), _quadrant(lambda a, b: 1 - 1 / (1 + np.exp(0.9 * a) + np.exp(0.9 * b))))
    for n_experts, top_k in ((4, 2), (16, 16)):
        close(rule(n_experts, top_k, 0.0, normalize=False), mpmath.mpf(top_k) / n_experts)
        close(rule(n_experts, top_k, 1.0, normalize=True), 1)
    close(rule(5, 5, 2.0, normalize=False), 1)


def prove_one_hot_limit(rule=gate_second_moment):
    """Two experts: 1 - S_2 = 2 E[p (1 - p)] -> sqrt(2) phi(0) / s, up to O(1/s^3)."""
    for std in (30.0, 100.0):
        close(rule(2, 2, std, normalize=True), 1 - mpmath.sqrt(2) * mpmath.npdf(0) / std, 1e-5 + 2 / std**3)


PROOFS = [
    Proof("gate limits: k = 1, k = E, flat logits", "i.i.d. normal router logits", prove_limits),
    Proof("two experts, softmax and sigmoid (1e-10)", "i.i.d. normal router logits", prove_two_experts),
    Proof("three experts, one or two active (1e-10)", "i.i.d. normal router logits", prove_three_experts),
    Proof("mean of the sum of gates, two and three experts (1e-10)", "i.i.d. normal router logits", prove_first_moment),
    Proof("one-hot limit of large logits (1e-5)", "i.i.d. normal router logits", prove_one_hot_limit),
]
