"""Feed-forward output at initialisation: down(phi(up u)), or gated down(phi(gate u) * up u).

Given the normalised tokens u, gate u and up u are exactly Gaussian for Gaussian weights, at any width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from varprop.spec import TensorRow
from varprop.theory.activation import activation_kernel, activation_second_moment
from varprop.theory.linear import effective_gain


def gated_kernel(activation_moment: Any, input_covariance: Any, up_gain: Any, down_gain: Any) -> Any:
    """E f_t.f_s / d of a gated network: down_gain * up_gain * input_covariance * E phi(h_t) phi(h_s).

    The factor input_covariance makes it vanish for uncorrelated tokens. Exact.
    Source: derived in proofs/prove_feed_forward.py.

    >>> gated_kernel(0.5, 1.0, 2.0, 3.0)
    3.0
    """
    return down_gain * up_gain * input_covariance * activation_moment


def plain_kernel(activation_moment: Any, down_gain: Any) -> Any:
    """E f_t.f_s / d of a plain network: down_gain * E phi(h_t) phi(h_s). Exact.

    >>> plain_kernel(0.5, 3.0)
    1.5
    """
    return down_gain * activation_moment


def feed_forward_gram(gram: np.ndarray, rows: Mapping[str, TensorRow], activation: str, gated: bool) -> np.ndarray:
    """Gram matrices of the output, (..., T, T), from those of the normalised tokens.

    rows: the tensors `gate` (if gated), `up`, `down` with their gains and masks. The diagonal takes each token's own
    second moment; correlations of phi use the kernel at the mean second moment, exact when all tokens have the same
    (tokens differ only through the norm's eps).
    """
    gains = {name: effective_gain(row) for name, row in rows.items()}
    diagonal = np.diagonal(gram, axis1=-2, axis2=-1)
    inner = gains["gate" if gated else "up"]
    moment = activation_second_moment(activation, inner * diagonal)
    variance = inner * float(diagonal.mean())
    spread = np.sqrt(diagonal[..., :, None] * diagonal[..., None, :])
    kernel = activation_kernel(activation, variance, np.clip(gram / spread, -1.0, 1.0))
    kernel = kernel / activation_second_moment(activation, variance)
    kernel = kernel * np.sqrt(moment[..., :, None] * moment[..., None, :])
    index = np.arange(gram.shape[-1])
    kernel[..., index, index] = moment
    if gated:
        return gated_kernel(kernel, gram, gains["up"], gains["down"])
    return plain_kernel(kernel, gains["down"])
