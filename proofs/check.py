"""What every proof uses: exact and numerical comparison, and expectations over independent symbols."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import mpmath
import numpy as np
import sympy


class ProofError(AssertionError):
    """A statement was found false, or could not be shown."""


Status = Literal["proved", "proved for the cases shown", "checked numerically"]
"""Symbolic and general; symbolic at fixed small sizes or sample parameters; by numbers."""
PROVED, CASES, NUMERICAL = get_args(Status)


class Proof(NamedTuple):
    """One line of the table: what is shown, under which assumption, and the function that shows it or raises.

    status: None where `close` in the function tells a numerical check from a general proof.
    """

    statement: str
    assumption: str
    function: Callable[..., None]
    status: Status | None = None


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


def branches_agree(
    rule: Callable[..., Any],
    symbolic: Callable[..., Any],
    points: Sequence[Sequence[Any]],
    limit: Callable[..., float | None] = lambda *point: None,
) -> None:
    """The numpy branch of `rule` (one point; all in an array) against `symbolic` at exact rationals, relative 1e-12.

    points: argument tuples, rationals that float64 holds exactly; limit: the value of the numpy branch where the closed
    form does not apply, None where it does.
    """
    exact = [tuple(map(sympy.Rational, point)) for point in points]
    expected = [limit(*point) for point in exact]
    if all(value is not None for value in expected):
        raise ProofError("no point of the grid lies in the domain of the closed form")
    columns = np.array(exact, dtype=float)
    for point, row, value, entry in zip(exact, columns.tolist(), expected, rule(*columns.T), strict=True):
        for actual in (rule(*row), entry):
            if value is None:
                close(actual / mpmath.mpf(sympy.N(symbolic(*point, xp=sympy), 30)), 1, 1e-12)
            elif actual != value:
                raise ProofError(f"{actual} at {row} should be {value}")


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
