"""Hermite expansions of a function of a normal variable, for any variance: K(v, v', c) = sum_n a_n(v) a_n(v') c^n.

a_n(v) = E f(sqrt(v) z) He_n(z) / sqrt(n!). For one variance K(c) = E f(h) f(h') at correlation c, sum_n a_n^2 = E f^2.
The integrals use the trapezium rule in t with z = width sinh(t), whose nodes crowd where f bends (|h| of order 1).
a_n(v) and E f^2 are smooth in log v and kept as Chebyshev expansions, one per unit of log v, made when first needed.
Orders beyond `N_TERMS` matter for large variances only: `HermiteExpansion.remainder` is what they hold of E f^2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Function = Callable[[Array], Array]
N_TERMS = 512
N_NODES = 640
RANGE = 13.0
"""Nodes reach this many standard deviations: the density there is below 1e-36."""
N_CHEBYSHEV = 18
DROPPED = 1e-14
"""Orders whose squares add up to less than this share of E f^2 are not stored."""
SMALLEST = 1e-150
"""A smaller variance counts as 0."""


class HermiteExpansion(NamedTuple):
    """Coefficients of even and odd order, first axis, and what they leave of the second moment.

    even, odd: (orders, *variance.shape); second_moment, remainder: E f^2 and E f^2 - sum a_n^2, of variance.shape.
    """

    even: Array
    odd: Array
    second_moment: Array
    remainder: Array


def hermite_expansion(function: Function, variance: Array | float) -> HermiteExpansion:
    """Expansion of f(sqrt(variance) z) for an array of variances in [0, 1e12].

    function: f, vectorised, smooth on the scale 1, of at most polynomial growth. Relative error of a coefficient, in
    units of sqrt(E f^2), below 1e-12. Checked by: tests/theory/test_activation.py.

    >>> expansion = hermite_expansion(np.square, 2.0)  # h^2 = 2 He_0 + 2 sqrt(2) He_2 / sqrt(2)
    >>> [round(float(a), 9) for a in expansion.even], round(float(expansion.second_moment), 9)
    ([2.0, 2.828427125], 12.0)
    """
    variance = np.asarray(variance, dtype=float)
    flat = variance.ravel()
    zero = flat < SMALLEST
    position = np.log(np.where(zero, 1.0, flat))
    pieces = np.floor(position).astype(int)
    tables = {int(index): _piece(function, int(index)) for index in np.unique(pieces)}
    sizes = [max(table[part].shape[0] for table in tables.values()) for part in range(3)]
    even, odd, second_moment = (np.zeros((size, flat.size)) for size in sizes)
    for index, table in tables.items():
        chosen = pieces == index if len(tables) > 1 else slice(None)
        angle = np.arccos(np.clip(2 * (position[chosen] - index) - 1, -1.0, 1.0))
        polynomials = np.cos(np.arange(N_CHEBYSHEV)[:, None] * angle)
        for values, part in zip((even, odd, second_moment), table, strict=True):
            values[: part.shape[0], chosen] = part @ polynomials
    if zero.any():
        at_zero = float(function(np.zeros(1))[0])
        for values, first in ((even, at_zero), (odd, 0.0), (second_moment, at_zero**2)):
            values[:, zero] = 0.0
            values[:1, zero] = first
    total = second_moment[0]
    remainder = np.maximum(total - np.sum(even**2, axis=0) - np.sum(odd**2, axis=0), 0.0)
    shape = variance.shape
    return HermiteExpansion(
        even.reshape(-1, *shape), odd.reshape(-1, *shape), total.reshape(shape), remainder.reshape(shape)
    )


def hermite_kernel(first: HermiteExpansion, other: HermiteExpansion, correlation: Array) -> Array:
    """sum_n a_n a'_n c^n, Horner in c^2; variances and correlations broadcast.

    The remainders enter as one more even order, so that at full correlation and equal variances the sum is E f^2.
    Error at most sqrt(remainder remainder') |c|^n with n the first order left out.
    """
    correlation = np.asarray(correlation, dtype=float)
    square = correlation**2
    shape = np.broadcast_shapes(correlation.shape, first.remainder.shape, other.remainder.shape)
    n_even, n_odd = min(len(first.even), len(other.even)), min(len(first.odd), len(other.odd))
    total = np.zeros(shape)
    total += np.sqrt(first.remainder * other.remainder)
    if n_odd > n_even:  # the first order left out is at least that of the odd ones
        total *= square ** (n_odd - n_even)
    for n in reversed(range(n_even)):
        total *= square
        total += first.even[n] * other.even[n]
    odd = np.zeros(shape)
    for n in reversed(range(n_odd)):
        if n < n_odd - 1:
            odd *= square
        odd += first.odd[n] * other.odd[n]
    odd *= correlation
    total += odd
    return total


def _quadrature(width: float) -> tuple[Array, Array]:
    """Nodes z >= 0 and the matrix (N_TERMS, nodes) of weight * density * He_n(z) / sqrt(n!), weight of both signs."""
    step = np.arcsinh(RANGE / width) / (N_NODES - 1)
    t = step * np.arange(N_NODES)
    z = width * np.sinh(t)
    weight = 2 * step * width * np.cosh(t)
    weight[0] /= 2
    root_density = np.exp(-(z**2) / 4) / (2 * np.pi) ** 0.25
    basis = np.empty((N_TERMS, N_NODES))
    basis[0], basis[1] = root_density, z * root_density
    for n in range(2, N_TERMS):  # Hermite functions: stable upwards
        basis[n] = (z * basis[n - 1] - np.sqrt(n - 1.0) * basis[n - 2]) / np.sqrt(n)
    return z, basis * (weight * root_density)


@functools.lru_cache(maxsize=512)
def _piece(function: Function, index: int) -> tuple[Array, Array, Array]:
    """Chebyshev coefficients over log v in [index, index + 1] of the even and odd a_n, and of E f^2."""
    angle = (np.arange(N_CHEBYSHEV) + 0.5) * np.pi / N_CHEBYSHEV
    root = np.exp((index + (np.cos(angle) + 1) / 2) / 2)
    z, basis = _quadrature(float(min(1.0, np.pi / root.max())))
    right, left = function(root * z[:, None]), function(-root * z[:, None])
    even = basis[::2] @ ((right + left) / 2)
    odd = basis[1::2] @ ((right - left) / 2)
    second_moment = basis[:1] @ ((right**2 + left**2) / 2)
    to_chebyshev = 2 / N_CHEBYSHEV * np.cos(angle[:, None] * np.arange(N_CHEBYSHEV))
    to_chebyshev[:, 0] /= 2
    tables = tuple(_kept(part, second_moment) @ to_chebyshev for part in (even, odd))
    return tables[0], tables[1], second_moment @ to_chebyshev


def _kept(coefficients: Array, second_moment: Array) -> Array:
    """The leading orders, without a tail that adds less than `DROPPED` of E f^2."""
    tail = np.cumsum(coefficients[::-1] ** 2, axis=0)[::-1]
    return coefficients[: int(np.sum(np.any(tail > DROPPED * second_moment, axis=1)))]
