"""The derivative of mixture-of-experts gates with respect to their router logits, at a fixed choice of experts.

With scores f_i (e^l or sigmoid(l)), their slopes h_i = f_i' and i.i.d. normal logits, the law is that of `moe.py`:
given the (k+1)-th largest logit the k larger ones are independent, and 1 / Z^a = int u^{a-1} e^{-uZ} du / Gamma(a).
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np

from varprop.errors import AssumptionError, require
from varprop.theory.moe import MAX_LOGIT_STD, _interval, _score, _thresholds


class GateJacobian(NamedTuple):
    """square: E sum_ij (dg_i / dl_j)^2; trace: E sum_i dg_i / dl_i."""

    square: float
    trace: float


def gate_jacobian(
    n_experts: int,
    top_k: int,
    logit_std: float,
    *,
    normalize: bool,
    router: str = "softmax",
    gate_order: str = "score_then_top_k",
) -> GateJacobian:
    """Mean square and trace of the matrix dg_i / dl_j of the gates g of the active experts.

    softmax: dg_i / dl_j = g_i (delta_ij - g_j), over the top k if normalised, so that square = E[S_2 - 2 S_3 + S_2^2]
    with S_a = sum_i g_i^a, else with the sum of squares over all experts in the last factor. sigmoid: g_i' = g_i (1 -
    g_i), or the quotient rule if normalised. The choice of experts is piecewise constant and has no derivative.
    Arguments as in `gate_second_moment`. Quadrature, relative error below 1e-6 for logit_std <= 4.
    Raises `AssumptionError` for top_k outside 1..E or logit_std outside its domain.
    Source: derived in proofs/prove_backward.py.

    >>> gate_jacobian(8, 1, 1.0, normalize=True)
    GateJacobian(square=0.0, trace=0.0)
    >>> [round(x, 6) for x in gate_jacobian(4, 4, 0.0, normalize=True)]
    [0.1875, 0.75]
    """
    require(1 <= top_k <= n_experts, AssumptionError, "top_k", top_k, "outside the domain", f"1..{n_experts}")
    good = 0 <= logit_std <= MAX_LOGIT_STD
    require(good, AssumptionError, "logit_std", logit_std, "outside the domain", f"a number in [0, {MAX_LOGIT_STD}]")
    require(router in ("softmax", "sigmoid"), AssumptionError, "router", router, "unknown", "softmax or sigmoid")
    softmax = router == "softmax"
    normalised = normalize or (softmax and (gate_order == "top_k_then_score" or top_k == n_experts))
    if normalised and top_k == 1:
        return GateJacobian(0.0, 0.0)
    return _gate_jacobian(n_experts, top_k, float(logit_std), normalised, router)


@functools.lru_cache(maxsize=1024)
def _gate_jacobian(n_experts: int, top_k: int, std: float, normalised: bool, router: str) -> GateJacobian:
    thresholds, probability = _thresholds(n_experts, top_k)
    if std == 0:
        thresholds, probability = np.zeros(1), np.ones(1)
    parts = [_given_threshold(n_experts, top_k, std, normalised, router, float(t)) for t in thresholds]
    square, trace = probability @ np.array(parts)
    return GateJacobian(float(square), float(trace))


def _given_threshold(
    n_experts: int, top_k: int, std: float, normalised: bool, router: str, t: float
) -> tuple[float, float]:
    """Square and trace given that the (k+1)-th largest logit is t."""
    z, above = _interval(t, np.inf)
    score = _score(z, std, router)
    slope = score if router == "softmax" else score * (1 - score)
    if router == "sigmoid" and not normalised:
        return top_k * float(above @ slope**2), top_k * float(above @ slope)
    log_u = np.arange(-np.log(score[-1] * n_experts) - 24, -np.log(score[0]) + 6, 0.25)
    u_score = np.exp(np.minimum(log_u[:, None] + np.log(score), 30.0))  # exp(-e^30) is zero already
    survival = np.exp(-u_score) * above
    ratio = slope / score

    def moment(slopes: int, power: int) -> np.ndarray:
        """u^power E[slope^slopes score^(power - slopes) e^{-u score}]."""
        return (u_score**power * survival) @ ratio**slopes

    zeroth = survival.sum(axis=1)
    one, two = zeroth ** (top_k - 1), zeroth ** max(top_k - 2, 0)
    others = top_k - 1
    single = one * (moment(2, 2) - moment(2, 3) + moment(2, 4) / 6)
    square = single + others * two * moment(2, 2) * moment(0, 2) / 6
    trace = one * (moment(1, 1) - moment(1, 2))
    if not normalised:
        u = np.exp(log_u)
        below, weight = _interval(-np.inf, t)
        low = u[:, None] * _score(below, std, router)
        threshold = u * _score(t, std, router)
        fade = np.exp(-low)
        rest, n_below = fade @ weight, n_experts - top_k - 1
        tail = np.exp(-threshold)
        outside = threshold**2 * rest**n_below + n_below * ((low**2 * fade) @ weight) * rest ** max(n_below - 1, 0)
        square = tail * (square * rest**n_below + one * moment(2, 2) * outside / 6)
        trace = tail * trace * rest**n_below
    return tuple((top_k * 0.25 * np.array([square.sum(), trace.sum()])).tolist())
