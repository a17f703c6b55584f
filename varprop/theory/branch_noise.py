"""What the inner weights of a branch add to the fluctuation of its Gram matrix, for exchangeable tokens.

A branch's Gram matrix given everything but its output weights, K, is a mean over its units (inner units, key/value
heads, experts). Its covariance over networks is that of the seven patterns Cov(K_ab, K_cd) of `PATTERNS`, from which
`mean_covariance` makes the covariance of q = tr K / T and s = 1'K1 / T^2.

- feed-forward: i.i.d. units, Cov = (E a_a a_b a_c a_d - E a_a a_b E a_c a_d) / d_ff, by quadrature;
- mixture: gates of four tokens are drawn, and Cov = E[sum_e g g g g] Cov_expert + Cov(O_ab, O_cd) k_ab k_cd;
- attention: key/value groups are drawn (patterns); given the patterns the values make a Wishart matrix.

Everything is relative to the branch's mean q, and tabulated over the token correlation c, smooth in arccos c.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.interpolate
import scipy.special

from varprop.errors import AssumptionError, require
from varprop.spec import ModelSpec, MoESpec, TensorRow, layer_table
from varprop.theory.activation import SERIES, activation_square_kernel, gelu
from varprop.theory.attention import AttentionGains, attention_gains, attention_weights
from varprop.theory.gates import canonical, gates
from varprop.theory.linear import effective_gain
from varprop.theory.moe import router_overlap
from varprop.theory.namespace import normal_density
from varprop.theory.norm import cosine_mean, cosine_variance
from varprop.theory.patterns import allowed_keys
from varprop.theory.quadrature import gram_root, normal_nodes

PATTERNS = ((0, 0, 0, 0), (0, 0, 1, 1), (0, 0, 0, 1), (0, 0, 1, 2), (0, 1, 0, 1), (0, 1, 0, 2), (0, 1, 2, 3))
"""Tokens (a, b, c, d) of the covariances Cov(K_ab, K_cd) that differ for exchangeable tokens."""
N_CORRELATIONS = 9
N_NODES = 160
MAX_PATTERN_TOKENS = 256
"""Attention patterns are drawn for at most this many tokens; beyond it their share of the spread is overestimated."""
PATTERN_BUDGET = 2**21
"""Attention entries drawn per correlation: between 8 and 192 groups of heads."""
GATE_BUDGET = 2**19
"""Router logits drawn per correlation: between 256 and 4096 draws of four tokens."""
FUNCTIONS = {"identity": lambda x: x, "gelu": gelu, **SERIES}


def mean_covariance(patterns: Any, n_tokens: Any) -> np.ndarray:
    """Var q, Cov(q, s), Var s of q = tr K / T and s = 1'K1 / T^2 from the covariances of the seven `PATTERNS`.

    patterns: (7, ...) numbers or symbols; n_tokens: T. Exact. Source: derived in proofs/prove_fluctuation.py.

    >>> mean_covariance([2, 0, 0, 0, 1, 0, 0], 2).tolist()
    [1.0, 0.5, 0.5]
    """
    t = n_tokens
    same, other, one, off, pair, chain, apart = patterns
    two, three, four = t - 1, (t - 1) * (t - 2), (t - 1) * (t - 2) * (t - 3)
    diagonal = same + two * other
    across = 2 * two * one + three * off
    rest = 2 * two * pair + 4 * three * chain + four * apart
    return np.array([diagonal / t, (diagonal + across) / t**2, (diagonal + 2 * across + rest) / t**3])


def pair_products(diagonal: Any, off_diagonal: Any) -> np.ndarray:
    """K_ab K_cd of the seven patterns for a matrix with these entries."""
    p, k = diagonal, off_diagonal
    return np.array([p * p, p * p, p * k, p * k, k * k, k * k, k * k])


@dataclass(frozen=True)
class UnitMoments:
    """An inner unit a: second moments E a_a^2 and E a_a a_b, and E a_a a_b a_c a_d of the seven patterns."""

    diagonal: float
    off_diagonal: float
    fourth: np.ndarray

    def times(self, other: UnitMoments) -> UnitMoments:
        """Of the product with an independent unit."""
        diagonal, off_diagonal = self.diagonal * other.diagonal, self.off_diagonal * other.off_diagonal
        return UnitMoments(diagonal, off_diagonal, self.fourth * other.fourth)

    @property
    def means(self) -> np.ndarray:
        """Products of second moments, in the order of the patterns."""
        return pair_products(self.diagonal, self.off_diagonal)


def normal_unit(correlation: Any) -> UnitMoments:
    """A standard normal unit with this correlation between tokens (Wick's theorem; exact).

    >>> normal_unit(0.5).fourth.tolist()
    [3.0, 1.5, 1.5, 1.0, 1.5, 1.0, 0.75]
    """
    c = correlation
    pair, chain = 1 + 2 * c**2, c + 2 * c**2
    return UnitMoments(1.0, c, np.array([3.0, pair, 3 * c, chain, pair, chain, 3 * c**2]))


def activation_unit(activation: str, variance: float, correlation: float) -> UnitMoments:
    """phi(h) for h of this variance and a correlation c in [0, 1] between tokens.

    h_t = sqrt(variance) (sqrt(c) x + sqrt(1 - c) z_t): tokens are i.i.d. given x. Moments given x in closed form for
    relu and relu2, else Gauss-Hermite; Gauss-Hermite over x. Relative error below 1e-10 for variance <= 4; relu only
    for c <= 0.9 and c = 1 (1e-5 at 0.98). Checked by: proofs/prove_fluctuation.py.

    >>> unit = activation_unit("identity", 2.0, 0.5)
    >>> round(unit.off_diagonal, 12), unit.fourth.round(9).tolist() == (4 * normal_unit(0.5).fourth).tolist()
    (1.0, True)
    """
    nodes, probability = normal_nodes(N_NODES)
    mean, std = np.sqrt(variance * correlation) * nodes, np.sqrt(variance * (1 - correlation))
    if activation in ("relu", "relu2"):
        step = 2 if activation == "relu2" else 1
        one, two, three, four = rectified_moments(mean, std, 4 * step)[step::step]
    else:
        values = FUNCTIONS[activation](mean[:, None] + std * nodes)
        one, two, three, four = (values**power @ probability for power in (1, 2, 3, 4))
    same, pair, chain = probability @ four, probability @ two**2, probability @ (two * one**2)
    fourth = np.array([same, pair, probability @ (three * one), chain, pair, chain, probability @ one**4])
    return UnitMoments(float(probability @ two), float(probability @ one**2), fourth)


def rectified_moments(mean: np.ndarray, std: float, highest: int) -> np.ndarray:
    """E max(h, 0)^k for h ~ N(mean, std^2), k = 0..highest, along the first axis.

    M_k = mean M_{k-1} + (k - 1) std^2 M_{k-2}, from integration by parts; M_1 = mean M_0 + std phi(mean / std). Exact.
    Checked by: proofs/prove_fluctuation.py.

    >>> rectified_moments(np.zeros(1), 1.0, 2).ravel().round(6).tolist()
    [0.5, 0.398942, 0.5]
    """
    if std == 0:
        return np.stack([(mean > 0).astype(float), *(np.maximum(mean, 0.0) ** k for k in range(1, highest + 1))])
    moments = [scipy.special.ndtr(mean / std)]
    moments.append(mean * moments[0] + std * normal_density(mean / std))
    for k in range(2, highest + 1):
        moments.append(mean * moments[-1] + (k - 1) * std**2 * moments[-2])
    return np.stack(moments)


@dataclass(frozen=True)
class BranchLaw:
    """Splines over arccos c of a branch's means q and s, of its inner noise, Var q, Cov(q, s), Var s, and of the mean
    of Var K_ts over t, s."""

    splines: Any

    def at(self, correlation: float) -> tuple[np.ndarray, np.ndarray, float]:
        """Derivatives of (q, s) by c, the noise covariance (2, 2) and the mean variance of entries, for q = 1."""
        angle = np.arccos(min(correlation, 1 - 1e-6))
        q, _, *noise, entry = self.splines(angle)
        slope = self.splines(angle, 1)[:2] / -np.sin(angle)
        return slope / q, np.array([[noise[0], noise[1]], [noise[1], noise[2]]]) / q**2, float(entry / q**2)


def tabulated(rows: list[tuple[float, ...]]) -> BranchLaw:
    """The law through its values at `correlations()`."""
    return BranchLaw(scipy.interpolate.CubicSpline(_angles(), np.array(rows)))


def _angles() -> np.ndarray:
    return np.linspace(0, np.pi / 2, N_CORRELATIONS)


def correlations() -> np.ndarray:
    """Token correlations of the table, 1 to 0."""
    return np.clip(np.cos(_angles()), 0.0, 1.0)


def mlp_law(spec: ModelSpec, layer: int, n_tokens: int, input_moment: float, seed: int) -> BranchLaw:
    """Law of the feed-forward or mixture of a layer; `input_moment` is the second moment after the norm."""
    rows = layer_table(spec, layer)
    if spec.is_moe(layer) and spec.moe is not None:
        routing = spec.moe.routing
        require(routing == "token_choice", AssumptionError, "moe.routing", routing, "not covered", "token_choice")
    table = []
    for c in correlations():
        if spec.is_moe(layer):
            assert spec.moe is not None
            means, covariance = _mixture(
                rows, spec.moe, float(c), input_moment, spec.d_model, np.random.default_rng([seed, layer])
            )
        else:
            assert spec.feed_forward is not None
            part = spec.feed_forward
            unit = _unit(rows, "mlp.", part.activation, part.gated, input_moment, float(c), spec.d_model)
            means, covariance = (unit.diagonal, unit.off_diagonal), (unit.fourth - unit.means) / part.d_ff
        q, off = means
        entry = (covariance[0] + (n_tokens - 1) * covariance[4]) / n_tokens
        table.append((q, (q + (n_tokens - 1) * off) / n_tokens, *mean_covariance(covariance, n_tokens), entry))
    return tabulated(table)


def _unit(
    rows: dict[str, TensorRow],
    prefix: str,
    activation: str,
    gated: bool,
    input_moment: float,
    correlation: float,
    d_model: int,
) -> UnitMoments:
    """One inner unit; the constant gains of `up` (gated) and `down` drop out of relative quantities.

    E a_t^2 a_s^2 is averaged over the realised cosines of two tokens (three-point Gauss rule): its curvature counts T
    times more than the diagonal once T is no longer small against d.
    """
    variance = effective_gain(rows[prefix + ("gate" if gated else "up")]) * input_moment
    unit = activation_unit(activation, variance, correlation)
    unit = unit.times(normal_unit(correlation)) if gated else unit
    nodes, probability = normal_nodes(3)
    cosine = cosine_mean(correlation, d_model) + nodes * np.sqrt(cosine_variance(correlation, d_model))
    cosine = np.clip(cosine, -1.0, 1.0)
    square = activation_square_kernel(activation, variance, cosine) * (1 + 2 * cosine**2 if gated else 1.0)
    fourth = unit.fourth.copy()
    fourth[1] = probability @ square
    return UnitMoments(unit.diagonal, unit.off_diagonal, fourth)


def _mixture(
    rows: dict[str, TensorRow],
    part: MoESpec,
    correlation: float,
    input_moment: float,
    d_model: int,
    rng: np.random.Generator,
) -> tuple[tuple[float, float], np.ndarray]:
    """Means (K_aa, K_ab) and pattern covariances of a mixture, shared experts included."""
    expert = _unit(rows, "moe.experts.", part.activation, part.gated, input_moment, correlation, d_model)
    gate = _draw_gates(part, correlation, (effective_gain(rows["moe.router"]) * input_moment) ** 0.5, rng)
    noise = (expert.fourth - expert.means) / part.d_expert
    covariance = gate.same_expert * noise + gate.covariance * expert.means
    q, off = gate.diagonal * expert.diagonal, gate.off_diagonal * expert.off_diagonal
    if not part.n_shared_experts:
        return (q, off), covariance
    scale = _output_gain(rows, "moe.shared.", part.gated) / _output_gain(rows, "moe.experts.", part.gated)
    shared = _unit(rows, "moe.shared.", part.activation, part.gated, input_moment, correlation, d_model)
    products = shared.means + (shared.fourth - shared.means) / (part.n_shared_experts * part.d_expert)
    pair = np.array([shared.diagonal, shared.off_diagonal])
    if part.shared_gate:
        sigmoid = activation_unit("sigmoid", rows["moe.shared_gate"].gain * input_moment, correlation)
        products = products * sigmoid.fourth
        pair = pair * np.array([sigmoid.diagonal, sigmoid.off_diagonal])
    weight = part.top_k**2 if part.shared_mixing == "mean" else 1
    covariance = weight**2 * covariance + scale**2 * (products - pair_products(*pair))
    return (weight * q + scale * pair[0], weight * off + scale * pair[1]), covariance


def _output_gain(rows: dict[str, TensorRow], prefix: str, gated: bool) -> float:
    gain = effective_gain(rows[prefix + "down"])
    return gain * effective_gain(rows[prefix + "up"]) if gated else gain


@dataclass(frozen=True)
class _Gates:
    """O_ab = sum_e g_e(a) g_e(b): means, covariances of the patterns, and E sum_e g_e(a) g_e(b) g_e(c) g_e(d)."""

    diagonal: float
    off_diagonal: float
    covariance: np.ndarray
    same_expert: np.ndarray


def _draw_gates(part: MoESpec, correlation: float, logit_std: float, rng: np.random.Generator) -> _Gates:
    """Means by quadrature; the rest from gates of four exchangeable tokens, the same random numbers at every c."""
    n_draws = int(np.clip(GATE_BUDGET // (4 * part.n_experts), 256, 4096))
    common, own = rng.standard_normal((n_draws, 1, part.n_experts)), rng.standard_normal((n_draws, 4, part.n_experts))
    logits = logit_std * (np.sqrt(correlation) * common + np.sqrt(1 - correlation) * own)
    g = gates(logits, canonical(part.n_experts, part.top_k, part.normalize_gates, part.router, part.gate_order))
    overlap = g @ g.swapaxes(-1, -2)
    pairs = [(overlap[:, a, b], overlap[:, c, d]) for a, b, c, d in PATTERNS]
    covariance = np.array([np.mean(x * y) - x.mean() * y.mean() for x, y in pairs])
    same = np.array([np.mean(np.sum(g[:, a] * g[:, b] * g[:, c] * g[:, d], axis=-1)) for a, b, c, d in PATTERNS])
    power = part.gate_multiplier**2
    diagonal, off = (power * float(router_overlap(part, logit_std, c)) for c in (1.0, correlation))
    return _Gates(diagonal, off, power**2 * covariance, power**2 * same)


def attention_law(spec: ModelSpec, layer: int, n_tokens: int, input_moment: float, seed: int) -> BranchLaw:
    """Law of the attention of a layer, from drawn groups of heads that share a key/value head."""
    n_tokens = min(n_tokens, MAX_PATTERN_TOKENS)
    table = []
    for c in correlations():
        cosine = (1 - c) * np.eye(n_tokens) + c
        rng = np.random.default_rng([seed, layer])
        table.append(_attention(spec, layer, cosine, input_moment, rng))
    return tabulated(table)


def _attention(
    spec: ModelSpec, layer: int, cosine: np.ndarray, input_moment: float, rng: np.random.Generator
) -> tuple[float, ...]:
    """Means of (q, s) and their covariance over patterns and values, for unit gains of values and outputs.

    A group's K is the mean over its heads of P W P', W = V V' / head_dim of mean C. With A = mean P'P / T and
    w = P'1 / T: Var q = (2 / head_dim) tr(A C A C) and so on given the patterns.
    """
    n_tokens = len(cosine)
    group, allowed = spec.kv_group_size, allowed_keys(spec, layer, n_tokens)
    n_groups = int(np.clip(PATTERN_BUDGET // (group * n_tokens**2), 8, 192))
    means, values, entry = np.empty((n_groups, 2)), np.zeros(3), 0.0
    gains, gram = attention_gains(spec, layer), input_moment * cosine[None]
    root = gram_root(gram)
    for index in range(n_groups):
        weights = _draw_patterns(spec, gains, gram, root, allowed, rng)
        square = np.einsum("hts,htr->sr", weights, weights) / (n_tokens * group)
        token_mean = weights.mean(axis=1)
        mixed = square @ cosine
        forms = token_mean @ cosine @ token_mean.T
        means[index] = np.sum(square * cosine), np.trace(forms) / group
        reach = token_mean @ cosine
        own = np.einsum("hts,gts->hg", weights @ cosine, weights) / n_tokens
        entry += (np.sum(mixed * mixed.T) + np.mean(own**2)) / (spec.head_dim * n_groups)
        values += [np.sum(mixed * mixed.T), np.einsum("ht,ts,hs->", reach, square, reach) / group, np.mean(forms**2)]
    patterns = np.cov(means.T)
    values *= 2 / (spec.head_dim * n_groups)
    total = np.array([patterns[0, 0], patterns[0, 1], patterns[1, 1]]) + values
    return (*means.mean(axis=0), *total / spec.n_kv_heads, entry / spec.n_kv_heads)


def _draw_patterns(
    spec: ModelSpec,
    gains: AttentionGains,
    gram: np.ndarray,
    root: np.ndarray,
    allowed: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Attention rows (kv_group_size, T, T) of heads that share their keys; gram: (1, T, T), root: its root."""
    shape = (gram.shape[-1], spec.head_dim)
    queries = gains.query**0.5 * (root @ rng.standard_normal((1, spec.kv_group_size, *shape)))
    keys = np.broadcast_to(gains.key**0.5 * (root @ rng.standard_normal((1, 1, *shape))), queries.shape)
    return attention_weights(spec, queries, keys, gains, gram, allowed, rng)[0]
