"""Attention over tokens of any Gram matrix without drawing heads: E[P C P'] for causal, windowed, rotary attention.

The resummed second order of closure.py (legend there), with

- finite head_dim: query norms a chi^2_{head_dim} / head_dim; products of two queries with relative variance
  (1 + k^2) / head_dim. Under QK-norm of heads: keys on a sphere, query norms fixed, variance (1 - k^2)^2 / head_dim;
- finite d_model: mean cosines (`cosine_mean`); logits of tokens on a sphere, which act like a relative variance
  SPHERE_VARIANCE / d of the logit variance; value-key coupling (attention.py), whose pair form has k times its
  first term;
- key masks before the softmax: n = 1 + Bin(N - 1, rho) keys; after it: `masked_output_form`;
- a sink logit: p = W times the softmax over the real keys, W = Z / (1 + Z), log Z normal and independent of the rest;
- a soft cap several logit standard deviations wide: its mean slope.

Source: derived in proofs/prove_closure.py and prove_patterns.py. Checked by: tests/theory/test_causal.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from varprop.errors import AssumptionError, require
from varprop.spec import ModelSpec
from varprop.theory.attention import AttentionGains, attention_gains, attention_logit_std, value_key_coupling
from varprop.theory.closure import SecondOrder, equivalent_keys, pair_factor, second_order
from varprop.theory.moments import Moments
from varprop.theory.norm import cosine_mean
from varprop.theory.patterns import (
    allowed_keys,
    kept_inverse,
    kept_inverse_square,
    masked_output_form,
    rotary_kernel,
    softcap_slope,
)
from varprop.theory.quadrature import chi_square_nodes, hermite_basis
from varprop.theory.softmax_table import SoftmaxTable, softmax_table

MAX_CLOSURE_STD = 2.5
"""Largest logit standard deviation of uncorrelated tokens for which the closure is used."""
MIN_HEAD_DIM = 8
CAP_PER_STD = 4.0
"""A soft cap acts as a slope if it is at least this many logit standard deviations."""
MANY_KEYS = 1e8
"""n of the equivalent set above which the bare second order is used; it may also be negative."""
SPHERE_VARIANCE = -5.0
"""chi^2_d / d: 2. A component of a point on the sphere has fourth cumulant -6/d, and log(n Y) ~ log E e^{2l} -
2 log E e^l takes (2^4 - 2) / 24 of it: -3.5 a^2 w^2 / d, as much as a relative variance -7/d."""
VARIANCE_STEP = 0.25
N_SINK_NODES = 12
ROUNDING = 1e-12


def has_closure(spec: ModelSpec) -> bool:
    """Whether `closed_attention` covers a spec; if not, heads are drawn (`sampled_attention`).

    Not covered: logit standard deviations above MAX_CLOSURE_STD, heads below MIN_HEAD_DIM, a soft cap below
    CAP_PER_STD standard deviations.

    >>> from varprop import presets
    >>> has_closure(presets.tiny()), has_closure(presets.tiny().with_fields(logit_scale=1.0))
    (True, False)
    """
    return spec.attention is None or _not_covered(spec) is None


def _not_covered(spec: ModelSpec) -> str | None:
    """The first condition of `has_closure` that fails, as an error message."""
    part = spec.attention
    assert part is not None
    if spec.head_dim < MIN_HEAD_DIM:
        return f"head_dim={spec.head_dim!r} is too small for the closure; expected at least {MIN_HEAD_DIM}"
    std = max(_logit_variance(spec, attention_gains(spec, layer), 1.0) for layer in (1, spec.n_layers)) ** 0.5
    if std > MAX_CLOSURE_STD:
        return f"logit_std={std:.4g} is too large for the closure; expected a number in [0, {MAX_CLOSURE_STD}]"
    if part.logit_softcap is not None and part.logit_softcap < CAP_PER_STD * std:
        return f"logit_softcap={part.logit_softcap!r} bends the logits; expected at least {CAP_PER_STD * std:.4g}"
    return None


def _logit_variance(spec: ModelSpec, gains: AttentionGains, second_moment: float) -> float:
    """lambda^2 of uncorrelated tokens of this second moment, before a soft cap."""
    part = spec.attention
    assert part is not None
    if part.qk_norm == "none":
        return attention_logit_std(spec, gains, second_moment) ** 2
    query, key = (gain * second_moment / (gain * second_moment + spec.norm.eps) for gain in (gains.query, gains.key))
    scale = part.logit_scale or spec.head_dim**-0.5
    return scale**2 * spec.head_dim * query * key


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
    position = np.arange(gram.shape[-1])
    kernel = rotary_kernel(position[:, None] - position, part.rope_theta, part.rope_fraction, spec.head_dim)
    turned = cosine * kernel
    side = np.sqrt(power)
    return _Logits(variance * power, turned, turned * side[..., :, None] * side[..., None, :], kernel)


@dataclass(frozen=True)
class _Keys:
    """The visible keys: mean weights M (T, T) at zero logits, their number N (T,), and n / N of those kept.

    kept, kept_probability: (T, nodes) rule for n / N over a key mask before the softmax.
    """

    weights: np.ndarray
    count: np.ndarray
    kept: np.ndarray
    kept_probability: np.ndarray


def _visible(spec: ModelSpec, allowed: np.ndarray) -> _Keys:
    part = spec.attention
    assert part is not None
    count = allowed.sum(axis=-1)
    density = part.key_mask_density
    if density == 1 or part.key_mask_place == "after_softmax":
        return _Keys(allowed / count[:, None], count, np.ones((len(count), 1)), np.ones((len(count), 1)))
    own = kept_inverse(count, density)
    eye = np.eye(len(count))
    others = (allowed - eye) * ((1 - own) / np.maximum(count - 1, 1))[:, None]
    nodes, probability = _binomial_nodes(count - 1, density)
    return _Keys(others + own[:, None] * eye, count, (1 + nodes) / count[:, None], probability)


def _binomial_nodes(trials: np.ndarray, density: float, n_nodes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Gauss rules of Bin(m, rho), (len(m), n_nodes) each, from the recurrence of the Krawtchouk polynomials."""
    k, m = np.arange(n_nodes), trials[:, None]
    matrix = np.zeros((len(trials), n_nodes, n_nodes))
    matrix[:, k, k] = density * (m - k) + (1 - density) * k
    off = np.sqrt(np.maximum(k[1:] * density * (1 - density) * (m - k[1:] + 1), 0.0))
    matrix[:, k[1:], k[:-1]] = off
    nodes, vectors = np.linalg.eigh(matrix)
    probability = vectors[:, 0, :] ** 2
    return np.where(probability > 0, np.clip(nodes, 0.0, m), 0.0), probability


def _mean_form(spec: ModelSpec, values: np.ndarray, keys: _Keys, allowed: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """E p_t' V p_t at zero logits, (..., T): the diagonal of X, or its mean over a key mask before the softmax."""
    part = spec.attention
    assert part is not None
    if part.key_mask_density == 1 or part.key_mask_place == "after_softmax":
        return _diagonal(mean)
    inverse = kept_inverse(keys.count, part.key_mask_density)
    square = kept_inverse_square(int(keys.count.max()), part.key_mask_density)[keys.count - 1]
    m = np.maximum(keys.count - 1, 1)
    one = (inverse - square) / m
    two = (1 - 3 * inverse + 2 * square) / (m * np.maximum(m - 1, 1))
    diagonal = _diagonal(values)
    others = allowed - np.eye(len(allowed))
    rows = others @ values
    own_row, squares = _diagonal(rows), (others * diagonal[..., None, :]).sum(axis=-1)
    pairs = (rows * others).sum(axis=-1) - squares
    return square * diagonal + one * (2 * own_row + squares) + two * pairs


def _variance_rule(spec: ModelSpec) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of the factor on a logit variance: the query's norm, and the sphere of the tokens."""
    part = spec.attention
    assert part is not None
    if part.qk_norm == "head":
        return np.ones(1), np.ones(1)
    nodes, weights = chi_square_nodes(4, spec.head_dim)
    bend = SPHERE_VARIANCE / spec.d_model / 2 / VARIANCE_STEP**2
    step = VARIANCE_STEP
    return np.concatenate([nodes, [1 - step, 1.0, 1 + step]]), np.concatenate([weights, [bend, -2 * bend, bend]])


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
    part = spec.attention
    reason = "attention=None is absent; expected an AttentionSpec" if part is None else _not_covered(spec)
    if part is None or reason is not None:
        raise AssumptionError(reason)
    n_tokens = tokens.gram.shape[-1]
    require(
        n_tokens == tokens.n_tokens, AssumptionError, "gram", tokens.gram.shape, "not one position per token", "all"
    )
    gains = attention_gains(spec, layer)
    values = _mean_cosines(tokens.gram, spec.d_model)
    logits = _logits(spec, gains, values)
    allowed = allowed_keys(spec, layer, n_tokens, documents)
    keys = _visible(spec, allowed)
    terms = second_order(values, logits.keys, keys.weights)
    same = _equivalent(spec, terms, logits, keys)
    out = _pairs(spec, terms, logits, same)
    index = np.arange(n_tokens)
    out[..., index, index] = _mean_form(spec, values, keys, allowed, terms.mean) + same.increment
    out += _coupling(spec, logits, keys, same)
    if part.sink_logit:
        out *= _sink_factor(terms, logits, keys, same)
    if part.key_mask_density < 1 and part.key_mask_place == "after_softmax":
        out = _masked_output(out, values, terms, keys, same, part.key_mask_density)
    return gains.value_output * out


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


def _equivalent(spec: ModelSpec, terms: SecondOrder, logits: _Logits, keys: _Keys) -> _Equivalent:
    part = spec.attention
    assert part is not None
    table = softmax_table(spec.head_dim if part.qk_norm == "head" else None)
    second = _diagonal(terms.together) + 2 * _diagonal(terms.shift)
    curved = second > np.maximum(terms.value_spread * terms.logit_spread / MANY_KEYS, ROUNDING)
    safe = (np.where(curved, x, 1.0) for x in (terms.value_spread, terms.logit_spread, second))
    n, spread, widths = equivalent_keys(*safe)
    n_kept = np.maximum(np.where(curved, n, MANY_KEYS)[..., None] * keys.kept, 1.0)
    variance = np.where(curved, logits.strength * widths, 0.0)
    factors, weights = _variance_rule(spec)
    participation = table.participation(n_kept[..., None], (variance[..., None] * factors)[..., None, :]) @ weights
    gained = ((participation - 1 / n_kept) * keys.kept_probability).sum(axis=-1)
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


def _coupling(spec: ModelSpec, logits: _Logits, keys: _Keys, same: _Equivalent) -> np.ndarray:
    """Value-key coupling of all pairs, (R, T, T); rotation takes the mean kernel of it."""
    pair, own = (_geometric(moment(same.n_keys, same.variance)) for moment in (same.table.pair, same.table.diagonal))
    aligned = keys.weights @ logits.kernel @ keys.weights.T
    return aligned * value_key_coupling(1 - _geometric(same.spread), logits.queries * pair, own, spec.d_model)


def _sink_factor(terms: SecondOrder, logits: _Logits, keys: _Keys, same: _Equivalent) -> np.ndarray:
    """E W_t W_u, (R, T, T): W = 1 / (1 + e^{-log Z}), log Z = log n + L / 2 + the mean logit, and its own spread.

    The mean logits of two queries have covariance sqrt(a_t a_u) k S_bar. Hermite (Mehler) series in their correlation.
    """
    covariance = _geometric(logits.strength) * logits.queries * terms.key_mean
    kept = keys.count * (keys.kept * keys.kept_probability).sum(axis=-1)
    variance = _diagonal(covariance) + np.expm1(same.log_excess) / same.n_keys
    centre = np.log(kept) + same.log_excess / 2
    nodes, basis = hermite_basis(N_SINK_NODES)
    weight = 1 / (1 + np.exp(-centre[..., None] - np.sqrt(variance)[..., None] * nodes))
    coefficients = (weight * basis[0]) @ basis.T
    correlation = covariance / np.maximum(_geometric(variance), ROUNDING)
    index = np.arange(correlation.shape[-1])
    correlation[..., index, index] = 1.0
    return sum(
        coefficients[..., :, None, k] * coefficients[..., None, :, k] * correlation**k for k in range(N_SINK_NODES)
    )


def _masked_output(
    form: np.ndarray, values: np.ndarray, terms: SecondOrder, keys: _Keys, same: _Equivalent, density: float
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
    root = np.sqrt(np.maximum(x, 0.0))
    return root[..., :, None] * root[..., None, :]
