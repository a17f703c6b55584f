"""The block Jacobian J at initialisation, in three definitions of E||J - I||_F^2 / d.

all_sources: one output token against every input token. own_token: one token's output against its own input.
token_mean: J summed over source tokens and averaged over target tokens, then the norm (the metric of arXiv 2603.15389,
whose figures show sqrt(value / d)).

A branch is f(u), u = N(x). Its last matrix is zero-mean and independent of the rest, so that the cross terms between
identity, attention and feed-forward vanish and the powers of a product multiply. The norm removes the direction of u
from du/dx: the derivative of Gaussian weights is then independent of their pre-activations. Leading order in 1/d
throughout; tokens are taken as exchangeable with the given second moment and correlation, in causal attention too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from varprop.errors import AssumptionError, require
from varprop.spec import ModelSpec, MoESpec, layer_table
from varprop.theory._derivative import (
    activation_derivative_kernel,
    activation_derivative_second_moment,
    activation_kernel,
)
from varprop.theory._overlap import gate_overlap
from varprop.theory.activation import activation_second_moment
from varprop.theory.attention import attention_gains, incoherent_average
from varprop.theory.feed_forward import gated_kernel, plain_kernel
from varprop.theory.gate_jacobian import gate_jacobian
from varprop.theory.linear import effective_gain
from varprop.theory.moe import gate_second_moment, mix_shared
from varprop.theory.norm import centred_second_moment, normalised_second_moment
from varprop.theory.softmax_jacobian import longest_view, softmax_averages, softmax_sources

DEFINITIONS = ("all_sources", "own_token", "token_mean")
Jacobian = dict[str, Any]
"""A value for each of `DEFINITIONS`: a float, or an array of the shape of the moments."""


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


def product_deviation(first: Any, second: Any, trace: Any) -> Any:
    """E||J_2 J_1 - I||^2 / d from the powers E||J_1||^2 / d and E||J_2||^2 / d and E tr(J_2 J_1) / d.

    Powers multiply where J_2 is isotropic given J_1. Leading order in 1/d. Source: derived in proofs/prove_backward.py.

    >>> product_deviation(1.5, 2.0, 1.0)
    2.0
    """
    return first * second - 2 * trace + 1


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


@dataclass(frozen=True)
class _Input:
    """The input u of a branch: second moment, correlation, and tr(N_t N_s') / d for one token and for a pair."""

    second_moment: Any
    correlation: Any
    own: Any
    pair: Any


@dataclass(frozen=True)
class _Power:
    """Powers of a Jacobian by definition; pair: of two tokens; forward: the branch's own second moment."""

    values: Jacobian
    forward: Any

    def times(self, own: Any, pair: Any, n_tokens: int) -> _Power:
        """Followed by a matrix per token with these powers."""
        mean = _token_mean(own, pair, n_tokens)
        factors = {"all_sources": own, "own_token": own, "token_mean": mean}
        return _Power({name: value * factors[name] for name, value in self.values.items()}, self.forward)


def _token_mean(own: Any, pair: Any, n_tokens: int) -> Any:
    """(1/T^2) sum over pairs of tokens."""
    return own / n_tokens + pair * (1 - 1 / n_tokens)


def attention_jacobian(
    spec: ModelSpec, layer: int, *, n_tokens: int, second_moment: Any, token_correlation: Any
) -> Jacobian:
    """E||d a / dx||_F^2 / d of what the attention of a layer adds to the stream, in the three definitions.

    sigma_OV^2 nu times: all_sources `softmax_sources`; own_token the share of the own key in the value and key path
    and the query path; token_mean the whole value path, 1, and the query path averaged over pairs of queries.
    nu = `norm_jacobian`. second_moment, token_correlation: of the stream, numbers or arrays of one shape; n_tokens: T.
    Leading order in 1/d and 1/head_dim (relative error s^2 / head_dim of the query path). Causal and windowed attention
    average over the numbers of visible keys at one token correlation. Returns floats, or arrays for arrays.
    Raises `AssumptionError` for a soft cap, sink logit or key mask, and for arguments outside their domain.
    Source: derived in proofs/prove_backward.py. Checked by: tests/theory/test_backward.py, autograd.

    >>> from varprop.spec import AttentionSpec
    >>> spec = ModelSpec(d_model=64, n_layers=1, attention=AttentionSpec(n_heads=1))
    >>> attention_jacobian(spec, 1, n_tokens=1, second_moment=2.0, token_correlation=1.0)["all_sources"]  # one key
    0.4921...
    """
    arrays = _check(spec, layer, n_tokens, second_moment=second_moment, token_correlation=token_correlation)
    return _output(_added(spec, layer, n_tokens, "attention", *arrays).values)


def feed_forward_jacobian(
    spec: ModelSpec, layer: int, *, n_tokens: int, second_moment: Any, token_correlation: Any
) -> Jacobian:
    """E||d f / dx||_F^2 / d of what the feed-forward or mixture of a layer adds to the stream, in the three definitions.

    One token (all_sources = own_token): nu `plain_jacobian` or `gated_jacobian`, exact given the realised second moment
    for Gaussian weights. token_mean: (1/T) of it and (1 - 1/T) of the same with the kernels at the token correlation.
    Mixture: S_2 times the expert's plus router_gain |f_E|^2 times `gate_jacobian`. Arguments, results and errors as in
    `attention_jacobian`; raises `AssumptionError` for expert-choice routing.
    Source: derived in proofs/prove_backward.py. Checked by: tests/theory/test_backward.py, autograd.

    >>> from varprop.spec import FeedForwardSpec
    >>> spec = ModelSpec(d_model=64, n_layers=1, feed_forward=FeedForwardSpec(d_ff=64, activation="relu", gated=False))
    >>> j = feed_forward_jacobian(spec, 1, n_tokens=1000, second_moment=2.0, token_correlation=0.0)
    >>> round(j["own_token"], 3), round(j["token_mean"], 3)
    (0.246, 0.121)
    """
    arrays = _check(spec, layer, n_tokens, second_moment=second_moment, token_correlation=token_correlation)
    return _output(_added(spec, layer, n_tokens, "mlp", *arrays).values)


def block_jacobian(
    spec: ModelSpec,
    layer: int,
    *,
    n_tokens: int,
    second_moment: Any,
    token_correlation: Any,
    middle_second_moment: Any,
    middle_token_correlation: Any,
) -> Jacobian:
    """E||J - I||_F^2 / d of the whole block of a layer (attention, then feed-forward), in the three definitions.

    Pre-norm: (1 + a)(1 + f) - 1 with the powers a, f of `attention_jacobian` and `feed_forward_jacobian`; with skip
    scale k: (k^2 + a)(k^2 + f) - 2 k^2 + 1. A norm after the sum (post) multiplies power and trace of its half; a
    parallel block adds a + f. second_moment, token_correlation: of the stream before the attention; middle_...: before
    the feed-forward (not read by a parallel block). Numbers, or arrays of one shape (say, over layers with the same
    tensors). Leading order in 1/d. Raises `AssumptionError` as the parts do.
    Source: derived in proofs/prove_backward.py. Checked by: tests/theory/test_backward.py, autograd.

    >>> from varprop.spec import FeedForwardSpec
    >>> spec = ModelSpec(d_model=512, n_layers=1, feed_forward=FeedForwardSpec(d_ff=64, activation="relu", gated=False))
    >>> moments = {"second_moment": 4.0, "token_correlation": 0.0}
    >>> moments |= {f"middle_{name}": value for name, value in moments.items()}
    >>> round(block_jacobian(spec, 1, n_tokens=8, **moments)["own_token"], 3)  # v_J / q = 0.5 / 4
    0.125
    """
    q, c, middle_q, middle_c = _check(
        spec,
        layer,
        n_tokens,
        second_moment=second_moment,
        token_correlation=token_correlation,
        middle_second_moment=middle_second_moment,
        middle_token_correlation=middle_token_correlation,
    )
    has_feed_forward = spec.feed_forward is not None or spec.moe is not None
    if spec.block == "parallel" and spec.attention is not None and has_feed_forward:
        both = [_added(spec, layer, n_tokens, name, q, c).values for name in ("attention", "mlp")]
        skip = (spec.skip_scale - 1) ** 2
        return _output({name: skip + both[0][name] + both[1][name] for name in DEFINITIONS})
    halves = []
    if spec.attention is not None:
        halves.append(_half(spec, layer, n_tokens, "attention", q, c))
    if has_feed_forward:
        halves.append(_half(spec, layer, n_tokens, "mlp", middle_q, middle_c))
    first = halves[0]
    second = halves[1] if len(halves) > 1 else (dict.fromkeys(DEFINITIONS, 1.0), 1.0)
    trace = first[1] * second[1]
    return _output({name: product_deviation(first[0][name], second[0][name], trace) for name in DEFINITIONS})


def _check(spec: ModelSpec, layer: int, n_tokens: int, **moments: Any) -> list[np.ndarray]:
    """The moments as arrays of one shape; correlations below 0 (exchangeable tokens' are not) count as 0."""
    for name, value, largest in (("layer", layer, spec.n_layers), ("n_tokens", n_tokens, None)):
        integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        good = integer and value >= 1 and (largest is None or value <= largest)
        domain = "an integer >= 1" if largest is None else f"an integer in 1..{largest}"
        require(good, AssumptionError, name, value, "outside the domain", domain)
    arrays = []
    for name, value in moments.items():
        is_correlation = name.endswith("correlation")
        domain = "numbers in [-1, 1]" if is_correlation else "finite numbers > 0"
        raw = np.asarray(value)
        number = raw.dtype.kind in "iuf" and bool(np.isfinite(raw).all())
        good = number and bool((np.abs(raw) <= 1 + 1e-9).all() if is_correlation else (raw > 0).all())
        require(good, AssumptionError, name, value, "outside the domain", domain)
        arrays.append(np.clip(raw, 0.0, 1.0) if is_correlation else raw.astype(float))
    try:
        return list(np.broadcast_arrays(*arrays))
    except ValueError:
        shapes = ", ".join(str(a.shape) for a in arrays)
        raise AssumptionError(f"moments={shapes!r} are shapes that differ; expected one shape") from None


def _output(values: Jacobian) -> Jacobian:
    return {name: float(value) if np.ndim(value) == 0 else np.asarray(value) for name, value in values.items()}


def _input(spec: ModelSpec, layer: int, second_moment: Any, correlation: Any) -> _Input:
    """What the branch reads: the stream after its norm, or the stream itself (post, reordered)."""
    placement = spec.norm_placement(layer)
    if placement in ("post", "reordered"):
        return _Input(second_moment, correlation, 1.0, 1.0)
    own, pair = _norm_powers(spec, second_moment, correlation)
    shrink = layer if placement == "lns" else 1
    variance = centred_second_moment(second_moment, spec.d_model) if spec.norm.kind == "layer" else second_moment
    after = normalised_second_moment(variance, spec.norm.eps)
    return _Input(after / shrink, correlation, own / shrink, pair / shrink)


def _norm_powers(spec: ModelSpec, second_moment: Any, correlation: Any) -> tuple[Any, Any]:
    """`norm_jacobian` of the spec's norm for one token and for a pair."""
    centred = spec.norm.kind == "layer"
    variance = centred_second_moment(second_moment, spec.d_model) if centred else second_moment
    own, pair = (norm_jacobian(variance, r, spec.norm.eps, spec.d_model, int(centred)) for r in (1.0, correlation))
    return own, pair


def _added(spec: ModelSpec, layer: int, n_tokens: int, name: str, second_moment: Any, correlation: Any) -> _Power:
    """Powers of what a branch adds to the stream: input norm, branch, norm on its output, branch scale."""
    tokens = _input(spec, layer, second_moment, correlation)
    if name == "attention":
        power = _attention(spec, layer, n_tokens, tokens)
    else:
        power = (_mixture if spec.is_moe(layer) else _feed_forward)(spec, layer, n_tokens, tokens)
    if spec.norm_placement(layer) in ("peri", "reordered"):
        power = power.times(*_norm_powers(spec, power.forward, correlation), n_tokens)
    scale = spec.branch_scale**2
    return _Power({key: scale * value for key, value in power.values.items()}, scale * power.forward)


def _half(
    spec: ModelSpec, layer: int, n_tokens: int, name: str, second_moment: Any, correlation: Any
) -> tuple[Jacobian, Any]:
    """Power by definition and trace of one residual sum, with the norm that follows it (post)."""
    branch = _added(spec, layer, n_tokens, name, second_moment, correlation)
    skip = spec.skip_scale
    power = _Power({key: skip**2 + value for key, value in branch.values.items()}, branch.forward)
    if spec.norm_placement(layer) != "post":
        return power.values, skip
    total = skip**2 * second_moment + branch.forward
    own, pair = _norm_powers(spec, total, correlation)
    trace = (own * (1 - (1 + (spec.norm.kind == "layer")) / spec.d_model)) ** 0.5  # N is a scaled projection
    return power.times(own, pair, n_tokens).values, skip * trace


def _attention(spec: ModelSpec, layer: int, n_tokens: int, tokens: _Input) -> _Power:
    gains = attention_gains(spec, layer)
    c, key_c = tokens.correlation, tokens.correlation * mean_rotation(spec, layer, n_tokens)
    std = _logit_std(spec, gains.query * gains.key, tokens.second_moment)
    mean = softmax_averages(spec, layer, n_tokens, std * np.sqrt(1 - key_c), c)
    variance = std**2 * _projected_share(spec)
    query = variance * (1 - c) * (1 - key_c)
    own_query = query * (mean.square + mean.spread / spec.d_model)
    pair_query = query * (mean.pair_square + mean.pair_spread / spec.d_model)
    sources = (mean.participation, mean.square, mean.spread)
    values = {
        "all_sources": tokens.own * softmax_sources(*sources, variance, c, key_c, spec.d_model),
        "own_token": tokens.own * (mean.own_weight + variance * (1 - c) * mean.own_square + own_query),
        "token_mean": _token_mean(tokens.own * (1 + own_query), tokens.pair * (1 + pair_query), n_tokens),
    }
    forward = gains.value_output * tokens.second_moment * incoherent_average(c, mean.participation)
    return _Power({name: gains.value_output * value for name, value in values.items()}, forward)


def _logit_std(spec: ModelSpec, query_key_gain: float, second_moment: Any) -> Any:
    """Standard deviation of the logits of uncorrelated tokens; under a QK-norm that of unit queries and keys."""
    part = spec.attention
    assert part is not None
    covered = part.logit_softcap is None and not part.sink_logit and part.key_mask_density == 1
    wrong = "given with a soft cap, sink logit or key mask"
    require(covered, AssumptionError, "attention", part.pattern, wrong, "plain softmax for the Jacobian")
    scale = (part.logit_scale or spec.head_dim**-0.5) * spec.head_dim**0.5
    return scale * (np.ones_like(second_moment) if part.qk_norm != "none" else second_moment * query_key_gain**0.5)


def _projected_share(spec: ModelSpec) -> float:
    """A QK-norm removes one of the dimensions that it normalises over from the logits' derivative."""
    part = spec.attention
    assert part is not None
    if part.qk_norm == "none":
        return 1.0
    return 1 - 1 / (spec.head_dim * (spec.n_heads if part.qk_norm == "projection" else 1))


def mean_rotation(spec: ModelSpec, layer: int, n_tokens: int) -> float:
    """Mean over pairs of different visible positions of cos((j - k) theta_i), averaged over all dimensions of a head.

    The logits of tokens with correlation c, rotated by their positions, correlate by about c times this number (1
    without rotary positions). Exact for the mean over the longest view. Source: derived in proofs/prove_backward.py.
    """
    part = spec.attention
    assert part is not None
    n = longest_view(spec, layer, n_tokens)
    if part.rope_theta is None or n == 1:
        return 1.0
    half = round(part.rope_fraction * spec.head_dim) // 2
    angle = part.rope_theta ** (-np.arange(half) / half) / 2
    mean = np.mean((np.sin(n * angle) / (n * np.sin(angle))) ** 2)
    share = 2 * half / spec.head_dim
    return float(1 - share + share * (n * mean - 1) / (n - 1))


def _feed_forward(spec: ModelSpec, layer: int, n_tokens: int, tokens: _Input) -> _Power:
    part = spec.feed_forward
    assert part is not None
    own, pair, (square, _) = _two_layers(spec, layer, "mlp.", part.activation, part.gated, tokens)
    return _local(tokens.own * own, tokens.pair * pair, n_tokens, square)


def _local(own: Any, pair: Any, n_tokens: int, forward: Any) -> _Power:
    """A Jacobian that acts on each token alone."""
    mean = _token_mean(own, pair, n_tokens)
    return _Power({"all_sources": own, "own_token": own, "token_mean": mean}, forward)


def _two_layers(
    spec: ModelSpec, layer: int, prefix: str, activation: str, gated: bool, tokens: _Input
) -> tuple[Any, Any, tuple[Any, Any]]:
    """Jacobian power for one token and for a pair, both without the norm; second moment and covariance of the output."""
    rows = layer_table(spec, layer)
    up, down = (effective_gain(rows[f"{prefix}{name}"]) for name in ("up", "down"))
    inner = effective_gain(rows[f"{prefix}gate"]) if gated else up
    m, c = tokens.second_moment, tokens.correlation
    v = inner * m
    slope, slopes = activation_derivative_second_moment(activation, v), activation_derivative_kernel(activation, v, c)
    square, kernel = activation_second_moment(activation, v), activation_kernel(activation, v, c)
    if not gated:
        forward = plain_kernel(square, down), plain_kernel(kernel, down)
        return plain_jacobian(slope, inner, down), plain_jacobian(slopes, inner, down), forward
    own = gated_jacobian(m, slope, square, inner, up, down)
    pair = gated_jacobian(m * c, slopes, kernel, inner, up, down)
    return own, pair, (gated_kernel(m * square, up, down), gated_kernel(m * c * kernel, up, down))


def gated_sum_jacobian(
    gates: Any, expert: Any, gate_square: Any, router_gain: Any, expert_moment: Any, multiplier: Any = 1
) -> Any:
    """Jacobian power of sum_i g_i E_i: multiplier^2 (gates * expert + router_gain * gate_square * expert_moment).

    gates: E sum g_i(t) g_i(s); expert: E tr(J_t J_s') / d of one expert; gate_square: E sum_ij of the products of
    dg_i / dl_j; router_gain: E|dl_j / du|^2; expert_moment: E E_i(t).E_i(s) / d. Exact for independent experts.
    Source: derived in proofs/prove_backward.py.

    >>> gated_sum_jacobian(0.5, 1.0, 0.25, 1.0, 2.0)
    1.0
    """
    return multiplier**2 * (gates * expert + router_gain * gate_square * expert_moment)


def _mixture(spec: ModelSpec, layer: int, n_tokens: int, tokens: _Input) -> _Power:
    part = spec.moe
    assert part is not None
    require(part.routing == "token_choice", AssumptionError, "moe.routing", part.routing, "not covered", "token_choice")
    rows = layer_table(spec, layer)
    router = effective_gain(rows["moe.router"])
    law = _gate_law(part, (router * tokens.second_moment) ** 0.5, tokens.correlation)
    own, pair, (square, covariance) = _two_layers(spec, layer, "moe.experts.", part.activation, part.gated, tokens)
    scale = part.gate_multiplier
    own = gated_sum_jacobian(law.square, own, law.slopes, router, square, scale)
    pair = gated_sum_jacobian(law.overlap, pair, law.slope_overlap, router, covariance, scale)
    forward = scale**2 * law.square * square
    if part.n_shared_experts:
        shared = _shared_experts(spec, layer, part, tokens)
        mixed = zip((own, pair, forward), shared, strict=True)
        own, pair, forward = (mix_shared(a, b, part.top_k, part.shared_mixing) for a, b in mixed)
    return _local(tokens.own * own, tokens.pair * pair, n_tokens, forward)


def _shared_experts(spec: ModelSpec, layer: int, part: MoESpec, tokens: _Input) -> tuple[Any, Any, Any]:
    """Jacobian power of one token and of a pair, and second moment, of the shared experts behind their gate."""
    own, pair, (square, covariance) = _two_layers(spec, layer, "moe.shared.", part.activation, part.gated, tokens)
    if not part.shared_gate:
        return own, pair, square
    gain, c = layer_table(spec, layer)["moe.shared_gate"].gain, tokens.correlation
    v = gain * tokens.second_moment
    gate, gates = activation_second_moment("sigmoid", v), activation_kernel("sigmoid", v, c)
    slope, slopes = activation_derivative_second_moment("sigmoid", v), activation_derivative_kernel("sigmoid", v, c)
    own = gated_sum_jacobian(gate, own, slope, gain, square)
    return own, gated_sum_jacobian(gates, pair, slopes, gain, covariance), gate * square


@dataclass(frozen=True)
class _GateLaw:
    """Sum of squared gates and of squared slopes, and the same sums over the gates of two tokens."""

    square: Any
    overlap: Any
    slopes: Any
    slope_overlap: Any


def _gate_law(part: MoESpec, logit_std: Any, correlation: Any) -> _GateLaw:
    """Gates of one token and of two. The overlap of slopes is exact at c = 0 and 1, geometric in c between them."""
    law = {"normalize": part.normalize_gates, "router": part.router, "gate_order": part.gate_order}
    std, c = np.broadcast_arrays(np.asarray(logit_std, dtype=float), np.asarray(correlation, dtype=float))
    each = np.array([_gates_at(part, round(float(s), 6), float(r), law) for s, r in zip(std.flat, c.flat, strict=True)])
    return _GateLaw(*np.moveaxis(each.reshape(*std.shape, 4), -1, 0))


def _gates_at(part: MoESpec, std: float, c: float, law: dict[str, Any]) -> tuple[float, float, float, float]:
    square = gate_second_moment(part.n_experts, part.top_k, std, **law)
    slopes, trace = gate_jacobian(part.n_experts, part.top_k, std, **law)
    # the mean of dg / dl is a I - b 11', with zero row sums except for the gates of a plain sigmoid
    plain = part.router == "sigmoid" and not part.normalize_gates
    least = trace**2 / max(part.n_experts - (0 if plain else 1), 1)
    between = least ** (1 - c) * slopes**c if least > 0 else 0.0
    return square, float(gate_overlap(part.n_experts, part.top_k, std, np.array(c), **law)), slopes, between
