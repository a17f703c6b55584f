"""Proofs of varprop/theory/activation.py.

Price's theorem: d/dk E f(x) g(y) = E f'(x) g'(y) for a centred Gaussian pair of variances v, w and covariance
k = c sqrt(v w). A kernel is fixed by its value and first derivatives at k = 0, where x and y are independent, and by a
higher derivative for all k.
"""

from __future__ import annotations

from typing import Any

import mpmath
import numpy as np
import sympy

from proofs.check import Proof, close, equal, normal_average, plane_integral
from varprop.theory import activation as theory
from varprop.theory.activation import (
    activation_derivative_kernel,
    activation_derivative_second_moment,
    activation_fourth_moment,
    activation_kernel,
    activation_mean,
    activation_second_moment,
    activation_square_kernel,
    kurtosis_response,
)

v, w = sympy.symbols("v w", positive=True)
c, x = sympy.symbols("c x", real=True)
DELTA_PAIR = 1 / (2 * sympy.pi * sympy.sqrt(v * w) * sympy.sqrt(1 - c**2))
"""E delta(x) delta(y): the density of the pair at the origin."""


def _one(function: Any, low: Any = 0, variance: Any = v) -> Any:
    """E function(x) 1(x > low) for x ~ N(0, variance)."""
    density = sympy.exp(-(x**2) / (2 * variance)) / sympy.sqrt(2 * sympy.pi * variance)
    return sympy.integrate(function * density, (x, low, sympy.oo))


def _product(function: Any, low: Any = 0) -> Any:
    """E function(x) E function(y), each above `low`."""
    return _one(function, low) * _one(function, low, w)


def _derivative(rule, order):
    """Derivative with respect to the covariance."""
    return sympy.diff(rule(v, w, c, sympy), c, order) / sympy.sqrt(v * w) ** order


def _start(rule, order):
    return _derivative(rule, order).subs(c, 0)


def prove_identity(rule=theory.identity_kernel):
    equal(rule(v, w, c, sympy), c * sympy.sqrt(v * w))


def prove_identity_derivative(rule=theory.identity_derivative_kernel):
    equal(rule(v, w, c, sympy), _derivative(theory.identity_kernel, 1))


def prove_identity_square(rule=theory.identity_square_kernel):
    equal(_derivative(rule, 2), 4)
    equal(_start(rule, 0), _product(x**2, -sympy.oo))
    equal(_start(rule, 1), 0)


def prove_relu(rule=theory.relu_kernel):
    equal(_derivative(rule, 2), DELTA_PAIR)
    equal(_start(rule, 0), _product(x))
    equal(_start(rule, 1), _product(1))
    equal(rule(v, v, 1, sympy), _one(x**2))


def prove_relu_derivative(rule=theory.relu_derivative_kernel):
    equal(rule(v, w, c, sympy), _derivative(theory.relu_kernel, 1))


def prove_relu2(rule=theory.relu2_kernel):
    equal(_derivative(rule, 3), 4 * DELTA_PAIR)
    for order, function in enumerate((x**2, 2 * x, 2)):
        equal(_start(rule, order), _product(function))
    equal(rule(v, v, 1, sympy), _one(x**4))


def prove_relu2_derivative(rule=theory.relu2_derivative_kernel):
    equal(rule(v, w, c, sympy), _derivative(theory.relu2_kernel, 1))


def prove_relu2_square(rule=theory.relu2_square_kernel):
    equal(_derivative(rule, 5), 24**2 * DELTA_PAIR)
    for order, function in enumerate((x**4, 4 * x**3, 12 * x**2, 24 * x, 24)):
        equal(_start(rule, order), _product(function))
    equal(rule(v, v, 1, sympy), _one(x**8))


ROOT = sympy.symbols("D", positive=True)
p, r = sympy.symbols("p r", positive=True)
ROOT_SQUARE = 1 + p**2 + r**2 + p**2 * r**2 * (1 - c**2)
"""D^2 of the gelu kernels at variances p^2 and r^2."""


def _is_root(term):
    return term.is_Pow and not term.exp.is_integer and sympy.expand(term.base - ROOT_SQUARE) == 0


def _equal_over_root(actual, expected):
    """Equality of two rational functions of c, p, r, D and atan(k / D), D^2 = `ROOT_SQUARE`; faster than `equal`."""
    difference = sympy.together((actual - expected).replace(_is_root, lambda power: ROOT ** (2 * power.exp)))
    numerator = sympy.expand(sympy.numer(difference.replace(sympy.atan, lambda _: sympy.Symbol("angle"))))
    rest = sympy.rem(sympy.Poly(numerator, ROOT), sympy.Poly(ROOT**2 - sympy.expand(ROOT_SQUARE), ROOT))
    equal(rest.as_expr(), 0)


def prove_gelu(rule=theory.gelu_kernel):
    # gelu'' = phi(x) (2 - x^2): under the tilted Gaussian of precision inverse(cov) + 1 a ratio of polynomials
    k = c * p * r
    covariance = sympy.Matrix([[p**2, k], [k, r**2]])
    tilted = (covariance.inv() + sympy.eye(2)).inv()
    a, b, both = tilted[0, 0], tilted[1, 1], tilted[0, 1]
    mean = 4 - 2 * a - 2 * b + a * b + 2 * both**2
    equal(tilted.det() / covariance.det(), 1 / ROOT_SQUARE)
    kernel = rule(p**2, r**2, c, sympy)
    _equal_over_root(sympy.diff(kernel, c, 2) / (p * r) ** 2, mean / (2 * sympy.pi * ROOT))
    # E x Phi(x) = v E phi(x) by Stein; E gelu' = 1/2 because gelu' - 1/2 is odd
    phi = sympy.exp(-(x**2) / 2) / sympy.sqrt(2 * sympy.pi)
    mean_product = (v * w * _product(phi, -sympy.oo)).subs({v: p**2, w: r**2})
    equal(kernel.subs(c, 0) ** 2, mean_product**2)  # both are positive; sympy compares the squares more easily
    equal(sympy.diff(kernel, c).subs(c, 0), p * r / 4)


def prove_gelu_derivative(rule=theory.gelu_derivative_kernel):
    slope = sympy.diff(theory.gelu_kernel(p**2, r**2, c, sympy), c) / (p * r)
    _equal_over_root(rule(p**2, r**2, c, sympy), slope)


def prove_relu_mean(rule=theory.relu_mean):
    equal(rule(v, sympy), _one(x))


def prove_relu2_mean(rule=theory.relu2_mean):
    equal(rule(v, sympy), _one(x**2))


def prove_gelu_mean(rule=theory.gelu_mean):
    phi = sympy.exp(-(x**2) / 2) / sympy.sqrt(2 * sympy.pi)
    equal(rule(v, sympy), v * _one(phi, -sympy.oo))  # Stein


def _sigmoid(h, xp=mpmath):
    return 1 / (1 + xp.exp(-h))


def _silu(h, xp=mpmath):
    return h / (1 + xp.exp(-h))


def _gelu_tanh(h, xp=mpmath):
    return h / 2 * (1 + xp.tanh(xp.sqrt(2 / xp.pi) * (h + 0.044715 * h**3)))


def _gelu(h):
    return h * mpmath.ncdf(h)


FUNCTIONS = {"silu": _silu, "gelu_tanh": _gelu_tanh, "sigmoid": _sigmoid}
VARIANCES = (1e-6, 0.1, 0.8, 4.0, 20.0, 400.0)


def _relatively_close(actual, expected):
    close(float(actual) / expected, 1)


def _average(function, variance):
    return normal_average(lambda z: function(mpmath.sqrt(variance) * z))


def prove_quadrature_moments(rule=activation_second_moment):
    for name, function in FUNCTIONS.items():
        for variance in VARIANCES:
            _relatively_close(rule(name, variance), _average(lambda h, f=function: f(h) ** 2, variance))


def prove_quadrature_means(rule=activation_mean):
    for name, function in FUNCTIONS.items():
        for variance in VARIANCES:
            _relatively_close(rule(name, variance), _average(function, variance))


def prove_quadrature_derivatives(rule=activation_derivative_second_moment):
    with mpmath.workdps(30):
        for name, function in FUNCTIONS.items():
            for variance in (1e-6, 0.8, 400.0):
                _relatively_close(
                    rule(name, variance), _average(lambda h, f=function: mpmath.diff(f, h) ** 2, variance)
                )


def prove_quadrature_fourth(rule=activation_fourth_moment):
    for name, function in {**FUNCTIONS, "gelu": _gelu}.items():
        for variance in VARIANCES:
            _relatively_close(rule(name, variance), _average(lambda h, f=function: f(h) ** 4, variance))


def prove_kurtosis_response(rule=kurtosis_response):
    variance = mpmath.mpf("0.8")
    for name, function in {**FUNCTIONS, "gelu": _gelu, "relu2": lambda h: max(h, 0) ** 2}.items():

        def weighted(z, f=function):
            return (z**4 - 6 * z**2 + 3) * f(mpmath.sqrt(variance) * z) ** 2

        second_moment = _average(lambda h, f=function: f(h) ** 2, variance)
        _relatively_close(rule(name, 0.8), normal_average(weighted) / (24 * second_moment))


def _pair_average(function, variance, other, correlation):
    """E f(h) f(h') by a plane rule in float64."""

    def integrand(a, b):
        second = function(np.sqrt(other) * (correlation * a + np.sqrt(1 - correlation**2) * b))
        return function(np.sqrt(variance) * a) * second * np.exp(-(a**2 + b**2) / 2) / (2 * np.pi)

    return plane_integral(
        integrand, np.linspace(-9, 9, 25).tolist() if max(variance, other) > 50 else [-9, -3, 0, 3, 9]
    )


PAIRS = ((0.8, 0.8, 0.6), (1e-6, 0.3, -0.7), (2.0, 0.5, 0.95), (400.0, 3.0, 0.9))


def _series_close(rule, function, name):
    for variance, other, correlation in PAIRS:
        expected = _pair_average(function, variance, other, correlation)
        scale = np.sqrt(float(rule(name, variance, 1.0) * rule(name, other, 1.0)))
        close(float(rule(name, variance, correlation, other)) / scale, expected / scale)


def prove_series(rule=activation_kernel):
    _series_close(rule, lambda h: _silu(h, np), "silu")
    _series_close(rule, lambda h: _gelu_tanh(h, np), "gelu_tanh")
    _series_close(rule, lambda h: _sigmoid(h, np), "sigmoid")


def prove_derivative_series(rule=activation_derivative_kernel):
    # Price: a central difference in the correlation of the kernel; error about step^2 + 1e-14 / step
    for name in FUNCTIONS:
        for variance, other in ((0.8, 0.8), (2.0, 0.5), (1e-6, 0.3)):
            step, at = 1e-5, np.array([-0.9, 0.0, 0.5])
            difference = activation_kernel(name, variance, at + step, other)
            difference = (difference - activation_kernel(name, variance, at - step, other)) / (2 * step)
            for actual, expected in zip(rule(name, variance, at, other), difference, strict=True):
                close(actual, expected / np.sqrt(variance * other), 1e-7)


def prove_square_series(rule=activation_square_kernel):
    _series_close(rule, lambda h: _silu(h, np) ** 2, "silu")
    _series_close(rule, lambda h: _gelu_tanh(h, np) ** 2, "gelu_tanh")


GAUSSIAN = "Gaussian pre-activations"
PROOFS = [
    Proof("identity kernel", GAUSSIAN, prove_identity),
    Proof("identity derivative kernel", GAUSSIAN, prove_identity_derivative),
    Proof("identity square kernel", GAUSSIAN, prove_identity_square),
    Proof("relu kernel, two variances", GAUSSIAN, prove_relu),
    Proof("relu derivative kernel", GAUSSIAN, prove_relu_derivative),
    Proof("relu2 kernel, two variances; relu square kernel", GAUSSIAN, prove_relu2),
    Proof("relu2 derivative kernel", GAUSSIAN, prove_relu2_derivative),
    Proof("relu2 square kernel", GAUSSIAN, prove_relu2_square),
    Proof("gelu kernel, two variances", GAUSSIAN, prove_gelu),
    Proof("gelu derivative kernel", GAUSSIAN, prove_gelu_derivative),
    Proof("relu mean", GAUSSIAN, prove_relu_mean),
    Proof("relu2 mean", GAUSSIAN, prove_relu2_mean),
    Proof("gelu mean", GAUSSIAN, prove_gelu_mean),
    Proof("second moments by quadrature (1e-10)", "variance 1e-6 to 400", prove_quadrature_moments),
    Proof("means by quadrature (1e-10)", "variance 1e-6 to 400", prove_quadrature_means),
    Proof("derivative second moments by quadrature (1e-10)", "variance 1e-6 to 400", prove_quadrature_derivatives),
    Proof("fourth moments by quadrature, gelu too (1e-10)", "variance 1e-6 to 400", prove_quadrature_fourth),
    Proof("response to excess kurtosis (1e-10)", "first Gram-Charlier term", prove_kurtosis_response),
    Proof("Hermite series of a pair (1e-10)", "variances 1e-6 to 400, |c| <= 0.95", prove_series),
    Proof("Hermite series of the derivative kernel (1e-7)", GAUSSIAN, prove_derivative_series),
    Proof("Hermite series of the square kernel (1e-10)", "variances 1e-6 to 400, |c| <= 0.95", prove_square_series),
]
