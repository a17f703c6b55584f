"""Gate overlap of two tokens, O(c) = E sum_i g_i(t) g_i(s), for router logits of correlation c.

With h(z) = E[g_1 | z_1 = z], the gate of an expert given its own logit,

    O(c) = E * E[h(x) h(y)] + E sum_i e_i(t) e_i(s),   e_i = g_i - h(z_i),

because e_i averages to 0 given its own logit. Both terms are power series in c with coefficients >= 0 (squared Hermite
coefficients; Mehler). The first is a quadrature. The second vanishes at c = 0, is S_2 - E * E[h^2] at c = 1, and
leaves c = 1 with the slope of `swap_rate` in the angle arccos c; in between it is drawn once, from a fixed seed.
Source: derived in proofs/prove_overlap.py.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import scipy.special
from scipy.interpolate import CubicSpline
from scipy.optimize import nnls

from varprop.theory.gates import (
    LOG_U_STEP,
    LOGIT_RANGE,
    Router,
    below,
    canonical,
    checked_std,
    gate_moment,
    gates,
    interpolation,
    interval,
    legendre,
    log_moment,
    log_threshold_density,
    n_logits,
    score_of,
    threshold_nodes,
    threshold_range,
)
from varprop.theory.namespace import checked

SMALLEST_STD = 1e-6
N_ANGLES = 13
N_HERMITE = 256
DRAWN_LOGITS = 3_000_000
"""Logits drawn for one table, over all correlations."""
DRAWN_CORRELATIONS = (0.15, 0.3, 0.45, 0.6, 0.75, 0.87, 0.95, 0.985, 0.997)
SLOPE_ANGLES = (0.003, 0.01)
FITTED_POWERS = (2, 3, 4, 6, 9, 14, 22, 36, 60, 100, 170, 300, 600, 1500, 5000, 20_000)


def _own_gate(law: Router, std: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """h(z) = E[g_1 | z_1 = z]: Gauss-Legendre nodes z, their normal probabilities, and h there; h = 0 below the nodes.

    h(z) = int_{t < z} p(t) H(t, z) dt, t the k-th largest logit of the others, Phi(t) ~ Beta(E - k, k), and
    H(t, z) = int f(z) e^{-u f(z)} E[e^{-u Z} | t] du. H is analytic in t: it is interpolated from Chebyshev nodes.
    """
    n_experts, top_k = law.n_experts, law.top_k
    everyone = top_k == n_experts
    low, high = (-LOGIT_RANGE, -LOGIT_RANGE) if everyone else threshold_range(n_experts - top_k, top_k)
    x, weight = legendre(n_logits(std))
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
    x, weight = legendre(64)
    reach = np.minimum(z, high) - low
    share = reach / (high - low) * (x[:, None] + 1) / 2
    density = (
        weight[:, None]
        * reach
        / 2
        * np.exp(log_threshold_density(low + (high - low) * share, n_experts - top_k, top_k))
    )
    given = np.polynomial.chebyshev.chebval(1 - 2 * share, coefficients[:, None, :], tensor=False)
    return z, mass, np.clip(np.sum(density * given, axis=0), 0.0, None)


def _gate_given(law: Router, std: float, thresholds: np.ndarray, z: np.ndarray) -> np.ndarray:
    """H(t, z): mean gate of an active expert of logit z when the k-th largest of the others is t; (t, z)."""
    n_experts, top_k, router, normalised = law
    score = score_of(z, std, router)
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
        above, weight = interval(t, np.inf, n_logits(std))
        u_above = np.exp(np.minimum(log_u[:, None] + np.log(score_of(above, std, router)), 30.0))
        laplace = (np.exp(-u_above) @ weight) ** n_above
        if not normalised:
            laplace = laplace * below(law._replace(n_experts=n_experts - 1, top_k=top_k - 1), std, t, np.exp(log_u))
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
    std = max(std, SMALLEST_STD)  # without it, draws could not tell which experts are active
    z, mass, own = _own_gate(law, std)
    series = _own_series(law, z, mass, own)
    total = gate_moment(law, std, 2)
    interaction = total - series.sum()
    angle = (1 - np.cos(np.linspace(0, math.pi, N_ANGLES))) * math.pi / 4
    overlap = np.polynomial.polynomial.polyval(np.cos(angle), series)
    if interaction > 1e-9 * total:
        overlap += interaction * _drawn_shape(law, std, CubicSpline(z, own), interaction, np.cos(angle))
    overlap[0], overlap[-1] = total, gate_moment(law, std, 1) ** 2 / law.n_experts
    return np.linalg.solve(np.polynomial.chebyshev.chebvander(4 * angle / math.pi - 1, N_ANGLES - 1), np.log(overlap))


def _drawn_shape(
    law: Router, std: float, own: CubicSpline, interaction: float, cosine: np.ndarray, seed: int = 0
) -> np.ndarray:
    """E sum e_i(t) e_i(s) = sum_m d_m c^m over its value for equal tokens (`interaction`), at the given cosines.

    d_1 = E (E - 1) E[g_1 z_2]^2 is a mean over all draws. The other d_m >= 0 are fitted by non-negative least squares
    to drawn values, to d's sum, 1, and to the slope at small angles (`swap_rate`).
    """
    first, drawn = _draw_families(law, std, own, np.random.default_rng(seed))
    slope = swap_rate(law, std) / interaction
    c = np.array([1.0, *np.cos(SLOPE_ANGLES), *DRAWN_CORRELATIONS])
    target = np.array([1.0, *(1 - slope * np.array(SLOPE_ANGLES)), *drawn])
    weight = 1 / np.sqrt(1e-6 + 1 - np.clip(target, 0, 1) ** 2)
    powers = np.array(FITTED_POWERS)
    fitted, _ = nnls(c[:, None] ** powers * weight[:, None], (target - first * c) * weight)
    return first * cosine + cosine[:, None] ** powers @ fitted


def _draw_families(law: Router, std: float, own: CubicSpline, rng: np.random.Generator) -> tuple[float, list[float]]:
    """d_1, and E sum e_i(t) e_i(s) over E sum e_i^2 at DRAWN_CORRELATIONS.

    Tokens are drawn in families sqrt(c) u + sqrt(1 - c) w_j of one u each: every two of a family have correlation c.
    """
    low, n_grid = own.x[0], 1 << 14
    step = (own.x[-1] - low) / (n_grid - 1)
    h = np.clip(own(low + step * np.arange(n_grid)), 0.0, None)
    shape, first_degree, power, count = [], 0.0, 0.0, 0
    for c in DRAWN_CORRELATIONS:
        size = int(np.clip(2 / c**2, 2, 32))
        share = c / sum(DRAWN_CORRELATIONS)
        n_families = max(8, int(share * DRAWN_LOGITS / (law.n_experts * size)))
        logits = math.sqrt(1 - c) * rng.standard_normal((n_families, size, law.n_experts))
        logits += math.sqrt(c) * rng.standard_normal((n_families, 1, law.n_experts))
        active = gates(std * logits, law)
        nearest = np.clip((logits - (low - step / 2)) / step, 0, n_grid - 1).astype(np.int32)
        excess = active - h[nearest]
        squares = np.sum(excess**2)
        shape.append((np.sum(excess.sum(axis=1) ** 2) - squares) / ((size - 1) * squares))
        first_degree += np.sum(active.sum(axis=-1) * logits.sum(axis=-1) - np.sum(active * logits, axis=-1))
        power, count = power + squares, count + n_families * size
    first = (first_degree / count) ** 2 / (law.n_experts * (law.n_experts - 1) * power / count)
    return float(first), shape


def swap_rate(law: Router, std: float) -> float:
    """-dO/d(angle) at equal tokens: the k-th and (k+1)-th expert change places with probability ~ angle.

    k / sqrt(pi) E_t[phi(t) / Phi(-t) E[r^2 | t]], r the gate of a logit equal to t, the (k+1)-th largest.
    """
    if law.top_k == law.n_experts:
        return 0.0
    thresholds, probability = threshold_nodes(law.n_experts, law.top_k)
    hazard = np.exp(-(thresholds**2) / 2 - scipy.special.log_ndtr(-thresholds)) / math.sqrt(2 * math.pi)
    squares = [_tied_square(law, std, float(t)) for t in thresholds]
    return law.top_k / math.sqrt(math.pi) * float((probability * hazard) @ squares)


def _tied_square(law: Router, std: float, t: float) -> float:
    """E[r^2 | (k+1)-th largest logit = t], r the gate of an active expert of logit t."""
    score = float(score_of(t, std, law.score))
    if law.normalised and law.top_k == 1:
        return 1.0
    if law.score == "sigmoid" and not law.normalised:
        return score**2
    z, above = interval(t, np.inf, n_logits(std))
    highest = float(score_of(z[-1], std, law.score))
    log_u = np.arange(-math.log(highest * law.n_experts) - 20, -math.log(score) + 5, LOG_U_STEP)
    u = np.exp(log_u)
    others = np.exp(-np.exp(np.minimum(log_u[:, None] + np.log(score_of(z, std, law.score)), 30.0))) @ above
    integrand = (u * score) ** 2 * np.exp(-u * score) * others ** (law.top_k - 1)
    return float(np.sum(integrand if law.normalised else integrand * below(law, std, t, u)) * LOG_U_STEP)


def _coefficients(law: Router, std: np.ndarray) -> np.ndarray:
    """Chebyshev coefficients of log O, (N_ANGLES, *std.shape), between the nodes; ends as exact as the moments."""
    nodes, weights = interpolation(law, std, 3)
    coefficients = np.tensordot(np.array([_log_overlap(law, float(s)) for s in nodes]), weights, axes=(0, 0))
    signs = (-1.0) ** np.arange(N_ANGLES)
    equal = log_moment(law, std, 2) - np.tensordot(signs, coefficients, axes=(0, 0))
    apart = 2 * log_moment(law, std, 1) - math.log(law.n_experts) - coefficients.sum(axis=0)
    coefficients[0] += (equal + apart) / 2
    coefficients[1] += (apart - equal) / 2
    return coefficients


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
    cut off). logit_std = 0 is the limit of small logits: experts are still chosen by them.

    c = 1 gives `gate_second_moment`, c = 0 gives `gate_first_moment`^2 / E (quadrature, relative error below 1e-5, 1e-4
    for E > 1024). In between the error is the standard error of the draws, fixed by their seed and largest near
    c = 0.6: below 0.3 % for top_k >= 4 up to E = 256 and 0.4 % up to E = 1024, 0.7 % for top_k = 2, 1.5 % for top_k = 1
    up to E = 128; it grows to 8 % at (E, k) = (4096, 1), and to 1 % for logit_std > 6. Negative c: O(0)^2 / O(|c|), a
    continuation with the right value and slope at 0. A new set of arguments costs up to three tables of about 0.1 s
    each and the moments near logit_std; then 128 x 128 correlations take half a millisecond.
    Raises `AssumptionError` as `gate_second_moment` does. Source: derived in proofs/prove_overlap.py. Checked by:
    tests/theory/test_overlap.py.

    >>> [round(float(o), 4) for o in gate_overlap(8, 2, 0.905, [0.0, 0.5, 1.0], normalize=True)]
    [0.125, 0.2638, 0.5459]
    """
    law = canonical(n_experts, top_k, normalize, router, gate_order)
    std = checked_std(logit_std, law)
    domain = "numbers in [-1, 1]"
    cosine = np.asarray(checked("correlation", correlation, domain, -1 - 1e-9, 1 + 1e-9), dtype=float)
    coefficients = _coefficients(law, std)
    angle = np.arccos(np.minimum(np.abs(cosine), 1.0))
    log_overlap = np.polynomial.chebyshev.chebval(4 * angle / math.pi - 1, coefficients, tensor=False)
    if (cosine < 0).any():
        log_overlap = np.where(cosine < 0, 2 * coefficients.sum(axis=0) - log_overlap, log_overlap)
    return np.exp(log_overlap)
