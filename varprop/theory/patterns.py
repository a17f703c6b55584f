"""What a query sees, and how positions and a soft cap enter its logits.

With no logits (s = 0) attention is uniform over the n visible keys, sum_j p_j^2 = 1/n: the means over positions below
are exact there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from varprop.errors import AssumptionError, require
from varprop.spec import ModelSpec
from varprop.theory.namespace import harmonic
from varprop.theory.quadrature import normal_nodes

N_NODES = 24


def require_integer(name: str, value: Any, lowest: int) -> None:
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    good = whole and bool(value >= lowest)
    require(good, AssumptionError, name, value, "outside the domain", f"an integer >= {lowest}")


def require_number(name: str, value: Any, good: Any, domain: str) -> None:
    real = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    require(
        bool(real and math.isfinite(value) and good(value)), AssumptionError, name, value, "outside the domain", domain
    )


def allowed_keys(
    spec: ModelSpec, layer: int, n_tokens: int, documents: Sequence[int] | np.ndarray | None = None
) -> np.ndarray:
    """(T, T) booleans: whether query t (row) sees key s, by pattern, window, sink tokens and documents.

    documents: (T,) integers; a query sees only keys of its own document. Sink tokens are the first of the sequence.
    Raises `AssumptionError` for documents of another shape or type.

    >>> from varprop import presets
    >>> allowed_keys(presets.tiny(), 1, 3, documents=[0, 0, 1]).astype(int).tolist()
    [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    """
    assert spec.attention is not None
    t, s = np.arange(n_tokens)[:, None], np.arange(n_tokens)
    allowed = np.ones((n_tokens, n_tokens), dtype=bool)
    if spec.attention.pattern != "full":
        allowed = s <= t
        window = spec.window(layer)
        if window is not None:
            allowed = allowed & ((t - s < window) | (s < spec.attention.n_sink_tokens))
    if documents is not None:
        index = np.asarray(documents)
        good = index.shape == (n_tokens,) and index.dtype.kind in "iu"
        require(good, AssumptionError, "documents", documents, "not a document index", f"{n_tokens} integers")
        allowed = allowed & (index[:, None] == index)
    return allowed


def causal_uniform_participation(n_tokens: Any, xp: Any = np) -> Any:
    """Mean over causal positions of sum_j p_j^2 under uniform attention: H_T / T, H_T = 1 + 1/2 + ... + 1/T.

    n_tokens: T. Exact. Raises `AssumptionError` unless T is an integer >= 1 (numbers).
    Source: derived in proofs/prove_patterns.py.

    >>> round(float(causal_uniform_participation(2)), 12)
    0.75
    """
    if xp is np:
        require_integer("n_tokens", n_tokens, 1)
    return harmonic(n_tokens, xp) / n_tokens


def window_uniform_participation(n_tokens: Any, window: Any, xp: Any = np) -> Any:
    """The same for a causal window of w <= T keys: (H_w + (T - w) / w) / T.

    Exact; a window longer than the sequence acts as T. Raises `AssumptionError` unless both are integers >= 1.
    Source: derived in proofs/prove_patterns.py.

    >>> round(float(window_uniform_participation(4, 2)), 12)
    0.625
    """
    if xp is np:
        require_integer("n_tokens", n_tokens, 1)
        require_integer("window", window, 1)
        window = min(window, n_tokens)
    return (harmonic(window, xp) + (n_tokens - window) / window) / n_tokens


def document_uniform_participation(lengths: Sequence[int]) -> float:
    """The same for causal documents of these lengths in one sequence: sum_i H_{T_i} / sum_i T_i.

    Exact. Raises `AssumptionError` for no document or a length below 1. Source: derived in proofs/prove_patterns.py.

    >>> round(document_uniform_participation([2, 2]), 12) == round(float(causal_uniform_participation(2)), 12)
    True
    """
    require(len(lengths) > 0, AssumptionError, "lengths", lengths, "empty", "one integer >= 1 or more")
    for length in lengths:
        require_integer("lengths", length, 1)
    return float(sum(harmonic(length, np) for length in lengths) / sum(lengths))


def rotary_kernel(distance: np.ndarray, theta: float | None, fraction: float, head_dim: int) -> np.ndarray:
    """Mean over the dimensions of a head of cos(distance * frequency): 1 for no positions (theta None).

    Logits l_tj = q_t' R_{j-t} k_j of rotated queries and keys have Cov(l_tj, l_sk) proportional to
    C_ts C_jk kernel((t - j) - (s - k)), C the token Gram matrix. n = round(fraction * head_dim) dimensions turn, in
    pairs, with frequencies theta^(-2 i / n). Exact. Source: derived in proofs/prove_patterns.py.

    >>> rotary_kernel(np.array([0, 3]), None, 1.0, 8).tolist()
    [1.0, 1.0]
    >>> rotary_kernel(np.array([0, 1]), 10.0, 1.0, 2).round(4).tolist()
    [1.0, 0.5403]
    """
    distance = np.asarray(distance, dtype=float)
    half = round(fraction * head_dim) // 2
    if theta is None or half == 0:
        return np.ones_like(distance)
    frequency = theta ** (-np.arange(half) / half)
    turned = np.cos(distance[..., None] * frequency).sum(axis=-1)
    return (2 * turned + head_dim - 2 * half) / head_dim


def qk_norm_logit_variance(
    query_moment: Any, key_moment: Any, eps: Any, head_dim: Any, logit_scale: Any | None = None
) -> Any:
    """Variance of q.k * logit_scale of unrelated tokens with RMS-normalised q and k: scale^2 head_dim r_q r_k.

    query_moment, key_moment: second moments m before the norm, r = m / (m + eps); logit_scale: None = 1/sqrt(head_dim),
    which gives r_q r_k whatever the gains. |q|^2 = r_q head_dim exactly: the logits are components of points on a
    sphere, not normal, and no query norm fluctuates. Exact for realised moments. Source: derived in
    proofs/prove_patterns.py.

    >>> qk_norm_logit_variance(3.0, 1.0, 1.0, 64)
    0.375
    """
    ratio = query_moment / (query_moment + eps) * key_moment / (key_moment + eps)
    return ratio if logit_scale is None else logit_scale**2 * head_dim * ratio


def sink_uniform_form(form: Any, n_keys: Any) -> Any:
    """p' C p with a sink logit 0 beside n keys of logit 0: form (n / (n + 1))^2, form without the sink. Exact.

    Source: derived in proofs/prove_patterns.py.

    >>> sink_uniform_form(1.0, 1)
    0.25
    """
    return form * (n_keys / (n_keys + 1)) ** 2


def softcap_slope(logit_std: float, cap: float) -> float:
    """Slope of cap * tanh(l / cap) averaged over l ~ N(0, s^2): E sech^2(s z / cap), the linear part of a soft cap.

    A cap of several s acts as this factor on the logits: the rest has a variance of order s^6 / cap^4. Gauss-Hermite,
    error below 1e-9 for cap >= 4 s. Raises `AssumptionError` outside the domain.
    Source: derived in proofs/prove_patterns.py.

    >>> round(softcap_slope(1.0, 4.0), 4), round(softcap_slope(0.0, 1.0), 12)
    (0.9442, 1.0)
    """
    require_number("logit_std", logit_std, lambda x: x >= 0, "a finite number >= 0")
    require_number("cap", cap, lambda x: x > 0, "a finite number > 0")
    z, weight = normal_nodes(N_NODES)
    return float(weight @ (1 - np.tanh(logit_std * z / cap) ** 2))
