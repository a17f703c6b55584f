"""Token correlation c across depth: two scalars (q, c) for exchangeable tokens, their flow and its fixed points.

Per layer of a Pre-LN model, with attention gain a = sigma_OV^2, v the feed-forward second moment and kappa(c) its
token correlation for inputs of correlation c (pair kernel over its value at 1; c g(c) for a gated network):

    attention      q' = q + a (c + (1 - c) Y),   q'c' = q c + a (c + (1 - c) X)
    feed-forward   q' = q + v,                   q'c' = q c + v kappa(c)

Y and X: participation and overlap of the attention rows, both 0 for infinitely many tokens. In depth dc/dl = D(c) / q with
D(c) = a (c + (1-c) X) + v kappa(c) - c (a (c + (1-c) Y) + v), and q grows like (a (c* + (1-c*) Y) + v) l: power laws in l.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.optimize

from varprop.errors import AssumptionError, require
from varprop.spec import ModelSpec, MoESpec, TensorRow, layer_table
from varprop.theory.attention import attention_gains
from varprop.theory.domain import check_number
from varprop.theory.feed_forward import feed_forward_gram
from varprop.theory.linear import effective_gain
from varprop.theory.moe import gate_second_moment, gates, mix_shared

Kernel = Callable[[np.ndarray], np.ndarray]
INFINITE_WIDTH = 10**12
"""Width at which the O(1/d) terms of the feed-forward kernel are below rounding."""
GRID = np.concatenate([np.linspace(0.0, 0.99, 100), 1 - np.geomspace(0.99e-2, 1e-8, 60), [1.0]])
"""Correlations between which roots are looked for: top-k routing puts c* within (v / a)^2 of 1."""
ROUTER_PAIRS = 8192
"""Router draws for the overlap of two tokens' gates, the same ones at every correlation (standard error below 1 %)."""


def correlation_step(second_moment: Any, correlation: Any, power: Any, covariance: Any) -> tuple[Any, Any]:
    """(q, c) after a residual sum with an uncorrelated branch: q + p and (q c + k) / (q + p).

    second_moment, correlation: q > 0 and c of the stream; power, covariance: p and k of the branch, its second moment
    and the covariance of two tokens. Exact. Source: derived in proofs/prove_collapse.py.

    >>> correlation_step(1.0, 0.5, 1.0, 0.0)
    (2.0, 0.25)
    """
    return second_moment + power, (second_moment * correlation + covariance) / (second_moment + power)


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
    above 1, c = 0 is unstable (infinity where uncorrelated tokens become correlated at once, kappa(0) > 0); fixed_point:
    c* that small correlations tend to; exponent: of |c - c*| ~ l^exponent (-infinity where the approach is faster than
    any power; 0: slower).
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
    `correlation_drift`; quadrature (mixtures: 8192 drawn routers, fixed seed). Raises `AssumptionError` for other norm
    placements than "pre", for windows and for expert-choice routing. Source: derived in proofs/prove_collapse.py.
    Checked by: tests/theory/test_collapse.py.

    >>> from varprop.spec import AttentionSpec, FeedForwardSpec, ModelSpec
    >>> spec = ModelSpec(d_model=64, n_layers=4, attention=AttentionSpec(n_heads=4), feed_forward=FeedForwardSpec(d_ff=64))
    >>> token_collapse(spec).fixed_point
    1.0
    """
    check_number("token_correlation", token_correlation, 0, 1)
    check_number("layer", layer, 1, spec.n_layers, integer=True)
    placement = spec.norm_placement(layer)
    require(placement == "pre", AssumptionError, "norm.placement", placement, "not covered here", "'pre'")
    gain = attention_strength(spec, layer)
    increment, kernel = feed_forward_kernel(spec, layer)

    def drift(c: Any) -> Any:
        return correlation_drift(c, gain, increment, kernel(np.atleast_1d(c)))

    at_zero = float(kernel(np.zeros(1))[0])
    opens = at_zero > 1e-12
    line = increment * (1 - _slope(kernel, 0.0))
    balance = float("inf") if gain > 0 else 0.0
    if opens:
        balance = float("inf")
    elif line > 0:
        balance = gain / line
    fixed_point = _attractor(drift, token_correlation, balance > 1)
    if gain * fixed_point + increment == 0:
        return TokenCollapse(gain, increment, balance, fixed_point, 0.0)
    routed = spec.is_moe(layer) and spec.moe is not None and spec.moe.top_k < spec.moe.n_experts
    slope = _slope(kernel, fixed_point, 0.3 * (1 - fixed_point) if routed and fixed_point > 0 else None)
    exponent = float(approach_exponent(fixed_point, gain, increment, slope))
    return TokenCollapse(gain, increment, balance, fixed_point, exponent)


def attention_strength(spec: ModelSpec, layer: int) -> float:
    """a = sigma_OV^2 of one layer after masks and the branch scale; 0 without attention.

    Masking keys after the softmax multiplies the row sums, and with infinitely many tokens a, by the density squared.
    """
    part = spec.attention
    if part is None:
        return 0.0
    require(part.pattern != "window", AssumptionError, "attention.pattern", part.pattern, "not covered", "full or causal")
    kept = part.key_mask_density**2 if part.key_mask_place == "after_softmax" else 1.0
    return spec.branch_scale**2 * kept * attention_gains(spec, layer).value_output


def feed_forward_kernel(spec: ModelSpec, layer: int) -> tuple[float, Kernel]:
    """v of the feed-forward part or mixture at unit input, and kappa(c) at infinite width; (0, identity) without one."""
    rows, scale = layer_table(spec, layer), spec.branch_scale**2
    if spec.is_moe(layer):
        assert spec.moe is not None
        value, kernel = _mixture(spec.moe, rows)
        return scale * value, kernel
    part = spec.feed_forward
    if part is None:
        return 0.0, lambda c: np.asarray(c, dtype=float)
    value, kernel = _dense(rows, "mlp.", part.activation, part.gated)
    return scale * value, kernel


def _dense(rows: dict[str, TensorRow], prefix: str, activation: str, gated: bool) -> tuple[float, Kernel]:
    matrices = {name.removeprefix(prefix): row for name, row in rows.items() if name.startswith(prefix)}
    value = float(feed_forward_gram(np.ones((1, 1, 1)), matrices, activation, gated, INFINITE_WIDTH)[0, 0, 0])

    def kernel(c: np.ndarray) -> np.ndarray:
        c = np.asarray(c, dtype=float)
        gram = np.stack([np.stack([np.ones_like(c), c], -1), np.stack([c, np.ones_like(c)], -1)], -2)
        return feed_forward_gram(gram, matrices, activation, gated, INFINITE_WIDTH)[..., 0, 1] / value

    return value, kernel


def _mixture(part: MoESpec, rows: dict[str, TensorRow]) -> tuple[float, Kernel]:
    """Routed experts, whose kernel takes the overlap of the gates as a factor, and shared ones."""
    require(part.routing == "token_choice", AssumptionError, "moe.routing", part.routing, "not covered", "token_choice")
    expert, kernel = _dense(rows, "moe.experts.", part.activation, part.gated)
    std = effective_gain(rows["moe.router"]) ** 0.5
    order, normalize = part.gate_order, part.normalize_gates
    moment = gate_second_moment(
        part.n_experts, part.top_k, std, normalize=normalize, router=part.router, gate_order=order
    )
    first, second = np.random.default_rng(0).standard_normal((2, ROUTER_PAIRS, part.n_experts))
    own = gates(std * first, part)

    def overlap(c: float) -> float:
        other = gates(std * (c * first + max(0.0, 1 - c**2) ** 0.5 * second), part)
        norm = np.sqrt(np.mean(np.sum(own**2, -1)) * np.mean(np.sum(other**2, -1)))
        return float(np.mean(np.sum(own * other, -1)) / norm)

    def routed(c: np.ndarray) -> np.ndarray:
        return kernel(c) * np.array([overlap(float(x)) for x in c])

    value = part.gate_multiplier**2 * moment * expert
    if part.n_shared_experts == 0:
        return value, routed
    shared, shared_kernel = _dense(rows, "moe.shared.", part.activation, part.gated)
    require(not part.shared_gate, AssumptionError, "moe.shared_gate", True, "not covered here", "false")
    total = mix_shared(value, shared, part.top_k, part.shared_mixing)

    def mixed(c: np.ndarray) -> np.ndarray:
        both = mix_shared(value * routed(c), shared * shared_kernel(c), part.top_k, part.shared_mixing)
        return both / total

    return total, mixed


def _attractor(drift: Callable[[Any], Any], start: float, leaves_zero: bool) -> float:
    """The first root of the drift that the flow from `start` meets."""
    values = drift(GRID)
    values[-1] = 0.0  # equal tokens stay equal
    if start == 0.0:
        if not leaves_zero:
            return 0.0
        rising, index = True, 0
    else:
        rising = float(drift(start)[0]) > 0
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
    return float(scipy.optimize.brentq(lambda c: float(drift(c)[0]), low, high, xtol=1e-12))


def _slope(kernel: Kernel, c: float, step: float | None = None) -> float:
    """kappa'(c) by differences; at 1 from below, where relu kernels have half-integer powers of 1 - c.

    Richardson over (1 - c)^{1/2, 1, 3/2, 2}: error below 1e-6 for dense networks.
    """
    if step is not None or c < 1 - 1e-4:
        step = 1e-5 if step is None else step
        below, above = kernel(np.array([c - step, c + step]))
        return float(above - below) / (2 * step)
    steps = 1e-3 / 4.0 ** np.arange(5)
    table = list((1 - kernel(1 - steps)) / steps)
    for order in (2, 4, 8, 16):
        table = [(order * finer - coarser) / (order - 1) for coarser, finer in zip(table, table[1:], strict=False)]
    return float(table[0])
