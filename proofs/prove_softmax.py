"""Proofs of varprop/theory/softmax.py: the Laplace identity, and the quadratures against direct integrals for two keys.

For two keys the weights are 1 / (1 + e^{-s D}) and its complement, D = z_1 - z_2 ~ N(0, 2) independent of z_1 + z_2.
"""

from __future__ import annotations

import functools
import math

import mpmath
import numpy as np
import sympy

from proofs.check import Proof, close, equal, normal_average, normal_pair_average, plane_integral
from varprop.theory.softmax import component_weights, softmax_moments, softmax_overlap, softmax_participation


def prove_laplace(power=2):
    t, total = sympy.symbols("t Z", positive=True)
    equal(sympy.integrate(t ** (power - 1) * sympy.exp(-t * total), (t, 0, sympy.oo)), 1 / total**2)


def prove_uniform(rule=softmax_participation):
    for n_tokens in (1, 2, 7, 10**7):
        close(n_tokens * rule(n_tokens, 0.0), 1)
    close(rule(1, 3.0), 1)
    close(10**7 * rule(10**7, 1e-3), mpmath.exp(1e-6), 1e-9)  # e^{s^2} / T for T -> infinity


def _product(std, z):
    """p (1 - p) for D = sqrt(2) z."""
    p = 1 / (1 + mpmath.exp(-std * math.sqrt(2) * z))
    return p * (1 - p)


def prove_two_keys(rule=softmax_moments):
    for std in (0.3, 1.0, 4.0):
        product = functools.partial(_product, std)
        moments = rule(2, std)
        close(moments.participation, 1 - 2 * normal_average(product))
        # z_1 z_2 = (sum^2 - D^2) / 4 and z_1^2 + z_2^2 = (sum^2 + D^2) / 2, E sum^2 = 2
        close(moments.pair, normal_average(lambda z, f=product: f(z) * (1 - z**2)))
        close(moments.diagonal, normal_average(lambda z, f=product: f(z) * (z**2 - 1)))


def prove_three_keys(rule=softmax_participation):
    std = 1.5

    def square(a, b):  # a, b: differences to the first key, of variance 2 and covariance 1
        x, y = np.exp(std * a), np.exp(std * b)
        return (1 + x**2 + y**2) / (1 + x + y) ** 2 * np.exp(-(a**2 + b**2 - a * b) / 3) / (2 * np.pi * 3**0.5)

    close(rule(3, std), plane_integral(square, [-16, -5, 0, 5, 16]), 1e-9)


def prove_overlap(rule=softmax_overlap):
    std, correlation, root = 1.0, 0.5, math.sqrt(2)

    def product(a, b):
        p = 1 / (1 + np.exp(-std * root * a))
        r = 1 / (1 + np.exp(-std * root * (correlation * a + math.sqrt(1 - correlation**2) * b)))
        return p * r + (1 - p) * (1 - r)

    close(rule(2, std, correlation), normal_pair_average(product), 1e-8)
    close(rule(50, 1.5, 1.0), softmax_participation(50, 1.5), 1e-8)
    close(50 * rule(50, 1.5, 0.0), 1, 1e-8)


def prove_sphere(rule=component_weights):
    """Moments of one component of a uniform point on |u|^2 = d: by symmetry 1, and 3 d / (d + 2) from E |u|^4 = d^2."""
    z = np.linspace(-10, 10, 81)
    for d in (16, 64, 2048):
        weight = rule(z, d)
        close(weight @ z**2, 1, 1e-7)
        close(weight @ z**4, mpmath.mpf(3 * d) / (d + 2), 1e-6)


PROOFS = [
    Proof("1/Z^2 = int t exp(-t Z) dt", "none", prove_laplace),
    Proof("uniform attention: 1/T, and exp(s^2)/T at large T", "i.i.d. normal logits", prove_uniform),
    Proof("participation, pair and diagonal moments, T = 2 (1e-10)", "i.i.d. normal logits", prove_two_keys),
    Proof("participation, T = 3 (1e-9)", "i.i.d. normal logits", prove_three_keys),
    Proof("overlap of two queries, T = 2, and its limits (1e-8)", "correlated normal logits", prove_overlap),
    Proof("component of a point on the sphere (1e-6)", "i.i.d. Gaussian tokens, RMS norm", prove_sphere),
]
