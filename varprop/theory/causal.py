"""Attention over tokens of any Gram matrix without drawing heads: E[P C P'] for causal, windowed, rotary attention.

The resummed second order of closure.py (legend there), with

- finite head_dim: query norms a chi^2_{head_dim} / head_dim; products of two queries with relative variance
  (1 + k^2) / head_dim. Under QK-norm of heads: keys on a sphere, query norms fixed, variance (1 - k^2)^2 / head_dim;
- finite d_model: mean cosines (`cosine_mean`); logits of tokens on a sphere, which act like a relative variance
  SPHERE_VARIANCE / d of the logit variance; value-key coupling (attention.py), whose pair form has k times its
  first term;
- key masks before the softmax: n = 1 + Bin(N - 1, rho) keys; after it: `masked_output_form`;
- a sink logit: p = W times the softmax over the real keys, W = Z / (1 + Z), log Z normal and independent of the rest;
- a wide soft cap: its mean slope, and its cubic term like a relative variance CAP_VARIANCE a w / cap^2.

Source: derived in proofs/prove_closure.py, prove_patterns.py and prove_key_mask.py.
Checked by: tests/theory/test_causal.py.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from varprop.errors import AssumptionError
from varprop.spec import AttentionSpec, ModelSpec
from varprop.theory.attention import AttentionGains, attention_gains, attention_logit_std, value_key_coupling
from varprop.theory.closure import SecondOrder, equivalent_keys, iid_third_order, pair_factor, second_order, third_order
from varprop.theory.key_mask import VisibleKeys, kept_form, masked_output_form, visible_keys
from varprop.theory.moments import Moments
from varprop.theory.norm import cosine_mean
from varprop.theory.patterns import allowed_keys, qk_norm_logit_variance, rotary_kernel, softcap_slope
from varprop.theory.quadrature import chi_square_nodes, hermite_basis
from varprop.theory.softmax_table import SoftmaxTable, softmax_table

MAX_CLOSURE_STD = 2.5
"""Largest logit standard deviation of uncorrelated tokens for which the closure is used."""
MIN_HEAD_DIM = 8
CAP_PER_STD = 7.0
"""A soft cap has to be at least this many times max(s, s^3): the cubic term then moves log(n Y) by 0.1 at most."""
MANY_KEYS = 1e8
"""n of the equivalent set above which the bare second order is used; it may also be negative."""
SPHERE_VARIANCE = -5.0
"""chi^2_d / d: 2. A component of a point on the sphere has fourth cumulant -6/d, and log(n Y) ~ log E e^{2l} -
2 log E e^l takes (2^4 - 2) / 24 of it: -3.5 a^2 w^2 / d, as much as a relative variance -7/d."""
CAP_VARIANCE = -28 / 3
"""cap tanh(l / cap) = l - l^3 / (3 cap^2): fourth cumulant -8 (a w)^3 / cap^2, the same way -28/3 a w / cap^2."""
VARIANCE_STEP = 0.25
N_CHI_SQUARE = 4
N_LEGENDRE = 4
N_SINK_NODES = 12
N_ROWS = 8
ROUNDING = 1e-12
CLOSURE_ERROR = 0.003
SINK_ERROR, MASK_ERROR, CAP_ERROR = 4, 2, 1.0
"""Errors at a logit standard deviation of 1: of the closure; added multiples of it; per s^6 / cap^2."""
GAP_FACTOR = 1.5


def has_closure(spec: ModelSpec, second_moment: float = 1.0) -> bool:
    """Whether `closed_attention` covers a spec; if not, heads are drawn (`sampled_attention`).

    second_moment: the largest that the attention reads, 1 after a norm. Not covered: logit standard deviations above
    MAX_CLOSURE_STD, heads below MIN_HEAD_DIM, a sink logit with a key mask before the softmax, a soft cap below
    CAP_PER_STD max(s, s^3).

    >>> from varprop import presets
    >>> has_closure(presets.tiny()), has_closure(presets.tiny().with_fields(logit_scale=1.0))
    (True, False)
    """
    return spec.attention is None or _not_covered(spec, second_moment) is None


def _not_covered(spec: ModelSpec, second_moment: float = 1.0) -> str | None:
    """The first condition of `has_closure` that fails, as an error message."""
    part = spec.attention
    assert part is not None
    if spec.head_dim < MIN_HEAD_DIM:
        return f"head_dim={spec.head_dim!r} is too small for the closure; expected at least {MIN_HEAD_DIM}"
    std = max(_logit_variance(spec, attention_gains(spec, layer), second_moment) for layer in (1, spec.n_layers)) ** 0.5
    if std > MAX_CLOSURE_STD:
        return f"logit_std={std:.4g} is too large for the closure; expected a number in [0, {MAX_CLOSURE_STD}]"
    if part.sink_logit and part.key_mask_density < 1 and part.key_mask_place == "before_softmax":
        return "sink_logit=True is given with a key mask before the softmax; expected one of the two for the closure"
    widest = CAP_PER_STD * max(std, std**3)
    if part.logit_softcap is not None and part.logit_softcap < widest:
        return f"logit_softcap={part.logit_softcap!r} is too narrow for the closure; expected at least {widest:.4g}"
    return None


def _logit_variance(spec: ModelSpec, gains: AttentionGains, second_moment: float) -> float:
    """lambda^2 of uncorrelated tokens of this second moment, before a soft cap."""
    part = spec.attention
    assert part is not None
    if part.qk_norm == "none":
        return attention_logit_std(spec, gains, second_moment) ** 2
    moments = gains.query * second_moment, gains.key * second_moment
    return float(qk_norm_logit_variance(*moments, spec.norm.eps, spec.head_dim, part.logit_scale))


@dataclass(frozen=True)
class _Logits:
    """strength: a_t (R, T); queries: k (R, T, T); keys: S (R, T, T); kernel (T, T): rotary factor of both."""

    strength: np.ndarray
    queries: np.ndarray
    keys: np.ndarray
    kernel: np.ndarray


def _logits(spec: ModelSpec, gains: AttentionGains, gram: np.ndarray) -> _Logits:
    part = spec.attention
    assert part is not None
    diagonal = _diagonal(gram)
    second_moment = diagonal.mean(axis=-1)[..., None]
    root = np.sqrt(diagonal)
    cosine = gram / (root[..., :, None] * root[..., None, :])
    if part.qk_norm == "none":
        power = diagonal / second_moment
    else:
        power = np.ones_like(diagonal)
        cosine = cosine_mean(cosine, spec.head_dim) if part.qk_norm == "head" else cosine
    variance = np.array([_logit_variance(spec, gains, float(x)) for x in second_moment.ravel()]).reshape(-1, 1)
    if part.logit_softcap is not None:
        cap = part.logit_softcap
        variance = variance * np.array([[softcap_slope(float(x) ** 0.5, cap) ** 2] for x in variance[:, 0]])
    kernel = _kernel(gram.shape[-1], part.rope_theta, part.rope_fraction, spec.head_dim)
    turned = cosine * kernel
    side = np.sqrt(power)
    return _Logits(variance * power, turned, turned * side[..., :, None] * side[..., None, :], kernel)


@functools.lru_cache(maxsize=8)
def _kernel(n_tokens: int, theta: float | None, fraction: float, head_dim: int) -> np.ndarray:
    """(T, T): `rotary_kernel` of the distance between two positions."""
    position = np.arange(n_tokens)
    matrix = rotary_kernel(position, theta, fraction, head_dim)[np.abs(position[:, None] - position)]
    matrix.setflags(write=False)
    return matrix


def _participation(spec: ModelSpec, table: SoftmaxTable, n: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """E sum p^2, (R, T, nodes) for n of this shape and logit variances (R, T), over what makes the variance fluctuate.

    The query's norm by a Gauss rule; laws of the logits that are not normal as a relative variance, by the second
    difference in the variance.
    """
    part = spec.attention
    assert part is not None
    variance = variance[..., None]
    if part.qk_norm == "head":
        out, bend = table.participation(n, variance), np.zeros_like(variance)
    else:
        factors, weights = chi_square_nodes(N_CHI_SQUARE, spec.head_dim)
        out = table.participation(n[..., None], variance[..., None] * factors) @ weights
        bend = np.full_like(variance, SPHERE_VARIANCE / spec.d_model)
    if part.logit_softcap is not None:
        bend = bend + CAP_VARIANCE * variance / part.logit_softcap**2
    difference = sum(
        sign * table.participation(n, variance * factor)
        for sign, factor in ((1, 1 - VARIANCE_STEP), (-2, 1.0), (1, 1 + VARIANCE_STEP))
    )
    return out + bend / 2 * difference / VARIANCE_STEP**2


def closed_attention(spec: ModelSpec, layer: int, tokens: Moments, documents: np.ndarray | None = None) -> np.ndarray:
    """Gram matrices of the attention output, (n_recursions, T, T), without drawing heads (module docstring).

    tokens: after the norm, one position each. documents: (T,) integers; a query sees only keys of its own document.
    Covers every pattern, rotary positions, QK-norm, sink logits, key masks and wide soft caps (`has_closure`).
    Error: `closure_error`. Raises `AssumptionError` where the spec is not covered, or the Gram matrix does not resolve
    every position. Source: derived in proofs/prove_closure.py. Checked by: tests/theory/test_causal.py.

    >>> from varprop import presets
    >>> out = closed_attention(presets.tiny(), 1, Moments(np.eye(4)[None], 4))
    >>> out[0].diagonal().round(2).tolist()
    [1.0, 0.64, 0.48, 0.39]
    """
    part, values, logits, allowed = _prepared(spec, layer, tokens, documents)
    keys = visible_keys(part, allowed)
    all_keys = second_order(values, logits.keys, allowed / keys.count[:, None])
    same = _equivalent(spec, all_keys, logits, keys)
    mask_before = part.key_mask_density < 1 and part.key_mask_place == "before_softmax"
    terms = all_keys
    if mask_before:  # a mask keeps the mean weights of exchangeable keys: their shift is that of all keys
        terms = replace(second_order(values, logits.keys, keys.weights), shift=all_keys.shift)
    out = _pairs(spec, terms, logits, same)
    index = np.arange(len(allowed))
    form = kept_form(values, allowed, keys.count, part.key_mask_density) if mask_before else _diagonal(terms.mean)
    out[..., index, index] = form + same.increment
    out += _coupling(spec, logits, keys, same)
    if part.key_mask_density < 1 and not mask_before:
        out = _masked_output(out, values, terms, keys, same, part.key_mask_density)
    if part.sink_logit:
        out *= _sink_factor(terms, logits, keys, same)
    bound = _geometric(_diagonal(out))  # an error of the closure must not break Cauchy-Schwarz: tokens may be all alike
    return attention_gains(spec, layer).value_output * np.clip(out, -bound, bound)


class ClosureError(NamedTuple):
    """Claimed errors of `closed_attention`: relative, of the second moment, and absolute, of the token correlation.

    total: of one layer. irregular: the part of tokens that are not alike (repeated words), which adds up over layers.
    """

    total: float
    irregular: float


def closure_error(spec: ModelSpec, layer: int, tokens: Moments, documents: np.ndarray | None = None) -> ClosureError:
    """Error of `closed_attention` beyond O(1/width), for one layer and its tokens (arguments as there).

    CLOSURE_ERROR max(1, s^2), more with a sink logit and with a key mask, plus two terms of size: third order of the
    tokens minus that of their equivalent sets, damped by ((1 - p'Sp) / (1 - S_bar))^3, averaged over N_ROWS rows, times
    GAP_FACTOR; and the cubic term of a soft cap. Constants: largest errors of tests/theory/test_causal.py, rounded up.

    >>> from varprop import presets
    >>> closure_error(presets.tiny(), 1, Moments(np.eye(4)[None], 4)).total < 0.01
    True
    """
    part, values, logits, allowed = _prepared(spec, layer, tokens, documents)
    largest = float(logits.strength.max())
    floor = CLOSURE_ERROR * (1 + SINK_ERROR * part.sink_logit + MASK_ERROR * (part.key_mask_density < 1))
    floor *= max(1.0, largest)
    if part.logit_softcap is not None:
        floor += CAP_ERROR * largest**3 / part.logit_softcap**2
    rows = np.unique(np.linspace(0, len(allowed) - 1, N_ROWS).astype(int))
    gap = max(
        _third_order_gap(values[r], logits.keys[r], logits.strength[r], allowed, rows) for r in range(len(values))
    )
    return ClosureError(floor + GAP_FACTOR * gap, GAP_FACTOR * gap)


def _third_order_gap(
    values: np.ndarray, keys: np.ndarray, strength: np.ndarray, allowed: np.ndarray, rows: np.ndarray
) -> float:
    """Mean damped third-order mismatch over rows, over their mean p'Vp."""
    missed, total = 0.0, 0.0
    table = softmax_table()
    for row in rows:
        seen = np.flatnonzero(allowed[row])
        weights = np.full((1, len(seen)), 1 / len(seen))
        value, logit = values[np.ix_(seen, seen)], keys[np.ix_(seen, seen)]
        terms = second_order(value, logit, weights)
        spread, width = float(terms.value_spread[0]), float(terms.logit_spread[0])
        second = float(terms.together[0, 0] + 2 * terms.shift[0, 0])
        total += float(terms.mean[0, 0])
        if width < ROUNDING or spread < ROUNDING:
            continue
        mismatch, left = float(third_order(logit)), 1.0
        if second > ROUNDING:
            n, _, w = equivalent_keys(spread, width, second)
            mismatch -= iid_third_order(n, w)
            y = float(table.participation(np.array(n), np.array(strength[row] * w)))
            left = (1 - y) * n / (n - 1)
            total += spread * (1 - left)
        missed += float(strength[row]) ** 2 * abs(mismatch) * spread / width * left**3
    return missed / max(total, ROUNDING)


def _prepared(
    spec: ModelSpec, layer: int, tokens: Moments, documents: np.ndarray | None
) -> tuple[AttentionSpec, np.ndarray, _Logits, np.ndarray]:
    """The attention part, value Gram matrices, logits and visibility of a layer that the closure covers."""
    part = spec.attention
    if part is None:
        raise AssumptionError("attention=None is absent; expected an AttentionSpec")
    reason = _not_covered(spec)
    if reason is not None:
        raise AssumptionError(reason)
    n_tokens = tokens.gram.shape[-1]
    if n_tokens != tokens.n_tokens:
        raise AssumptionError(f"gram={tokens.gram.shape!r} holds fewer than {tokens.n_tokens} positions; expected all")
    values = _mean_cosines(tokens.gram, spec.d_model)
    logits = _logits(spec, attention_gains(spec, layer), values)
    return part, values, logits, allowed_keys(spec, layer, n_tokens, documents)


def _mean_cosines(gram: np.ndarray, d_model: int) -> np.ndarray:
    """The Gram matrix of normalised tokens with the mean of their cosines at finite width."""
    root = np.sqrt(_diagonal(gram))
    scale = root[..., :, None] * root[..., None, :]
    return scale * cosine_mean(gram / scale, d_model)


@dataclass(frozen=True)
class _Equivalent:
    """The equivalent set of every query, (R, T) each: n keys (of those kept), their v, and logit variance a w.

    increment: what the logits add to E p'Vp; log_excess: L; first_order: z.
    """

    n_keys: np.ndarray
    spread: np.ndarray
    variance: np.ndarray
    increment: np.ndarray
    log_excess: np.ndarray
    first_order: np.ndarray
    table: SoftmaxTable


def _equivalent(spec: ModelSpec, terms: SecondOrder, logits: _Logits, keys: VisibleKeys) -> _Equivalent:
    part = spec.attention
    assert part is not None
    table = softmax_table(spec.head_dim if part.qk_norm == "head" else None)
    second = _diagonal(terms.together) + 2 * _diagonal(terms.shift)
    curved = second > np.maximum(terms.value_spread * terms.logit_spread / MANY_KEYS, ROUNDING)
    safe = (np.where(curved, x, 1.0) for x in (terms.value_spread, terms.logit_spread, second))
    n, spread, widths = equivalent_keys(*safe)
    n_kept = np.maximum(np.where(curved, n, MANY_KEYS)[..., None] * keys.kept, 1.0)
    variance = np.where(curved, logits.strength * widths, 0.0)
    gained = ((_participation(spec, table, n_kept, variance) - 1 / n_kept) * keys.kept_probability).sum(axis=-1)
    n = 1 / (keys.kept_probability / n_kept).sum(axis=-1)
    first_order = np.where(curved, variance * (1 - 1 / n), logits.strength * terms.logit_spread)
    return _Equivalent(
        n_keys=n,
        spread=np.where(curved, spread, 0.0),
        variance=variance,
        increment=np.where(curved, spread * gained, logits.strength * second),
        log_excess=np.where(curved, table.log_excess(n, variance), first_order),
        first_order=first_order,
        table=table,
    )


def _pairs(spec: ModelSpec, terms: SecondOrder, logits: _Logits, same: _Equivalent) -> np.ndarray:
    """E p_t' V p_u for t != u, (R, T, T), without the value-key coupling."""
    part = spec.attention
    assert part is not None
    k = logits.queries
    variance = ((1 - k**2) ** 2 if part.qk_norm == "head" else 1 + k**2) / spec.head_dim
    leading = _geometric(same.first_order)
    positive = leading > 0
    factor = pair_factor(k, _geometric(same.log_excess), np.where(positive, leading, 1.0), variance)
    shift = logits.strength[..., None] * terms.shift
    together = _geometric(logits.strength) * terms.together * np.where(positive, factor, k)
    return terms.mean + together + shift + np.swapaxes(shift, -1, -2)


def _coupling(spec: ModelSpec, logits: _Logits, keys: VisibleKeys, same: _Equivalent) -> np.ndarray:
    """Value-key coupling of all pairs, (R, T, T); rotation takes the mean kernel of it."""
    pair, own = (_geometric(moment(same.n_keys, same.variance)) for moment in (same.table.pair, same.table.diagonal))
    aligned = keys.weights @ logits.kernel @ keys.weights.T
    return aligned * value_key_coupling(1 - _geometric(same.spread), logits.queries * pair, own, spec.d_model)


def _sink_factor(terms: SecondOrder, logits: _Logits, keys: VisibleKeys, same: _Equivalent) -> np.ndarray:
    """E[W_t W_u p'p] / E[p'p], (R, T, T): W = 1 / (1 + e^{-log Z}), log Z = log n + mean logit + log mean e^x normal.

    E log mean e^x = int_0^{a w} (1 - Y(u)) du / 2 (integration by parts); its variance is (e^L - 1) / n for many keys.
    Hermite (Mehler) series in the correlation of two log Z. On the diagonal p'p goes up with Z: their covariance is
    (e^L - 1)^2 / n of the incoherent part for many keys.
    """
    noise = np.expm1(logits.queries * _geometric(same.log_excess)) / _geometric(same.n_keys)
    covariance = _geometric(logits.strength) * logits.queries * terms.key_mean + noise
    kept = keys.count * (keys.kept * keys.kept_probability).sum(axis=-1)
    points, lengths = np.polynomial.legendre.leggauss(N_LEGENDRE)
    halfway = same.variance[..., None] * (points + 1) / 2
    grown = (1 - same.table.participation(same.n_keys[..., None], halfway)) @ lengths * same.variance / 4
    nodes, basis = hermite_basis(N_SINK_NODES)
    deviation = np.sqrt(_diagonal(covariance))
    weight = 1 / (1 + np.exp(-(np.log(kept) + grown)[..., None] - deviation[..., None] * nodes))
    coefficients = (weight * basis[0]) @ basis.T
    correlation = covariance / np.maximum(_geometric(deviation**2), ROUNDING)
    out = np.zeros_like(covariance)
    for order in range(N_SINK_NODES):
        out += _product(coefficients[..., order]) * correlation**order
    index = np.arange(out.shape[-1])
    form = np.maximum(_diagonal(terms.mean) + same.increment, ROUNDING)
    incoherent = same.spread * np.exp(same.log_excess) / same.n_keys / form
    rise = 2 * (1 - coefficients[..., 0]) * np.expm1(same.log_excess) ** 2 / same.n_keys * incoherent
    out[..., index, index] *= 1 + rise
    return out


def _masked_output(
    form: np.ndarray, values: np.ndarray, terms: SecondOrder, keys: VisibleKeys, same: _Equivalent, density: float
) -> np.ndarray:
    """The same after a Bernoulli mask on the weights. Mean own weights are 1/N, sum p^2 is Y n / N (equicorrelated)."""
    own = np.diagonal(keys.weights)
    diagonal = _diagonal(values)
    squares = np.exp(same.log_excess) * own * diagonal
    row = own * (_diagonal(terms.value_rows) + same.increment)
    out = density**2 * form
    crossed = density * (1 - density) * own[:, None] * np.swapaxes(terms.value_rows, -1, -2)
    out += crossed + np.swapaxes(crossed, -1, -2) + (1 - density) ** 2 * own[:, None] * own * values
    index = np.arange(out.shape[-1])
    out[..., index, index] = masked_output_form(_diagonal(form), squares, own * squares, row, density)
    return out


def _diagonal(matrix: np.ndarray) -> np.ndarray:
    return np.diagonal(matrix, axis1=-2, axis2=-1)


def _geometric(x: np.ndarray) -> np.ndarray:
    """sqrt(x_t x_u) of non-negative (..., T)."""
    return _product(np.sqrt(np.maximum(x, 0.0)))


def _product(x: np.ndarray) -> np.ndarray:
    """x_t x_u of (..., T)."""
    return x[..., :, None] * x[..., None, :]
