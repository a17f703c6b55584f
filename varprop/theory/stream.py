"""Exact recursion of the second moment q of the stream, its bounds, fixed point and asymptote.

One residual sum: q' = a^2 q + v + 2 a r sqrt(v q), a the skip scale, v the second moment of the branch, r the
correlation of branch and stream. A norm before the branch makes v independent of q. With y = sqrt(q):

    y' = sqrt((a y + r sqrt(v))^2 + (1 - r^2) v),

so for a = 1 and constant v: r = 0 linear; r > 0 quadratic; r < 0 settles at v / (4 r^2); exponential only for a > 1 or
for a branch that grows with the stream, which a norm forbids: sqrt(q_L) <= sqrt(q_0) + sum_l sqrt(v_l) whatever r.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.special

from varprop.errors import AssumptionError, require
from varprop.theory.domain import check_number


def stream_step(second_moment: Any, increment: Any, correlation: Any = 0, skip_scale: Any = 1, xp: Any = np) -> Any:
    """Second moment after one residual sum: a^2 q + v + 2 a r sqrt(v q).

    second_moment: q >= 0; increment: v >= 0, second moment of the branch; correlation: r in [-1, 1] of branch and
    stream (r = 0: independent zero-mean output weights); skip_scale: a > 0. Exact. Raises `AssumptionError` outside
    the domain. Source: derived in proofs/prove_stream.py.

    >>> float(stream_step(4.0, 1.0)), float(stream_step(4.0, 1.0, correlation=1.0))
    (5.0, 9.0)
    """
    if xp is np:
        check_number("second_moment", second_moment, 0)
        check_number("increment", increment, 0)
        check_correlation(correlation)
        check_number("skip_scale", skip_scale, 0, above=True)
    return skip_scale**2 * second_moment + increment + 2 * skip_scale * correlation * xp.sqrt(increment * second_moment)


def stream_profile(
    start: float, increments: Sequence[float] | np.ndarray, correlation: Any = 0.0, skip_scale: float = 1.0
) -> np.ndarray:
    """q_0 .. q_L by `stream_step`, (L + 1,). increments: v_1 .. v_L; correlation: one number, or one per block. Exact.

    >>> stream_profile(1.0, [1.0, 1.0, 1.0]).tolist()
    [1.0, 2.0, 3.0, 4.0]
    """
    steps = np.atleast_1d(np.asarray(increments, dtype=float))
    values = [float(start)]
    for increment, r in zip(steps, np.broadcast_to(correlation, steps.shape), strict=True):
        values.append(float(stream_step(values[-1], increment, r, skip_scale)))
    return np.array(values)


def triangle_bound(start: Any, root_sum: Any) -> Any:
    """Largest second moment that block outputs of given size can reach, whatever they correlate with, skip scale 1:

    (sqrt(q_0) + sum_l sqrt(v_l))^2. start: q_0 >= 0; root_sum: the sum of sqrt(v_l). Attained at correlation 1. With
    bounded v it grows like l^2: never exponentially. Exact. Source: derived in proofs/prove_stream.py.

    >>> float(triangle_bound(1.0, 3.0))
    16.0
    """
    return (start**0.5 + root_sum) ** 2


def stationary_second_moment(increment: Any, correlation: Any, skip_scale: Any = 1, xp: Any = np) -> Any:
    """Fixed point of `stream_step`: v / (sqrt(1 - a^2 (1 - r^2)) - a r)^2, for a < 1, or a = 1 and r < 0.

    v / (4 r^2) for a = 1, where the distance shrinks by 1 - 2 r^2 per block; v / (1 - a^2) for r = 0. Exact. Raises
    `AssumptionError` outside the domain. Source: derived in proofs/prove_stream.py.

    >>> float(stationary_second_moment(1.0, -0.5)), round(float(stationary_second_moment(3.0, 0.0, skip_scale=0.5)), 9)
    (1.0, 4.0)
    """
    if xp is np:
        check_number("increment", increment, 0)
        check_correlation(correlation)
        check_number("skip_scale", skip_scale, 0, 1, above=True)
        r = np.asarray(correlation)
        settles = bool(np.all((np.asarray(skip_scale) < 1) | ((r < 0) & (r > -1))))
        require(settles, AssumptionError, "correlation", correlation, "not settling", "(-1, 0), or skip_scale < 1")
    return increment / (xp.sqrt(1 - skip_scale**2 * (1 - correlation**2)) - skip_scale * correlation) ** 2


def aligned_asymptote(layer: Any, power: Any, amplitude: Any, correlation: Any, start: Any = 0, xp: Any = np) -> Any:
    """Second moment of a stream whose branches keep a correlation r > 0 with it:

    (y_0 + r A l + (1 - r^2) V / (2 r A) ln(1 + 2 r^2 A^2 l / ((1 - r^2) V + 2 r A y_0)))^2,   y_0 = sqrt(q_0),

    power: V, the sum of the block's increments v; amplitude: A, the sum of their roots (sqrt(v) for one branch).
    The leading r^2 A^2 l^2 and the next term (1 - r^2) V l ln(l) are exact; sqrt(q) is off by a bounded amount.
    Source: derived in proofs/prove_stream.py. Checked by: tests/theory/test_stream.py.

    >>> round(float(aligned_asymptote(1000, 1.0, 1.0, 0.5) / stream_profile(0.0, np.ones(1000), 0.5)[-1]), 3)
    1.001
    """
    drift, spread = correlation * amplitude, (1 - correlation**2) * power / 2
    root = xp.sqrt(start)
    if xp is np and np.all(spread == 0):
        return (root + drift * layer) ** 2
    growth = xp.log(1 + drift**2 * layer / (spread + drift * root))
    return (root + drift * layer + spread / drift * growth) ** 2


def aligned_bounds(layer: int, increment: float, correlation: float, start: float = 0.0) -> np.ndarray:
    """Lower and upper bound on q_l of one branch with correlation r > 0 and constant v, from y' - y - r sqrt(v):

    y_0 + r sqrt(v) l <= sqrt(q_l) <= y_0 + r sqrt(v) l + (1 - r^2) sqrt(v) / (2 r) * sum_{k=1}^l 1 / (k + y_0 / (r
    sqrt(v))). Raises `AssumptionError` outside the domain. Source: derived in proofs/prove_stream.py.

    >>> low, high = aligned_bounds(100, 1.0, 0.5)
    >>> bool(low < stream_profile(0.0, np.ones(100), 0.5)[-1] < high)
    True
    """
    check_number("layer", layer, 0, integer=True)
    check_number("increment", increment, 0, above=True)
    check_number("correlation", correlation, 0, 1, above=True)
    check_number("start", start, 0)
    drift, root = correlation * math.sqrt(increment), math.sqrt(start)
    offset = root / drift
    harmonic = float(scipy.special.digamma(layer + 1 + offset) - scipy.special.digamma(1 + offset))
    low = root + drift * layer
    return np.array([low, low + (1 - correlation**2) * increment / (2 * drift) * harmonic]) ** 2


def power_sum(n_terms: Any, power: float) -> Any:
    """sum_{k=1}^n k^{-p} by its asymptotic series (error below n^{-p-3} for n >= 2): exact for p = 0.

    n^{1-p} / (1-p) + zeta(p) + n^{-p} / 2 - p n^{-p-1} / 12, and ln n + gamma + 1/(2n) - 1/(12 n^2) for p = 1.

    >>> round(float(power_sum(100, 1.0)), 6), float(power_sum(7, 0.0))
    (5.187378, 7.0)
    """
    n = np.asarray(n_terms, dtype=float)
    if power == 0:
        return n
    if power == 1:
        return np.log(n) + np.euler_gamma + 1 / (2 * n) - 1 / (12 * n**2)
    return n ** (1 - power) / (1 - power) + zeta(power) + n**-power / 2 - power * n ** (-power - 1) / 12


def zeta(power: float) -> float:
    """The Riemann zeta function for power > 0, != 1, by Euler-Maclaurin from 64 terms (error below 1e-13)."""
    n, p = 64.0, power
    head = float(np.sum(np.arange(1.0, n) ** -p))
    tail = n ** (1 - p) / (p - 1) + n**-p / 2 + p * n ** (-p - 1) / 12 - p * (p + 1) * (p + 2) * n ** (-p - 3) / 720
    return head + tail + p * (p + 1) * (p + 2) * (p + 3) * (p + 4) * n ** (-p - 5) / 30240


def check_correlation(correlation: Any) -> None:
    """Raise `AssumptionError` unless the branch correlation is in [-1, 1]."""
    check_number("correlation", correlation, -1, 1)
