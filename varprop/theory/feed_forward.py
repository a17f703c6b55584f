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
from varprop.theory.norm import cosine_mean, cosine_variance
from varprop.theory.quadrature import normal_nodes


def gated_kernel(moment: Any, up_gain: Any, down_gain: Any) -> Any:
    """E f_t.f_s / d of a gated network: down_gain * up_gain * E[C_ts phi(h_t) phi(h_s)], C_ts = u_t.u_s / d.

    The factor C_ts makes it vanish for uncorrelated tokens. Exact. Source: derived in proofs/prove_feed_forward.py.

    >>> gated_kernel(0.5, 2.0, 3.0)
    3.0
    """
    return down_gain * up_gain * moment


def plain_kernel(activation_moment: Any, down_gain: Any) -> Any:
    """E f_t.f_s / d of a plain network: down_gain * E phi(h_t) phi(h_s). Exact.

    >>> plain_kernel(0.5, 3.0)
    1.5
    """
    return down_gain * activation_moment


def feed_forward_gram(
    gram: np.ndarray, rows: Mapping[str, TensorRow], activation: str, gated: bool, d_model: int
) -> np.ndarray:
    """Gram matrices of the output, (..., T, T), from the mean ones of the normalised tokens.

    rows: the tensors `gate` (if gated), `up`, `down` with their gains and masks. The diagonal takes each token's own
    second moment and is exact given it. Pairs use the kernel at the mean second moment (tokens differ only through
    the norm's eps), averaged over the law of their cosine, of mean `cosine_mean` and variance `cosine_variance`, by
    the three-point Gauss rule: exact up to O(1/d^2) for the given Gram matrix.
    """
    gains = {name: effective_gain(row) for name, row in rows.items()}
    diagonal = np.diagonal(gram, axis1=-2, axis2=-1)
    inner = gains["gate" if gated else "up"]
    moment = activation_second_moment(activation, inner * diagonal)
    variance = inner * float(diagonal.mean())
    cosine = np.clip(gram / np.sqrt(diagonal[..., :, None] * diagonal[..., None, :]), -1.0, 1.0)
    spread = np.sqrt(cosine_variance(cosine, d_model))
    centre = cosine_mean(cosine, d_model)
    kernel = np.zeros_like(gram)
    for point, probability in zip(*normal_nodes(3), strict=True):
        moved = np.clip(centre + point * spread, -1.0, 1.0)
        kernel += probability * activation_kernel(activation, variance, moved) * (moved if gated else 1.0)
    kernel /= activation_second_moment(activation, variance)
    scale = np.sqrt(moment * (diagonal if gated else 1.0))
    kernel *= scale[..., :, None] * scale[..., None, :]
    return gated_kernel(kernel, gains["up"], gains["down"]) if gated else plain_kernel(kernel, gains["down"])
