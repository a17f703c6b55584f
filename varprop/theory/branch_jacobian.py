"""Powers of branch Jacobians df/dx at initialisation, f(u) with u = N(x): E||df/dx||_F^2 / d in three definitions.

The norm removes the direction of u from du/dx, so that the derivative of Gaussian weights is independent of their
pre-activations: the power of a feed-forward is exact given the realised second moment. Attention and pairs of tokens
are leading order in 1/d. Tokens are taken as exchangeable with the given second moment and correlation, in causal
attention too. The definitions are those of `jacobian.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from varprop.errors import AssumptionError, require
from varprop.spec import ModelSpec, layer_table
from varprop.theory.activation import (
    activation_derivative_kernel,
    activation_derivative_second_moment,
    activation_kernel,
    activation_second_moment,
)
from varprop.theory.attention import attention_gains, incoherent_average
from varprop.theory.feed_forward import feed_forward_covariance, feed_forward_gains, feed_forward_second_moment
from varprop.theory.gate_jacobian import gate_jacobian
from varprop.theory.linear import effective_gain
from varprop.theory.moe import mix_shared, router_overlap
from varprop.theory.norm import centred_second_moment, normalised_second_moment
from varprop.theory.softmax_jacobian import (
    SoftmaxAverages,
    mean_rotation,
    softmax_averages,
    softmax_sources,
)

Jacobian = dict[str, Any]
"""A value for each definition: a float, or an array of the shape of the moments."""


def norm_jacobian(second_moment: Any, correlation: Any, eps: Any, d_model: Any, centred: Any = 0) -> Any:
    """tr(N_t N_s') / d of a norm at two tokens, N = du/dx = (I - u u'/d) / sqrt(q + eps):

    (1 - (centred + 2 m - m^2 c^2) / d) / (q + eps),   m = q / (q + eps).

    second_moment: q of both tokens (variance over entries for layer norm, centred = 1); correlation: their cosine c, 1
    for one token: (1 - 1/d) / q without eps. Exact given the realised q and c.
    Source: derived in proofs/prove_backward.py.

    >>> norm_jacobian(2.0, 1.0, 0.0, 4), norm_jacobian(1.0, 0.0, 0.0, 4)
    (0.375, 0.5)
    """
    m = second_moment / (second_moment + eps)
    return (1 - (centred + 2 * m - m**2 * correlation**2) / d_model) / (second_moment + eps)


def plain_jacobian(derivative_kernel: Any, inner_gain: Any, down_gain: Any) -> Any:
    """E tr(F_t F_s') / d of F = d down(phi(up u)) / du: down_gain * inner_gain * E phi'(h_t) phi'(h_s).

    derivative_kernel: E phi'(h_t) phi'(h_s); E phi'^2 for one token, then exact. Pairs: leading order in 1/d.
    Source: derived in proofs/prove_backward.py.

    >>> plain_jacobian(0.5, 2.0, 3.0)
    3.0
    """
    return down_gain * inner_gain * derivative_kernel


def gated_jacobian(
    covariance: Any, derivative_kernel: Any, kernel: Any, inner_gain: Any, up_gain: Any, down_gain: Any
) -> Any:
    """E tr(F_t F_s') / d of a gated network: down up (gate * C E phi'(h_t) phi'(h_s) + E phi(h_t) phi(h_s)).

    covariance: C = u_t.u_s / d, the second moment for one token; derivative_kernel, kernel: E phi' phi' and E phi phi'
    of the gate's pre-activations; inner_gain: of the gate. Exact for one token; pairs: leading order in 1/d.
    Source: derived in proofs/prove_backward.py.

    >>> gated_jacobian(0.5, 1.0, 0.25, 1.0, 2.0, 3.0)
    4.5
    """
    return down_gain * up_gain * (inner_gain * covariance * derivative_kernel + kernel)


def gated_sum_jacobian(gates: Any, expert: Any, gate_square: Any, router_gain: Any, expert_moment: Any) -> Any:
    """Jacobian power of sum_i g_i E_i: gates * expert + router_gain * gate_square * expert_moment.

    gates: E sum g_i(t) g_i(s); expert: E tr(J_t J_s') / d of one expert; gate_square: E sum_ij of the products of
    dg_i / dl_j; router_gain: E|dl_j / du|^2; expert_moment: E E_i(t).E_i(s) / d. Exact for independent experts.
    Source: derived in proofs/prove_backward.py.

    >>> gated_sum_jacobian(0.5, 1.0, 0.25, 1.0, 2.0)
    1.0
    """
    return gates * expert + router_gain * gate_square * expert_moment


@dataclass(frozen=True)
class BranchInput:
    """The input u of a branch: second moment, correlation, and tr(N_t N_s') / d for one token and for a pair."""

    second_moment: Any
    correlation: Any
    own: Any
    pair: Any


@dataclass(frozen=True)
class BranchPowers:
    """Powers of a Jacobian by definition, what they do to gradients, and the branch's own second moment.

    A gradient with second moment g and token covariance k becomes own * g + own_pair * k and pair_own * g + pair * k,
    own = values["all_sources"].
    """

    values: Jacobian
    own_pair: Any
    pair_own: Any
    pair: Any
    forward: Any

    def times(self, own: Any, pair: Any, n_tokens: int) -> BranchPowers:
        """Followed by a matrix for each token, with these powers for one token and for a pair."""
        mean = token_mean(own, pair, n_tokens)
        factors = {"all_sources": own, "own_token": own, "token_mean": mean}
        values = {name: value * factors[name] for name, value in self.values.items()}
        return BranchPowers(values, self.own_pair * pair, self.pair_own * own, self.pair * pair, self.forward)

    def scaled(self, factor: float) -> BranchPowers:
        """Every power and the second moment times a number."""
        values = {name: value * factor for name, value in self.values.items()}
        others = (self.own_pair, self.pair_own, self.pair, self.forward)
        return BranchPowers(values, *(value * factor for value in others))


def token_mean(own: Any, pair: Any, n_tokens: int) -> Any:
    """(1/T^2) sum over pairs of tokens, from the value of one token and of a pair."""
    return own / n_tokens + pair * (1 - 1 / n_tokens)


def branch_powers(
    spec: ModelSpec, layer: int, n_tokens: int, name: str, second_moment: Any, correlation: Any
) -> BranchPowers:
    """Powers of what the branch `attention` or `mlp` adds to the stream: norms, branch and branch scale."""
    tokens = branch_input(spec, layer, second_moment, correlation)
    if name == "attention":
        power = _attention(spec, layer, n_tokens, tokens)
    else:
        power = (_mixture if spec.is_moe(layer) else _feed_forward)(spec, layer, n_tokens, tokens)
    if spec.norm_placement(layer) in ("peri", "reordered"):
        power = power.times(*norm_powers(spec, power.forward, correlation), n_tokens)
    return power.scaled(spec.branch_scale**2)


def branch_input(spec: ModelSpec, layer: int, second_moment: Any, correlation: Any) -> BranchInput:
    """What the branch reads: the stream after its norm, or the stream itself (post, reordered)."""
    placement = spec.norm_placement(layer)
    if placement in ("post", "reordered"):
        return BranchInput(second_moment, correlation, 1.0, 1.0)
    own, pair = norm_powers(spec, second_moment, correlation)
    shrink = layer if placement == "lns" else 1
    variance = centred_second_moment(second_moment, spec.d_model) if spec.norm.kind == "layer" else second_moment
    after = normalised_second_moment(variance, spec.norm.eps)
    return BranchInput(after / shrink, correlation, own / shrink, pair / shrink)


def norm_powers(spec: ModelSpec, second_moment: Any, correlation: Any) -> tuple[Any, Any]:
    """`norm_jacobian` of the spec's norm for one token and for a pair."""
    centred = spec.norm.kind == "layer"
    variance = centred_second_moment(second_moment, spec.d_model) if centred else second_moment
    own, pair = (norm_jacobian(variance, r, spec.norm.eps, spec.d_model, int(centred)) for r in (1.0, correlation))
    return own, pair


def _attention(spec: ModelSpec, layer: int, n_tokens: int, tokens: BranchInput) -> BranchPowers:
    gains = attention_gains(spec, layer)
    c, key_c = tokens.correlation, tokens.correlation * mean_rotation(spec, layer, n_tokens)
    std = logit_std(spec, gains.query * gains.key, tokens.second_moment)
    mean = softmax_averages(spec, layer, n_tokens, std * np.sqrt(1 - key_c), c)
    forward = gains.value_output * tokens.second_moment * incoherent_average(c, mean.participation)
    variance = std**2 * projected_share(spec)
    powers = _attention_powers(mean, tokens, variance, c, key_c, n_tokens, spec.d_model)
    return replace(powers.scaled(gains.value_output), forward=forward)


def _attention_powers(
    mean: SoftmaxAverages, tokens: BranchInput, variance: Any, c: Any, key_c: Any, n_tokens: int, d_model: int
) -> BranchPowers:
    """For unit sigma_OV^2. variance: s^2 of uncorrelated tokens; key_c: correlation of the logits of one query.

    Gradients: over all sources the value path sums to 1 and the key path to 0, which fixes pairs from single tokens.
    """
    key, query = variance * (1 - c), variance * (1 - c) * (1 - key_c)
    own_query = query * (mean.square + mean.spread / d_model)
    pair_query = query * (mean.pair_square + mean.pair_spread / d_model)
    sources = softmax_sources(
        mean.participation, mean.key_square, mean.square, mean.spread, variance, c, key_c, d_model
    )
    values = {
        "all_sources": tokens.own * sources,
        "own_token": tokens.own * (mean.own_weight + key * mean.own_key_square + own_query),
        "token_mean": token_mean(tokens.own * (1 + own_query), tokens.pair * (1 + pair_query), n_tokens),
    }
    others = max(n_tokens - 1, 1)
    return BranchPowers(
        values,
        own_pair=tokens.own * (n_tokens - 1) * (mean.pair_overlap + key * c * mean.pair_square),
        pair_own=tokens.pair * (1 - mean.participation - key * mean.key_square) / others,
        pair=tokens.pair * (1 - mean.pair_overlap - key * c * mean.pair_square + pair_query),
        forward=np.nan,
    )


def logit_std(spec: ModelSpec, query_key_gain: float, second_moment: Any) -> Any:
    """Standard deviation of the logits of uncorrelated tokens; under a QK-norm that of unit queries and keys."""
    part = spec.attention
    assert part is not None
    absent = {"logit_softcap": None, "sink_logit": False, "key_mask_density": 1}
    for name, value in absent.items():
        given = getattr(part, name)
        require(given == value, AssumptionError, f"attention.{name}", given, "not covered by the Jacobian", repr(value))
    scale = (part.logit_scale or spec.head_dim**-0.5) * spec.head_dim**0.5
    return scale * (np.ones_like(second_moment) if part.qk_norm != "none" else second_moment * query_key_gain**0.5)


def projected_share(spec: ModelSpec) -> float:
    """A QK-norm removes one of the dimensions that it normalises over from the logits' derivative."""
    part = spec.attention
    assert part is not None
    if part.qk_norm == "none":
        return 1.0
    return 1 - 1 / (spec.head_dim * (spec.n_heads if part.qk_norm == "projection" else 1))


def _feed_forward(spec: ModelSpec, layer: int, n_tokens: int, tokens: BranchInput) -> BranchPowers:
    part = spec.feed_forward
    assert part is not None
    inner = two_layers(spec, layer, "mlp.", part.activation, part.gated, tokens)
    return _local(tokens, inner, n_tokens)


@dataclass(frozen=True)
class TwoLayers:
    """Jacobian power of one token and of a pair before the norm; second moment and covariance of the output."""

    own: Any
    pair: Any
    second_moment: Any
    covariance: Any


def _local(tokens: BranchInput, inner: TwoLayers, n_tokens: int) -> BranchPowers:
    """A branch that acts on each token alone."""
    own, pair = tokens.own * inner.own, tokens.pair * inner.pair
    values = {"all_sources": own, "own_token": own, "token_mean": token_mean(own, pair, n_tokens)}
    return BranchPowers(values, 0.0, 0.0, pair, inner.second_moment)


def two_layers(
    spec: ModelSpec, layer: int, prefix: str, activation: str, gated: bool, tokens: BranchInput
) -> TwoLayers:
    """A plain or gated feed-forward whose tensors are named with this prefix."""
    rows = layer_table(spec, layer).items()
    gains = feed_forward_gains({name.removeprefix(prefix): row for name, row in rows if name.startswith(prefix)})
    m, c = tokens.second_moment, tokens.correlation
    v = gains.inner * m
    slope, slopes = activation_derivative_second_moment(activation, v), activation_derivative_kernel(activation, v, c)
    second_moment = feed_forward_second_moment(m, gains, activation, gated)
    covariance = feed_forward_covariance(m, m, c, gains, activation, gated, spec.d_model)
    if not gated:
        own, pair = (plain_jacobian(x, gains.inner, gains.down) for x in (slope, slopes))
        return TwoLayers(own, pair, second_moment, covariance)
    square, kernel = activation_second_moment(activation, v), activation_kernel(activation, v, c)
    own = gated_jacobian(m, slope, square, gains.inner, gains.up, gains.down)
    pair = gated_jacobian(m * c, slopes, kernel, gains.inner, gains.up, gains.down)
    return TwoLayers(own, pair, second_moment, covariance)


def _mixture(spec: ModelSpec, layer: int, n_tokens: int, tokens: BranchInput) -> BranchPowers:
    part = spec.moe
    assert part is not None
    require(part.routing == "token_choice", AssumptionError, "moe.routing", part.routing, "not covered", "token_choice")
    gain = effective_gain(layer_table(spec, layer)["moe.router"])
    std, c = np.sqrt(gain * tokens.second_moment), tokens.correlation
    expert = two_layers(spec, layer, "moe.experts.", part.activation, part.gated, tokens)
    slopes = _gate_slopes(spec, std, c)
    square, overlap = router_overlap(part, std, np.ones_like(c)), router_overlap(part, std, c)
    routed = TwoLayers(
        gated_sum_jacobian(square, expert.own, slopes[0], gain, expert.second_moment),
        gated_sum_jacobian(overlap, expert.pair, slopes[1], gain, expert.covariance),
        square * expert.second_moment,
        overlap * expert.covariance,
    )
    if not part.n_shared_experts:
        return _local(tokens, routed, n_tokens)
    pairs = zip(vars(routed).values(), vars(_shared_experts(spec, layer, tokens)).values(), strict=True)
    mixed = TwoLayers(*(mix_shared(a, b, part.top_k, part.shared_mixing) for a, b in pairs))
    return _local(tokens, mixed, n_tokens)


def _gate_slopes(spec: ModelSpec, std: Any, correlation: Any) -> tuple[Any, Any]:
    """E sum_ij of (dg_i / dl_j)^2, and of the product at two tokens: exact at c = 0 and 1, geometric in c between."""
    part = spec.moe
    assert part is not None
    order = {"normalize": part.normalize_gates, "router": part.router, "gate_order": part.gate_order}
    square, trace = gate_jacobian(part.n_experts, part.top_k, std, **order)
    # At c = 0 the mean matrix counts, a multiple of I - 11'/E (rows or columns sum to 0), or of I for plain sigmoids.
    plain = part.router == "sigmoid" and not part.normalize_gates
    least = trace**2 / max(part.n_experts - (not plain), 1)
    scale = part.gate_multiplier**2
    return scale * square, scale * least ** (1 - correlation) * square**correlation


def _shared_experts(spec: ModelSpec, layer: int, tokens: BranchInput) -> TwoLayers:
    """The shared experts behind their sigmoid gate, where they have one."""
    part = spec.moe
    assert part is not None
    shared = two_layers(spec, layer, "moe.shared.", part.activation, part.gated, tokens)
    if not part.shared_gate:
        return shared
    gain, c = layer_table(spec, layer)["moe.shared_gate"].gain, tokens.correlation
    v = gain * tokens.second_moment
    gate, gates = activation_second_moment("sigmoid", v), activation_kernel("sigmoid", v, c)
    slope, slopes = activation_derivative_second_moment("sigmoid", v), activation_derivative_kernel("sigmoid", v, c)
    return TwoLayers(
        gated_sum_jacobian(gate, shared.own, slope, gain, shared.second_moment),
        gated_sum_jacobian(gates, shared.pair, slopes, gain, shared.covariance),
        gate * shared.second_moment,
        gates * shared.covariance,
    )
