"""Growth laws of the second moment q_l of the stream: which law a recursion is in, and its asymptote.

One residual sum: q' = a^2 q + v + 2 a r sqrt(v q), a the skip scale, v the second moment of the branch, r the
correlation of branch and stream. A norm before the branch makes v independent of q. With y = sqrt(q):

    y' = sqrt((a y + r sqrt(v))^2 + (1 - r^2) v),

so for a = 1 and constant v: r = 0 linear; r > 0 quadratic; r < 0 settles at v / (4 r^2); exponential only for a > 1 or
for a branch that grows with the stream, which a norm forbids: sqrt(q_L) <= sqrt(q_0) + sum_l sqrt(v_l) whatever r.
Blocks of several branches (`Increment`) and increments that fall with the layer or the depth: `classify`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import scipy.special

from varprop.errors import AssumptionError, require
from varprop.theory.domain import check_number

Law = Literal["bounded", "logarithmic", "linear", "polynomial", "exponential"]
N_ITERATED = 4096
"""Layers that are iterated where a limit has no closed form."""


def stream_step(second_moment: Any, increment: Any, correlation: Any = 0, skip_scale: Any = 1, xp: Any = np) -> Any:
    """Second moment after one residual sum: a^2 q + v + 2 a r sqrt(v q).

    second_moment: q >= 0; increment: v >= 0, second moment of the branch; correlation: r in [-1, 1] of branch and
    stream (r = 0: independent zero-mean output weights); skip_scale: a > 0. Exact. Raises `AssumptionError` outside
    the domain. Source: derived in proofs/prove_growth.py.

    >>> float(stream_step(4.0, 1.0)), float(stream_step(4.0, 1.0, correlation=1.0))
    (5.0, 9.0)
    """
    if xp is np:
        check_number("second_moment", second_moment, 0)
        check_number("increment", increment, 0)
        _check_correlation(correlation)
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
    bounded v it grows like l^2: never exponentially. Exact. Source: derived in proofs/prove_growth.py.

    >>> float(triangle_bound(1.0, 3.0))
    16.0
    """
    return (start**0.5 + root_sum) ** 2


def stationary_second_moment(increment: Any, correlation: Any, skip_scale: Any = 1, xp: Any = np) -> Any:
    """Fixed point of `stream_step`: v / (sqrt(1 - a^2 (1 - r^2)) - a r)^2, for a < 1, or a = 1 and r < 0.

    v / (4 r^2) for a = 1, where the distance shrinks by 1 - 2 r^2 per block; v / (1 - a^2) for r = 0. Exact. Raises
    `AssumptionError` outside the domain. Source: derived in proofs/prove_growth.py.

    >>> float(stationary_second_moment(1.0, -0.5)), round(float(stationary_second_moment(3.0, 0.0, skip_scale=0.5)), 9)
    (1.0, 4.0)
    """
    if xp is np:
        check_number("increment", increment, 0)
        _check_correlation(correlation)
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
    Source: derived in proofs/prove_growth.py. Checked by: tests/theory/test_growth.py.

    >>> round(float(aligned_asymptote(1000, 1.0, 1.0, 0.5) / stream_profile(0.0, np.ones(1000), 0.5)[-1]), 3)
    1.001
    """
    drift, spread = correlation * amplitude, (1 - correlation**2) * power / 2
    root = xp.sqrt(start)
    if xp is np and np.all(spread == 0):
        return (root + drift * layer) ** 2
    growth = xp.log(1 + drift**2 * layer / (spread + drift * root))
    return (root + drift * layer + spread / drift * growth) ** 2


def aligned_bounds(layer: int, increment: float, correlation: float, start: float = 0.0) -> tuple[float, float]:
    """Rigorous bounds on q_l of one branch with correlation r > 0 and constant v, from y' - y - r sqrt(v):

    y_0 + r sqrt(v) l <= sqrt(q_l) <= y_0 + r sqrt(v) l + (1 - r^2) sqrt(v) / (2 r) * sum_{k=1}^l 1 / (k + y_0 / (r
    sqrt(v))). Raises `AssumptionError` outside the domain. Source: derived in proofs/prove_growth.py.

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
    return low**2, (low + (1 - correlation**2) * increment / (2 * drift) * harmonic) ** 2


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
    return n ** (1 - power) / (1 - power) + _zeta(power) + n**-power / 2 - power * n ** (-power - 1) / 12


def _zeta(power: float) -> float:
    """The Riemann zeta function for power > 0, != 1, by Euler-Maclaurin from 64 terms (error below 1e-13)."""
    n, p = 64.0, power
    head = float(np.sum(np.arange(1.0, n) ** -p))
    tail = n ** (1 - p) / (p - 1) + n**-p / 2 + p * n ** (-p - 1) / 12 - p * (p + 1) * (p + 2) * n ** (-p - 3) / 720
    return head + tail + p * (p + 1) * (p + 2) * (p + 3) * (p + 4) * n ** (-p - 5) / 30240


@dataclass(frozen=True)
class Increment:
    """What one branch adds in layer l of L: v = value * l^-layer_power * L^-depth_power (second moment)."""

    value: float
    layer_power: float = 0.0
    depth_power: float = 0.0

    def __post_init__(self) -> None:
        check_number("value", self.value, 0)
        check_number("layer_power", self.layer_power, 0)
        check_number("depth_power", self.depth_power, 0)


@dataclass(frozen=True)
class GrowthLaw:
    """How the second moment q_L of the last layer grows with the depth L.

    law: `bounded`, `logarithmic`, `linear`, `polynomial` or `exponential`. exponent: the power of L (of ln L for
    logarithmic; the rate per layer for exponential; 0 for bounded). coefficient: limit of q_L over L^exponent,
    (ln L)^exponent or e^{exponent L}. asymptote: q_L for large L with the next terms that are known, a function of L.
    assumption: under which the law holds.
    """

    law: Law
    exponent: float
    coefficient: float
    assumption: str
    asymptote: Callable[[Any], Any] = field(compare=False, repr=False)


def classify(
    increments: float | Sequence[Increment],
    *,
    correlation: float = 0.0,
    start: float = 1.0,
    skip_scale: float = 1.0,
    proportional: bool = False,
) -> GrowthLaw:
    """The growth law of q_L for the branches of one block, added one after the other, and its asymptote.

    increments: v of a single branch that is the same in all layers, or one `Increment` per branch of a block;
    correlation: r of every branch with the stream; start: q_0 >= 0; skip_scale: a. proportional: the increments are
    v / q, the case of branches without a norm. r != 0: one r for all layers. Exact laws and coefficients; asymptotes
    as said in proofs/prove_growth.py. Raises `AssumptionError` outside the domain, and where r < 0 or a != 1 meets
    increments that fall with layer or depth.
    Source: derived in proofs/prove_growth.py. Checked by: tests/theory/test_growth.py.

    >>> classify(0.5).law, classify(0.5).coefficient
    ('linear', 0.5)
    >>> classify(0.5, correlation=0.4).exponent, round(classify(0.5, correlation=0.4).coefficient, 3)
    (2.0, 0.08)
    >>> classify([Increment(1.0, layer_power=1.0)]).law, classify(0.1, proportional=True).law
    ('logarithmic', 'exponential')
    """
    if not isinstance(increments, Sequence) or isinstance(increments, str):
        check_number("increments", increments, 0)
        increments = (Increment(float(increments)),)
    branches = [b for b in increments if b.value > 0]
    _check_correlation(correlation)
    check_number("start", start, 0)
    check_number("skip_scale", skip_scale, 0, above=True)
    if proportional:
        return _proportional(branches, correlation, start, skip_scale)
    if not branches and skip_scale == 1:
        return GrowthLaw("bounded", 0.0, start, "no increments", lambda depth: start + 0 * np.asarray(depth))
    if skip_scale != 1 or correlation < 0:
        return _iterated(branches, correlation, start, skip_scale)
    return _aligned(branches, correlation, start) if correlation > 0 else _independent(branches, start)


def _law(exponent: float) -> Law:
    return "linear" if exponent == 1 else "polynomial"


def _independent(branches: Sequence[Increment], start: float) -> GrowthLaw:
    """r = 0: q_L = q_0 + sum over branches of v L^-s sum_l l^-p."""

    def asymptote(depth: Any) -> Any:
        n = np.asarray(depth, dtype=float)
        return start + sum(b.value * n**-b.depth_power * power_sum(n, b.layer_power) for b in branches)

    assumption = "branches uncorrelated with the stream (r = 0), increments fixed by the norm"
    powers = [max(1 - b.layer_power, 0.0) - b.depth_power for b in branches]
    logs = [b.value for b in branches if b.layer_power == 1 and b.depth_power == 0]
    top = max(powers)
    if top > 0:
        leading = [b for b, power in zip(branches, powers, strict=True) if power == top]
        coefficient = sum(b.value / (1 - b.layer_power) for b in leading)
        return GrowthLaw(_law(top), top, coefficient, assumption, asymptote)
    if logs:
        return GrowthLaw("logarithmic", 1.0, sum(logs), assumption, asymptote)
    limits = (_sum_limit(b) for b, power in zip(branches, powers, strict=True) if power == 0)
    return GrowthLaw("bounded", 0.0, start + sum(limits), assumption, asymptote)


def _sum_limit(branch: Increment) -> float:
    """Limit of v L^-s sum_{l <= L} l^-p where it is finite and not 0."""
    if branch.depth_power > 0 and branch.layer_power < 1:
        return branch.value / (1 - branch.layer_power)
    return branch.value * _zeta(branch.layer_power) if branch.depth_power == 0 else 0.0


def _aligned(branches: Sequence[Increment], correlation: float, start: float) -> GrowthLaw:
    """r > 0: sqrt(q) grows by r sqrt(v) per branch, and by (1 - r^2) v / (2 sqrt(q))."""
    assumption = f"every branch keeps the correlation r = {correlation:g} with the stream, increments fixed by the norm"
    constant = [b for b in branches if b.layer_power == 0 and b.depth_power == 0]
    power = sum(b.value for b in constant)
    amplitude = sum(math.sqrt(b.value) for b in constant)

    def asymptote(depth: Any) -> Any:
        n = np.asarray(depth, dtype=float)
        root = math.sqrt(start)
        if constant:
            root = np.sqrt(aligned_asymptote(n, power, amplitude, correlation, start))
        falling = (b for b in branches if b not in constant)
        drift = (math.sqrt(b.value) * n ** (-b.depth_power / 2) * power_sum(n, b.layer_power / 2) for b in falling)
        return (root + correlation * sum(drift)) ** 2

    powers = [max(1 - b.layer_power / 2, 0.0) - b.depth_power / 2 for b in branches]
    top = max(powers)
    leading = [b for b, power in zip(branches, powers, strict=True) if power == top]
    if any(b.layer_power == 2 and b.depth_power == 0 for b in leading) and top == 0:
        logs = sum(math.sqrt(b.value) for b in leading if b.layer_power == 2 and b.depth_power == 0)
        return GrowthLaw("logarithmic", 2.0, (correlation * logs) ** 2, assumption, asymptote)
    if top > 0:
        rate = correlation * sum(math.sqrt(b.value) / (1 - b.layer_power / 2) for b in leading)
        return GrowthLaw(_law(2 * top), 2 * top, rate**2, assumption, asymptote)
    summable = [b for b in branches if b.depth_power == 0]
    if summable:  # layer powers above 2: the limit has no closed form
        return _summable(summable, correlation, start, assumption)
    drift = correlation * sum(math.sqrt(b.value) / (1 - b.layer_power / 2) for b in leading if b.layer_power < 2)
    limit = (math.sqrt(start) + (drift if top == 0 else 0.0)) ** 2
    return GrowthLaw("bounded", 0.0, limit, assumption, asymptote)


def _summable(branches: Sequence[Increment], correlation: float, start: float, assumption: str) -> GrowthLaw:
    """Limit of a recursion whose amplitudes sum up: N_ITERATED layers, then the rest of the sum of r sqrt(v)."""
    value = start
    for layer in range(1, N_ITERATED + 1):
        for b in branches:
            value = float(stream_step(value, b.value * layer**-b.layer_power, correlation))
    powers = [(math.sqrt(b.value), b.layer_power / 2) for b in branches]
    rest = sum(root * (_zeta(power) - float(power_sum(N_ITERATED, power))) for root, power in powers)
    limit = (math.sqrt(value) + correlation * rest) ** 2
    return GrowthLaw("bounded", 0.0, limit, assumption, lambda depth: limit + 0 * np.asarray(depth, dtype=float))


def _iterated(branches: Sequence[Increment], correlation: float, start: float, skip_scale: float) -> GrowthLaw:
    """r < 0 or a != 1 with constant increments: a fixed point, or exponential growth by a per branch."""
    falls = [b for b in branches if b.layer_power or b.depth_power]
    require(not falls, AssumptionError, "increments", falls, "falling with layer or depth", "constant ones here")
    if skip_scale > 1:
        require(correlation >= 0, AssumptionError, "correlation", correlation, "negative", "r >= 0 for skip_scale > 1")
        rate = 2 * max(1, len(branches)) * math.log(skip_scale)
        value, scale, done = start, 1.0, False
        while not done:  # q_l e^{-rate l} rises to its limit
            before = value
            for b in branches:
                scale *= skip_scale**2
                value = value + b.value / scale + 2 * correlation * math.sqrt(b.value / scale * value)
            done = value - before <= 1e-15 * value
        text = f"skip scale {skip_scale:g} > 1"
        return GrowthLaw("exponential", rate, value, text, lambda depth: value * np.exp(rate * np.asarray(depth)))
    if len(branches) == 1:
        limit = float(stationary_second_moment(branches[0].value, correlation, skip_scale))
    else:
        limit = _fixed_point([b.value for b in branches], correlation, skip_scale)
    text = f"skip scale {skip_scale:g} < 1" if skip_scale < 1 else f"branches keep r = {correlation:g} < 0"
    return GrowthLaw("bounded", 0.0, limit, text, lambda depth: limit + 0 * np.asarray(depth, dtype=float))


def _fixed_point(values: Sequence[float], correlation: float, skip_scale: float) -> float:
    """Second moment that a block of several branches maps to itself, by iteration from above."""
    low, high = 0.0, 1.0

    def excess(q: float) -> float:
        after = q
        for value in values:
            after = float(stream_step(after, value, correlation, skip_scale))
        return after - q

    if not values:
        return 0.0
    while excess(high) > 0:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return (low + high) / 2


def _proportional(branches: Sequence[Increment], correlation: float, start: float, skip_scale: float) -> GrowthLaw:
    """v = k q: q' = (a^2 + k + 2 a r sqrt(k)) q for every branch."""
    rate = 0.0
    for b in branches:
        constant = not (b.layer_power or b.depth_power)
        require(constant, AssumptionError, "increments", b, "falling with layer or depth", "constant ones here")
        rate += math.log(float(stream_step(1.0, b.value, correlation, skip_scale)))
    text = "branches grow in proportion to the stream (no norm before them)"
    law = "exponential" if rate > 0 else "bounded"
    coefficient = start if rate >= 0 else 0.0
    exponent = max(rate, 0.0)
    return GrowthLaw(law, exponent, coefficient, text, lambda depth: start * np.exp(rate * np.asarray(depth)))


def _check_correlation(correlation: Any) -> None:
    check_number("correlation", correlation, -1, 1)
