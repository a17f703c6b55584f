"""Gates of a router at initialisation: moments from the order statistics of E i.i.d. normal logits.

For logits of standard deviation s and score f (e^{sz} or sigmoid(sz)): condition on the (k+1)-th largest logit t, whose
Phi(t) is Beta(E - k, k + 1); the k larger ones are i.i.d. normals above t. With 1/Z^n = int u^{n-1} e^{-uZ} du / (n-1)!

    normalised     E sum g^n = E_t int u^{n-1} k M_n(u) M_0(u)^{k-1} du,   M_a = E[f(z)^a e^{-u f(z)} | z > t]
    un-normalised  (softmax)  times e^{-u f(t)} E[e^{-u f(z)} | z < t]^{E-k-1};    (sigmoid)  k E_t E[f^n | z > t].

Two tokens: overlap.py.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import scipy.special

from varprop.errors import AssumptionError, require
from varprop.theory.namespace import checked

N_THRESHOLDS = 48
N_LOGITS = 160
LOGIT_RANGE = 9.5
LOG_U_STEP = 0.25
MAX_LOGIT_STD = 16.0
"""Beyond this the grid of logits no longer resolves the scores; a softmax is interpolated to its one-hot limit."""
MAX_EXPERTS = 65_536

STD_NODES = (0, 0.03, 0.08, 0.15, 0.22, 0.3, 0.4, 0.5, 0.625, 0.75, 0.875, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6)
STD_NODES = (*map(float, STD_NODES), 8.0, 10.0, 12.0, MAX_LOGIT_STD, math.inf)
"""Logit standard deviations that have a table; polynomials in s / (1 + s) between them. Infinity: softmax only."""


class Router(NamedTuple):
    """What the law of the gates depends on besides logit_std; normalised: gates sum to 1."""

    n_experts: int
    top_k: int
    score: str
    normalised: bool


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def canonical(n_experts: int, top_k: int, normalize: bool, router: str, gate_order: str) -> Router:
    """The checked router in its one canonical form."""
    good = _is_integer(n_experts) and 1 <= n_experts <= MAX_EXPERTS
    domain = f"an integer in 1..{MAX_EXPERTS}"
    require(bool(good), AssumptionError, "n_experts", n_experts, "outside the domain", domain)
    good = _is_integer(top_k) and 1 <= top_k <= n_experts
    require(bool(good), AssumptionError, "top_k", top_k, "outside the domain", f"an integer in 1..{n_experts}")
    good = isinstance(normalize, (bool, np.bool_))
    require(good, AssumptionError, "normalize", normalize, "not a boolean", "true or false")
    require(router in ("softmax", "sigmoid"), AssumptionError, "router", router, "unknown", "softmax or sigmoid")
    orders = ("score_then_top_k", "top_k_then_score")
    require(gate_order in orders, AssumptionError, "gate_order", gate_order, "unknown", " or ".join(orders))
    softmax = router == "softmax"
    normalised = bool(normalize) or (softmax and (gate_order == "top_k_then_score" or top_k == n_experts))
    return Router(int(n_experts), int(top_k), router, normalised)


def checked_std(logit_std: Any, law: Router) -> np.ndarray:
    """Standard deviations of the logits as an array of floats; raises `AssumptionError` outside the domain."""
    bounded = law.score == "sigmoid"
    domain = f"numbers in [0, {MAX_LOGIT_STD:g}] for a sigmoid" if bounded else "finite numbers >= 0"
    largest = MAX_LOGIT_STD if bounded else math.inf
    return np.asarray(checked("logit_std", logit_std, domain, 0.0, largest), dtype=float)


def gate_second_moment(
    n_experts: int,
    top_k: int,
    logit_std: Any,
    *,
    normalize: bool,
    router: str = "softmax",
    gate_order: str = "score_then_top_k",
) -> Any:
    """E of the sum of squared gates over the active experts, S_2.

    n_experts: E; top_k: k; logit_std: of the i.i.d. normal router logits, a number or an array; normalize: gates
    divided by their sum over the top k; router: "softmax" or "sigmoid"; gate_order: as in `MoESpec` (a softmax over the
    top k is the normalised case). Quadrature, relative error below 1e-10 for logit_std <= 16; arrays,
    and a softmax beyond 16, are interpolated (to the one-hot limit): error below 1e-5, 1e-4 for E > 1024.
    Raises `AssumptionError` for top_k outside 1..E, a negative logit_std, or one above 16 with sigmoid scores.
    Source: derived in proofs/prove_gates.py. Checked by: tests/theory/test_gates.py.

    >>> round(gate_second_moment(8, 2, 0.905, normalize=True), 3)
    0.546
    >>> round(gate_second_moment(64, 8, 0.905, normalize=False), 4)
    0.024
    >>> gate_second_moment(8, 4, 0.0, normalize=True), gate_second_moment(8, 1, 2.0, normalize=True)
    (0.25, 1.0)
    """
    law = canonical(n_experts, top_k, normalize, router, gate_order)
    return _moment_at(law, logit_std, 2)


def gate_first_moment(
    n_experts: int,
    top_k: int,
    logit_std: Any,
    *,
    normalize: bool,
    router: str = "softmax",
    gate_order: str = "score_then_top_k",
) -> Any:
    """E of the sum of gates over the active experts, S_1: 1 for normalised gates, else the share the top k hold.

    Arguments, exactness and errors as in `gate_second_moment`. Two tokens with independent logits have the gate
    overlap S_1^2 / E. Source: derived in proofs/prove_gates.py. Checked by: tests/theory/test_gates.py.

    >>> gate_first_moment(64, 8, 0.0, normalize=False), gate_first_moment(64, 8, 1.0, normalize=True)
    (0.125, 1.0)
    >>> round(gate_first_moment(64, 8, 0.905, normalize=False), 4)
    0.3926
    """
    law = canonical(n_experts, top_k, normalize, router, gate_order)
    return _moment_at(law, logit_std, 1)


def _moment_at(law: Router, logit_std: Any, power: int) -> Any:
    std = checked_std(logit_std, law)
    if std.ndim == 0 and std <= MAX_LOGIT_STD:
        return gate_moment(law, float(std), power)
    return np.exp(log_moment(law, std, power))


@functools.lru_cache(maxsize=4096)
def gate_moment(law: Router, std: float, power: int) -> float:
    """E sum g^power for power 1 or 2; std = infinity is the one-hot limit of a softmax."""
    n_experts, top_k, score, normalised = law
    if std == math.inf or (normalised and (top_k == 1 or power == 1)):
        return 1.0
    if std == 0:
        gate = 1 / top_k if normalised else 1 / n_experts if score == "softmax" else 0.5
        return top_k * gate**power
    thresholds, probability = threshold_nodes(n_experts, top_k)
    return float(probability @ [_given_threshold(law, std, power, float(t)) for t in thresholds])


def threshold_nodes(n_experts: int, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes and probabilities of the (k+1)-th largest of E normals; -infinity if all are active."""
    if top_k == n_experts:
        return np.array([-np.inf]), np.ones(1)
    low, high = threshold_range(n_experts - top_k, top_k + 1)
    x, weight = legendre(N_THRESHOLDS)
    t = low + (high - low) * (x + 1) / 2
    mass = weight * np.exp(log_threshold_density(t, n_experts - top_k, top_k + 1))
    return t, mass / mass.sum()


def threshold_range(a: int, b: int) -> tuple[float, float]:
    """Central interval of t with Phi(t) ~ Beta(a, b), without 1e-13 of probability on either side."""
    below, above = (scipy.special.ndtri(scipy.special.betaincinv(*shape, 1e-13)) for shape in ((a, b), (b, a)))
    return float(below), float(-above)


def log_threshold_density(t: np.ndarray, a: int, b: int) -> np.ndarray:
    """Log density of t with Phi(t) ~ Beta(a, b)."""
    log_phi = -(t**2) / 2 - math.log(2 * math.pi) / 2
    below, above = (a - 1) * scipy.special.log_ndtr(t), (b - 1) * scipy.special.log_ndtr(-t)
    return below + above + log_phi - scipy.special.betaln(a, b)


@functools.cache
def legendre(n_nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes and weights on [-1, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(n_nodes)
    for array in (nodes, weights):
        array.setflags(write=False)
    return nodes, weights


def interval(low: float, high: float, n_nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and probabilities of a normal variable given that it lies in (low, high)."""
    low, high = max(low, -LOGIT_RANGE), min(high, LOGIT_RANGE)
    x, weight = legendre(n_nodes)
    z = low + (high - low) * (x + 1) / 2
    mass = weight * np.exp(-(z**2) / 2 + min(abs(low), abs(high)) ** 2 / 2 * (low * high > 0))
    return z, mass / mass.sum()


def score_of(z: Any, std: float, router: str) -> np.ndarray:
    """e^{std z} or sigmoid(std z)."""
    return np.exp(std * np.asarray(z)) if router == "softmax" else scipy.special.expit(std * np.asarray(z))


def n_logits(std: float) -> int:
    """Nodes that resolve the scores of logits of this standard deviation."""
    return int(N_LOGITS * max(1.0, std / 4))


def _given_threshold(law: Router, std: float, power: int, t: float) -> float:
    """E[sum of g^power | (k+1)-th largest logit = t]."""
    n_experts, top_k, router, normalised = law
    z, above = interval(t, np.inf, n_logits(std))
    score = score_of(z, std, router)
    if router == "sigmoid" and not normalised:
        return top_k * float(above @ score**power)
    log_u = np.arange(-np.log(score[-1] * n_experts) - 20, -np.log(score[0]) + 5, LOG_U_STEP)
    u_score = np.exp(np.minimum(log_u[:, None] + np.log(score), 30.0))  # exp(-e^30) is zero already
    survival = np.exp(-u_score)
    zeroth, active = survival @ above, (u_score**power * survival) @ above
    integrand = top_k * active * zeroth ** (top_k - 1)
    if not normalised:
        integrand *= below(law, std, t, np.exp(log_u))
    return float(integrand.sum() * LOG_U_STEP)


def below(law: Router, std: float, t: float, u: np.ndarray) -> np.ndarray:
    """E[e^{-u (scores of the pivot at t and of the experts below it)}]; law: of as many experts as compete."""
    below, weight = interval(-np.inf, t, n_logits(std))
    rest = np.exp(-u[:, None] * score_of(below, std, law.score)) @ weight
    return np.exp(-u * score_of(t, std, law.score)) * rest ** (law.n_experts - law.top_k - 1)


def gates(logits: np.ndarray, law: Router) -> np.ndarray:
    """Gates of router logits (..., E): zero outside the top k."""
    last = law.n_experts - law.top_k
    active = logits >= np.partition(logits, last, axis=-1)[..., last, None]
    log_score = logits if law.score == "softmax" else -np.logaddexp(0.0, -logits)
    if law.score == "sigmoid" and not law.normalised:
        return np.where(active, np.exp(log_score), 0.0)
    score = np.exp(log_score - log_score.max(axis=-1, keepdims=True))
    chosen = np.where(active, score, 0.0)
    return chosen / (chosen if law.normalised else score).sum(axis=-1, keepdims=True)


def interpolation(law: Router, std: np.ndarray, n_points: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and Lagrange weights (n_nodes, *std.shape) of polynomial interpolation in s / (1 + s)."""
    stds = np.array(STD_NODES if law.score == "softmax" else STD_NODES[:-1])
    nodes = np.where(stds < math.inf, stds / (1 + np.minimum(stds, 1e300)), 1.0)
    at = std / (1 + std)
    first = np.clip(np.searchsorted(nodes, at, side="right") - n_points // 2, 0, len(nodes) - n_points)
    weights = np.zeros((len(nodes), *std.shape))
    for i in range(n_points):
        own, others = nodes[first + i], [nodes[first + j] for j in range(n_points) if j != i]
        value = np.prod([(at - other) / (own - other) for other in others], axis=0)
        np.put_along_axis(weights, np.expand_dims(first + i, 0), np.expand_dims(value, 0), axis=0)
    used = np.flatnonzero(weights.reshape(len(nodes), -1).any(axis=1))
    return stds[used], weights[used]


def log_moment(law: Router, std: np.ndarray, power: int) -> np.ndarray:
    """log E sum g^power, interpolated between the nodes: relative error below 1e-5."""
    nodes, weights = interpolation(law, std, 8)
    return np.tensordot(np.log([gate_moment(law, float(s), power) for s in nodes]), weights, axes=(0, 0))
