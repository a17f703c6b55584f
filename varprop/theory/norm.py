"""RMS norm u = g x / sqrt(|x|^2 / d + eps) and layer norm (the same after subtracting the mean over the d entries).

Gain vectors g multiply second moments and covariances by the mean of g^2 where the entries of x are exchangeable.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from varprop.errors import AssumptionError, require
from varprop.theory.namespace import checked


def _moment(name: str, value: Any) -> Any:
    return checked(name, value, "numbers >= 0", 0.0)


def _width(d_model: Any) -> Any:
    return checked("d_model", d_model, "numbers >= 1", 1.0)


def _correlation(value: Any) -> Any:
    return checked("correlation", value, "numbers in [-1, 1]", -1 - 1e-9, 1 + 1e-9)


def normalised_second_moment(second_moment: Any, eps: Any, gain_square: Any = 1) -> Any:
    """Second moment after a norm: gain_square q / (q + eps).

    second_moment: q of the input (its variance over the entries for layer norm); gain_square: mean of g^2. Exact for
    the realised q of one token and a common gain; `normalised_second_moment_mean` has the mean over a fluctuating q.
    Raises `AssumptionError` for negative numbers and for q = eps = 0. Source: derived in proofs/prove_norm.py.

    >>> normalised_second_moment(3.0, 1.0)
    0.75
    """
    second_moment, eps = _moment("second_moment", second_moment), _moment("eps", eps)
    _positive_sum(second_moment, eps)
    return _moment("gain_square", gain_square) * second_moment / (second_moment + eps)


def normalised_second_moment_mean(second_moment: Any, eps: Any, relative_variance: Any) -> Any:
    """Mean of q / (q + eps) over a fluctuating q: t - nu t^2 (1 - t), t = q / (q + eps) at the mean q.

    relative_variance: nu = Var(q) / q^2 of the realised second moment: 2 / d_model for Gaussian entries, more for a
    stream whose networks differ. Error O(nu^(3/2)); nothing to correct at eps = 0. Raises `AssumptionError` outside
    the domains. Source: derived in proofs/prove_norm.py. Checked by: tests/theory/test_norm.py.

    >>> normalised_second_moment_mean(1.0, 1.0, 0.08)
    0.49
    """
    t = normalised_second_moment(second_moment, eps)
    return t - _moment("relative_variance", relative_variance) * t**2 * (1 - t)


def normalised_covariance(
    covariance: Any, second_moment: Any, other: Any, eps: Any, xp: Any = np, gain_square: Any = 1
) -> Any:
    """Covariance of two normalised tokens: gain_square k / sqrt((q + eps)(q' + eps)).

    covariance: k = x.x'/d; second_moment, other: q and q'. Exact for realised moments; leading order in 1/d for means
    (`normalised_covariance_mean` has the next). Raises `AssumptionError` for q = eps = 0 or negative moments.
    Source: derived in proofs/prove_norm.py.

    >>> float(normalised_covariance(1.0, 4.0, 4.0, 0.0))
    0.25
    """
    second_moment, other, eps = _moment("second_moment", second_moment), _moment("other", other), _moment("eps", eps)
    covariance = checked("covariance", covariance, "finite numbers")
    _positive_sum(second_moment, eps)
    _positive_sum(other, eps)
    return gain_square * covariance / xp.sqrt((second_moment + eps) * (other + eps))


def normalised_covariance_mean(correlation: Any, first: Any, other: Any, d_model: Any, xp: Any = np) -> Any:
    """Mean covariance of two normalised tokens of Gaussian entries, with the first correction in 1/d:

    sqrt(t t') c (1 + (3 (t^2 + t'^2) / 4 - t - t' + c^2 t t' / 2) / d).

    correlation: c of the entries; first, other: t = q / (q + eps) of the two tokens, in [0, 1]; d_model: degrees of
    freedom (`norm_degrees`). t = t' = 1: `cosine_mean`. Error O(1/d^2). Raises `AssumptionError` outside the domains.
    Source: delta method, derived in proofs/prove_norm.py. Checked by: tests/theory/test_norm.py.

    >>> float(normalised_covariance_mean(0.5, 1.0, 1.0, 3))
    0.4375
    """
    c = _correlation(correlation)
    first, other = (
        checked(name, value, "numbers in [0, 1]", 0.0, 1.0) for name, value in (("first", first), ("other", other))
    )
    bend = 3 * (first**2 + other**2) / 4 - first - other + c**2 * first * other / 2
    return xp.sqrt(first * other) * c * (1 + bend / _width(d_model))


def norm_degrees(kind: str, d_model: Any) -> Any:
    """Degrees of freedom of a normalised vector of Gaussian entries: d for "rms", d - 1 for "layer".

    Layer norm acts like the RMS norm on the d - 1 directions orthogonal to (1, ..., 1): use this as `d_model` in
    `cosine_mean`, `cosine_variance`, `normalised_covariance_mean`. Exact for independent Gaussian entries of equal
    mean. Raises `AssumptionError` for another kind, and for d_model < 2 in a layer norm, whose output is then 0.

    >>> norm_degrees("layer", 64)
    63
    """
    require(kind in ("rms", "layer"), AssumptionError, "kind", kind, "unknown", "'rms' or 'layer'")
    if kind == "rms":
        return _width(d_model)
    return checked("d_model", d_model, "numbers >= 2 for a layer norm", 2.0) - 1


def centred_second_moment(second_moment: Any, d_model: Any, mean_square: Any = 0) -> Any:
    """Mean population variance over d independent entries: (q - mean_square)(1 - 1/d), what a layer norm divides by.

    mean_square: the square of the entries' common mean, 0 if centred. Products of two tokens in place of squares give
    the covariance. Exact in expectation. Raises `AssumptionError` for d_model < 1. Source: derived in
    proofs/prove_norm.py.

    >>> centred_second_moment(2.0, 4), centred_second_moment(2.0, 4, 1.0)
    (1.5, 0.75)
    """
    second_moment = checked("second_moment", second_moment, "finite numbers")
    mean_square = checked("mean_square", mean_square, "finite numbers")
    return (second_moment - mean_square) - (second_moment - mean_square) / _width(d_model)


def centred_correlation(
    correlation: Any, mean_share: Any, other_share: Any = None, mean_correlation: Any = 1, xp: Any = np
) -> Any:
    """Correlation of two tokens after a layer norm takes away their means over the entries:

    (c - r sqrt(a a')) / sqrt((1 - a)(1 - a')).

    correlation: c before, which an RMS norm keeps; mean_share, other_share: a = (mean of the entries)^2 / second
    moment of each token, in [0, 1); other_share None: the same; mean_correlation: r, the sign (or mean product) of the
    two means, 1 for a mean common to all tokens. Exact for realised moments. The layer norm removes the share a of the
    second moment. Raises `AssumptionError` outside the domains. Source: derived in proofs/prove_norm.py.

    >>> float(centred_correlation(0.5, 0.5)), float(centred_correlation(0.5, 0.0))
    (0.0, 0.5)
    """
    other_share = mean_share if other_share is None else other_share
    mean_share, other_share = (
        checked(name, value, "numbers in [0, 1)", 0.0, 1 - 1e-12)
        for name, value in (("mean_share", mean_share), ("other_share", other_share))
    )
    common = _correlation(mean_correlation) * xp.sqrt(mean_share * other_share)
    return (_correlation(correlation) - common) / xp.sqrt((1 - mean_share) * (1 - other_share))


def cosine_mean(correlation: Any, d_model: Any) -> Any:
    """Mean cosine of two tokens whose entries have this correlation: c (1 - (1 - c^2) / (2 d)).

    d_model: degrees of freedom (`norm_degrees`), >= 1. Second order of the delta method for a Wishart matrix of d
    degrees: error O(1/d^2), at most 0.18 / d^2 from d = 4. Raises `AssumptionError` outside the domains. Source:
    derived in proofs/prove_norm.py. Checked by: tests/theory/test_norm.py against Hotelling's exact mean.

    >>> cosine_mean(0.5, 3)
    0.4375
    """
    correlation = _correlation(correlation)
    return correlation * (1 - (1 - correlation**2) / (2 * _width(d_model)))


def cosine_variance(correlation: Any, d_model: Any) -> Any:
    """Variance of the cosine of two tokens whose entries have this correlation: (1 - c^2)^2 / d.

    d_model: degrees of freedom (`norm_degrees`), >= 1. Error O(1/d^2), at most 0.83 / d^2 from d = 4; exact at c = 0
    and |c| = 1. Raises `AssumptionError` outside the domains. Source: derived in proofs/prove_norm.py. Checked by:
    tests/theory/test_norm.py against the exact variance.

    >>> cosine_variance(0.0, 4)
    0.25
    """
    return (1 - _correlation(correlation) ** 2) ** 2 / _width(d_model)


def norm_gram(gram: np.ndarray, kind: str, eps: float, d_model: int) -> np.ndarray:
    """Token Gram matrix after a norm, from arrays (..., T, T) of mean x_t.x_s / d: leading order in 1/d.

    The O(1/d) fluctuation of the cosines (`cosine_mean`, `cosine_variance`) is left to the rule that needs it.
    """
    gram = centred_second_moment(gram, d_model) if kind == "layer" else gram
    diagonal = np.diagonal(gram, axis1=-2, axis2=-1)
    return normalised_covariance(gram, diagonal[..., :, None], diagonal[..., None, :], eps)


def eps_fluctuation(second_moment: Any, eps: float, d_model: int) -> Any:
    """Relative bias of q / (q + eps) from the fluctuation 2 q^2 / d of the realised q: 2 eps q / ((q + eps)^2 d).

    The second-order term of Jensen's inequality, in magnitude. Zero for eps = 0: then |u|^2 = d exactly.
    """
    return 2 * eps * second_moment / ((second_moment + eps) ** 2 * d_model)


def _positive_sum(second_moment: Any, eps: Any) -> None:
    """Refuse a division by zero; symbols pass."""
    if not hasattr(second_moment + eps, "free_symbols"):
        least = float(np.min(np.asarray(second_moment, dtype=float) + eps))
        require(least > 0, AssumptionError, "second_moment + eps", least, "zero", "a number > 0")
