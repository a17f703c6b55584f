"""Mixtures of experts: routed output E f_t.f_s / d = O_ts K_E(t, s), O_ts = E sum_i g_i(t) g_i(s) over gates g.

Exact when the experts are independent of each other and of the router. The gates' laws are in gates.py (one token: S_2,
`gate_second_moment`), overlap.py (two tokens: `gate_overlap`) and expert_choice.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from varprop.errors import AssumptionError, require
from varprop.spec import ModelSpec, MoESpec, TensorRow, layer_table
from varprop.theory.activation import activation_kernel
from varprop.theory.expert_choice import expert_choice_gates
from varprop.theory.feed_forward import (
    FeedForwardGains,
    feed_forward_covariance,
    feed_forward_gains,
    feed_forward_second_moment,
)
from varprop.theory.gates import gate_first_moment
from varprop.theory.linear import effective_gain
from varprop.theory.namespace import checked
from varprop.theory.norm import cosine_mean, cosine_variance
from varprop.theory.overlap import gate_overlap
from varprop.theory.quadrature import normal_nodes

N_CHOICE_ANGLES = 7
"""Token correlations at which expert-choice gates are evaluated."""


@dataclass(frozen=True)
class MoEGains:
    """Gains fan_in * Var(w) after masks; numbers, or arrays that broadcast with the tokens' moments.

    router: of the router; experts: of each routed expert; shared: of the shared experts, evaluated as one network, None
    without; shared_gate: of the shared experts' gate, None without.
    """

    router: Any
    experts: FeedForwardGains
    shared: FeedForwardGains | None = None
    shared_gate: Any = None


def moe_gains(rows: Mapping[str, TensorRow]) -> MoEGains:
    """Gains of a layer's mixture from its tensors, by their name within the layer (`moe.router`)."""
    shared = _matrices(rows, "moe.shared.")
    gate = rows.get("moe.shared_gate")
    return MoEGains(
        effective_gain(rows["moe.router"]),
        feed_forward_gains(_matrices(rows, "moe.experts.")),
        feed_forward_gains(shared) if shared else None,
        None if gate is None else effective_gain(gate),
    )


def _matrices(rows: Mapping[str, TensorRow], prefix: str) -> dict[str, TensorRow]:
    return {name.removeprefix(prefix): row for name, row in rows.items() if name.startswith(prefix)}


def mix_shared(routed: Any, shared: Any, top_k: Any, mixing: str) -> Any:
    """Moments of routed and shared outputs combined: sum, or mean = (shared + top_k * routed) / (top_k + 1).

    Exact for independent routed and shared experts. Source: derived in proofs/prove_moe.py.

    >>> mix_shared(1.0, 2.0, 2, "sum"), mix_shared(1.0, 5.0, 2, "mean")
    (3.0, 1.0)
    """
    return routed + shared if mixing == "sum" else (shared + top_k**2 * routed) / (top_k + 1) ** 2


def router_overlap(part: MoESpec, logit_std: Any, correlation: Any, other_std: Any = None) -> Any:
    """`gate_overlap` of a mixture's router for two tokens of logit stds s and s', times gate_multiplier^2.

    other_std: s', None for the same. Unlike stds take O at their geometric mean, times S_1(s) S_1(s') / S_1(mean)^2:
    exact at c = 0, within 0.5 % for s'^2 = 2 s^2 and 1.6 % for s'^2 = 5 s^2 (E = 64, k = 8, s near 0.7).
    Raises `AssumptionError` for expert choice (`expert_choice_gates`). Source: derived in proofs/prove_overlap.py.
    Checked by: tests/theory/test_moe.py.

    >>> part = MoESpec(n_experts=4, top_k=1, d_expert=8, normalize_gates=True, gate_multiplier=2.0)
    >>> [round(float(router_overlap(part, 1.0, 0.0, std)), 9) for std in (1.0, 2.0)]
    [1.0, 1.0]
    """
    require(part.routing == "token_choice", AssumptionError, "moe.routing", part.routing, "not covered", "token_choice")
    law = {"normalize": part.normalize_gates, "router": part.router, "gate_order": part.gate_order}
    size = part.n_experts, part.top_k
    scale = part.gate_multiplier**2
    if other_std is None or np.array_equal(logit_std, other_std):
        return scale * gate_overlap(*size, logit_std, correlation, **law)
    middle = np.sqrt(np.asarray(logit_std) * other_std)
    first, second, mean = (gate_first_moment(*size, std, **law) for std in (logit_std, other_std, middle))
    return scale * first * second / mean**2 * gate_overlap(*size, middle, correlation, **law)


def moe_second_moment(second_moment: Any, gains: MoEGains, part: MoESpec) -> Any:
    """Second moment of a mixture's output: S_2 v_E, plus the shared experts' v_S by `mix_shared`.

    second_moment: m = |u|^2 / d of the input, >= 0, an array that broadcasts with the gains; router logits have the
    variance (router gain) m; a shared gate multiplies v_S by E sigmoid^2. Exact for the realised m, up to the
    quadrature and interpolation of S_2 (relative error below 1e-5). Raises `AssumptionError` for expert choice and
    outside the domains. Source: derived in proofs/prove_moe.py. Checked by: tests/theory/test_moe.py.

    >>> part = MoESpec(n_experts=4, top_k=1, d_expert=8, activation="relu", gated=False, normalize_gates=True)
    >>> float(moe_second_moment(1.0, MoEGains(1.0, FeedForwardGains(1.0, 1.0, 1.0)), part))
    0.5
    """
    m = np.asarray(checked("second_moment", second_moment, "numbers >= 0", 0.0), dtype=float)
    routed = router_overlap(part, np.sqrt(gains.router * m), 1.0)
    routed = routed * feed_forward_second_moment(m, gains.experts, part.activation, part.gated)
    if gains.shared is None:
        return routed
    shared = feed_forward_second_moment(m, gains.shared, part.activation, part.gated)
    if gains.shared_gate is not None:
        shared = shared * activation_kernel("sigmoid", gains.shared_gate * m, 1.0)
    return mix_shared(routed, shared, part.top_k, part.shared_mixing)


def moe_covariance(
    second_moment: Any, other: Any, cosine: Any, gains: MoEGains, part: MoESpec, d_model: float = np.inf
) -> Any:
    """Mean of f_t.f_s / d for two tokens: O(c) K_E(c), plus the shared experts' covariance by `mix_shared`.

    second_moment, other: m and m' of the two inputs; cosine: correlation of their entries, which is also that of the
    router logits. All broadcast. The cosine fluctuates at width d_model, as in `feed_forward_covariance`: the product
    is averaged over it by the three-point Gauss rule, up to O(1/d^2). O carries the error of `router_overlap`: a
    standard error below 0.3 % for top_k >= 4. Raises `AssumptionError` as `moe_second_moment` does. Source: derived in
    proofs/prove_moe.py. Checked by: tests/theory/test_moe.py.

    >>> part = MoESpec(n_experts=4, top_k=1, d_expert=8, activation="relu", gated=False, normalize_gates=True)
    >>> gains = MoEGains(1.0, FeedForwardGains(1.0, 1.0, 1.0))
    >>> round(float(moe_covariance(1.0, 1.0, 0.0, gains, part) * 8 * np.pi), 9)
    1.0
    """
    m = np.asarray(checked("second_moment", second_moment, "numbers >= 0", 0.0), dtype=float)
    n = np.asarray(checked("other", other, "numbers >= 0", 0.0), dtype=float)
    c = np.asarray(checked("cosine", cosine, "numbers in [-1, 1]", -1 - 1e-9, 1 + 1e-9), dtype=float)
    total = np.zeros(())
    for moved, probability in _cosine_law(np.clip(c, -1.0, 1.0), d_model):
        routed = router_overlap(part, np.sqrt(gains.router * m), moved, np.sqrt(gains.router * n))
        routed = routed * feed_forward_covariance(m, n, moved, gains.experts, part.activation, part.gated)
        if gains.shared is not None:
            shared = feed_forward_covariance(m, n, moved, gains.shared, part.activation, part.gated)
            if gains.shared_gate is not None:
                gate = gains.shared_gate
                shared = shared * activation_kernel("sigmoid", gate * m, moved, gate * n)
            routed = mix_shared(routed, shared, part.top_k, part.shared_mixing)
        total = total + probability * routed
    return total


def expert_choice_moments(
    second_moment: np.ndarray,
    correlation: np.ndarray,
    gains: MoEGains,
    part: MoESpec,
    n_tokens: int,
    d_model: float = np.inf,
) -> tuple[np.ndarray, np.ndarray]:
    """Second moment and covariance of a mixture's output under expert choice, for exchangeable tokens.

    second_moment: m of the inputs, (..., 1); correlation: (n,) in [0, 1], of their entries; results (..., n). The gates
    are `expert_choice_gates` at N_CHOICE_ANGLES angles arccos c and interpolated; their own error, up to 1 %, is most.
    Source: derived in proofs/prove_expert_choice.py. Checked by: tests/theory/test_expert_choice.py.

    >>> part = MoESpec(n_experts=4, top_k=2, d_expert=8, activation="relu", gated=False, router="sigmoid",
    ...                routing="expert_choice")
    >>> gains = MoEGains(1e-12, FeedForwardGains(1.0, 1.0, 1.0))
    >>> q, k = expert_choice_moments(np.ones((1, 1)), np.array([0.0, 1.0]), gains, part, 64)
    >>> q.round(3).tolist()  # two experts of gate 1/2 on average
    [[0.25, 0.25]]
    """
    law = {"normalize": part.normalize_gates, "router": part.router, "gate_order": part.gate_order}
    nodes = np.polynomial.chebyshev.chebpts1(N_CHOICE_ANGLES)
    cosines = np.cos((nodes + 1) * np.pi / 4)
    std = np.broadcast_to(np.sqrt(gains.router * second_moment), second_moment.shape)
    found = []
    for s in std.ravel():
        each = [expert_choice_gates(part.n_experts, part.top_k, float(s), n_tokens, float(c), **law) for c in cosines]
        series = np.polynomial.chebyshev.chebfit(
            nodes, [[e.second_moment, e.overlap] for e in each], N_CHOICE_ANGLES - 1
        )
        found.append(np.polynomial.chebyshev.chebval(np.arccos(correlation) * 4 / np.pi - 1, series))
    power, overlap = np.moveaxis(np.reshape(found, (*second_moment.shape[:-1], 2, len(correlation))), -2, 0)
    inputs = second_moment, second_moment, correlation
    scale, functions = part.gate_multiplier**2, (part.activation, part.gated)
    diagonal = scale * power * feed_forward_second_moment(second_moment, gains.experts, *functions)
    covariance = scale * overlap * feed_forward_covariance(*inputs, gains.experts, *functions, d_model)
    if gains.shared is None:
        return diagonal, covariance
    shared = feed_forward_second_moment(second_moment, gains.shared, *functions)
    pair = feed_forward_covariance(*inputs, gains.shared, *functions, d_model)
    if gains.shared_gate is not None:
        variance = gains.shared_gate * second_moment
        shared, pair = (
            shared * activation_kernel("sigmoid", variance, 1.0),
            pair * activation_kernel("sigmoid", variance, correlation),
        )
    mixing = part.top_k, part.shared_mixing
    return mix_shared(diagonal, shared, *mixing), mix_shared(covariance, pair, *mixing)


def _cosine_law(cosine: np.ndarray, d_model: float) -> list[tuple[np.ndarray, float]]:
    """Values and probabilities of the cosine of two tokens whose entries have this correlation."""
    if np.isinf(d_model):
        return [(cosine, 1.0)]
    centre, spread = cosine_mean(cosine, d_model), np.sqrt(cosine_variance(cosine, d_model))
    points, probabilities = normal_nodes(3)
    return [(np.clip(centre + x * spread, -1.0, 1.0), float(p)) for x, p in zip(points, probabilities, strict=True)]


def moe_gram(gram: np.ndarray, rows: Mapping[str, TensorRow], part: MoESpec, d_model: int) -> np.ndarray:
    """Gram matrices of a mixture's output, (..., T, T), from the mean ones of the inputs.

    rows: the layer's tensors by their name within the layer. The diagonal is `moe_second_moment` of each token, the
    rest `moe_covariance`. A token of second moment 0 has cosine 0 with all others.
    """
    gains = moe_gains(rows)
    diagonal = np.diagonal(gram, axis1=-2, axis2=-1)
    first, other = diagonal[..., :, None], diagonal[..., None, :]
    scale = np.sqrt(first * other)
    cosine = np.divide(gram, scale, out=np.zeros_like(scale), where=scale > 0)
    one = diagonal.flat[0]
    if np.all(np.abs(diagonal - one) <= 1e-9 * one):  # as without eps: one logit std for all is much cheaper
        first = other = np.float64(one)
    output = moe_covariance(first, other, np.clip(cosine, -1.0, 1.0), gains, part, d_model)
    index = np.arange(gram.shape[-1])
    output[..., index, index] = moe_second_moment(diagonal, gains, part)
    return output


def moe_against_dense(
    spec: ModelSpec, dense: ModelSpec, layer: int = 1, *, second_moment: float = 1.0, correlation: float = 1.0
) -> dict[str, float]:
    """Factors of the ratio of a mixture's output covariance to a dense feed-forward's, at equal inputs.

    spec, dense: two models, whose layer has a mixture and a dense feed-forward; second_moment: of the normalised input;
    correlation: c of two tokens in (0, 1]; 1 compares second moments. With O the gate overlap, S_2 = O(1) and K the
    covariance of one network's output:

        gates         S_2 (times gate_multiplier^2): gates against a single expert of gate 1; 1 / top_k if k are equal
        expert_width  K_E(c) / K_dense(c): one expert against the dense network. 1 for fan-in initialisation, the ratio
                      of widths d_expert / d_ff for a fixed standard deviation
        routing       O(c) / S_2: two tokens share only some experts; 1 at c = 1
        shared        output with the shared experts over the routed part alone; 1 without
        total         their product

    Quadrature. Raises `AssumptionError` where a layer has no mixture or no dense network, and outside the domains.
    Source: derived in proofs/prove_moe.py. Checked by: tests/theory/test_moe.py.

    >>> from varprop import presets
    >>> factors = moe_against_dense(presets.tiny_moe(), presets.tiny())
    >>> [name for name in factors], factors["routing"]
    (['gates', 'expert_width', 'routing', 'shared', 'total'], 1.0)
    """
    c = float(checked("correlation", correlation, "a number in (0, 1]", 1e-12, 1.0))
    m = float(checked("second_moment", second_moment, "a number > 0", 1e-300))
    part, plain = spec.moe, dense.feed_forward
    good = part is not None and spec.is_moe(layer)
    require(good, AssumptionError, "spec.moe", part, f"not in layer {layer}", "a layer with a mixture")
    good = plain is not None and not dense.is_moe(layer)
    require(good, AssumptionError, "dense.feed_forward", plain, f"not in layer {layer}", "a layer without a mixture")
    assert part is not None
    assert plain is not None
    gains = moe_gains(layer_table(spec, layer))
    reference = feed_forward_gains(_matrices(layer_table(dense, layer), "mlp."))
    std = float(np.sqrt(gains.router * m))
    gates, overlap = (float(router_overlap(part, std, x)) for x in (1.0, c))
    expert = float(feed_forward_covariance(m, m, c, gains.experts, part.activation, part.gated))
    network = float(feed_forward_covariance(m, m, c, reference, plain.activation, plain.gated))
    whole = float(moe_covariance(m, m, c, gains, part))
    routed = overlap * expert
    factors = {"gates": gates, "expert_width": expert / network, "routing": overlap / gates, "shared": whole / routed}
    return {**factors, "total": whole / network}
