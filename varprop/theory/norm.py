"""RMS norm u = x / sqrt(|x|^2 / d + eps) and layer norm (the same after subtracting the mean over the d entries)."""

from __future__ import annotations

from typing import Any

import numpy as np


def normalised_second_moment(second_moment: Any, eps: Any) -> Any:
    """Second moment after a norm: q / (q + eps).

    second_moment: q of the input (its variance over the entries for layer norm). Exact for the realised q of one token;
    leading order in 1/d for its mean. Source: derived in proofs/prove_norm.py.

    >>> normalised_second_moment(3.0, 1.0)
    0.75
    """
    return second_moment / (second_moment + eps)


def normalised_covariance(covariance: Any, second_moment: Any, other: Any, eps: Any, xp: Any = np) -> Any:
    """Covariance of two normalised tokens: k / sqrt((q + eps)(q' + eps)).

    covariance: k = x.x'/d; second_moment, other: q and q'. Exact for realised moments; leading order in 1/d for means.
    Source: derived in proofs/prove_norm.py.

    >>> float(normalised_covariance(1.0, 4.0, 4.0, 0.0))
    0.25
    """
    return covariance / xp.sqrt((second_moment + eps) * (other + eps))


def centred_second_moment(second_moment: Any, d_model: Any) -> Any:
    """Mean population variance over d exchangeable centred entries: q (1 - 1/d), what a layer norm divides by.

    Exact in expectation. Source: derived in proofs/prove_norm.py.

    >>> centred_second_moment(2.0, 4)
    1.5
    """
    return second_moment - second_moment / d_model


def cosine_mean(correlation: Any, d_model: Any) -> Any:
    """Mean cosine of two tokens whose entries have this correlation: c (1 - (1 - c^2) / (2 d)).

    Second order of the delta method for a Wishart matrix of d degrees: error O(1/d^2).
    Source: derived in proofs/prove_norm.py.

    >>> cosine_mean(0.5, 3)
    0.4375
    """
    return correlation * (1 - (1 - correlation**2) / (2 * d_model))


def cosine_variance(correlation: Any, d_model: Any) -> Any:
    """Variance of the cosine of two tokens whose entries have this correlation: (1 - c^2)^2 / d.

    Leading order in 1/d. Source: derived in proofs/prove_norm.py.

    >>> cosine_variance(0.0, 4)
    0.25
    """
    return (1 - correlation**2) ** 2 / d_model


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
