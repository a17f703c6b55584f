"""Proofs of varprop/theory/activation.py.

Price's theorem: d/dk E f(x) g(y) = E f'(x) g'(y) for a centred Gaussian pair of variance s and covariance k. A kernel
is fixed by its value and first derivatives at k = 0, where x and y are independent, and by a higher derivative for all
k.
"""

from __future__ import annotations

from typing import Any

import mpmath
import numpy as np
import sympy

from proofs.check import Proof, close, equal, normal_average, normal_pair_average
from varprop.theory.activation import (
    activation_kernel,
    activation_second_moment,
    gelu_kernel,
    identity_kernel,
    relu2_kernel,
    relu_kernel,
)

s = sympy.symbols("s", positive=True)
k = sympy.symbols("k", real=True)
x = sympy.symbols("x", real=True)
DELTA_PAIR = 1 / (2 * sympy.pi * sympy.sqrt(s**2 - k**2))
"""E delta(x) delta(y): the density of the pair at the origin."""


def _one(function: Any, low: Any = -sympy.oo) -> Any:
    """E function(x) 1(x > low) for x ~ N(0, s)."""
    return sympy.integrate(function * sympy.exp(-(x**2) / (2 * s)) / sympy.sqrt(2 * sympy.pi * s), (x, low, sympy.oo))


def _derivative(rule, order, at_zero=True):
    value = sympy.diff(rule(s, k, sympy), k, order)
    return value.subs(k, 0) if at_zero else value


def prove_identity(rule=identity_kernel):
    equal(rule(s, k, sympy), k)


def prove_relu(rule=relu_kernel):
    equal(_derivative(rule, 2, at_zero=False), DELTA_PAIR)
    equal(_derivative(rule, 0), _one(x, 0) ** 2)
    equal(_derivative(rule, 1), _one(1, 0) ** 2)
    equal(rule(s, s, sympy), _one(x**2, 0))


def prove_relu2(rule=relu2_kernel):
    equal(_derivative(rule, 3, at_zero=False), 4 * DELTA_PAIR)
    equal(_derivative(rule, 0), _one(x**2, 0) ** 2)
    equal(_derivative(rule, 1), _one(2 * x, 0) ** 2)
    equal(_derivative(rule, 2), _one(2, 0) ** 2)
    equal(rule(s, s, sympy), _one(x**4, 0))


def prove_gelu(rule=gelu_kernel):
    # gelu'' = phi(x) (2 - x^2): under the tilted Gaussian of precision inverse(cov) + 1 a ratio of polynomials
    covariance = sympy.Matrix([[s, k], [k, s]])
    tilted = (covariance.inv() + sympy.eye(2)).inv()
    a, b = tilted[0, 0], tilted[0, 1]
    mean = 4 - 4 * a + a**2 + 2 * b**2
    expected = mean / (2 * sympy.pi) / sympy.sqrt((1 + s) ** 2 - k**2)  # det(tilted) / det(covariance)
    equal(tilted.det() / covariance.det(), 1 / ((1 + s) ** 2 - k**2))
    equal(_derivative(rule, 2, at_zero=False), expected)
    # E x Phi(x) = s E phi(x) by Stein; E gelu' = 1/2 because gelu' - 1/2 is odd
    phi = sympy.exp(-(x**2) / 2) / sympy.sqrt(2 * sympy.pi)
    equal(_derivative(rule, 0), (s * _one(phi)) ** 2)
    equal(_derivative(rule, 1), sympy.Rational(1, 4))


def _silu(h, xp=mpmath):
    return h / (1 + xp.exp(-h))


def _gelu_tanh(h, xp=mpmath):
    return h / 2 * (1 + xp.tanh(xp.sqrt(2 / xp.pi) * (h + 0.044715 * h**3)))


def prove_quadrature_moments(rule=activation_second_moment):
    for name, function in (("silu", _silu), ("gelu_tanh", _gelu_tanh)):
        for variance in (0.1, 0.8, 4.0):
            close(rule(name, variance), normal_average(lambda z, f=function, v=variance: f(v**0.5 * z) ** 2))


def prove_series(rule=activation_kernel):
    variance, c = 0.8, 0.6
    for name, function in (("silu", lambda h: _silu(h, np)), ("gelu_tanh", lambda h: _gelu_tanh(h, np))):

        def product(a, b, f=function):
            return f(variance**0.5 * a) * f(variance**0.5 * (c * a + (1 - c**2) ** 0.5 * b))

        close(rule(name, variance, np.array(c)), normal_pair_average(product))


PROOFS = [
    Proof("identity kernel", "Gaussian pre-activations", prove_identity),
    Proof("relu second moment and kernel", "Gaussian pre-activations", prove_relu),
    Proof("relu2 second moment and kernel", "Gaussian pre-activations", prove_relu2),
    Proof("gelu kernel for any variance", "Gaussian pre-activations", prove_gelu),
    Proof("silu and gelu_tanh second moments (1e-10)", "Gaussian pre-activations", prove_quadrature_moments),
    Proof("silu and gelu_tanh Hermite series (1e-10)", "Gaussian pre-activations", prove_series),
]
