"""Feed-forward output at initialisation: down(phi(up u)), or gated down(phi(gate u) * up u).

Given the inputs u, gate u and up u are exactly Gaussian for Gaussian weights, at any width. Inputs need not be
normalised: tokens may have different second moments (norm placements that feed the raw stream).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from varprop.errors import AssumptionError, require
from varprop.spec import TensorRow
from varprop.theory.activation import activation_kernel, activation_second_moment
from varprop.theory.linear import effective_gain
from varprop.theory.namespace import checked
from varprop.theory.norm import cosine_mean, cosine_variance
from varprop.theory.quadrature import normal_nodes


@dataclass(frozen=True)
class FeedForwardGains:
    """Gains fan_in * Var(w) after masks; numbers, or arrays that broadcast with the tokens' moments.

    inner: of the matrix before phi, `gate` if gated, else `up`; up: of `up`, used only if gated; down: of `down`.
    """

    inner: Any
    up: Any
    down: Any


def feed_forward_gains(rows: Mapping[str, TensorRow]) -> FeedForwardGains:
    """Gains of the tensors `gate` (if gated), `up` and `down`, masks included.

    >>> row = TensorRow("up", "up", 1, (8, 4), 4, 8, 0.0, 0.5, 1.0, None)
    >>> feed_forward_gains({"up": row, "down": row})
    FeedForwardGains(inner=1.0, up=1.0, down=1.0)
    """
    up = effective_gain(rows["up"])
    inner = effective_gain(rows["gate"]) if "gate" in rows else up
    return FeedForwardGains(inner, up, effective_gain(rows["down"]))


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


def feed_forward_second_moment(second_moment: Any, gains: FeedForwardGains, activation: str, gated: bool) -> Any:
    """Second moment of the output: down E phi(h)^2, h ~ N(0, inner m); gated times up m.

    second_moment: m = |u|^2 / d of the input, >= 0, an array. Exact for the realised m (quadrature for silu and
    gelu_tanh, relative error below 1e-12). Raises `AssumptionError` outside the domains.
    Source: derived in proofs/prove_feed_forward.py. Checked by: tests/theory/test_feed_forward.py.

    >>> float(feed_forward_second_moment(2.0, FeedForwardGains(1.0, 1.0, 3.0), "relu", gated=False))
    3.0
    """
    checked("second_moment", second_moment, "numbers >= 0", 0.0)
    m = np.asarray(second_moment, dtype=float)
    moment = activation_second_moment(activation, gains.inner * m)
    return gated_kernel(m * moment, gains.up, gains.down) if gated else plain_kernel(moment, gains.down)


def feed_forward_mask_factor(
    retained: FeedForwardGains, gains: FeedForwardGains, activation: str, gated: bool, second_moment: Any = 1.0
) -> Any:
    """Second moment of the masked network over that of the dense one.

    retained: variance that the masks keep of each matrix; gains: before masks; second_moment: of the input. relu and
    identity: inner * down (times up if gated); relu2: inner^2 * down. Gated silu: inner * up * down times a factor in
    [1/2, 1], because E silu(h)^2 / v rises with v from 1/4 to 1/2. Exact as `feed_forward_second_moment`.
    Raises `AssumptionError` outside its domains and where the dense network gives 0.
    Source: derived in proofs/prove_feed_forward.py.

    >>> half, gains = FeedForwardGains(0.5, 0.5, 0.5), FeedForwardGains(1.0, 1.0, 1.0)
    >>> round(float(feed_forward_mask_factor(half, gains, "relu", gated=False)), 9)
    0.25
    >>> round(float(feed_forward_mask_factor(half, gains, "silu", gated=True)), 4)  # below 1/8
    0.1114
    """
    masked = FeedForwardGains(gains.inner * retained.inner, gains.up * retained.up, gains.down * retained.down)
    dense = feed_forward_second_moment(second_moment, gains, activation, gated)
    least = float(np.min(dense))
    require(least > 0, AssumptionError, "dense second moment", least, "zero", "a number > 0")
    return feed_forward_second_moment(second_moment, masked, activation, gated) / dense


def feed_forward_covariance(
    second_moment: Any,
    other: Any,
    cosine: Any,
    gains: FeedForwardGains,
    activation: str,
    gated: bool,
    d_model: float = np.inf,
) -> Any:
    """Mean of f_t.f_s / d for two tokens: down E phi(h) phi(h'); gated down E[up C phi(h) phi(h')], C = cos sqrt(m m').

    second_moment, other: m and m' of the two inputs; cosine: correlation c of their entries. All broadcast.
    The cosine of two tokens fluctuates at width d_model, with mean `cosine_mean` and variance `cosine_variance`: the
    three-point Gauss rule averages over it, which leaves O(1/d^2) for Gaussian entries; d_model = inf: no fluctuation.
    At c = 1 and m = m' this is `feed_forward_second_moment`, to 1e-12. Raises `AssumptionError` outside the domains.
    Source: derived in proofs/prove_feed_forward.py. Checked by: tests/theory/test_feed_forward.py.

    >>> gains = FeedForwardGains(1.0, 1.0, 1.0)
    >>> float(feed_forward_covariance(1.0, 1.0, 0.0, gains, "silu", gated=True))
    0.0
    >>> round(float(feed_forward_covariance(1.0, 4.0, 1.0, gains, "relu", gated=False, d_model=64)), 9)
    1.0
    """
    checked("second_moment", second_moment, "numbers >= 0", 0.0)
    checked("other", other, "numbers >= 0", 0.0)
    checked("cosine", cosine, "numbers in [-1, 1]", -1 - 1e-9, 1 + 1e-9)
    m, m_other = np.asarray(second_moment, dtype=float), np.asarray(other, dtype=float)
    shape = np.broadcast_shapes(m.shape, m_other.shape, np.shape(cosine), np.shape(gains.inner))
    moved, probability = _cosine_law(np.clip(np.asarray(cosine, dtype=float), -1.0, 1.0), d_model, len(shape))
    kernel = activation_kernel(activation, gains.inner * m, moved, gains.inner * m_other)
    if gated:
        kernel = kernel * moved
    mean = np.tensordot(probability, kernel, axes=1)
    if gated:
        return gated_kernel(mean * np.sqrt(m * m_other), gains.up, gains.down)
    return plain_kernel(mean, gains.down)


def _cosine_law(cosine: np.ndarray, d_model: float, n_axes: int) -> tuple[np.ndarray, np.ndarray]:
    """Points (n, *cosine) and probabilities of the cosine at width d_model; cosine gets `n_axes` axes."""
    cosine = cosine.reshape((1,) * (n_axes - cosine.ndim) + cosine.shape)
    if np.isinf(d_model):
        return cosine[None], np.ones(1)
    points, probability = normal_nodes(3)
    spread = np.sqrt(cosine_variance(cosine, d_model))
    moved = cosine_mean(cosine, d_model) + points.reshape((3,) + (1,) * n_axes) * spread
    return np.clip(moved, -1.0, 1.0), probability


def feed_forward_gram(
    gram: np.ndarray, rows: Mapping[str, TensorRow], activation: str, gated: bool, d_model: float
) -> np.ndarray:
    """Gram matrices of the output, (..., T, T), from the mean ones of the inputs.

    rows: the tensors `gate` (if gated), `up`, `down` with their gains and masks. The diagonal is
    `feed_forward_second_moment` of each token, the rest `feed_forward_covariance`: exact up to O(1/d^2) for the given
    Gram matrix. A token of second moment 0 has cosine 0 with all others.
    """
    gains = feed_forward_gains(rows)
    diagonal = np.diagonal(gram, axis1=-2, axis2=-1)
    first, other = diagonal[..., :, None], diagonal[..., None, :]
    scale = np.sqrt(first * other)
    cosine = np.divide(gram, scale, out=np.zeros_like(scale), where=scale > 0)
    one = float(diagonal.flat[0])
    if np.all(diagonal == one):  # equal tokens, as without eps: one variance for all is much cheaper
        first = other = np.float64(one)
    output = feed_forward_covariance(first, other, np.clip(cosine, -1.0, 1.0), gains, activation, gated, d_model)
    index = np.arange(gram.shape[-1])
    output[..., index, index] = feed_forward_second_moment(diagonal, gains, activation, gated)
    return output
