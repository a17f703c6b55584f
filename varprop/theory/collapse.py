"""Token correlation c across depth: two scalars (q, c) for exchangeable tokens, their flow and its fixed points.

Per layer of a Pre-LN model, with attention gain a = sigma_OV^2, v the feed-forward second moment and kappa(c) its
token correlation for inputs of correlation c (pair kernel over its value at 1; c g(c) for a gated network):

    attention      q' = q + a (c + (1 - c) Y),   q'c' = q c + a (c + (1 - c) X)
    feed-forward   q' = q + v,                   q'c' = q c + v kappa(c)

Y and X: participation and overlap of the attention rows, both 0 for infinitely many tokens. In depth dc/dl = D(c) / q,
D(c) = a (c + (1-c) X) + v kappa(c) - c (a (c + (1-c) Y) + v), and q grows like (a (c* + (1-c*) Y) + v) l: power laws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.optimize

from varprop.errors import AssumptionError, require
from varprop.spec import ModelSpec, MoESpec, TensorRow, layer_table
from varprop.theory.activation import activation_derivative_kernel, activation_kernel, activation_second_moment
from varprop.theory.attention import attention_gains
from varprop.theory.domain import check_number
from varprop.theory.feed_forward import feed_forward_gains, feed_forward_second_moment
from varprop.theory.linear import effective_gain
from varprop.theory.moe import mix_shared, router_overlap

GRID = np.concatenate([np.linspace(0.0, 0.99, 100), 1 - np.geomspace(0.99e-2, 1e-8, 60), [1.0]])
"""Correlations between which roots are looked for: top-k routing puts c* within (v / a)^2 of 1."""


@dataclass(frozen=True)
class Kernel:
    """A feed-forward part at unit input and infinite width: v, kappa(c) of an array and its derivative at a number."""

    increment: float
    ratio: Callable[[Any], Any]
    slope: Callable[[float], float]


def correlation_step(second_moment: Any, correlation: Any, power: Any, covariance: Any) -> Any:
    """Token correlation after a residual sum with an uncorrelated branch: (q c + k) / (q + p).

    second_moment, correlation: q > 0 and c of the stream; power, covariance: p and k of the branch, its second moment
    and the covariance of two tokens. Exact. Source: derived in proofs/prove_collapse.py.

    >>> correlation_step(1.0, 0.5, 1.0, 0.0)
    0.25
    """
    return (second_moment * correlation + covariance) / (second_moment + power)


def correlation_drift(
    correlation: Any, attention_gain: Any, increment: Any, kernel: Any, participation: Any = 0, overlap: Any = 0
) -> Any:
    """D(c) = a (c + (1 - c) X) + v kappa - c (a (c + (1 - c) Y) + v): the correlation moves by D / q per layer.

    correlation: c; attention_gain, increment: a, v; kernel: kappa(c); participation, overlap: Y, X (0: infinitely many
    tokens). One block moves c by exactly D / q' to first order in 1 / q. For X = Y = 0 and a gated network
    D = c (a (1 - c) - v (1 - g(c))). Source: derived in proofs/prove_collapse.py.

    >>> correlation_drift(0.5, attention_gain=1.0, increment=2.0, kernel=0.25)
    -0.25
    """
    covariance = attention_gain * (correlation + (1 - correlation) * overlap) + increment * kernel
    power = attention_gain * (correlation + (1 - correlation) * participation) + increment
    return covariance - correlation * power


def approach_exponent(correlation: Any, attention_gain: Any, increment: Any, kernel_slope: Any) -> Any:
    """Exponent of c - c* ~ l^exponent near a fixed point c*, infinitely many tokens: D'(c*) / (a c* + v).

    (a (1 - 2 c*) - v (1 - kappa'(c*))) / (a c* + v); negative where c* is stable. At c* = 1 of a gated network
    -(a - v g'(1)) / (a + v); of ReLU -a / (a + v). kernel_slope: kappa'(c*). Exact for l -> infinity.
    Source: derived in proofs/prove_collapse.py. Checked by: tests/theory/test_collapse.py by iteration.

    >>> approach_exponent(1.0, attention_gain=1.0, increment=1.0, kernel_slope=1.0)
    -0.5
    """
    slope = attention_gain * (1 - 2 * correlation) - increment * (1 - kernel_slope)
    return slope / (attention_gain * correlation + increment)


def rank_collapse(correlation: Any, strength: Any, n_tokens: Any) -> Any:
    """Token correlation under uniform attention and linear feed-forward parts: Noci et al. 2022 (2206.03126).

    (E (1 + (T-1) c) - (1 - c)) / (E (1 + (T-1) c) + (T-1)(1 - c)). correlation: c of the embeddings; strength: E, the
    product of (1 + alpha^2) over the attention branches (e^{A^2} for alpha = A / sqrt(L) and many layers); n_tokens: T.
    Holds without a norm, or for equal norms at every branch. Exact. Source: derived in proofs/prove_collapse.py.

    >>> rank_collapse(0.0, 1.0, 32), rank_collapse(1.0, 2.0, 32)
    (0.0, 1.0)
    """
    total, rest = strength * (1 + (n_tokens - 1) * correlation), 1 - correlation
    return (total - rest) / (total + (n_tokens - 1) * rest)


@dataclass(frozen=True)
class TokenCollapse:
    """Where the token correlation of a spec goes in depth, for infinitely many tokens.

    attention_gain: a = sigma_OV^2 after masks; increment: v; balance: a / (v (1 - kappa'(0))), the side of the line:
    above 1, c = 0 is unstable (infinity where uncorrelated tokens become correlated at once, kappa(0) > 0);
    fixed_point: c* that small correlations tend to; exponent: of |c - c*| ~ l^exponent (0: slower than any
    power).
    """

    attention_gain: float
    increment: float
    balance: float
    fixed_point: float
    exponent: float

    @property
    def collapses(self) -> bool:
        """Whether small token correlations grow."""
        return self.balance > 1


def token_collapse(spec: ModelSpec, layer: int = 1, *, token_correlation: float = 0.0) -> TokenCollapse:
    """Fixed point of the token correlation of a Pre-LN model and its stability, infinite width and many tokens.

    layer: whose gains are used; token_correlation: where the flow starts (0: just above 0). Roots of
    `correlation_drift`; quadrature (mixtures near c = 1: 1 - c* within 40 %). Raises `AssumptionError` for other norm
    placements than "pre", for windows and for expert-choice routing. Source: derived in proofs/prove_collapse.py.
    Checked by: tests/theory/test_collapse.py.

    >>> from varprop.spec import AttentionSpec, FeedForwardSpec, ModelSpec
    >>> parts = {"attention": AttentionSpec(n_heads=4), "feed_forward": FeedForwardSpec(d_ff=64)}
    >>> spec = ModelSpec(d_model=64, n_layers=4, **parts)
    >>> token_collapse(spec).fixed_point
    1.0
    """
    check_number("token_correlation", token_correlation, 0, 1)
    check_number("layer", layer, 1, spec.n_layers, integer=True)
    placement = spec.norm_placement(layer)
    require(placement == "pre", AssumptionError, "norm.placement", placement, "not covered here", "'pre'")
    gain = attention_strength(spec, layer)
    kernel = feed_forward_kernel(spec, layer)
    increment = kernel.increment

    def drift(c: Any) -> Any:
        return correlation_drift(c, gain, increment, kernel.ratio(np.atleast_1d(c)))

    line = increment * (1 - kernel.slope(0.0))
    if float(kernel.ratio(np.zeros(1))[0]) > 1e-12:
        balance = float("inf")
    elif line > 0:
        balance = gain / line
    else:
        balance = float("inf") if gain > 0 else 0.0
    fixed_point = _attractor(drift, token_correlation, balance > 1)
    if gain * fixed_point + increment == 0:
        return TokenCollapse(gain, increment, balance, fixed_point, 0.0)
    exponent = float(approach_exponent(fixed_point, gain, increment, kernel.slope(fixed_point)))
    return TokenCollapse(gain, increment, balance, fixed_point, exponent)


def attention_strength(spec: ModelSpec, layer: int) -> float:
    """a = sigma_OV^2 of one layer after masks and the branch scale; 0 without attention.

    Masking keys after the softmax multiplies the row sums, and with infinitely many tokens a, by the density squared.
    """
    part = spec.attention
    if part is None:
        return 0.0
    require(
        part.pattern != "window", AssumptionError, "attention.pattern", part.pattern, "not covered", "full or causal"
    )
    kept = part.key_mask_density**2 if part.key_mask_place == "after_softmax" else 1.0
    return spec.branch_scale**2 * kept * attention_gains(spec, layer).value_output


def feed_forward_kernel(spec: ModelSpec, layer: int) -> Kernel:
    """The feed-forward part or mixture of a layer, branch scale included; increment 0 and kappa(c) = c without one."""
    rows, scale = layer_table(spec, layer), spec.branch_scale**2
    if spec.is_moe(layer):
        assert spec.moe is not None
        kernel = _mixture(spec.moe, rows)
    elif spec.feed_forward is not None:
        kernel = _dense(rows, "mlp.", spec.feed_forward.activation, spec.feed_forward.gated)
    else:
        kernel = Kernel(0.0, lambda c: np.asarray(c, dtype=float), lambda c: 1.0)
    return Kernel(scale * kernel.increment, kernel.ratio, kernel.slope)


def _dense(rows: dict[str, TensorRow], prefix: str, activation: str, gated: bool) -> Kernel:
    matrices = {name.removeprefix(prefix): row for name, row in rows.items() if name.startswith(prefix)}
    gains = feed_forward_gains(matrices)
    value = float(feed_forward_second_moment(1.0, gains, activation, gated))
    power = float(activation_second_moment(activation, gains.inner))

    def pair(c: Any) -> Any:
        return activation_kernel(activation, gains.inner, c) / power

    def ratio(c: np.ndarray) -> np.ndarray:
        return pair(c) * (c if gated else 1.0)

    def slope(c: float) -> float:
        inner = gains.inner * float(activation_derivative_kernel(activation, gains.inner, c)) / power
        return float(pair(c)) + c * inner if gated else inner

    return Kernel(value, ratio, slope)


def _mixture(part: MoESpec, rows: dict[str, TensorRow]) -> Kernel:
    """Routed experts, whose kernel takes the overlap of the gates as a factor, and shared ones."""
    require(part.routing == "token_choice", AssumptionError, "moe.routing", part.routing, "not covered", "token_choice")
    require(not part.shared_gate, AssumptionError, "moe.shared_gate", part.shared_gate, "not covered here", "false")
    expert = _dense(rows, "moe.experts.", part.activation, part.gated)
    std = effective_gain(rows["moe.router"]) ** 0.5
    moment = float(router_overlap(part, std, 1.0))  # gate_multiplier^2 S_2
    routed = moment * expert.increment
    shared = Kernel(0.0, lambda c: np.asarray(c, dtype=float), lambda c: 1.0)
    if part.n_shared_experts:
        shared = _dense(rows, "moe.shared.", part.activation, part.gated)
    mixing = part.shared_mixing if part.n_shared_experts else "sum"
    total = mix_shared(routed, shared.increment, part.top_k, mixing)

    def overlap(c: Any) -> Any:
        return router_overlap(part, std, c) / moment

    def ratio(c: np.ndarray) -> np.ndarray:
        own = routed * overlap(c) * expert.ratio(c)
        return mix_shared(own, shared.increment * shared.ratio(c), part.top_k, mixing) / total

    def slope(c: float) -> float:
        if c == 1.0 and part.top_k < part.n_experts:
            return float("inf")  # equal tokens part at once: 1 - O falls like sqrt(1 - c)
        step = min(1e-4, 0.1 * (1 - c)) if c < 1 else 1e-6
        high = min(c + step, 1.0)
        rise = float(overlap(high) - overlap(c - step)) / (high - c + step)
        own = float(overlap(c)) * expert.slope(c) + rise * float(expert.ratio(np.float64(c)))
        return mix_shared(routed * own, shared.increment * shared.slope(c), part.top_k, mixing) / total

    return Kernel(total, ratio, slope)


STILL = 1e-12
"""A drift this small is rounding: the flow stands still."""


def _attractor(drift: Callable[[Any], Any], start: float, leaves_zero: bool) -> float:
    """The first root of the drift that the flow from `start` meets."""
    values = drift(GRID)
    values[-1] = 0.0  # equal tokens stay equal
    if start == 1.0:
        return 1.0
    if start == 0.0:
        if not leaves_zero:
            return 0.0
        rising, index = True, 0
    else:
        here = float(drift(start)[0])
        if abs(here) <= STILL:
            return start
        rising = here > 0
        index = int(np.searchsorted(GRID, start))
    while rising and index < len(GRID) - 1:
        index += 1
        if values[index] < 0:
            low = max(start, float(GRID[index - 1]), 1e-9)
            return _root(drift, low, float(GRID[index]))
    if rising:
        return 1.0
    while index > 0:
        index -= 1
        if values[index] > 0:
            return _root(drift, float(GRID[index]), min(1.0, float(GRID[index + 1]), start))
    return 0.0


def _root(drift: Callable[[Any], Any], low: float, high: float) -> float:
    if drift(low)[0] <= 0 or drift(high)[0] >= 0:
        return low
    root: Any = scipy.optimize.brentq(lambda c: float(drift(c)[0]), low, high, xtol=1e-12)
    return float(root)
