"""Attention at initialisation: E out_t.out_s / d = sigma_OV^2 E[p_t' C p_s], with C the Gram of the normalised tokens.

The identity is exact at any width, given the attention rows p and C, because W_V and W_O are independent of both
(gains of V and O after masks: sigma_OV^2 = g_V g_O). Grouped key/value heads leave it unchanged. Two ways to the
average over p:

- quadrature for full attention over exchangeable tokens (`softmax.py`, `exchangeable.py`);
- `sampled_attention`: everything else. Given C the rows of queries and keys are exactly Gaussian with covariance
  g_Q C and g_K C, so whole heads are drawn without weight matrices.

Finite width. The cosine matrix C fluctuates from network to network like that of T Gaussian vectors in d dimensions.
(1) Values correlate with the keys that weight them, because both see the same C: before the norm Cov(C_ab, C_cd) =
(C_ac C_bd + C_ad C_bc) / d, and keys of unit gain k ~ N(0, C) tell about it by Bayes to first order,

    E[C_ab | keys] = C_ab + (S_ab - head_dim C_ab) / d - C_ab (r_a + r_b) / 2 + N_ab,   S_ab = k_a.k_b,
    r_a = (S_aa - head_dim) / d,

where the last two terms come from the norm, which holds the diagonal at 1: on the side of the values, and on that of
the keys (N: long tokens have short keys; what their squared lengths o outside the row space tell about C there, by
linear regression C diag(y) C, y = (C * C)^-1 (o - 1), elementwise square). For one query and i.i.d. tokens this is
E[sum_{j != k} p_j p_k z_j z_k] / d = E[(sum p g)^2 - sum p^2 g^2] / (s^2 d), g = s z the logits.
(2) The law of the keys is an average over C. With W_K = A Q, Q orthonormal rows, keys are A z / |x|, where z = Q x are
the coordinates of a token before the norm in the row space and |x|^2 / d is its squared norm. With one query only the
component along its direction matters: a component of a point on the sphere |u|^2 = d times chi_d.
Source: derived in proofs/prove_attention.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from varprop.errors import AssumptionError
from varprop.spec import ModelSpec, layer_table
from varprop.theory.linear import effective_gain
from varprop.theory.moments import Moments
from varprop.theory.norm import cosine_mean
from varprop.theory.patterns import allowed_keys
from varprop.theory.quadrature import ROOT_JITTER, gram_root
from varprop.theory.softmax import MAX_OVERLAP_STD

CHUNK_ELEMENTS = 2_000_000
"""Attention matrices are built for at most this many entries at a time."""


@dataclass(frozen=True)
class AttentionGains:
    """Gains after masks: queries, keys, and the product of values and outputs (sigma_OV^2)."""

    query: float
    key: float
    value_output: float


def attention_gains(spec: ModelSpec, layer: int) -> AttentionGains:
    """The gains of one layer, read from the tensor table."""
    rows = layer_table(spec, layer)
    q, k, v, o = (effective_gain(rows[f"attention.{name}"]) for name in "qkvo")
    return AttentionGains(q, k, v * o)


def incoherent_average(correlation, overlap):
    """p' C p' for weights that sum to 1 over tokens of one correlation c: c + (1 - c) * overlap.

    overlap: sum_j p_j p'_j. Exact. Source: derived in proofs/prove_attention.py.

    >>> incoherent_average(0.5, 0.25)
    0.625
    """
    return correlation + (1 - correlation) * overlap


def value_key_coupling(correlation, pair, diagonal, d_model):
    """Finite-width term of p' C p: (1 - c)(pair - c (2 - c) diagonal) / d, with the averages of `SoftmaxMoments`.

    Two queries of correlation k take k * pair for pair (leading order in the logits): of p_t' C p_u. At small logits
    and many keys s^2 (1 - c)^2 (k - 2c + c^2) / d. Leading order in 1/d. Source: derived in proofs/prove_attention.py.

    >>> value_key_coupling(0.0, 1.0, 0.5, 100)
    0.01
    """
    return (1 - correlation) * (pair - correlation * (2 - correlation) * diagonal) / d_model


def attention_logit_std(spec: ModelSpec, gains: AttentionGains, second_moment: float) -> float:
    """Standard deviation of q.k * logit_scale for uncorrelated tokens of this second moment after the norm."""
    assert spec.attention is not None
    scale = spec.attention.logit_scale or spec.head_dim**-0.5
    return scale * second_moment * (spec.head_dim * gains.query * gains.key) ** 0.5


def is_exchangeable(spec: ModelSpec) -> bool:
    """Whether the quadratures apply: full attention, no positions, plain softmax, logits of moderate size."""
    part = spec.attention
    if part is None:
        return True
    largest = max(attention_logit_std(spec, attention_gains(spec, layer), 1.0) for layer in (1, spec.n_layers))
    return (
        largest <= MAX_OVERLAP_STD
        and part.pattern == "full"
        and part.rope_theta is None
        and part.qk_norm == "none"
        and part.logit_softcap is None
        and not part.sink_logit
        and part.key_mask_density == 1
    )


def sampled_attention(
    spec: ModelSpec,
    layer: int,
    tokens: Moments,
    n_heads: int,
    rng: np.random.Generator,
    documents: np.ndarray | None = None,
) -> np.ndarray:
    """Gram matrices of the attention output, (n_recursions, T, T), from `n_heads` drawn heads per recursion.

    tokens: after the norm, one position each. documents: (T,) integers; a query sees only keys of its own document.
    Heads of a recursion share keys as far as the spec's do. The mean over
    draws is exact up to O(1/d) terms other than the coupling; the draws' spread is left to the caller.
    Raises `AssumptionError` where the Gram matrix does not resolve every position.
    """
    n_recursions, n_tokens, _ = tokens.gram.shape
    if n_tokens != tokens.n_tokens:
        raise AssumptionError(f"gram={tokens.gram.shape!r} holds fewer than {tokens.n_tokens} positions; expected all")
    gains = attention_gains(spec, layer)
    allowed = allowed_keys(spec, layer, n_tokens, documents)
    out = np.empty_like(tokens.gram)
    chunk = max(1, CHUNK_ELEMENTS // (n_heads * n_tokens**2))
    for start in range(0, n_recursions, chunk):
        gram = tokens.gram[start : start + chunk]
        out[start : start + chunk] = _average_heads(spec, gains, gram, allowed, n_heads, rng)
    return gains.value_output * out


def _average_heads(
    spec: ModelSpec,
    gains: AttentionGains,
    gram: np.ndarray,
    allowed: np.ndarray,
    n_heads: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Mean over drawn heads of P E[C | keys] P', for a stack of Gram matrices (R, T, T)."""
    scale = np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1))[:, None]
    cosine = np.clip(gram / (scale.swapaxes(-1, -2) * scale), -1.0, 1.0)  # rounding of equal tokens
    root = gram_root(cosine)[:, None]
    n_recursions, n_tokens, _ = gram.shape
    shape = (n_recursions, n_heads, n_tokens, spec.head_dim)
    queries = gains.query**0.5 * scale[..., None] * (root @ rng.standard_normal(shape))
    n_keys = max(1, n_heads // spec.kv_group_size)
    keys, given = draw_keys(cosine, root, n_keys, spec.head_dim, spec.d_model, rng)
    keys, given = (np.repeat(x, -(-n_heads // n_keys), axis=1)[:, :n_heads] for x in (keys, given))
    weights = attention_weights(spec, queries, gains.key**0.5 * scale[..., None] * keys, gains, gram, allowed, rng)
    scaled = weights * scale[..., None, :]
    return (scaled @ given @ scaled.swapaxes(-1, -2)).mean(axis=1)


def draw_keys(
    cosine: np.ndarray, root: np.ndarray, n_keys: int, head_dim: int, d_model: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Keys of normalised tokens for unit gain, (R, n_keys, T, head_dim), and E[C | keys], (R, n_keys, T, T).

    cosine: correlation matrices (R, T, T) of the stream's entries; root: its roots, (R, 1, T, T). |x_a|^2 / d outside
    the row space is normal to leading order, with covariance 2 C_ab^2 (d - head_dim) / d^2.
    """
    n_recursions, n_tokens, _ = cosine.shape
    inside = min(head_dim, d_model)
    z = root @ rng.standard_normal((n_recursions, n_keys, n_tokens, inside))
    outside = (gram_root(cosine**2)[:, None] @ rng.standard_normal((n_recursions, n_keys, n_tokens, 1)))[..., 0]
    own = np.sum(z**2, axis=-1)
    power = np.maximum(own + (d_model - inside) + np.sqrt(2 * (d_model - inside)) * outside, own)
    z = z * np.sqrt(d_model / power)[..., None]
    excess = (np.sum(z**2, axis=-1) - inside) / d_model
    shrink = 1 - inside / d_model - (excess[..., :, None] + excess[..., None, :]) / 2
    given = cosine_mean(cosine, d_model)[:, None] * shrink + z @ z.swapaxes(-1, -2) / d_model
    given += _outside_given(cosine, np.sqrt(2 * (d_model - inside)) / d_model * outside)
    return z @ key_factor(head_dim, d_model, (n_recursions, n_keys), rng).swapaxes(-1, -2), given


def _outside_given(cosine: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """What squared lengths outside the row space, (R, n_keys, T) of mean 0 and over d, tell about cosines there."""
    square = cosine**2 + ROOT_JITTER * np.eye(cosine.shape[-1])
    y = np.linalg.solve(square, lengths.swapaxes(-1, -2)).swapaxes(-1, -2)
    told = (cosine[:, None] * y[..., None, :]) @ cosine[:, None]
    own = np.diagonal(told, axis1=-2, axis2=-1)
    return told - cosine[:, None] * (own[..., :, None] + own[..., None, :]) / 2


def key_factor(head_dim: int, d_model: int, lead: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """A of W = A Q for W (head_dim, d_model) with i.i.d. N(0, 1/d) entries and orthonormal rows Q (Bartlett 1933).

    (*lead, head_dim, min(head_dim, d_model)): lower triangular with chi-distributed diagonal; W itself if d_model is
    the smaller one.
    """
    if head_dim > d_model:
        return rng.standard_normal((*lead, head_dim, d_model)) / np.sqrt(d_model)
    factor = np.tril(rng.standard_normal((*lead, head_dim, head_dim)), -1)
    index = np.arange(head_dim)
    factor[..., index, index] = np.sqrt(rng.chisquare(d_model - index, (*lead, head_dim)))
    return factor / np.sqrt(d_model)


def attention_weights(
    spec: ModelSpec,
    queries: np.ndarray,
    keys: np.ndarray,
    gains: AttentionGains,
    gram: np.ndarray,
    allowed: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Attention rows P (R, H, T, T) of drawn queries and keys (R, H, T, head_dim).

    QK-norm, rotary positions, scale, soft cap, visibility, key masks and the sink logit, in this order.
    """
    part = spec.attention
    assert part is not None
    if part.qk_norm != "none":
        second_moment = np.diagonal(gram, axis1=-2, axis2=-1)
        queries = _unit_rms(spec, queries, gains.query * second_moment, spec.n_heads)
        keys = _unit_rms(spec, keys, gains.key * second_moment, spec.n_kv_heads)
    if part.rope_theta is not None:
        queries, keys = (rotate(x, part.rope_theta, part.rope_fraction) for x in (queries, keys))
    logits = (part.logit_scale or spec.head_dim**-0.5) * (queries @ keys.swapaxes(-1, -2))
    if part.logit_softcap is not None:
        logits = part.logit_softcap * np.tanh(logits / part.logit_softcap)
    visible = np.broadcast_to(allowed, logits.shape)
    kept = np.ones_like(visible)
    if part.key_mask_density < 1:
        kept = (rng.random(logits.shape) < part.key_mask_density) | np.eye(logits.shape[-1], dtype=bool)
        if part.key_mask_place == "before_softmax":
            visible = visible & kept
    logits = np.where(visible, logits, -np.inf)
    top = logits.max(axis=-1, keepdims=True)
    if part.sink_logit:
        top = np.maximum(top, 0.0)
    unnormalised = np.exp(logits - top)
    total = unnormalised.sum(axis=-1, keepdims=True) + (np.exp(-top) if part.sink_logit else 0.0)
    return unnormalised / total * (kept if part.key_mask_place == "after_softmax" else 1.0)


def _unit_rms(spec: ModelSpec, x: np.ndarray, expected: np.ndarray, n_heads: int) -> np.ndarray:
    """RMS norm of drawn queries or keys over a head, or over the whole projection.

    For a projection, heads that were not drawn enter with their expected power (relative error O(1/(heads head_dim))).
    """
    assert spec.attention is not None
    power = np.mean(x**2, axis=-1)
    if spec.attention.qk_norm == "projection":
        share = min(1.0, x.shape[1] / n_heads)
        power = share * power.mean(axis=1, keepdims=True) + (1 - share) * expected[:, None]
    return x / np.sqrt(power + spec.norm.eps)[..., None]


def rotate(x: np.ndarray, theta: float, fraction: float) -> np.ndarray:
    """Rotary embedding of (..., T, head_dim): pairs (i, i + n/2) of the first n = fraction * head_dim dimensions."""
    n_rotated = round(fraction * x.shape[-1])
    half = n_rotated // 2
    angle = np.arange(x.shape[-2])[:, None] * theta ** (-np.arange(half) / half)
    cosine, sine = np.cos(angle), np.sin(angle)
    first, second = x[..., :half], x[..., half:n_rotated]
    return np.concatenate([first * cosine - second * sine, second * cosine + first * sine, x[..., n_rotated:]], axis=-1)
