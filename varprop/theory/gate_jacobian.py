"""The derivative of mixture-of-experts gates with respect to their router logits, at a fixed choice of experts.

With scores f_i (e^l or sigmoid(l)), their slopes h_i = f_i' and i.i.d. normal logits, the law is that of `gates.py`:
given the (k+1)-th largest logit the k larger ones are independent, and 1 / Z^a = int u^{a-1} e^{-uZ} du / Gamma(a).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from varprop.theory.gates import (
    MAX_LOGIT_STD,
    Router,
    canonical,
    checked_std,
    interpolation,
    interval,
    score_of,
    threshold_nodes,
)

LOG_U_STEP = 0.3
"""Trapezoidal error below 1e-9: |Gamma(4 + 2 pi i / step)|."""
TINY = 1e-300
"""Stands for 0 in a logarithm: normalised gates of one active expert have no derivative."""


def gate_jacobian(
    n_experts: int,
    top_k: int,
    logit_std: Any,
    *,
    normalize: bool,
    router: str = "softmax",
    gate_order: str = "score_then_top_k",
) -> np.ndarray:
    """E sum_ij (dg_i / dl_j)^2 and E sum_i dg_i / dl_i of the active experts' gates g, stacked.

    softmax: dg_i / dl_j = g_i (delta_ij - g_j), over the top k if normalised: the first is E[S_2 - 2 S_3 + S_2^2]
    with S_a = sum_i g_i^a, else with the sum of squares over all experts in the last factor. sigmoid: g_i' = g_i (1 -
    g_i), or the quotient rule if normalised. The choice of experts is piecewise constant and has no derivative.

    Arguments and errors as in `gate_second_moment`; logit_std may be an array. Quadrature at tabulated logit_std,
    relative error below 1e-6, and cubic interpolation between them, relative error below 1e-3; for a softmax beyond
    logit_std 16 both are A / s + B / s^2, fixed at 8 and 16. Source: derived in proofs/prove_backward.py.

    >>> gate_jacobian(8, 1, 1.0, normalize=True)  # one active expert has the gate 1
    array([0., 0.])
    >>> gate_jacobian(4, 4, [0.0, 1.25], normalize=True).round(6)[:, 0]
    array([0.1875, 0.75  ])
    """
    law = canonical(n_experts, top_k, normalize, router, gate_order)
    std = checked_std(logit_std, law)
    values = _interpolated(law, np.minimum(std, MAX_LOGIT_STD))
    if not (std > MAX_LOGIT_STD).any():
        return values
    low, high = (_interpolated(law, np.full_like(std, s)) for s in (MAX_LOGIT_STD / 2, MAX_LOGIT_STD))
    ratio = MAX_LOGIT_STD / np.maximum(std, MAX_LOGIT_STD)
    return np.where(std > MAX_LOGIT_STD, ratio * (high + (high - low / 2) * (1 - ratio)), values)


def _interpolated(law: Router, std: np.ndarray) -> np.ndarray:
    """(2, *std.shape): the logarithms are interpolated in s / (1 + s), by the cubic through the four nodes around."""
    nodes, weights = interpolation(law._replace(score="sigmoid"), std, 4)  # a sigmoid's nodes: the finite ones
    table = np.log(np.maximum([gate_jacobian_at(law, float(s)) for s in nodes], TINY))
    total = np.tensordot(table, weights, axes=(0, 0))
    return np.where(total > math.log(TINY) / 2, np.exp(total), 0.0)


@functools.lru_cache(maxsize=1024)
def gate_jacobian_at(law: Router, std: float) -> tuple[float, float]:
    """`gate_jacobian` at one logit_std in [0, 16], by quadrature."""
    if law.normalised and law.top_k == 1:
        return 0.0, 0.0
    thresholds, probability = threshold_nodes(law.n_experts, law.top_k)
    if std == 0:
        thresholds, probability = np.zeros(1), np.ones(1)
    square, trace = probability @ np.array([_given_threshold(law, std, float(t)) for t in thresholds])
    return float(square), float(trace)


def _n_nodes(std: float) -> int:
    return int(96 * max(1.0, std / 3))


def _given_threshold(law: Router, std: float, t: float) -> tuple[float, float]:
    """Square and trace given that the (k+1)-th largest logit is t."""
    n_experts, top_k, router, normalised = law
    z, above = interval(t, np.inf, _n_nodes(std))
    score = score_of(z, std, router)
    slope = score if router == "softmax" else score * (1 - score)
    if router == "sigmoid" and not normalised:
        return top_k * float(above @ slope**2), top_k * float(above @ slope)
    log_u = np.arange(-np.log(score[-1] * n_experts) - 16, -np.log(score[0]) + 3.5, LOG_U_STEP)
    u_score = np.exp(np.minimum(log_u[:, None] + np.log(score), 30.0))  # exp(-e^30) is zero already
    survival = np.exp(-u_score)
    ratio = slope / score
    moments = [survival]  # u^a score^a e^{-u score}
    for _ in range(4):
        moments.append(moments[-1] * u_score)
    zeroth, others = survival @ above, top_k - 1
    one, two = zeroth**others, zeroth ** max(top_k - 2, 0)
    slopes = above * ratio**2
    active = moments[2] @ slopes  # u^2 E[h^2 e^{-uf}], one of the k
    square = one * ((moments[2] - moments[3] + moments[4] / 6) @ slopes)
    square += others * two * active * (moments[2] @ above) / 6
    trace = one * ((moments[1] - moments[2]) @ (above * ratio))
    if not normalised:
        u, n_below = np.exp(log_u), n_experts - top_k - 1
        below, weight = interval(-np.inf, t, _n_nodes(std))
        low, pivot = u[:, None] * score_of(below, std, router), u * score_of(t, std, router)
        fade = np.exp(-low)
        rest = fade @ weight
        tail = np.exp(-pivot) * rest**n_below
        outside = pivot**2 * tail
        if n_below:
            outside = outside + n_below * np.exp(-pivot) * rest ** (n_below - 1) * ((low**2 * fade) @ weight)
        square = square * tail + one * active * outside / 6
        trace = trace * tail
    return tuple((top_k * LOG_U_STEP * np.array([square.sum(), trace.sum()])).tolist())
