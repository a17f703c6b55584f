"""Key masks: each query of each head keeps every key with probability rho, its own always.

Before the softmax the weights are renormalised over n = 1 + Bin(N - 1, rho) keys; after it they are not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from varprop.spec import AttentionSpec
from varprop.theory.patterns import require_integer, require_number

N_BINOMIAL = 5


def kept_inverse(n_keys: Any, density: Any, xp: Any = np) -> Any:
    """E 1/n of n = 1 + Bin(N - 1, rho) visible keys: (1 - (1 - rho)^N) / (rho N).

    n_keys: N keys (a number or array), the own one included; density: rho in (0, 1]. Exact: uniform attention over keys
    masked before the softmax, whose variance goes up by about 1/rho. Raises `AssumptionError` for rho outside its
    domain. Source: derived in proofs/prove_key_mask.py.

    >>> round(float(kept_inverse(2, 0.5)), 12), float(kept_inverse(5, 1.0))
    (0.75, 0.2)
    """
    if xp is np:
        require_number("density", density, lambda x: 0 < x <= 1, "a number in (0, 1]")
        lost = -np.expm1(n_keys * np.log1p(-density)) if density < 1 else 1.0  # 1 - (1 - rho)^N at any small rho
        return lost / (density * n_keys)
    return (1 - (1 - density) ** n_keys) / (density * n_keys)


def kept_inverse_square(n_keys: int, density: float) -> np.ndarray:
    """E 1/n^2 of n = 1 + Bin(N - 1, rho) for N = 1..n_keys, by the recursion h_N = (1 - rho) h_{N-1} + u_N.

    h_N = rho N E 1/n^2 = E[1(K >= 1) / K], K ~ Bin(N, rho), and u_N = (1 - (1 - rho)^N) / N. Exact.
    Source: derived in proofs/prove_key_mask.py.

    >>> kept_inverse_square(2, 0.5).tolist()
    [1.0, 0.625]
    """
    require_integer("n_keys", n_keys, 1)
    require_number("density", density, lambda x: 0 < x <= 1, "a number in (0, 1]")
    out, h = np.empty(n_keys), 0.0
    for n in range(1, n_keys + 1):
        h = (1 - density) * h - math.expm1(n * math.log1p(-density)) / n if density < 1 else 1 / n
        out[n - 1] = h / (density * n)
    return out


def masked_output_form(form: Any, squares: Any, own_square: Any, own_row: Any, density: Any) -> Any:
    """E p' C p after a Bernoulli(rho) mask on the weights p, without renormalisation, the own weight always kept.

    rho^2 form + rho (1 - rho) squares + (1 - rho)(1 - 2 rho) own_square + 2 rho (1 - rho) own_row. form: p' C p;
    squares: sum_j p_j^2 C_jj; own_square: p_t^2 C_tt; own_row: p_t (C p)_t, before the mask. Exact.
    Source: derived in proofs/prove_key_mask.py.

    >>> masked_output_form(1.0, 0.5, 0.25, 0.5, 1.0)
    1.0
    """
    lost = density * (1 - density)
    return density**2 * form + lost * squares + (1 - density) * (1 - 2 * density) * own_square + 2 * lost * own_row


@dataclass(frozen=True)
class VisibleKeys:
    """The visible keys: mean weights M (T, T) at zero logits, their number N (T,), and n / N of those kept.

    kept, kept_probability: (T, nodes) rule for n / N over a key mask before the softmax.
    """

    weights: np.ndarray
    count: np.ndarray
    kept: np.ndarray
    kept_probability: np.ndarray


def visible_keys(part: AttentionSpec, allowed: np.ndarray) -> VisibleKeys:
    """The keys that the rows of `allowed` (T, T) leave, before or after a key mask of the spec.

    >>> from varprop.spec import AttentionSpec
    >>> visible_keys(AttentionSpec(n_heads=1), np.tri(2, dtype=bool)).weights.tolist()
    [[1.0, 0.0], [0.5, 0.5]]
    """
    count = allowed.sum(axis=-1)
    density = part.key_mask_density
    if density == 1 or part.key_mask_place == "after_softmax":
        return VisibleKeys(allowed / count[:, None], count, np.ones((len(count), 1)), np.ones((len(count), 1)))
    own = kept_inverse(count, density)
    eye = np.eye(len(count))
    others = (allowed - eye) * ((1 - own) / np.maximum(count - 1, 1))[:, None]
    nodes, probability = binomial_nodes(count - 1, density)
    return VisibleKeys(others + own[:, None] * eye, count, (1 + nodes) / count[:, None], probability)


def binomial_nodes(trials: np.ndarray, density: float) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and probabilities of Bin(m, rho) for the m in `trials`, (len(m), N_BINOMIAL) each: Gauss rules.

    Exact for polynomials of degree below 2 N_BINOMIAL, for any function if m < N_BINOMIAL. From the recurrence of the
    Krawtchouk polynomials (Golub and Welsch 1969). Source: derived in proofs/prove_key_mask.py.

    >>> nodes, probability = binomial_nodes(np.array([1]), 0.25)
    >>> float((probability * nodes).sum().round(12))
    0.25
    """
    k, m = np.arange(N_BINOMIAL), trials[:, None]
    matrix = np.zeros((len(trials), N_BINOMIAL, N_BINOMIAL))
    matrix[:, k, k] = density * (m - k) + (1 - density) * k
    off = np.sqrt(np.maximum(k[1:] * density * (1 - density) * (m - k[1:] + 1), 0.0))
    matrix[:, k[1:], k[:-1]] = off
    nodes, vectors = np.linalg.eigh(matrix)
    probability = vectors[:, 0, :] ** 2
    return np.where(probability > 0, np.clip(nodes, 0.0, m), 0.0), probability


def kept_form(values: np.ndarray, allowed: np.ndarray, count: np.ndarray, density: float) -> np.ndarray:
    """E p_t' V p_t at zero logits, (..., T), over a key mask before the softmax: weights 1/n on the n kept keys.

    values: V (..., T, T); allowed (T, T) and its row sums `count`, before the mask. Exact.
    Source: derived in proofs/prove_key_mask.py.

    >>> kept_form(np.eye(2), np.ones((2, 2)), np.array([2, 2]), 0.5).tolist()
    [0.75, 0.75]
    """
    inverse = kept_inverse(count, density)
    square = kept_inverse_square(int(count.max()), density)[count - 1]
    m = np.maximum(count - 1, 1)
    one = (inverse - square) / m  # E 1(key kept) / n^2, and the same for two keys
    two = (1 - 3 * inverse + 2 * square) / (m * np.maximum(m - 1, 1))
    diagonal = np.diagonal(values, axis1=-2, axis2=-1)
    others = allowed - np.eye(len(allowed))
    rows = others @ values
    own_row = np.diagonal(rows, axis1=-2, axis2=-1)
    squares = (others * diagonal[..., None, :]).sum(axis=-1)
    pairs = (rows * others).sum(axis=-1) - squares
    return square * diagonal + one * (2 * own_row + squares) + two * pairs
