"""Growth laws: how the second moment q_L of the last layer grows with the depth L, with exact asymptotes.

`classify` takes the increments of one block's branches (`Increment`: constant, falling with the layer as in LNS, or
with the depth as in scaled initialisation), the branch correlation r and the skip scale; `classify_spec` reads them off
a `ModelSpec`. The recursion and its proofs are in stream.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from varprop.errors import AssumptionError, require
from varprop.spec import ModelSpec, layer_table
from varprop.theory.collapse import attention_strength, feed_forward_kernel, token_collapse
from varprop.theory.domain import check_number
from varprop.theory.linear import effective_gain
from varprop.theory.stream import (
    aligned_asymptote,
    check_correlation,
    power_sum,
    stationary_second_moment,
    stream_step,
    zeta,
)

Law = Literal["bounded", "logarithmic", "linear", "polynomial", "exponential"]
N_ITERATED = 4096
"""Layers that are iterated where a limit has no closed form."""


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
    counted = proportional or skip_scale != 1  # a branch that adds nothing still takes the skip scale
    branches = [b for b in increments if b.value > 0 or counted]
    check_correlation(correlation)
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
    return branch.value * zeta(branch.layer_power) if branch.depth_power == 0 else 0.0


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
    scaled = [b for b in leading if b.depth_power > 0 and b.layer_power < 2] if top == 0 else []
    drift = correlation * sum(math.sqrt(b.value) / (1 - b.layer_power / 2) for b in scaled)
    summable = [b for b in branches if b.depth_power == 0]
    if summable:  # layer powers above 2: the limit has no closed form
        return _summable(summable, drift, correlation, start, assumption)
    limit = (math.sqrt(start) + drift) ** 2
    return GrowthLaw("bounded", 0.0, limit, assumption, asymptote)


def _summable(
    branches: Sequence[Increment], drift: float, correlation: float, start: float, assumption: str
) -> GrowthLaw:
    """Limit of a recursion whose amplitudes sum up: N_ITERATED layers, then the rest of the sum of r sqrt(v).

    drift: what branches scaled with depth add to sqrt(q), at layers l ~ L, where the others have settled.
    """
    value = start
    for layer in range(1, N_ITERATED + 1):
        for b in branches:
            value = float(stream_step(value, b.value * layer**-b.layer_power, correlation))
    powers = [(math.sqrt(b.value), b.layer_power / 2) for b in branches]
    rest = sum(root * (zeta(power) - float(power_sum(N_ITERATED, power))) for root, power in powers)
    limit = math.sqrt(value) + correlation * rest + drift

    def asymptote(depth: Any) -> Any:
        n = np.asarray(depth, dtype=float)
        tail = sum(root * (zeta(power) - power_sum(n, power)) for root, power in powers)
        return (limit - correlation * tail) ** 2

    return GrowthLaw("bounded", 0.0, limit**2, assumption, asymptote)


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


def classify_spec(spec: ModelSpec, *, correlation: float = 0.0, token_correlation: float | None = None) -> GrowthLaw:
    """The growth law of a model family in its depth: `classify` with the increments of `spec`.

    correlation: r of every branch with the stream (0 at initialisation); token_correlation: c of the tokens, which sets
    the attention's increment sigma_OV^2 c (infinitely many tokens); None: the limit c* of `token_collapse`.
    Norm placements: pre, lns, peri and reordered (increments 1 per branch), mix (the pre layers), post (1). Residual
    rules and output scaling enter as powers of the depth. Exact coefficients for infinite width and many tokens; for
    lns with gated or smooth activations the leading power of 1 / l, whose bounded sums are 9 % (silu) and 14 % (gelu)
    low at unit gains. Raises `AssumptionError` for mixed MoE patterns, and where `classify` or `token_collapse` does.
    Source: derived in proofs/prove_growth.py. Checked by: tests/theory/test_growth.py.

    >>> from varprop.spec import FeedForwardSpec, ModelSpec, NormSpec
    >>> spec = ModelSpec(d_model=64, n_layers=4, feed_forward=FeedForwardSpec(d_ff=64, activation="relu", gated=False))
    >>> round(classify_spec(spec).coefficient, 9), classify_spec(spec.with_fields(norm=NormSpec(placement="lns"))).law
    (0.5, 'logarithmic')
    """
    placement = spec.norm.placement
    start = (spec.tensor_table()[0].init_std * spec.embedding_scale) ** 2
    require(len(set(spec.moe_pattern)) < 2, AssumptionError, "moe_pattern", spec.moe_pattern, "mixed", "equal layers")
    if placement == "post":
        text = "the norm holds the stream at 1"
        return GrowthLaw("bounded", 0.0, 1.0, text, lambda depth: 1.0 + 0 * np.asarray(depth, dtype=float))
    if placement == "mix":
        post = spec.norm.post_fraction
        pre = spec.with_fields({"norm.placement": "pre", "embedding_scale": spec.embedding_scale / start**0.5})
        return _stretched(classify_spec(pre, correlation=correlation, token_correlation=token_correlation), 1 - post)
    branches = _increments(spec, token_correlation)
    return classify(branches, correlation=correlation, start=start, skip_scale=spec.skip_scale)


def _stretched(law: GrowthLaw, fraction: float) -> GrowthLaw:
    """The law of a stack where only this fraction of the layers adds to the stream."""
    if fraction == 0:
        return GrowthLaw("bounded", 0.0, 1.0, law.assumption, lambda depth: 1.0 + 0 * np.asarray(depth, dtype=float))
    coefficient = law.coefficient * fraction**law.exponent if _is_power(law) else law.coefficient
    exponent = law.exponent * fraction if law.law == "exponential" else law.exponent
    asymptote = law.asymptote
    return GrowthLaw(law.law, exponent, coefficient, law.assumption, lambda depth: asymptote(fraction * depth))


def _is_power(law: GrowthLaw) -> bool:
    return law.law in ("linear", "polynomial")


def _increments(spec: ModelSpec, token_correlation: float | None) -> list[Increment]:
    """Increments of the branches of a block, for any layer and depth."""
    power = {"one": 0.0, "inverse_sqrt_2L": 1.0, "inverse_sqrt_L": 1.0, "inverse_L": 2.0, "deepnorm": 0.0}
    residual = power[spec.residual.rule]
    has_feed_forward = spec.feed_forward is not None or spec.moe is not None
    if spec.norm.placement in ("peri", "reordered"):
        count = (spec.attention is not None) + has_feed_forward
        return [Increment(spec.branch_scale**2 * spec.n_layers**residual, 0.0, residual)] * count
    if spec.init.output_scaling == "inverse_sqrt_2L":
        kept = [name for name, _ in spec.init.overrides if name in ("o", "down")]
        require(not kept, AssumptionError, "init.overrides", kept, "without the output scaling", "no 'o' or 'down'")
        residual += 1
    scale, lns = spec.n_layers**residual, spec.norm.placement == "lns"
    found = []
    if spec.attention is not None:
        c = _asymptotic_correlation(spec) if token_correlation is None else token_correlation
        check_number("token_correlation", c, 0, 1)
        found.append(Increment(scale * attention_strength(spec, spec.n_layers) * c, float(lns), residual))
    if has_feed_forward:
        value, layer_power = _small_signal(spec) if lns else (feed_forward_kernel(spec, spec.n_layers).increment, 0.0)
        found.append(Increment(scale * value, layer_power, residual))
    if spec.block == "parallel" and len(found) == 2 and found[0].layer_power == found[1].layer_power:
        return [Increment(found[0].value + found[1].value, found[0].layer_power, residual)]
    return found


def _asymptotic_correlation(spec: ModelSpec) -> float:
    """c* of the spec; under lns smooth feed-forward parts become linear in depth and attention makes tokens equal."""
    if spec.norm.placement != "lns" or spec.feed_forward is None:
        return token_collapse(spec, spec.n_layers).fixed_point
    part = spec.feed_forward
    if part.gated or part.activation not in ("relu", "identity"):
        return 1.0
    return token_collapse(spec.with_fields({"norm.placement": "pre"}), spec.n_layers).fixed_point


SMALL_SIGNAL = {
    "relu": (0.5, 1),
    "relu2": (1.5, 2),
    "identity": (1.0, 1),
    "gelu": (0.25, 1),
    "gelu_tanh": (0.25, 1),
    "silu": (0.25, 1),
}
"""E phi(h)^2 -> coefficient * variance^power for small variance (exact for relu, relu2, identity)."""


def _small_signal(spec: ModelSpec) -> tuple[float, float]:
    """(value, p) with v_l -> value * l^-p of a feed-forward part under lns, where its input has variance 1 / l."""
    part = spec.feed_forward
    require(part is not None, AssumptionError, "moe", spec.moe, "not covered with norm.placement='lns'", "feed_forward")
    assert part is not None
    rows = {name: effective_gain(row) for name, row in layer_table(spec, 1).items() if name.startswith("mlp.")}
    coefficient, power = SMALL_SIGNAL[part.activation]
    inner = rows["mlp.gate" if part.gated else "mlp.up"]
    value = spec.branch_scale**2 * rows["mlp.down"] * coefficient * inner**power
    return (value * rows["mlp.up"], power + 1.0) if part.gated else (value, float(power))
