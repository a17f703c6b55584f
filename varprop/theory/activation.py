"""Moments and pair kernels of activations phi at jointly Gaussian, centred pre-activations h, h'.

K(v, v', c) = E phi(h) phi(h'), h of variance v, h' of variance v', correlation c; likewise the derivative kernel
E phi'(h) phi'(h') and the square kernel E phi(h)^2 phi(h')^2. Closed forms: relu, relu2, gelu (not its square),
identity. silu, gelu_tanh, sigmoid: Hermite series (`hermite.py`), sum_n a_n(v) a_n(v') c^n.

A mask on the weights before phi multiplies the variance by its retained share, and that is all for Gaussian
pre-activations: put gain * retained_variance * second_moment in as `variance`. What a mask adds beyond that, excess
kurtosis kappa, changes E phi^2 by the factor 1 + kappa * `kurtosis_response`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import scipy.special

from varprop.errors import AssumptionError, require
from varprop.theory.hermite import Function, hermite_expansion, hermite_kernel
from varprop.theory.namespace import checked, clip_correlation

MAX_VARIANCE = 1e12
Kernel = Callable[..., Any]


def identity_kernel(variance: Any, other: Any, correlation: Any, xp: Any = np) -> Any:
    """E h h' = sqrt(v v') c."""
    return xp.sqrt(variance * other) * correlation


def identity_derivative_kernel(variance: Any, other: Any, correlation: Any, xp: Any = np) -> Any:
    """1: the derivative of h."""
    return 1 + 0 * correlation


def identity_square_kernel(variance: Any, other: Any, correlation: Any, xp: Any = np) -> Any:
    """E h^2 h'^2 = v v' (1 + 2 c^2)."""
    return variance * other * (1 + 2 * correlation**2)


def relu_kernel(variance: Any, other: Any, correlation: Any, xp: Any = np) -> Any:
    """E relu(h) relu(h') = sqrt(v v') (sqrt(1 - c^2) + c (pi - acos c)) / (2 pi).

    Exact. Source: arc-cosine kernel of order 1 (Cho and Saul 2009); derived in proofs/prove_activation.py.

    >>> float(relu_kernel(2.0, 2.0, 1.0)), round(float(relu_kernel(1.0, 1.0, 0.0)), 6)
    (1.0, 0.159155)
    """
    c = clip_correlation(correlation, xp)
    shape = xp.sqrt(1 - c**2) + c * (xp.pi - xp.acos(c))
    return xp.sqrt(variance * other) * shape / (2 * xp.pi)


def relu_derivative_kernel(variance: Any, other: Any, correlation: Any, xp: Any = np) -> Any:
    """P(h > 0, h' > 0) = (pi - acos c) / (2 pi). Exact. Source: derived in proofs/prove_activation.py.

    >>> float(relu_derivative_kernel(3.0, 1.0, 0.0))
    0.25
    """
    return (xp.pi - xp.acos(clip_correlation(correlation, xp))) / (2 * xp.pi)


def relu2_kernel(variance: Any, other: Any, correlation: Any, xp: Any = np) -> Any:
    """E relu(h)^2 relu(h')^2 = v v' (3 c sqrt(1 - c^2) + (1 + 2 c^2)(pi - acos c)) / (2 pi).

    Exact. Source: arc-cosine kernel of order 2 (Cho and Saul 2009); derived in proofs/prove_activation.py.

    >>> float(relu2_kernel(1.0, 1.0, 1.0)), float(relu2_kernel(2.0, 2.0, 0.0))
    (1.5, 1.0)
    """
    c = clip_correlation(correlation, xp)
    return variance * other * (3 * c * xp.sqrt(1 - c**2) + (1 + 2 * c**2) * (xp.pi - xp.acos(c))) / (2 * xp.pi)


def relu2_derivative_kernel(variance: Any, other: Any, correlation: Any, xp: Any = np) -> Any:
    """E 2 relu(h) 2 relu(h') = 4 `relu_kernel`. Exact. Source: derived in proofs/prove_activation.py."""
    return 4 * relu_kernel(variance, other, correlation, xp)


def relu2_square_kernel(variance: Any, other: Any, correlation: Any, xp: Any = np) -> Any:
    """E relu(h)^4 relu(h')^4 = (v v')^2 ((55 c + 50 c^3) sqrt(1 - c^2) + (9 + 72 c^2 + 24 c^4)(pi - acos c)) / (2 pi).

    Exact. Source: arc-cosine kernel of order 4 (Cho and Saul 2009); derived in proofs/prove_activation.py.

    >>> float(relu2_square_kernel(1.0, 1.0, 1.0))
    52.5
    """
    c = clip_correlation(correlation, xp)
    shape = (55 * c + 50 * c**3) * xp.sqrt(1 - c**2) + (9 + 72 * c**2 + 24 * c**4) * (xp.pi - xp.acos(c))
    return (variance * other) ** 2 * shape / (2 * xp.pi)


def gelu_kernel(variance: Any, other: Any, correlation: Any, xp: Any = np) -> Any:
    """E gelu(h) gelu(h') for gelu(h) = h Phi(h); with k = sqrt(v v') c, D = sqrt((1 + v)(1 + v') - k^2):

    k (1/4 + atan(k / D) / (2 pi)) + (v v' + k^2 (1 - v v') / ((1 + v)(1 + v'))) / (2 pi D).

    Exact. Source: derived in proofs/prove_activation.py.

    >>> round(float(gelu_kernel(1.0, 1.0, 1.0)), 9)
    0.425221483
    """
    k, root = _gelu_terms(variance, other, correlation, xp)
    product = variance * other
    rest = product + k**2 * (1 - product) / ((1 + variance) * (1 + other))
    return k / 4 + k * xp.atan(k / root) / (2 * xp.pi) + rest / (2 * xp.pi * root)


def gelu_derivative_kernel(variance: Any, other: Any, correlation: Any, xp: Any = np) -> Any:
    """E gelu'(h) gelu'(h'); with k and D as in `gelu_kernel`:

    1/4 + atan(k / D) / (2 pi) + k (1 / (1 + v) + 1 / (1 + v') + 1 / D^2) / (2 pi D).

    Exact. Source: derived in proofs/prove_activation.py.

    >>> float(gelu_derivative_kernel(1.0, 2.0, 0.0))
    0.25
    """
    k, root = _gelu_terms(variance, other, correlation, xp)
    rest = 1 / (1 + variance) + 1 / (1 + other) + 1 / root**2
    quarter = 1 + 0 * correlation
    return quarter / 4 + xp.atan(k / root) / (2 * xp.pi) + k * rest / (2 * xp.pi * root)


def _gelu_terms(variance: Any, other: Any, correlation: Any, xp: Any) -> tuple[Any, Any]:
    """k and D; D without the cancellation of (1 + v)(1 + v') - k^2 near full correlation."""
    k = identity_kernel(variance, other, correlation, xp)
    return k, xp.sqrt(1 + variance + other + variance * other * (1 - correlation**2))


def relu_mean(variance: Any, xp: Any = np) -> Any:
    """E relu(h) = sqrt(v / (2 pi)). Exact."""
    return xp.sqrt(variance / (2 * xp.pi))


def relu2_mean(variance: Any, xp: Any = np) -> Any:
    """E relu(h)^2 = v / 2. Exact."""
    return variance / 2


def gelu_mean(variance: Any, xp: Any = np) -> Any:
    """E gelu(h) = v / sqrt(2 pi (1 + v)). Exact."""
    return variance / xp.sqrt(2 * xp.pi * (1 + variance))


def identity_mean(variance: Any, xp: Any = np) -> Any:
    """E h = 0."""
    return 0 * variance


def gelu(x: np.ndarray) -> np.ndarray:
    """x Phi(x)."""
    return x * scipy.special.ndtr(x)


def silu(x: np.ndarray) -> np.ndarray:
    """x sigmoid(x)."""
    return x * scipy.special.expit(x)


def silu_derivative(x: np.ndarray) -> np.ndarray:
    """sigmoid(x) (1 + x sigmoid(-x))."""
    return scipy.special.expit(x) * (1 + x * scipy.special.expit(-x))


def _gelu_tanh_inner(x: np.ndarray) -> np.ndarray:
    return np.sqrt(8 / np.pi) * (x + 0.044715 * x**3)


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """The tanh approximation of gelu: x sigmoid(sqrt(8 / pi) (x + 0.044715 x^3))."""
    return x * scipy.special.expit(_gelu_tanh_inner(x))


def gelu_tanh_derivative(x: np.ndarray) -> np.ndarray:
    """Its derivative."""
    inner = _gelu_tanh_inner(x)
    slope = np.sqrt(8 / np.pi) * (1 + 3 * 0.044715 * x**2)
    return scipy.special.expit(inner) * (1 + x * slope * scipy.special.expit(-inner))


def sigmoid_derivative(x: np.ndarray) -> np.ndarray:
    """sigmoid(x) sigmoid(-x)."""
    return scipy.special.expit(x) * scipy.special.expit(-x)


def _squared(function: Function) -> Function:
    return lambda x: function(x) ** 2


CLOSED_FORMS: dict[str, Kernel] = {
    "identity": identity_kernel,
    "relu": relu_kernel,
    "relu2": relu2_kernel,
    "gelu": gelu_kernel,
}
SERIES: dict[str, Function] = {"silu": silu, "gelu_tanh": gelu_tanh, "sigmoid": scipy.special.expit}
_VALUE = {**CLOSED_FORMS, **SERIES}
_DERIVATIVE = {
    "identity": identity_derivative_kernel,
    "relu": relu_derivative_kernel,
    "relu2": relu2_derivative_kernel,
    "gelu": gelu_derivative_kernel,
    "silu": silu_derivative,
    "gelu_tanh": gelu_tanh_derivative,
    "sigmoid": sigmoid_derivative,
}
_SQUARE = {
    "identity": identity_square_kernel,
    "relu": relu2_kernel,
    "relu2": relu2_square_kernel,
    "gelu": _squared(gelu),
    **{name: _squared(function) for name, function in SERIES.items()},
}
_MEAN = {"identity": identity_mean, "relu": relu_mean, "relu2": relu2_mean, "gelu": gelu_mean, **SERIES}
_KERNELS = {
    *(identity_kernel, identity_derivative_kernel, identity_square_kernel, relu_kernel, relu_derivative_kernel),
    *(relu2_kernel, relu2_derivative_kernel, relu2_square_kernel, gelu_kernel, gelu_derivative_kernel),
}


def activation_kernel(activation: str, variance: Any, correlation: Any, other_variance: Any = None) -> Any:
    """K = E phi(h) phi(h') for arrays of variances and correlations that broadcast.

    activation: relu, relu2, gelu, gelu_tanh, silu, identity or sigmoid; variance: of h, in [0, 1e12];
    correlation: in [-1, 1]; other_variance: of h', `variance` if None. Closed form (exact) or Hermite series, in units
    of sqrt(E phi(h)^2 E phi(h')^2): 1e-11 for variances up to 20; above, 1e-11 + `series_error` |c|^512, which is felt
    for |c| > 0.95 only. Raises `AssumptionError` outside these domains.
    Checked by: tests/theory/test_activation.py against mpmath.

    >>> round(float(activation_kernel("silu", 1.0, 0.0)), 6), round(float(activation_kernel("gelu", 1.0, 0.5)), 9)
    (0.042692, 0.227294915)
    >>> activation_kernel("relu", [1.0, 4.0], 0.0, 1.0).round(6)
    array([0.159155, 0.31831 ])
    """
    return _pair(_VALUE, activation, variance, correlation, other_variance)


def activation_derivative_kernel(activation: str, variance: Any, correlation: Any, other_variance: Any = None) -> Any:
    """E phi'(h) phi'(h'); arguments, errors and exactness as in `activation_kernel`.

    By Price's theorem the derivative of K with respect to the covariance.

    >>> round(float(activation_derivative_kernel("silu", 1.0, 0.5)), 9)
    0.312279615
    """
    return _pair(_DERIVATIVE, activation, variance, correlation, other_variance)


def activation_square_kernel(activation: str, variance: Any, correlation: Any, other_variance: Any = None) -> Any:
    """E phi(h)^2 phi(h')^2; arguments, errors and exactness as in `activation_kernel`. gelu: Hermite series.

    >>> float(activation_square_kernel("relu", 1.0, 0.0)), float(activation_square_kernel("identity", 1.0, 1.0))
    (0.25, 3.0)
    """
    return _pair(_SQUARE, activation, variance, correlation, other_variance)


def activation_second_moment(activation: str, variance: Any) -> Any:
    """E phi(h)^2 for h ~ N(0, variance); closed form, or quadrature with a relative error below 1e-12.

    variance: array of any shape, in [0, 1e12]. Raises `AssumptionError` outside, and for an unknown activation.
    Checked by: tests/theory/test_activation.py against mpmath.

    >>> float(activation_second_moment("relu", 2.0)), round(float(activation_second_moment("silu", 1.0)), 6)
    (1.0, 0.355776)
    """
    return _single(_VALUE, activation, variance)


def activation_derivative_second_moment(activation: str, variance: Any) -> Any:
    """E phi'(h)^2; arguments, errors and exactness as in `activation_second_moment`.

    >>> float(activation_derivative_second_moment("relu", 2.0))
    0.5
    """
    return _single(_DERIVATIVE, activation, variance)


def activation_fourth_moment(activation: str, variance: Any) -> Any:
    """E phi(h)^4; arguments, errors and exactness as in `activation_second_moment`.

    >>> float(activation_fourth_moment("relu", 2.0)), float(activation_fourth_moment("relu2", 1.0))
    (6.0, 52.5)
    """
    return _single(_SQUARE, activation, variance)


def activation_mean(activation: str, variance: Any) -> Any:
    """E phi(h); arguments, errors and exactness as in `activation_second_moment` (error in units of sqrt(E phi^2)).

    >>> round(float(activation_mean("silu", 1.0)), 6), round(float(activation_mean("gelu", 1.0)), 6)
    (0.206621, 0.282095)
    """
    rule = _rule(_MEAN, activation)
    variance = _variance(variance)
    return hermite_expansion(rule, variance).even[0] if activation in SERIES else rule(variance)


def series_error(activation: str, variance: Any, kernel: str = "value") -> Any:
    """Bound on the relative truncation error of a series: the dropped orders' share of its value at c = 1.

    kernel: "value", "derivative" or "square". 0 for closed forms. The error at correlation c is at most this times
    |c|^512 or so, and nothing at c = 1 itself, where the series ends in a term for the rest. Raises `AssumptionError`
    outside the domains.

    >>> float(series_error("silu", 20.0)) < 1e-12, 1e-7 < float(series_error("silu", 400.0)) < 2e-6
    (True, True)
    """
    rules = {"value": _VALUE, "derivative": _DERIVATIVE, "square": _SQUARE}
    known = isinstance(kernel, str) and kernel in rules
    require(known, AssumptionError, "kernel", kernel, "unknown", "one of " + ", ".join(rules))
    rule = _rule(rules[kernel], activation)
    values = _variance(variance)
    if rule in _KERNELS:
        return np.zeros_like(values)[()]
    expansion = hermite_expansion(rule, values)
    return expansion.remainder / expansion.second_moment


def kurtosis_response(activation: str, variance: Any) -> Any:
    """Relative change of E phi(h)^2 per unit of excess kurtosis of h: E He_4(z) phi(sqrt(v) z)^2 / (24 E phi^2).

    First term of the Gram-Charlier series. 0 for relu and identity, whose second moment needs no Gaussian.

    >>> float(kurtosis_response("relu", 1.0)), round(float(kurtosis_response("relu2", 1.0)), 6)
    (0.0, 0.333333)
    """
    _rule(_VALUE, activation)
    variance = _variance(variance)
    response = np.zeros_like(variance)
    if activation == "relu2":  # half of E He_4 z^4 = 24, over 24 * 3/2
        response += 1 / 3
    elif activation not in ("relu", "identity"):
        expansion = hermite_expansion(_SQUARE[activation], variance)
        if len(expansion.even) > 2:  # else phi^2 is a constant to rounding: variance near 0
            np.divide(expansion.even[2], np.sqrt(24) * expansion.even[0], out=response, where=expansion.even[0] > 0)
    return response[()]


def kurtosis_sensitivity(activation: str, variance: Any) -> float:
    """`kurtosis_response` in magnitude, for an error budget."""
    return float(np.abs(kurtosis_response(activation, variance)))


def _rule(rules: Mapping[str, Any], activation: str) -> Any:
    known = isinstance(activation, str) and activation in rules
    require(known, AssumptionError, "activation", activation, "unknown", "one of " + ", ".join(rules))
    return rules[activation]


def _variance(value: Any, name: str = "variance") -> np.ndarray:
    checked(name, value, "numbers in [0, 1e12]", 0.0, MAX_VARIANCE)
    return np.asarray(value, dtype=float)


def _pair(rules: Mapping[str, Any], activation: str, variance: Any, correlation: Any, other: Any) -> Any:
    """A kernel by its closed form or its series."""
    rule = _rule(rules, activation)
    checked("correlation", correlation, "numbers in [-1, 1]", -1 - 1e-9, 1 + 1e-9)
    first = _variance(variance)
    second = first if other is None else _variance(other, "other_variance")
    c = np.clip(np.asarray(correlation, dtype=float), -1.0, 1.0)
    if rule in _KERNELS:
        value = rule(first, second, c)
        shape = np.broadcast_shapes(first.shape, second.shape, c.shape)
        return value if np.shape(value) == shape else np.broadcast_to(value, shape).copy()
    expansion = hermite_expansion(rule, first)
    return hermite_kernel(expansion, expansion if other is None else hermite_expansion(rule, second), c)


def _single(rules: Mapping[str, Any], activation: str, variance: Any) -> Any:
    """The diagonal of a kernel: full correlation, one variance."""
    rule = _rule(rules, activation)
    values = _variance(variance)
    if rule in _KERNELS:
        return rule(values, values, np.ones_like(values))
    return hermite_expansion(rule, values).second_moment
