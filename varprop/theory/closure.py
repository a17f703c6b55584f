"""Softmax attention over Gaussian logits of any covariance: expansion in the logits, and its resummation.

Legend: V Gram matrix of the values (T, T); l_tj logits of query t with Cov(l_tj, l_uk) = sqrt(a_t a_u) k_tu S_jk, where
a_t is the strength of query t, k the correlation of two queries and S the covariance over keys; p_t the softmax over
the keys visible to t with base weights M_tj (uniform); cov and mean under M. n, v, w belong to one query.

(1) Small logits. p_j = M_j (1 + x_j + (x_j^2 - mean x^2) / 2 + ...) with x = l - mean l gives, to second order in l,

    E p_t' V p_u = X_tu + sqrt(a_t a_u) k_tu K_tu + a_t H_tu + a_u H_ut,   X = M V M',
    K_tu = mean_{j in t, k in u} V_jk (S_jk - mean_u S_j. - mean_t S_.k + mean_tu S),   fluctuations of both rows
    H_tu = cov_{j in t}(mean_u V_j., S_jj / 2 - mean_t S_j.),                           shift of the mean weights.

(2) One query. For n i.i.d. keys the answer is X + v (Y(n, a w) - 1/n), Y(n, s^2) = E sum p^2 of n i.i.d. logits. The
equivalent set has the same spread of values and of logits, and the same second order:

    D = mean V_jj - X_tt,   E = mean S_jj - mean S,   Q = K_tt + 2 H_tt,
    n = 1 + D E / Q,   v = D n / (n - 1),   w = E n / (n - 1).

Exact for equicorrelated tokens and for groups of m copies of such; to second order for any V and S. With S = V of unit
diagonal, E p'Vp = 1 - F'(s)/s, F(s) = E log mean e^l, a = s^2 (integration by parts): Q is minus a sixth of the mean
fourth cumulant of the logits over the keys, and `third_order` gives the next order.

(3) Two queries. The factor k of K becomes (e^{k L} - 1) / z, L = log(n Y) = z + ..., z = a E: to second order k, exact
at k = 0, and the value for many keys, where sum_j p_tj p_uj = e^{k a w} / n. L and z are geometric means of the two.

Source: derived in proofs/prove_closure.py. Checked by: tests/theory/test_causal.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class SecondOrder:
    """The terms of (1), (..., T, T) each: X, K and H, and what they are made of.

    value_rows: mean_{j in t} V_jk; key_mean: S_bar_tu; spreads (..., T): mean_j V_jj - X_tt, and the same of S.
    """

    mean: np.ndarray
    together: np.ndarray
    shift: np.ndarray
    value_rows: np.ndarray
    key_mean: np.ndarray
    value_spread: np.ndarray
    logit_spread: np.ndarray


def second_order(values: np.ndarray, keys: np.ndarray, weights: np.ndarray) -> SecondOrder:
    """Second order in the logits of E p_t' V p_u: X + sqrt(a_t a_u) k K + a_t H + a_u H' (module docstring, 1).

    values: V, Gram matrix of the values (..., T, T); keys: S, covariance of one query's logits over a_t; weights: M,
    rows that add up to 1 (base measure of the softmax; uniform over the visible keys). Exact at this order; arrays of
    symbols pass. Source: derived in proofs/prove_closure.py.

    >>> two = second_order(np.eye(2), np.eye(2), np.full((2, 2), 0.5))
    >>> float(two.mean[0, 0]), float(two.together[0, 0]), float(two.shift[0, 0])
    (0.5, 0.25, 0.0)
    """
    across = np.swapaxes(weights, -1, -2)
    value_rows, key_rows = weights @ values, weights @ keys
    mean, key_mean = value_rows @ across, key_rows @ across
    value_diagonal = np.diagonal(values, axis1=-2, axis2=-1)[..., None, :]
    key_diagonal = np.diagonal(keys, axis1=-2, axis2=-1)[..., None, :]
    crossed = weights @ np.swapaxes(value_rows * key_rows, -1, -2)  # mean_{j in t} of the rows of u
    together = weights @ (values * keys) @ across - crossed - np.swapaxes(crossed, -1, -2) + mean * key_mean
    tilt = weights * (key_diagonal / 2 - key_rows)
    shift = tilt @ np.swapaxes(value_rows, -1, -2) - tilt.sum(axis=-1)[..., None] * mean
    spreads = (
        (weights * diagonal).sum(axis=-1) - np.diagonal(average, axis1=-2, axis2=-1)
        for diagonal, average in ((value_diagonal, mean), (key_diagonal, key_mean))
    )
    return SecondOrder(mean, together, shift, value_rows, key_mean, *spreads)


def equivalent_keys(value_spread: Any, logit_spread: Any, second: Any) -> tuple[Any, Any, Any]:
    """(n, v, w) of the i.i.d. keys with these spreads and this second order (module docstring, 2).

    n = 1 + value_spread * logit_spread / second, v = value_spread n / (n - 1), w = logit_spread n / (n - 1), for
    second > 0. Exact for equicorrelated tokens. Source: derived in proofs/prove_closure.py.

    >>> equivalent_keys(0.375, 0.375, 0.046875)  # four keys of correlation 1/2
    (4.0, 0.5, 0.5)
    """
    others = value_spread * logit_spread / second
    return 1 + others, value_spread * (1 + others) / others, logit_spread * (1 + others) / others


def pair_factor(correlation: Any, log_excess: Any, first_order: Any, variance: Any, xp: Any = np) -> Any:
    """What k of the second order becomes for two queries: (e^{k L + L^2 variance / 2} - 1) / z (docstring, 3).

    correlation: k of the two queries; log_excess: L = log(n Y); first_order: z > 0, its leading order; variance: of the
    realised k. To leading order in z it is k; it is exact for equal queries, k = 1, where n Y - 1 = e^L - 1.
    Source: derived in proofs/prove_closure.py.

    >>> float(pair_factor(0.5, 1e-9, 1e-9, 0.0).round(6))
    0.5
    """
    exponent = correlation * log_excess + log_excess**2 * variance / 2
    return (np.expm1(exponent) if xp is np else xp.exp(exponent) - 1) / first_order


def iid_third_order(n_keys: Any, width: Any) -> Any:
    """`third_order` of n i.i.d. keys, S = w I, at real n: w^3 (n - 1)(n - 6) / (2 n^3). Exact.

    Source: derived in proofs/prove_closure.py.

    >>> iid_third_order(2, 1.0)
    -0.25
    """
    return width**3 * (n_keys - 1) * (n_keys - 6) / (2 * n_keys**3)


def third_order(covariance: np.ndarray) -> Any:
    """R of E p' S p = S_bar + a Q + a^2 R + ... for logits of covariance a S over n visible keys, base weights 1/n.

    -1/120 of the mean sixth cumulant of the logits over the keys, by Wick's theorem: with D the doubly centred S and
    means over the keys, E k_6 = 15 <D_jj^3> - 15 (3 <D_jj^2><D_jj> + 12 <D_jj D_jk^2>) - 10 (9 <D_jj D_jk D_kk> +
    6 <D_jk^3>) + 30 (<D_jj>^3 + 6 <D_jj><D_jk^2> + 8 <D_jk D_kl D_lj>). Exact; arrays of symbols pass.
    Source: derived in proofs/prove_closure.py.

    >>> round(float(third_order(np.eye(2))), 12)
    -0.25
    """
    n = len(covariance)
    rows = covariance.sum(axis=0) / n
    centred = covariance - rows[:, None] - rows + rows.sum() / n
    own = np.diagonal(centred)
    mean, mean_square = own.sum() / n, (centred**2).sum() / n**2
    triple = ((centred @ centred) * centred).sum() / n**3
    fourth_second = 3 * (own**2).sum() / n * mean + 12 * (own @ centred**2).sum() / n**2
    third_squared = 9 * (own @ centred @ own) / n**2 + 6 * (centred**3).sum() / n**2
    second_cubed = mean**3 + 6 * mean * mean_square + 8 * triple
    sixth = 15 * (own**3).sum() / n - 15 * fourth_second - 10 * third_squared + 30 * second_cubed
    return -sixth / 120
