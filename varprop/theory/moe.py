"""Mixtures of experts: routed output E f_t.f_s / d = O_ts K_E(t, s), O_ts = E sum_i g_i(t) g_i(s) over gates g.

Exact when the experts are independent of each other and of the router. The diagonal of O is S_2 = `gate_second_moment`.

S_2 for i.i.d. normal logits with std s and score f (e^{sz} or sigmoid(sz)): condition on the (k+1)-th largest logit t,
whose Phi(t) is Beta(E - k, k + 1); the k larger ones are i.i.d. normals above t. With 1/Z^2 = int u e^{-uZ} du,

    normalised     S_2 = E_t int u k M_2(u) M_0(u)^{k-1} du,     M_a = E[f(z)^a e^{-u f(z)} | z > t]
    un-normalised  (softmax)  times e^{-u f(t)} E[e^{-u f(z)} | z < t]^{E-k-1};    (sigmoid)  k E_t E[f^2 | z > t].
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np
import scipy.special

from varprop.errors import AssumptionError, require
from varprop.spec import MoESpec, TensorRow
from varprop.theory.activation import activation_kernel
from varprop.theory.feed_forward import feed_forward_gram
from varprop.theory.linear import effective_gain
from varprop.theory.quadrature import gram_root

N_THRESHOLDS = 48
N_LOGITS = 160
LOGIT_RANGE = 9.5
MAX_LOGIT_STD = 16
"""Beyond this the grid of logits no longer resolves the scores (the gates are one-hot to 2 % long before)."""


def gate_second_moment(
    n_experts: int,
    top_k: int,
    logit_std: float,
    *,
    normalize: bool,
    router: str = "softmax",
    gate_order: str = "score_then_top_k",
) -> float:
    """E of the sum of squared gates over the active experts, S_2.

    n_experts: E; top_k: k; logit_std: of the i.i.d. normal router logits; normalize: gates divided by their sum over
    the top k; router: "softmax" or "sigmoid"; gate_order: as in `MoESpec` (a softmax over the top k is the normalised
    case). Quadrature, relative error below 1e-6 for logit_std <= 4. Raises `AssumptionError` for top_k outside 1..E
    or a negative logit_std. Source: derived in proofs/prove_moe.py.

    >>> round(gate_second_moment(8, 2, 0.905, normalize=True), 3)
    0.546
    >>> round(gate_second_moment(64, 8, 0.905, normalize=False), 4)
    0.024
    >>> gate_second_moment(8, 4, 0.0, normalize=True), gate_second_moment(8, 1, 2.0, normalize=True)
    (0.25, 1.0)
    """
    require(1 <= top_k <= n_experts, AssumptionError, "top_k", top_k, "outside the domain", f"1..{n_experts}")
    good = 0 <= logit_std <= MAX_LOGIT_STD
    require(good, AssumptionError, "logit_std", logit_std, "outside the domain", f"a number in [0, {MAX_LOGIT_STD}]")
    require(router in ("softmax", "sigmoid"), AssumptionError, "router", router, "unknown", "softmax or sigmoid")
    normalised = normalize or (router == "softmax" and gate_order == "top_k_then_score")
    return _gate_second_moment(n_experts, top_k, float(logit_std), normalised, router)


@functools.lru_cache(maxsize=1024)
def _gate_second_moment(n_experts: int, top_k: int, std: float, normalised: bool, router: str) -> float:
    if (normalised and top_k == 1) or (router == "softmax" and n_experts == 1):
        return 1.0
    if std == 0:
        score = {True: 1 / top_k, False: 1 / n_experts if router == "softmax" else 0.5}[normalised]
        return top_k * score**2
    if router == "softmax" and top_k == n_experts:
        normalised = True  # all experts are active: the two are the same
    thresholds, probability = _thresholds(n_experts, top_k)
    parts = [_given_threshold(n_experts, top_k, std, normalised, router, float(t)) for t in thresholds]
    return float(probability @ parts)


def _thresholds(n_experts: int, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and probabilities of the (k+1)-th largest of E normals; -infinity when every expert is active.

    Gauss-Legendre over the central interval of its Beta law, without 1e-13 of probability on either side.
    """
    if top_k == n_experts:
        return np.array([-np.inf]), np.ones(1)
    a, b = n_experts - top_k, top_k + 1
    low, high = (float(scipy.special.ndtri(p)) for p in scipy.special.betaincinv(a, b, [1e-13, 1 - 1e-13]))
    x, weight = np.polynomial.legendre.leggauss(N_THRESHOLDS)
    t = low + (high - low) * (x + 1) / 2
    log_density = (a - 1) * scipy.special.log_ndtr(t) + (b - 1) * scipy.special.log_ndtr(-t) - t**2 / 2
    mass = weight * np.exp(log_density - log_density.max())
    return t, mass / mass.sum()


def _interval(low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and probabilities of a normal variable given that it lies in (low, high)."""
    low, high = max(low, -LOGIT_RANGE), min(high, LOGIT_RANGE)
    x, weight = np.polynomial.legendre.leggauss(N_LOGITS)
    z = low + (high - low) * (x + 1) / 2
    mass = weight * np.exp(-(z**2) / 2 + min(abs(low), abs(high)) ** 2 / 2 * (low * high > 0))
    return z, mass / mass.sum()


def _score(z: np.ndarray | float, std: float, router: str) -> np.ndarray:
    return np.exp(std * np.asarray(z)) if router == "softmax" else scipy.special.expit(std * np.asarray(z))


def _given_threshold(n_experts: int, top_k: int, std: float, normalised: bool, router: str, t: float) -> float:
    """E[sum of squared gates | (k+1)-th largest logit = t]."""
    z, above = _interval(t, np.inf)
    score = _score(z, std, router)
    if router == "sigmoid" and not normalised:
        return top_k * float(above @ score**2)
    log_u = np.arange(-np.log(score[-1] * n_experts) - 20, -np.log(score[0]) + 5, 0.25)
    u_score = np.exp(np.minimum(log_u[:, None] + np.log(score), 30.0))  # exp(-e^30) is zero already
    survival = np.exp(-u_score)
    zeroth, square = survival @ above, (u_score**2 * survival) @ above
    integrand = top_k * square * zeroth ** (top_k - 1)
    if not normalised:
        below, weight = _interval(-np.inf, t)
        u = np.exp(log_u)
        rest = np.exp(-u[:, None] * _score(below, std, router)) @ weight
        integrand *= np.exp(-u * _score(t, std, router)) * rest ** (n_experts - top_k - 1)
    return float(integrand.sum() * 0.25)


def gates(logits: np.ndarray, part: MoESpec) -> np.ndarray:
    """Gates of router logits (..., E): zero outside the top k; `gate_multiplier` is not applied."""
    order = np.argpartition(logits, -part.top_k, axis=-1)[..., -part.top_k :]
    active = np.zeros(logits.shape, dtype=bool)
    np.put_along_axis(active, order, True, axis=-1)
    if part.router == "sigmoid":
        score = scipy.special.expit(logits)
    else:
        score = np.exp(logits - logits.max(axis=-1, keepdims=True))
        if part.gate_order == "score_then_top_k":
            score = score / score.sum(axis=-1, keepdims=True)
    chosen = np.where(active, score, 0.0)
    if part.normalize_gates or (part.router == "softmax" and part.gate_order == "top_k_then_score"):
        chosen = chosen / chosen.sum(axis=-1, keepdims=True)
    return chosen


def gate_overlap(
    root: np.ndarray, logit_std: float, part: MoESpec, n_draws: int, rng: np.random.Generator
) -> np.ndarray:
    """O_ts = E sum_i g_i(t) g_i(s), (R, T, T), by drawing routers; the diagonal is the exact `gate_second_moment`.

    root: (R, T, T) with root root' = the correlation matrix of the normalised tokens; logit_std: of a router logit.
    """
    n_recursions, n_tokens, _ = root.shape
    total = np.zeros_like(root)
    for _ in range(n_draws):
        logits = logit_std * (root @ rng.standard_normal((n_recursions, n_tokens, part.n_experts)))
        chosen = gates(logits, part)
        total += chosen @ chosen.swapaxes(-1, -2)
    drawn = np.sqrt(np.diagonal(total, axis1=-2, axis2=-1))  # scaled so that equal tokens have exactly S_2
    return (
        total
        / (drawn[:, :, None] * drawn[:, None, :])
        * gate_second_moment(
            part.n_experts,
            part.top_k,
            logit_std,
            normalize=part.normalize_gates,
            router=part.router,
            gate_order=part.gate_order,
        )
    )


def mix_shared(routed, shared, top_k, mixing: str):
    """Moments of routed and shared outputs combined: sum, or mean = (shared + top_k * routed) / (top_k + 1).

    Exact for independent routed and shared experts. Source: derived in proofs/prove_moe.py.

    >>> mix_shared(1.0, 2.0, 2, "sum"), mix_shared(1.0, 5.0, 2, "mean")
    (3.0, 1.0)
    """
    return routed + shared if mixing == "sum" else (shared + top_k**2 * routed) / (top_k + 1) ** 2


def moe_gram(
    gram: np.ndarray,
    rows: Mapping[str, TensorRow],
    part: MoESpec,
    d_model: int,
    n_draws: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Gram matrices of a mixture's output, (R, T, T), from those of the normalised tokens.

    rows: the layer's tensors by their name within the layer. Routers are drawn `n_draws` times per recursion for the
    covariance of different tokens; the second moments are exact given |u|^2 = d (quadrature). Raises `AssumptionError`
    for expert-choice routing, where tokens compete.
    """
    require(part.routing == "token_choice", AssumptionError, "moe.routing", part.routing, "not covered", "token_choice")
    second_moment = float(np.diagonal(gram, axis1=-2, axis2=-1).mean())
    std = (effective_gain(rows["moe.router"]) * second_moment) ** 0.5
    overlap = gate_overlap(gram_root(gram / second_moment), std, part, n_draws, rng)
    experts = feed_forward_gram(gram, _matrices(rows, "moe.experts."), part.activation, part.gated, d_model)
    routed = part.gate_multiplier**2 * overlap * experts
    if part.n_shared_experts == 0:
        return routed
    shared = feed_forward_gram(gram, _matrices(rows, "moe.shared."), part.activation, part.gated, d_model)
    if part.shared_gate:
        variance = rows["moe.shared_gate"].gain * second_moment
        shared = shared * activation_kernel("sigmoid", variance, np.clip(gram / second_moment, -1.0, 1.0))
    return mix_shared(routed, shared, part.top_k, part.shared_mixing)


def _matrices(rows: Mapping[str, TensorRow], prefix: str) -> dict[str, TensorRow]:
    return {name.removeprefix(prefix): row for name, row in rows.items() if name.startswith(prefix)}
