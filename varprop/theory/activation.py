"""Second moments and pair kernels of activations phi at jointly Gaussian, centred pre-activations.

K(variance, covariance) = E phi(h) phi(h'), both h and h' of that variance. Closed forms: relu, relu2, gelu, identity.
silu and gelu_tanh: the Hermite series K = sum_n a_n^2 c^n, a_n = E phi(sqrt(variance) z) He_n(z) / sqrt(n!).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.special

from varprop.errors import AssumptionError, require
from varprop.theory.namespace import clip_correlation
from varprop.theory.quadrature import hermite_basis, normal_nodes

N_NODES = 256
SERIES_TOLERANCE = 1e-13
"""Hermite terms below this share of K(1) are dropped; the truncation error is below their sum (`series_error`)."""


def identity_kernel(variance: Any, covariance: Any, xp: Any = np) -> Any:
    """E h h' = covariance."""
    return covariance


def relu_kernel(variance: Any, covariance: Any, xp: Any = np) -> Any:
    """E relu(h) relu(h') = variance (sqrt(1 - c^2) + c (pi - acos c)) / (2 pi), c = covariance / variance.

    Arc-cosine kernel of order 1 (Cho and Saul 2009). Exact. Source: derived in proofs/prove_activation.py.

    >>> float(relu_kernel(2.0, 2.0)), round(float(relu_kernel(1.0, 0.0)), 6)
    (1.0, 0.159155)
    """
    c = clip_correlation(covariance / variance, xp)
    return variance * (xp.sqrt(1 - c**2) + c * (xp.pi - xp.acos(c))) / (2 * xp.pi)


def relu2_kernel(variance: Any, covariance: Any, xp: Any = np) -> Any:
    """E relu(h)^2 relu(h')^2 = variance^2 (3 c sqrt(1 - c^2) + (1 + 2 c^2)(pi - acos c)) / (2 pi).

    Arc-cosine kernel of order 2. Exact. Source: derived in proofs/prove_activation.py.

    >>> float(relu2_kernel(1.0, 1.0)), float(relu2_kernel(2.0, 0.0))
    (1.5, 1.0)
    """
    c = clip_correlation(covariance / variance, xp)
    return variance**2 * (3 * c * xp.sqrt(1 - c**2) + (1 + 2 * c**2) * (xp.pi - xp.acos(c))) / (2 * xp.pi)


def gelu_kernel(variance: Any, covariance: Any, xp: Any = np) -> Any:
    """E gelu(h) gelu(h') for gelu(h) = h Phi(h), with s = variance, k = covariance, D = sqrt((1 + s)^2 - k^2):

    k (1/4 + asin(k / (1 + s)) / (2 pi)) + (s^2 + k^2 (1 - s) / (1 + s)) / (2 pi D).

    Exact. Source: derived in proofs/prove_activation.py.

    >>> round(float(gelu_kernel(1.0, 1.0)), 6)
    0.425221
    """
    s, k = variance, covariance
    root = xp.sqrt((1 + s) ** 2 - k**2)
    linear = k / 4 + k * xp.asin(k / (1 + s)) / (2 * xp.pi)
    return linear + (s**2 + k**2 * (1 - s) / (1 + s)) / (2 * xp.pi * root)


def silu(x: np.ndarray) -> np.ndarray:
    """x sigmoid(x)."""
    return x * scipy.special.expit(x)


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """The tanh approximation of gelu."""
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


CLOSED_FORMS: dict[str, Callable[..., Any]] = {
    "identity": identity_kernel,
    "relu": relu_kernel,
    "relu2": relu2_kernel,
    "gelu": gelu_kernel,
}
SERIES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": silu,
    "gelu_tanh": gelu_tanh,
    "sigmoid": scipy.special.expit,
}


def hermite_coefficients(activation: str, variance: float) -> np.ndarray:
    """a_n = E phi(sqrt(variance) z) He_n(z) / sqrt(n!) for n = 0..127, by Gauss-Hermite with 256 nodes.

    >>> [round(float(a), 4) for a in hermite_coefficients("silu", 1.0)[:3]]
    [0.2066, 0.5, 0.2481]
    """
    return _hermite_coefficients(activation, float(variance))


@functools.lru_cache(maxsize=256)
def _hermite_coefficients(activation: str, variance: float) -> np.ndarray:
    nodes, basis = hermite_basis(N_NODES)
    values = SERIES[activation](np.sqrt(variance) * nodes)
    return basis[: N_NODES // 2] @ (basis[0] * values)


def series_error(activation: str, variance: float) -> float:
    """Relative truncation error of the series at c = 1, where it is largest: 1 - sum of kept a_n^2 / K(1)."""
    if activation in CLOSED_FORMS:
        return 0.0
    kept = np.sum(_kept_squares(activation, float(variance)))
    return abs(1 - float(kept / activation_second_moment(activation, variance)))


def _kept_squares(activation: str, variance: float) -> np.ndarray:
    squares = _hermite_coefficients(activation, variance) ** 2
    last = np.flatnonzero(squares > SERIES_TOLERANCE * squares.sum())[-1]
    return squares[: last + 1]


def activation_second_moment(activation: str, variance: Any) -> Any:
    """E phi(h)^2 for h ~ N(0, variance); closed form or Gauss-Hermite with 256 nodes.

    variance: array of any shape, > 0. Raises `AssumptionError` for an unknown activation.
    Checked by: tests/theory/test_activation.py against mpmath.

    >>> float(activation_second_moment("relu", 2.0)), round(float(activation_second_moment("silu", 1.0)), 6)
    (1.0, 0.355776)
    """
    if activation in CLOSED_FORMS:
        return CLOSED_FORMS[activation](variance, variance)
    _known(activation)
    nodes, probability = normal_nodes(N_NODES)
    values = SERIES[activation](np.sqrt(np.asarray(variance, dtype=float))[..., None] * nodes)
    return values**2 @ probability


def activation_kernel(activation: str, variance: float, correlation: np.ndarray) -> np.ndarray:
    """K(variance, correlation * variance) = E phi(h) phi(h') for an array of correlations in [-1, 1].

    Closed form, or the Hermite series as a polynomial (relative truncation error `series_error`).
    Raises `AssumptionError` for an unknown activation. Checked by: tests/theory/test_activation.py against mpmath.

    >>> round(float(activation_kernel("silu", 1.0, np.array(0.0))), 6)
    0.042692
    """
    if activation in CLOSED_FORMS:
        return CLOSED_FORMS[activation](variance, variance * correlation)
    _known(activation)
    return np.polynomial.polynomial.polyval(correlation, _kept_squares(activation, float(variance)))


def kurtosis_sensitivity(activation: str, variance: float) -> float:
    """Relative change of E phi(h)^2 per unit of excess kurtosis of h: |E He_4(z) phi^2| / (24 E phi^2).

    First term of the Gram-Charlier series; 0 for relu and identity, whose second moment needs no Gaussian.
    """
    if activation in ("relu", "identity"):
        return 0.0
    nodes, probability = normal_nodes(N_NODES)
    h = np.sqrt(variance) * nodes
    functions = {"relu2": lambda x: np.maximum(x, 0) ** 2, "gelu": lambda x: x * scipy.special.ndtr(x), **SERIES}
    squares = functions[activation](h) ** 2
    fourth = nodes**4 - 6 * nodes**2 + 3
    return abs(float(probability @ (fourth * squares) / (probability @ squares))) / 24


def _known(activation: str) -> None:
    expected = "one of " + ", ".join([*CLOSED_FORMS, *SERIES])
    require(activation in SERIES, AssumptionError, "activation", activation, "unknown", expected)
