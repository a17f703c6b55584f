"""Averages that the derivative of softmax attention needs, over queries that see n = 1..T keys, and its closed forms.

The Jacobian of p = softmax(l) is B = diag(p) - p p', with tr B = 1 - sum p^2 and tr B^2 = sum p^2 - 2 sum p^3 +
(sum p^2)^2. For n i.i.d. normal logits of standard deviation s, 1 / Z^a = int t^{a-1} e^{-tZ} dt / Gamma(a) gives

    E sum_j p_j^a                 = n / Gamma(a) int t^a E[e^{asz - t e^{sz}}] M_0^{n-1} dx,   x = log t,
    E sum_{j != k} p_j^2 p_k^2    = n (n-1) / 6 int (t^2 E[e^{2sz - t e^{sz}}])^2 M_0^{n-2} dx.

The integrals are taken by the trapezoidal rule at Chebyshev points of s / (1 + s); between them the logarithms are
interpolated, so that a profile over depth costs one table.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from varprop.errors import AssumptionError, require
from varprop.spec import ModelSpec
from varprop.theory.quadrature import chi_square_nodes

Z_MAX = 10.0
N_STD = 48
"""Chebyshev points in s / (1 + s)."""
N_QUERY = 8
"""Nodes of the average over the squared norm of a query."""
EXACT_COUNTS = 32
"""Prefixes up to this length are taken one by one, longer ones by Gauss-Legendre in log n (error 1e-4)."""
N_LONG = 16
"""Steps in log n beyond EXACT_COUNTS for single queries."""
PAIR_POSITIONS = 64
"""Pairs of positions are resolved on at most this many, longer sequences are shrunk: 1 % of a
term O(1/T), 15 % of it for windows near T/64."""
MAX_STD = 32.0
"""Beyond it one key dominates and the averages are A / s + B / s^2, fixed at MAX_STD and half of it."""
TINY = 1e-300


def softmax_sources(
    participation: Any,
    key_square: Any,
    square: Any,
    spread: Any,
    variance: Any,
    correlation: Any,
    logit_correlation: Any,
    d_model: Any,
) -> Any:
    """E||d out_t / d u||^2 / d over all tokens u, for unit sigma_OV^2:

    Y + s^2 (1 - c) tr B^2 + s^2 (1 - c)(1 - c_l) (tr B^2 + (tr B)^2 / d).

    participation: Y = E sum p^2; key_square: E tr B^2 times |q|^2 / E|q|^2, the query's norm; square: E tr B^2; spread:
    E (tr B)^2; variance: s^2 of the logits of uncorrelated tokens; correlation: c of tokens; logit_correlation: c_l of
    one query's logits, c without positions. The value, key and query path; their cross terms are O(1/d).
    Leading order in 1/d and 1/head_dim. Source: derived in proofs/prove_backward.py.

    >>> softmax_sources(0.25, 0.25, 0.25, 0.5, 1.0, 0.0, 0.0, 2)
    1.0
    """
    query = (1 - logit_correlation) * (square + spread / d_model)
    return participation + variance * (1 - correlation) * (key_square + query)


def centred_overlap(common: Any, n_keys: Any, n_other: Any) -> Any:
    """tr[(I_n - 11'/n)(I_m - 11'/m)] for sets of n and m keys with `common` ones: k - k/n - k/m + k^2/(n m).

    Mean softmax Jacobians are multiples of these matrices. Exact. Source: derived in proofs/prove_backward.py.

    >>> centred_overlap(4, 4, 4)
    3.0
    """
    return common - common / n_keys - common / n_other + common**2 / (n_keys * n_other)


@dataclass(frozen=True)
class SoftmaxAverages:
    """Averages over query positions (own: one query; pair: two different queries of one head), arrays of one shape.

    participation: sum p^2; own_weight: p_tt^2; square: tr B^2; key_square, own_key_square: tr B^2 and tr B^2 / n (one
    source's share) times |q|^2 / E|q|^2;
    spread: (tr B)^2; pair_overlap: p_t.p_t'; pair_square: tr B_t B_t'; pair_spread: tr B_t tr B_t'.
    """

    participation: np.ndarray
    own_weight: np.ndarray
    key_square: np.ndarray
    own_key_square: np.ndarray
    square: np.ndarray
    spread: np.ndarray
    pair_overlap: np.ndarray
    pair_square: np.ndarray
    pair_spread: np.ndarray


def softmax_averages(
    spec: ModelSpec, layer: int, n_tokens: int, logit_std: np.ndarray, correlation: np.ndarray
) -> SoftmaxAverages:
    """`SoftmaxAverages` of a layer.

    logit_std: s sqrt(1 - c) of the i.i.d. part of the logits, any shape; correlation: c between two queries. Averaged
    over the squared norm of the query (chi-square with head_dim degrees; fixed under a QK-norm).
    Quadrature: relative error below 1e-4 for one query (`EXACT_COUNTS`); pairs take independent softmax matrices at
    c = 0, exact, and the factor (n Y)^c on their overlap, exact at c = 1.
    """
    counts, weight = visible_counts(spec, layer, n_tokens)
    ratio, probability = _query_nodes(spec)
    std = np.asarray(logit_std, dtype=float)[..., None] * np.sqrt(ratio)  # (..., query)
    table = _table(tuple(counts.tolist()), _table_limit(float(std.max(initial=0.0))))
    participation, square, spread = table.at(std)  # (..., query, count)

    def mean(values: np.ndarray, query_weight: np.ndarray = probability) -> np.ndarray:
        return np.einsum("...qn,n,q->...", values, weight, query_weight)

    keyed = probability * ratio
    rows = np.einsum("...qn,q->...n", participation, probability)
    overlap, pair_square = _pair_averages(spec, layer, n_tokens, counts, rows, np.asarray(correlation, dtype=float))
    trace = mean(1 - participation)
    return SoftmaxAverages(
        participation=mean(participation),
        own_weight=mean(participation / counts),
        key_square=mean(square, keyed),
        own_key_square=mean(square / counts, keyed),
        square=mean(square),
        spread=mean(spread),
        pair_overlap=overlap,
        pair_square=pair_square,
        pair_spread=trace**2,
    )


@dataclass(frozen=True)
class QueryAverages:
    """participation, square, key_square and spread of `SoftmaxAverages` for single queries, (T,) each."""

    participation: np.ndarray
    square: np.ndarray
    key_square: np.ndarray
    spread: np.ndarray


def query_averages(spec: ModelSpec, n_keys: np.ndarray, logit_std: np.ndarray) -> QueryAverages:
    """`QueryAverages` of queries with these numbers of keys and standard deviations of the logits, both (T,).

    Quadrature as in `softmax_averages`, linear in log n between N_LONG + 1 numbers beyond `EXACT_COUNTS`: relative
    error below 1e-3.
    """
    ratio, probability = _query_nodes(spec)
    std = logit_std[:, None] * np.sqrt(ratio)  # (T, query)
    nodes, largest = np.unique(np.minimum(n_keys, EXACT_COUNTS)), float(n_keys.max())
    if largest > EXACT_COUNTS:
        nodes = np.append(nodes, np.geomspace(nodes[-1], largest, N_LONG + 1)[1:])
    table = _table(tuple(nodes.tolist()), _table_limit(float(std.max(initial=0.0))))
    logs = np.log(np.maximum(table.at(std), TINY))  # (3, T, query, node)
    place = np.interp(np.log(n_keys), np.log(nodes), np.arange(len(nodes)))
    token, low = np.arange(len(n_keys)), np.floor(place).astype(int)
    high, share = np.minimum(low + 1, len(nodes) - 1), (place - low)[:, None]
    left, right = (logs.transpose(1, 3, 0, 2)[token, node] for node in (low, high))  # (T, 3, query)
    between = (1 - share[..., None]) * left + share[..., None] * right
    participation, square, spread = np.exp(between).swapaxes(0, 1)
    return QueryAverages(
        participation @ probability, square @ probability, square @ (probability * ratio), spread @ probability
    )


def visible_counts(spec: ModelSpec, layer: int, n_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of keys that queries see, and the share of queries that see each; real numbers for long prefixes.

    >>> from varprop.spec import AttentionSpec
    >>> spec = ModelSpec(d_model=8, n_layers=1, attention=AttentionSpec(n_heads=1, pattern="window", window=2))
    >>> visible_counts(spec, 1, 4)
    (array([1., 2.]), array([0.25, 0.75]))
    """
    limit = longest_view(spec, layer, n_tokens)
    if spec.attention is not None and spec.attention.pattern == "full":
        return np.array([float(n_tokens)]), np.ones(1)
    counts = np.arange(1.0, min(limit, EXACT_COUNTS) + 1)
    weight = np.ones_like(counts)
    if limit > EXACT_COUNTS:
        low, high = math.log(EXACT_COUNTS + 0.5), math.log(limit + 0.5)
        x, w = np.polynomial.legendre.leggauss(16)
        longer = np.exp(low + (high - low) * (x + 1) / 2)
        mass = w * longer
        counts, weight = np.append(counts, longer), np.append(weight, mass * (limit - EXACT_COUNTS) / mass.sum())
    if limit < n_tokens:
        if counts[-1] != limit:
            counts, weight = np.append(counts, float(limit)), np.append(weight, 0.0)
        weight[-1] += n_tokens - limit
    return counts, weight / n_tokens


def longest_view(spec: ModelSpec, layer: int, n_tokens: int) -> int:
    """Most keys that a query sees; sink tokens widen the window."""
    part = spec.attention
    window = spec.window(layer) if part is not None and part.pattern == "window" else None
    return n_tokens if part is None or window is None else min(n_tokens, window + part.n_sink_tokens)


def mean_rotation(spec: ModelSpec, layer: int, n_tokens: int) -> float:
    """Mean over pairs of different visible positions of cos((j - k) theta_i), averaged over all dimensions of a head.

    The logits of tokens with correlation c, rotated by their positions, correlate by about c times this number (1
    without rotary positions). Exact for the mean over the longest view. Source: derived in proofs/prove_backward.py.
    """
    part = spec.attention
    assert part is not None
    n = longest_view(spec, layer, n_tokens)
    if part.rope_theta is None or n == 1:
        return 1.0
    half = round(part.rope_fraction * spec.head_dim) // 2
    angle = part.rope_theta ** (-np.arange(half) / half) / 2
    mean = np.mean((np.sin(n * angle) / (n * np.sin(angle))) ** 2)
    share = 2 * half / spec.head_dim
    return float(1 - share + share * (n * mean - 1) / (n - 1))


def _query_nodes(spec: ModelSpec) -> tuple[np.ndarray, np.ndarray]:
    if spec.attention is not None and spec.attention.qk_norm != "none":
        return np.ones(1), np.ones(1)
    return chi_square_nodes(N_QUERY, spec.head_dim)


def _pair_averages(
    spec: ModelSpec, layer: int, n_tokens: int, counts: np.ndarray, participation: np.ndarray, correlation: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean of p_t.p_t' and of tr B_t B_t' over different positions; participation: (..., count).

    Independent rows have the mean Jacobians (1 - Y) / (n - 1) (I - 11'/n), exact at c = 0; the factor (n Y)^c of the
    position that sees more keys makes the overlap exact at c = 1.
    """
    limit = longest_view(spec, layer, n_tokens)
    full = spec.attention is not None and spec.attention.pattern == "full"
    size = min(n_tokens, 2 if full else PAIR_POSITIONS)
    shrink = n_tokens / size
    position = shrink * (np.arange(size) + 0.5) + 0.5  # midpoints
    own = np.full(size, float(n_tokens)) if full else np.minimum(position, limit)
    first = np.zeros(size) if full else position - own
    last = first + own
    common = np.maximum(np.minimum(last[:, None], last) - np.maximum(first[:, None], first), 0.0)
    # pairs within one shrunk position: all but equal ones; those further apart than a window share nothing
    weight = 1 - np.eye(size) * (1 - (1 - 1 / shrink) * min(1.0, limit / shrink))
    weight = np.tril(2 * weight) - np.diag(np.diag(weight))  # the later position, which sees more, is the row
    weight /= max(size**2 - size / shrink, 1.0)
    rows = np.stack([np.interp(np.log(own), np.log(counts), row) for row in participation.reshape(-1, counts.size)])
    y = rows.reshape(*participation.shape[:-1], size)
    trace = np.where(own > 1, 1 - y, 0.0) / np.maximum(own - 1, 1.0)
    factor = np.maximum(own * y, 1.0) ** correlation[..., None]
    overlap = (weight * common / (own[:, None] * own)).sum(axis=1)
    square = trace * (trace @ (weight * centred_overlap(common, own[:, None], own)).T)
    return factor @ overlap, (factor * square).sum(axis=-1)


def _table_limit(largest: float) -> float:
    """Upper end of a table that holds `largest`: a power of sqrt(2), so that nearby profiles share one."""
    return min(2.0 ** (math.ceil(2 * math.log2(max(largest, 0.5))) / 2), MAX_STD)


@dataclass(frozen=True)
class _Table:
    """Logarithms of (sum p^2, tr B^2, (tr B)^2) as Chebyshev series in s / (1 + s)."""

    upper: float
    series: np.ndarray

    def at(self, std: np.ndarray) -> np.ndarray:
        """(3, *std.shape, counts)."""
        values = self._inside(np.minimum(std, MAX_STD))
        if not (std > MAX_STD).any():
            return values
        ends = (self._inside(np.full_like(std, s)) for s in (MAX_STD / 2, MAX_STD))
        low, high = (np.stack([1 - y, square, spread]) for y, square, spread in ends)
        ratio = (MAX_STD / np.maximum(std, MAX_STD))[..., None]
        y, square, spread = ratio * (high + (high - low / 2) * (1 - ratio))  # A / s + B / s^2
        return np.where((std > MAX_STD)[..., None], np.stack([1 - y, square, spread]), values)

    def _inside(self, std: np.ndarray) -> np.ndarray:
        x = 2 * std / (1 + std) / self.upper - 1
        values = np.polynomial.chebyshev.chebval(x, self.series)  # (3, counts, *std.shape)
        return np.exp(np.moveaxis(values, 1, -1))


@functools.lru_cache(maxsize=64)
def _table(counts: tuple[float, ...], limit: float) -> _Table:
    upper = limit / (1 + limit)
    angle = np.pi * (np.arange(N_STD) + 0.5) / N_STD
    v = upper * (np.cos(angle) + 1) / 2
    values = np.array([power_moments(np.array(counts), s) for s in v / (1 - v)])
    logs = np.log(np.maximum(values, TINY))
    transform = np.cos(np.outer(np.arange(N_STD), angle)) * 2 / N_STD
    transform[0] /= 2
    return _Table(upper, np.tensordot(transform, logs, axes=1))


def power_moments(counts: np.ndarray, logit_std: float) -> np.ndarray:
    """(E sum p^2, E tr B^2, E (tr B)^2) for each number of keys, (3, counts); counts >= 1 may be real numbers.

    Trapezoidal rule, relative error below 1e-8 for s <= 8. Raises `AssumptionError` for a negative or infinite std.

    >>> [round(float(x), 8) for x in power_moments(np.array([4.0]), 0.0)[:, 0]]
    [0.25, 0.1875, 0.5625]
    """
    good = math.isfinite(logit_std) and logit_std >= 0
    require(good, AssumptionError, "logit_std", logit_std, "outside the domain", "a finite number >= 0")
    n = np.asarray(counts, dtype=float)
    if logit_std == 0:
        return np.stack([1 / n, (1 - 1 / n) / n, (1 - 1 / n) ** 2])
    s = logit_std
    z = np.arange(-Z_MAX, Z_MAX + 1e-9, min(0.5, 0.3 / s))
    weight = np.exp(-(z**2) / 2)
    weight /= weight.sum()
    step = max(0.2, s / 40)
    x = np.arange(-Z_MAX * s - math.log(n.max()) - 22, Z_MAX * s + 5, step)
    t_e = np.exp(np.minimum(x[:, None] + s * z, 30.0))  # exp(-e^30) is zero already
    survival = np.exp(-t_e)
    log_m0 = np.log1p(-np.minimum(-np.expm1(-t_e) @ weight, 1 - 1e-15))
    second, third, fourth = np.empty((3, x.size))
    for moment in (second, third, fourth):
        survival *= t_e if moment is not second else t_e * t_e
        moment[:] = survival @ weight
    others = np.exp((n[:, None] - 1) * log_m0)
    y, cubes, fourths = (n * step * (others @ m) / math.gamma(a) for a, m in ((2, second), (3, third), (4, fourth)))
    squares = fourths + n * (n - 1) / 6 * step * (np.exp((n[:, None] - 2) * log_m0) @ second**2)
    alone = n == 1
    return np.where(alone, np.array([[1.0], [0.0], [0.0]]), np.stack([y, y - 2 * cubes + squares, 1 - 2 * y + squares]))
