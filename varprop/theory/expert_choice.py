"""Expert-choice routing (arXiv 2202.09368): each expert takes its m = max(1, T k // E) best of T tokens.

Logits of expert i over exchangeable tokens: z_it = sqrt(c) a_i + sqrt(1 - c) w_it, all i.i.d. normal. The common part
a_i does not change the ranking, and experts rank independently: a token is taken by Binomial(E, m/T) experts. With Q
the law of z of a taken token (w among the m largest of T), p = m/T and 1/Z^2 = int u e^{-uZ} du,

    S_2 = E p E_Q[f(z)^2 int u e^{-u f(z)} B(u)^{E-1} du],    B = 1 - p + p E_Q e^{-u f}    for normalised gates,

and S_2 = E p E_Q f^2 for plain sigmoid scores. Two tokens: both taken by one expert with probability
m (m - 1) / (T (T - 1)), then w and w' are i.i.d. above the (m+1)-th largest. So where experts rank by logits or
sigmoids. A softmax over the experts ranks by z_it - log Z_t: tokens compete through Z_t, hardly one goes unchosen, and
the same averages are drawn.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import scipy.special

from varprop.errors import AssumptionError, require
from varprop.theory.gates import (
    LOG_U_STEP,
    LOGIT_RANGE,
    MAX_LOGIT_STD,
    Router,
    canonical,
    interval,
    legendre,
    log_threshold_density,
    score_of,
    threshold_range,
)
from varprop.theory.namespace import checked
from varprop.theory.overlap import SMALLEST_STD, gate_overlap
from varprop.theory.quadrature import normal_nodes

MAX_DRAWN_TOKENS = 1024
DRAWN_LOGITS = 2_000_000
MAX_NETWORKS = 20_000
CHUNK_LOGITS = 100_000
N_COMMON = 24
N_THRESHOLDS = 24


class ExpertChoice(NamedTuple):
    """capacity: tokens of an expert, m. unchosen: probability that no expert takes a token. second_moment: E sum g^2.

    overlap: E sum_i g_i(t) g_i(s) of two tokens; the second moment where there is one token only.
    """

    capacity: int
    unchosen: float
    second_moment: float
    overlap: float


def expert_capacity(n_experts: int, top_k: int, n_tokens: int) -> int:
    """Tokens that each expert takes: max(1, T k // E).

    >>> expert_capacity(8, 2, 64), expert_capacity(64, 1, 8), expert_capacity(4, 4, 10)
    (16, 1, 10)
    """
    canonical(n_experts, top_k, True, "softmax", "score_then_top_k")
    count = isinstance(n_tokens, (int, np.integer)) and not isinstance(n_tokens, bool)
    require(
        bool(count and n_tokens >= 1), AssumptionError, "n_tokens", n_tokens, "outside the domain", "an integer >= 1"
    )
    return max(1, int(n_tokens) * int(top_k) // int(n_experts))


def experts_per_token(n_experts: int, top_k: int, n_tokens: int) -> np.ndarray:
    """Probabilities of 0..E experts acting on a token under expert choice: Binomial(E, m/T), (E + 1,).

    n_tokens: T of the sequence; m: `expert_capacity`. Exact for experts that rank by their own logit or sigmoid; a
    softmax over experts spreads them far more evenly (`expert_choice_gates`).
    Source: derived in proofs/prove_expert_choice.py. Checked by: tests/theory/test_expert_choice.py.

    >>> experts_per_token(2, 1, 8).round(12).tolist()
    [0.25, 0.5, 0.25]
    """
    share = expert_capacity(n_experts, top_k, n_tokens) / n_tokens
    taken = np.arange(n_experts + 1)
    log_choose = -scipy.special.betaln(n_experts - taken + 1, taken + 1) - math.log(n_experts + 1)
    return np.exp(log_choose + scipy.special.xlogy(taken, share) + scipy.special.xlog1py(n_experts - taken, -share))


def expert_choice_gates(
    n_experts: int,
    top_k: int,
    logit_std: float,
    n_tokens: int,
    correlation: float = 0.0,
    *,
    normalize: bool,
    router: str = "softmax",
    gate_order: str = "score_then_top_k",
) -> ExpertChoice:
    """Capacity, share of unchosen tokens, second moment and overlap of the gates under expert choice.

    n_experts, top_k, normalize, router, gate_order: as in `MoESpec`; logit_std: s in [0, 16]; n_tokens: T of the
    sequence; correlation: c in [0, 1] of the router logits of two tokens. A mixture's output has the second moment
    S_2 v_E as under token choice. Experts that rank by logit or sigmoid: quadrature, relative error below 1e-6 in
    second_moment and unchosen; overlap neglects that two tokens share other experts' terms in the sums of their scores:
    exact for plain sigmoid scores, else 1 % low for s = 1 and 2 % for s = 2 (E = 8, k = 2). Experts that rank by a
    softmax over experts: drawn with a fixed seed, standard error up to 1 %, T above 1024 at its limit up to O(1/T).
    Raises `AssumptionError` outside the domains.
    Source: derived in proofs/prove_expert_choice.py. Checked by: tests/theory/test_expert_choice.py.

    >>> choice = expert_choice_gates(8, 2, 0.0, 64, normalize=False, router="sigmoid")
    >>> choice.capacity, round(choice.second_moment, 6), round(choice.unchosen, 4)
    (16, 0.5, 0.1001)
    """
    capacity = expert_capacity(n_experts, top_k, n_tokens)
    law = canonical(n_experts, top_k, normalize, router, gate_order)
    std = float(checked("logit_std", logit_std, f"a number in [0, {MAX_LOGIT_STD:g}]", 0.0, MAX_LOGIT_STD))
    c = float(checked("correlation", correlation, "a number in [0, 1]", 0.0, 1.0))
    if router == "softmax" and gate_order == "score_then_top_k" and capacity < n_tokens:
        few = min(n_tokens, MAX_DRAWN_TOKENS)
        return ExpertChoice(capacity, *_drawn(law, bool(normalize), std, few, c))
    w, taken = _taken(n_tokens, capacity)
    common, weight = normal_nodes(N_COMMON)
    z = (math.sqrt(c) * common[:, None] + math.sqrt(1 - c) * w).ravel()
    mass = (weight[:, None] * taken).ravel()
    share = capacity / n_tokens
    power = _mean_gates(law, std, share, z, mass, z, 2)
    second_moment = n_experts * share * float(mass @ power)
    unchosen = float((1 - share) ** n_experts)
    if n_tokens == 1:
        return ExpertChoice(capacity, unchosen, second_moment, second_moment)
    both = capacity * (capacity - 1) / (n_tokens * (n_tokens - 1))
    overlap = n_experts * both * _shared_square(law, std, n_tokens, capacity, c, z, mass)
    return ExpertChoice(capacity, unchosen, second_moment, overlap)


@functools.lru_cache(maxsize=256)
def _drawn(law: Router, normalize: bool, std: float, n_tokens: int, c: float) -> tuple[float, float, float]:
    """Unchosen share, second moment and overlap where experts rank tokens by a softmax over the experts."""
    rng = np.random.default_rng(0)
    n_experts = law.n_experts
    capacity = expert_capacity(n_experts, law.top_k, n_tokens)
    n_networks = max(8, min(MAX_NETWORKS, DRAWN_LOGITS // (n_tokens * n_experts)))
    at_once = max(1, CHUNK_LOGITS // (n_tokens * n_experts))
    total = np.zeros(3)
    for start in range(0, n_networks, at_once):
        count = min(at_once, n_networks - start)
        logits = math.sqrt(1 - c) * rng.standard_normal((count, n_tokens, n_experts))
        logits += math.sqrt(c) * rng.standard_normal((count, 1, n_experts))
        score = np.exp(max(std, SMALLEST_STD) * (logits - logits.max(axis=-1, keepdims=True)))
        score /= score.sum(axis=-1, keepdims=True)
        lowest = np.partition(score, n_tokens - capacity, axis=1)[:, n_tokens - capacity, None]
        chosen = np.where(score >= lowest, score, 0.0)
        sums = chosen.sum(axis=-1, keepdims=True)
        if normalize:
            chosen /= np.where(sums > 0, sums, 1.0)
        power = np.sum(chosen**2)
        pairs = max(0.0, np.sum(chosen.sum(axis=1) ** 2) - power) / (n_tokens - 1)
        total += np.array([np.sum(sums == 0), power, pairs]) / n_tokens
    unchosen, second_moment, overlap = (total / n_networks).tolist()
    return unchosen, second_moment, overlap


def _taken(n_tokens: int, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and probabilities of a normal w given that it is among the `capacity` largest of `n_tokens`."""
    if capacity == n_tokens:
        return interval(-np.inf, np.inf, 128)
    low, high = threshold_range(n_tokens - capacity, capacity)
    x, weight = legendre(64)
    pieces = ((low, high), (high, max(high, 0.0) + LOGIT_RANGE))
    w = np.concatenate([a + (b - a) * (x + 1) / 2 for a, b in pieces])
    mass = np.concatenate([(b - a) / 2 * weight for a, b in pieces]) * np.exp(-(w**2) / 2) / math.sqrt(2 * math.pi)
    mass = mass * scipy.special.betaincc(capacity, n_tokens - capacity, scipy.special.ndtr(-w))
    return w, mass / mass.sum()


def _mean_gates(
    law: Router, std: float, share: float, z: np.ndarray, mass: np.ndarray, at: np.ndarray, power: int
) -> np.ndarray:
    """E[g^power] of a taken expert of logit `at`; z, mass: the law of a taken token's logit; power 1 or 2."""
    score = score_of(at, std, law.score)
    if law.score == "sigmoid" and not law.normalised:
        return score**power
    reach = score_of(np.array([min(z.min(), at.min()), max(z.max(), at.max())]), std, law.score)
    log_u = np.arange(-math.log(reach[1] * law.n_experts) - 24, -math.log(reach[0]) + 5, LOG_U_STEP)
    log_others = np.log(score_of(z, std, law.score))
    laplace = np.array([np.exp(-np.exp(np.minimum(x + log_others, 30.0))) @ mass for x in log_u])
    rest = (1 - share + share * laplace) ** (law.n_experts - 1) * LOG_U_STEP
    total = np.zeros_like(score)
    for x, value in zip(log_u, rest, strict=True):
        u_score = np.exp(np.minimum(x + np.log(score), 30.0))
        total += value * u_score**power * np.exp(-u_score)
    return total


def _shared_square(
    law: Router, std: float, n_tokens: int, capacity: int, c: float, z: np.ndarray, mass: np.ndarray
) -> float:
    """E[E[g | a, t]^2]: two tokens that one expert takes, whose w are i.i.d. above the threshold t."""
    if capacity == n_tokens:
        thresholds, probability = np.array([-np.inf]), np.ones(1)
    else:
        low, high = threshold_range(n_tokens - capacity, capacity + 1)
        x, weight = legendre(N_THRESHOLDS)
        thresholds = low + (high - low) * (x + 1) / 2
        probability = weight * np.exp(log_threshold_density(thresholds, n_tokens - capacity, capacity + 1))
        probability = probability / probability.sum()
    common, weight = normal_nodes(N_COMMON)
    grid = np.linspace(z.min(), z.max(), 1 + int(200 * max(1.0, std)))
    gate = _mean_gates(law, std, capacity / n_tokens, z, mass, grid, 1)
    total = 0.0
    for t, p in zip(thresholds, probability, strict=True):
        w, above = interval(float(t), np.inf, 64)
        logits = math.sqrt(c) * common[:, None] + math.sqrt(1 - c) * w
        total += float(p) * float(weight @ (np.interp(logits, grid, gate) @ above) ** 2)
    return total


def load_variance(n_experts: int, top_k: int, correlation: Any, n_tokens: int) -> Any:
    """Variance over networks of the share of T tokens that choose a given expert (token choice).

    (p + (T - 1) P(c)) / T - p^2, p = k/E, P(c) = k^2 O(c) / E the probability that two tokens both choose it, O the
    `gate_overlap` of equal gates. Its mean is k/E: p (1 - p) / T for independent tokens, p (1 - p) when all tokens
    choose alike. Imbalance does not enter the mean second moment, only its spread over networks.

    correlation: c of the router logits of two tokens, a number or an array in [-1, 1]. Exact given O, whose error it
    inherits. Raises `AssumptionError` outside the domains. Source: derived in proofs/prove_expert_choice.py. Checked
    by: tests/theory/test_expert_choice.py.

    >>> [round(float(v), 6) for v in load_variance(4, 1, [0.0, 1.0], 64)]
    [0.00293, 0.1875]
    """
    expert_capacity(n_experts, top_k, n_tokens)
    overlap = gate_overlap(n_experts, top_k, 0.0, correlation, normalize=True)
    share = top_k / n_experts
    return (share + (n_tokens - 1) * top_k**2 * overlap / n_experts) / n_tokens - share**2
