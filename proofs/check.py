"""What every proof uses: exact and numerical comparison, and expectations over independent symbols."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import mpmath
import numpy as np
import sympy


class ProofError(AssertionError):
    """A statement was found false, or could not be shown."""


class Proof(NamedTuple):
    """One line of the table: what is shown, under which assumption, and the function that shows it or raises."""

    statement: str
    assumption: str
    function: Callable[..., None]


def equal(actual: Any, expected: Any) -> None:
    """Raise `ProofError` unless two symbolic expressions are identically equal."""
    difference = sympy.simplify(sympy.sympify(actual) - sympy.sympify(expected))
    if difference != 0:
        raise ProofError(f"difference {difference} is not zero")


def close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    """Raise `ProofError` unless two numbers agree to a relative (below 1: absolute) tolerance."""
    error = abs(mpmath.mpf(float(actual)) - expected) / max(1, abs(expected))
    if not error < tolerance:
        raise ProofError(f"{float(actual)!r} is off {mpmath.nstr(expected, 15)} by {mpmath.nstr(error, 3)}")


def expect(expression: Any, moments: Mapping[sympy.Symbol, Sequence[Any]]) -> Any:
    """Expectation of a polynomial over independent symbols; moments[x][n] = E x^n."""
    variables = list(moments)
    polynomial = sympy.Poly(sympy.expand(expression), *variables)
    total = sympy.Integer(0)
    for powers, coefficient in polynomial.terms():
        for variable, power in zip(variables, powers, strict=True):
            coefficient = coefficient * moments[variable][power]
        total += coefficient
    return total


def normal_moments(variance: Any, highest: int = 4) -> list[Any]:
    """E x^n of N(0, variance) for n = 0..highest."""
    return [sympy.factorial2(n - 1) * variance ** (n // 2) if n % 2 == 0 else 0 for n in range(highest + 1)]


def plane_integral(function: Callable[[Any, Any], Any], points: Sequence[float]) -> float:
    """Integral of function(a, b) over the square of the pieces between `points`: 80-node Gauss-Legendre in each piece.

    float64: mpmath needs half a minute for one of these. Gauss-Legendre shares nothing with the rules under proof.
    """
    x, weight = np.polynomial.legendre.leggauss(80)
    pieces = list(itertools.pairwise(points))
    nodes = np.concatenate([low + (high - low) * (x + 1) / 2 for low, high in pieces])
    weights = np.concatenate([(high - low) / 2 * weight for low, high in pieces])
    return float(weights @ function(nodes[:, None], nodes[None, :]) @ weights)


def normal_pair_average(function: Callable[[Any, Any], Any]) -> float:
    """E f(a, b) over two independent standard normal variables."""
    return plane_integral(lambda a, b: function(a, b) * np.exp(-(a**2 + b**2) / 2) / (2 * np.pi), [-9, -3, 0, 3, 9])


def normal_average(function: Callable[[Any], Any], low: float = -12, high: float = 12) -> Any:
    """E f(z) for a standard normal z restricted to [low, high], by mpmath."""
    points = sorted({low, *(p for p in (-6, -3, 0, 3, 6) if low < p < high), high})
    return mpmath.quad(lambda z: function(z) * mpmath.npdf(z), points)
