"""Gates of a router at initialisation: order statistics of E i.i.d. normal logits, for one token and for two.

One token (std s, score f = e^{sz} or sigmoid(sz)): condition on the (k+1)-th largest logit t, whose Phi(t) is
Beta(E - k, k + 1); the k larger ones are i.i.d. normals above t. With 1/Z^n = int u^{n-1} e^{-uZ} du / (n-1)!,

    normalised     E sum g^n = E_t int u^{n-1} k M_n(u) M_0(u)^{k-1} du,   M_a = E[f(z)^a e^{-u f(z)} | z > t]
    un-normalised  (softmax)  times e^{-u f(t)} E[e^{-u f(z)} | z < t]^{E-k-1};    (sigmoid)  k E_t E[f^n | z > t].

Two tokens, logits of correlation c: with h(z) = E[g_1 | z_1 = z] the gate of an expert given its own logit,

    O(c) = E sum_i g_i(t) g_i(s) = E * E[h(x) h(y)] + E sum_i e_i(t) e_i(s),   e_i = g_i - h(z_i),

because e_i averages to 0 given its own logit. The first term is a quadrature, a series in c of positive coefficients
(Mehler). The second vanishes at c = 0 and is S_2 - E * E[h^2] at c = 1; in between it is drawn once, from a fixed seed.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import scipy.special
from scipy.interpolate import CubicSpline
from scipy.optimize import nnls

from varprop.errors import AssumptionError, require

N_THRESHOLDS = 48
N_LOGITS = 160
LOGIT_RANGE = 9.5
LOG_U_STEP = 0.25
MAX_LOGIT_STD = 16.0
"""Beyond this the grid of logits no longer resolves the scores; a softmax is interpolated to its one-hot limit."""
MAX_EXPERTS = 65_536

STD_NODES = (0, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 8, 10)
STD_NODES = (*map(float, STD_NODES), 12.0, MAX_LOGIT_STD, math.inf)
"""Logit standard deviations that have a table; cubic interpolation of log O in s / (1 + s) between them."""
N_ANGLES = 13
N_HERMITE = 256
DRAWN_LOGITS = 1_000_000
"""Logits drawn for one table, over all correlations."""
DRAWN_CORRELATIONS = (0.15, 0.3, 0.45, 0.6, 0.75, 0.87, 0.95, 0.985, 0.997)
FITTED_POWERS = (2, 3, 4, 6, 9, 14, 22, 36, 60, 110, 250)


class Router(NamedTuple):
    """What the law of the gates depends on besides logit_std; normalised: gates sum to 1."""

    n_experts: int
    top_k: int
    score: str
    normalised: bool


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _router(n_experts: int, top_k: int, normalize: bool, router: str, gate_order: str) -> Router:
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


def _checked_std(logit_std: Any, router: Router) -> np.ndarray:
    largest = math.inf if router.score == "softmax" else MAX_LOGIT_STD
    std = _real_array(logit_std)
    good = std is not None and bool(((std >= 0) & (std <= largest) & (std < math.inf)).all())
    domain = "a finite number >= 0" if largest == math.inf else f"a number in [0, {largest:g}] for a sigmoid"
    require(good, AssumptionError, "logit_std", logit_std, "outside the domain", domain)
    assert std is not None
    return std


def _real_array(value: Any) -> np.ndarray | None:
    """The value as an array of floats; None for what is not real numbers."""
    try:
        array = np.asarray(value)
    except ValueError:
        return None
    return array.astype(float) if array.dtype.kind in "iuf" else None


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
    law = _router(n_experts, top_k, normalize, router, gate_order)
    return _moment_at(law, float(_checked_std(logit_std, law)), 2)


def gate_first_moment(
    n_experts: int,
    top_k: int,
    logit_std: float,
    *,
    normalize: bool,
    router: str = "softmax",
    gate_order: str = "score_then_top_k",
) -> float:
    """E of the sum of gates over the active experts, S_1: 1 for normalised gates, else the share the top k hold.

    Arguments, exactness and errors as in `gate_second_moment`. Two tokens with independent logits have the gate
    overlap S_1^2 / E. Source: derived in proofs/prove_moe.py.

    >>> gate_first_moment(64, 8, 0.0, normalize=False), gate_first_moment(64, 8, 1.0, normalize=True)
    (0.125, 1.0)
    >>> round(gate_first_moment(64, 8, 0.905, normalize=False), 4)
    0.3956
    """
    law = _router(n_experts, top_k, normalize, router, gate_order)
    return _moment_at(law, float(_checked_std(logit_std, law)), 1)


def _moment_at(law: Router, std: float, power: int) -> float:
    if std <= MAX_LOGIT_STD:
        return _gate_moment(law, std, power)
    nodes, weights = _std_weights(np.asarray(std))
    return math.exp(sum(float(w) * math.log(_gate_moment(law, STD_NODES[n], power)) for n, w in zip(nodes, weights)))


@functools.lru_cache(maxsize=4096)
def _gate_moment(law: Router, std: float, power: int) -> float:
    """E sum g^power for power 1 or 2; std = infinity is the one-hot limit of a softmax."""
    n_experts, top_k, score, normalised = law
    if std == math.inf or (normalised and (top_k == 1 or power == 1)):
        return 1.0
    if std == 0:
        gate = 1 / top_k if normalised else 1 / n_experts if score == "softmax" else 0.5
        return top_k * gate**power
    thresholds, probability = _thresholds(n_experts, top_k)
    return float(probability @ [_given_threshold(law, std, power, float(t)) for t in thresholds])


def _thresholds(n_experts: int, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and probabilities of the (k+1)-th largest of E normals; -infinity when every expert is active.

    Gauss-Legendre over the central interval of its Beta law, without 1e-13 of probability on either side.
    """
    if top_k == n_experts:
        return np.array([-np.inf]), np.ones(1)
    low, high = _threshold_range(n_experts - top_k, top_k + 1)
    x, weight = np.polynomial.legendre.leggauss(N_THRESHOLDS)
    t = low + (high - low) * (x + 1) / 2
    mass = weight * np.exp(_log_threshold_density(t, n_experts - top_k, top_k + 1))
    return t, mass / mass.sum()


def _threshold_range(a: int, b: int) -> tuple[float, float]:
    low, high = (float(scipy.special.ndtri(p)) for p in scipy.special.betaincinv(a, b, [1e-13, 1 - 1e-13]))
    return low, high


def _log_threshold_density(t: np.ndarray, a: int, b: int) -> np.ndarray:
    """Log density of t with Phi(t) ~ Beta(a, b)."""
    log_phi = -(t**2) / 2 - math.log(2 * math.pi) / 2
    below, above = (a - 1) * scipy.special.log_ndtr(t), (b - 1) * scipy.special.log_ndtr(-t)
    return below + above + log_phi - scipy.special.betaln(a, b)


def _interval(low: float, high: float, n_nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and probabilities of a normal variable given that it lies in (low, high)."""
    low, high = max(low, -LOGIT_RANGE), min(high, LOGIT_RANGE)
    x, weight = np.polynomial.legendre.leggauss(n_nodes)
    z = low + (high - low) * (x + 1) / 2
    mass = weight * np.exp(-(z**2) / 2 + min(abs(low), abs(high)) ** 2 / 2 * (low * high > 0))
    return z, mass / mass.sum()


def _score(z: Any, std: float, router: str) -> np.ndarray:
    return np.exp(std * np.asarray(z)) if router == "softmax" else scipy.special.expit(std * np.asarray(z))


def _n_logits(std: float) -> int:
    return int(N_LOGITS * max(1.0, std / 4))


def _given_threshold(law: Router, std: float, power: int, t: float) -> float:
    """E[sum of g^power | (k+1)-th largest logit = t]."""
    n_experts, top_k, router, normalised = law
    z, above = _interval(t, np.inf, _n_logits(std))
    score = _score(z, std, router)
    if router == "sigmoid" and not normalised:
        return top_k * float(above @ score**power)
    log_u = np.arange(-np.log(score[-1] * n_experts) - 20, -np.log(score[0]) + 5, LOG_U_STEP)
    u_score = np.exp(np.minimum(log_u[:, None] + np.log(score), 30.0))  # exp(-e^30) is zero already
    survival = np.exp(-u_score)
    zeroth, active = survival @ above, (u_score**power * survival) @ above
    integrand = top_k * active * zeroth ** (top_k - 1)
    if not normalised:
        integrand *= _below(law, std, t, np.exp(log_u))
    return float(integrand.sum() * LOG_U_STEP)


def _below(law: Router, std: float, t: float, u: np.ndarray) -> np.ndarray:
    """E[e^{-u (scores of the pivot at t and of the experts below it)}]; law: of as many experts as compete."""
    below, weight = _interval(-np.inf, t, _n_logits(std))
    rest = np.exp(-u[:, None] * _score(below, std, law.score)) @ weight
    return np.exp(-u * _score(t, std, law.score)) * rest ** (law.n_experts - law.top_k - 1)


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


def _own_gate(law: Router, std: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """h(z) = E[g_1 | z_1 = z]: Gauss-Legendre nodes z, their normal probabilities, and h there; h = 0 below the nodes.

    h(z) = int_{t < z} p(t) H(t, z) dt, t the k-th largest logit of the others, Phi(t) ~ Beta(E - k, k), and
    H(t, z) = int f(z) e^{-u f(z)} E[e^{-u Z} | t] du. H is analytic in t: it is interpolated from Chebyshev nodes.
    """
    n_experts, top_k, router, _ = law
    everyone = top_k == n_experts
    low, high = (-LOGIT_RANGE, -LOGIT_RANGE) if everyone else _threshold_range(n_experts - top_k, top_k)
    x, weight = np.polynomial.legendre.leggauss(_n_logits(std))
    pieces = [(a, b) for a, b in ((low, high), (high, LOGIT_RANGE)) if b > a]
    z = np.concatenate([a + (b - a) * (x + 1) / 2 for a, b in pieces])
    mass = np.concatenate([(b - a) / 2 * weight for a, b in pieces]) * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    if everyone:
        return z, mass, _gate_given(law, std, np.array([-np.inf]), z)[0]
    n_nodes = int(24 * max(1.0, std / 4))
    angle = (np.arange(n_nodes) + 0.5) * math.pi / n_nodes
    table = _gate_given(law, std, low + (high - low) * (1 - np.cos(angle)) / 2, z)
    coefficients = 2 / n_nodes * np.cos(np.outer(np.arange(n_nodes), angle)) @ table
    coefficients[0] /= 2
    x, weight = np.polynomial.legendre.leggauss(64)
    reach = np.minimum(z, high) - low
    share = reach / (high - low) * (x[:, None] + 1) / 2
    density = (
        weight[:, None]
        * reach
        / 2
        * np.exp(_log_threshold_density(low + (high - low) * share, n_experts - top_k, top_k))
    )
    given = np.polynomial.chebyshev.chebval(1 - 2 * share, coefficients[:, None, :], tensor=False)
    return z, mass, np.clip(np.sum(density * given, axis=0), 0.0, None)


def _gate_given(law: Router, std: float, thresholds: np.ndarray, z: np.ndarray) -> np.ndarray:
    """H(t, z): mean gate of an active expert of logit z when the k-th largest of the others is t; (t, z)."""
    n_experts, top_k, router, normalised = law
    score = _score(z, std, router)
    if router == "sigmoid" and not normalised:
        return np.broadcast_to(score, (len(thresholds), len(z)))
    if normalised and top_k == 1:
        return np.ones((len(thresholds), len(z)))
    log_u = np.arange(-np.log(score.max() * n_experts) - 24, -np.log(score.min()) + 5, LOG_U_STEP)
    u_score = np.exp(np.minimum(log_u[:, None] + np.log(score), 30.0))
    own = u_score * np.exp(-u_score) * LOG_U_STEP
    n_above = n_experts - 1 if top_k == n_experts else top_k - 1
    others = []
    for t in thresholds:
        above, weight = _interval(t, np.inf, _n_logits(std))
        u_above = np.exp(np.minimum(log_u[:, None] + np.log(_score(above, std, router)), 30.0))
        laplace = (np.exp(-u_above) @ weight) ** n_above
        if not normalised:
            laplace = laplace * _below(law._replace(n_experts=n_experts - 1, top_k=top_k - 1), std, t, np.exp(log_u))
        others.append(laplace)
    return np.array(others) @ own


def _own_series(law: Router, z: np.ndarray, mass: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Coefficients a_m of E * E[h(x) h(y)] = sum a_m c^m: squared Hermite coefficients of h, E times.

    What the series leaves of E[h^2] stands in the last one.
    """
    before, current = np.zeros_like(z), np.ones_like(z)
    coefficients = np.empty(N_HERMITE)
    for m in range(N_HERMITE - 1):
        coefficients[m] = np.sum(mass * own * current) ** 2
        before, current = current, (z * current - math.sqrt(m) * before) / math.sqrt(m + 1)
    coefficients[-1] = max(0.0, np.sum(mass * own**2) - coefficients[:-1].sum())
    return law.n_experts * coefficients


@functools.lru_cache(maxsize=1024)
def _log_overlap(law: Router, std: float) -> np.ndarray:
    """Chebyshev coefficients of log O over the angle arccos c in [0, pi/2], highest degree N_ANGLES - 1."""
    if std == math.inf:
        law, std = Router(law.n_experts, 1, "softmax", True), 1.0
    z, mass, own = _own_gate(law, std)
    series = _own_series(law, z, mass, own)
    total = _gate_moment(law, std, 2)
    interaction = total - series.sum()
    if interaction > 1e-9 * total:
        series = series + interaction * _drawn_series(law, std, CubicSpline(z, own))
    series[0] = _gate_moment(law, std, 1) ** 2 / law.n_experts
    series[-1] += total - series.sum()
    angle = (1 - np.cos(np.linspace(0, math.pi, N_ANGLES))) * math.pi / 4
    overlap = np.polynomial.polynomial.polyval(np.cos(angle), series)
    return np.linalg.solve(np.polynomial.chebyshev.chebvander(4 * angle / math.pi - 1, N_ANGLES - 1), np.log(overlap))


def _drawn_series(law: Router, std: float, own: CubicSpline, seed: int = 0) -> np.ndarray:
    """Coefficients d_m >= 0, adding up to 1, of E sum e_i(t) e_i(s) = sum d_m c^m over its value for equal tokens.

    Tokens are drawn in families sqrt(c) u + sqrt(1 - c) w_j of one u each: every two of a family have correlation c.
    d_1 = E (E - 1) E[g_1 z_2]^2 is a mean over all draws; the rest is fitted by non-negative least squares.
    """
    rng = np.random.default_rng(seed)
    grid = np.linspace(own.x[0], own.x[-1], 4096)
    h = np.clip(own(grid), 0.0, None)
    shape, first_degree, power, count = np.empty(len(DRAWN_CORRELATIONS)), 0.0, 0.0, 0
    for index, c in enumerate(DRAWN_CORRELATIONS):
        size = int(np.clip(4 / c**2, 2, 32))
        n_families = max(8, DRAWN_LOGITS // (len(DRAWN_CORRELATIONS) * law.n_experts * size))
        common = rng.standard_normal((n_families, 1, law.n_experts))
        logits = math.sqrt(c) * common + math.sqrt(1 - c) * rng.standard_normal((n_families, size, law.n_experts))
        active = gates(std * logits, law)
        excess = active - np.interp(logits, grid, h, left=0.0)
        squares = np.sum(excess**2)
        shape[index] = (np.sum(excess.sum(axis=1) ** 2) - squares) / ((size - 1) * squares)
        first_degree += np.sum(active.sum(axis=-1) * logits.sum(axis=-1) - np.sum(active * logits, axis=-1))
        power, count = power + squares, count + n_families * size
    first = (first_degree / count) ** 2 / (law.n_experts * (law.n_experts - 1) * power / count)
    c = np.array([1.0, *DRAWN_CORRELATIONS])
    target = np.array([1.0, *shape]) - first * c
    weight = 1 / np.sqrt(1e-6 + 1 - np.clip(np.array([1.0, *shape]), 0, 1) ** 2)
    fitted, _ = nnls(c[:, None] ** FITTED_POWERS * weight[:, None], target * weight)
    series = np.zeros(N_HERMITE)
    series[1], series[list(FITTED_POWERS)] = first, fitted
    return series / series.sum()


def _std_weights(std: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices into STD_NODES and Lagrange weights (n_nodes, *std.shape) of cubic interpolation in s / (1 + s)."""
    nodes = np.array([s / (1 + s) if s < math.inf else 1.0 for s in STD_NODES])
    at = std / (1 + std)
    first = np.clip(np.searchsorted(nodes, at, side="right") - 2, 0, len(nodes) - 4)
    weights = np.zeros((len(nodes), *std.shape))
    for i in range(4):
        others = [nodes[first + j] for j in range(4) if j != i]
        own = nodes[first + i]
        value = np.prod([(at - other) / (own - other) for other in others], axis=0)
        np.put_along_axis(weights, np.expand_dims(first + i, 0), np.expand_dims(value, 0), axis=0)
    used = np.flatnonzero(weights.reshape(len(nodes), -1).any(axis=1))
    return used, weights[used]


def gate_overlap(
    n_experts: int,
    top_k: int,
    logit_std: Any,
    correlation: Any,
    *,
    normalize: bool,
    router: str = "softmax",
    gate_order: str = "score_then_top_k",
) -> Any:
    """E sum_i g_i(t) g_i(s) of two tokens whose router logits have this correlation; an array like the arguments.

    n_experts, top_k, normalize, router, gate_order: as in `gate_second_moment`; logit_std: s of both tokens, a number
    or an array; correlation: c in [-1, 1], a number or an array that broadcasts with logit_std (rounding beyond 1 is
    cut off). c = 1 gives `gate_second_moment`, c = 0 gives `gate_first_moment`^2 / E.

    >>> [round(float(o), 4) for o in gate_overlap(8, 2, 0.905, [0.0, 0.5, 1.0], normalize=True)]
    [0.125, 0.2359, 0.5463]
    """
    law = _router(n_experts, top_k, normalize, router, gate_order)
    std = _checked_std(logit_std, law)
    cosine = _real_array(correlation)
    good = cosine is not None and bool((np.abs(cosine) <= 1 + 1e-9).all())
    require(good, AssumptionError, "correlation", correlation, "outside the domain", "numbers in [-1, 1]")
    assert cosine is not None
    nodes, weights = _std_weights(std)
    coefficients = np.tensordot(np.array([_log_overlap(law, STD_NODES[n]) for n in nodes]), weights, axes=(0, 0))
    angle = np.arccos(np.minimum(np.abs(cosine), 1.0))
    log_overlap = np.polynomial.chebyshev.chebval(4 * angle / math.pi - 1, coefficients, tensor=False)
    if (cosine < 0).any():
        apart = np.polynomial.chebyshev.chebval(np.ones_like(std), coefficients, tensor=False)
        log_overlap = np.where(cosine < 0, 2 * apart - log_overlap, log_overlap)
    return np.exp(log_overlap)
