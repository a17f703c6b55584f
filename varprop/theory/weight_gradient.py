"""Second moments of dL/dW at initialisation, for every matrix of a block, from the gradient that arrives at its output.

dL/dW = sum_t delta_t h_t' over tokens t: inputs h, gradients delta at the matrix's output. Gradients of different
tokens are taken as uncorrelated (gradient correlation 0) and independent of the forward weights: leading order in 1/d.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from varprop.errors import AssumptionError, require
from varprop.spec import ModelSpec, layer_table
from varprop.theory.activation import activation_derivative_second_moment, activation_second_moment
from varprop.theory.attention import attention_gains, incoherent_average
from varprop.theory.branch_jacobian import BranchInput, branch_input, logit_std, projected_share, two_layers
from varprop.theory.feed_forward import feed_forward_gains
from varprop.theory.gate_jacobian import gate_jacobian
from varprop.theory.jacobian import branch_names, checked_moments, residual_powers
from varprop.theory.linear import effective_gain
from varprop.theory.moe import router_overlap
from varprop.theory.softmax_jacobian import mean_rotation, softmax_averages


def weight_gradients(
    spec: ModelSpec,
    layer: int,
    *,
    n_tokens: int,
    second_moment: float,
    token_correlation: float,
    middle_second_moment: float,
    middle_token_correlation: float,
    gradient_second_moment: float = 1.0,
) -> dict[str, float]:
    """Mean square of an entry of dL/dW of each effective matrix of a layer, by its name in `layer_table`.

    With g the gradient's second moment at the branch output (branch scale included), T tokens, m and c of the branch
    input: down T g E h^2; up and gate T m times the gradient behind down; o T g m g_V A, A = c + (1 - c) Y; v T g_o
    m A; q and k T g_o g_V (1 - c)(1 - c_l) s^2 (tr B^2 + (tr B)^2 / d) times m over the matrix's own gain, so that both
    vanish as c -> 1 (rank collapse, Noci et al. 2022); g_o = g gain_o d / (heads head_dim). Grouped keys and values add
    over their query heads. Experts take S_2 / E of it, the router T m g d |f_E|^2 / E times `gate_jacobian`.
    gradient_second_moment: of the stream after the block. Leading order in 1/d; a masked matrix has this gradient on
    its kept entries, times the mask's factor squared. Raises `AssumptionError` for placements other than pre and lns,
    for shared experts and expert choice, and as `block_jacobian` does. Source: as `branch_jacobian.py`; sum over tokens
    in proofs/prove_backward.py. Checked by: tests/theory/test_backward.py, autograd.

    >>> from varprop.spec import FeedForwardSpec
    >>> part = FeedForwardSpec(d_ff=128, activation="relu", gated=False)
    >>> spec = ModelSpec(d_model=64, n_layers=1, feed_forward=part)
    >>> moments = {"second_moment": 1e9, "token_correlation": 0.0}
    >>> moments |= {f"middle_{name}": value for name, value in moments.items()}
    >>> found = weight_gradients(spec, 1, n_tokens=10, **moments)
    >>> {name: round(value, 6) for name, value in found.items()}
    {'mlp.up': 2.5, 'mlp.down': 5.0}
    """
    placement = spec.norm_placement(layer)
    require(placement in ("pre", "lns"), AssumptionError, "norm.placement", placement, "not covered", "pre or lns")
    q, c, middle_q, middle_c, arriving = checked_moments(
        spec,
        layer,
        n_tokens,
        second_moment=second_moment,
        token_correlation=token_correlation,
        middle_second_moment=middle_second_moment,
        middle_token_correlation=middle_token_correlation,
        gradient_second_moment=gradient_second_moment,
    )
    gradient = n_tokens * spec.branch_scale**2 * arriving
    names = branch_names(spec)
    found: dict[str, Any] = {}
    if "mlp" in names:
        parallel = spec.block == "parallel" and len(names) == 2
        tokens = branch_input(spec, layer, *((q, c) if parallel else (middle_q, middle_c)))
        if spec.is_moe(layer):
            found = _mixture(spec, layer, tokens, gradient)
        else:
            found = _two_layers(spec, layer, "mlp.", tokens, gradient)
        if not parallel:  # what reaches the attention's output has passed the feed-forward
            rest, skip = residual_powers(spec, layer, n_tokens, "mlp", middle_q, middle_c)
            gradient = gradient * (skip**2 + rest.values["all_sources"])
    if "attention" in names:
        found = _attention(spec, layer, n_tokens, branch_input(spec, layer, q, c), gradient) | found
    return {name: float(value) for name, value in found.items()}


def _two_layers(spec: ModelSpec, layer: int, prefix: str, tokens: BranchInput, gradient: Any) -> dict[str, Any]:
    part = spec.moe if spec.is_moe(layer) else spec.feed_forward
    assert part is not None
    rows = {name.removeprefix(prefix): row for name, row in layer_table(spec, layer).items() if name.startswith(prefix)}
    gains = feed_forward_gains(rows)
    m, v = tokens.second_moment, gains.inner * tokens.second_moment
    square = activation_second_moment(part.activation, v)
    slope = activation_derivative_second_moment(part.activation, v)
    hidden = gradient * gains.down * rows["down"].fan_out / rows["down"].fan_in
    if not part.gated:
        return {f"{prefix}up": hidden * slope * m, f"{prefix}down": gradient * square}
    up = gains.up * m
    return {
        f"{prefix}gate": hidden * up * slope * m,
        f"{prefix}up": hidden * square * m,
        f"{prefix}down": gradient * up * square,
    }


def _mixture(spec: ModelSpec, layer: int, tokens: BranchInput, gradient: Any) -> dict[str, Any]:
    part = spec.moe
    assert part is not None
    require(part.routing == "token_choice", AssumptionError, "moe.routing", part.routing, "not covered", "token_choice")
    require(part.n_shared_experts == 0, AssumptionError, "moe.n_shared_experts", part.n_shared_experts, "given", "0")
    std = np.sqrt(effective_gain(layer_table(spec, layer)["moe.router"]) * tokens.second_moment)
    order = {"normalize": part.normalize_gates, "router": part.router, "gate_order": part.gate_order}
    slopes, _ = gate_jacobian(part.n_experts, part.top_k, std, **order)
    each = gradient / part.n_experts
    expert = two_layers(spec, layer, "moe.experts.", part.activation, part.gated, tokens)
    router = part.gate_multiplier**2 * tokens.second_moment * spec.d_model * expert.second_moment * slopes
    gates = router_overlap(part, std, np.ones_like(std))
    return {"moe.router": each * router, **_two_layers(spec, layer, "moe.experts.", tokens, each * gates)}


def _attention(spec: ModelSpec, layer: int, n_tokens: int, tokens: BranchInput, gradient: Any) -> dict[str, Any]:
    rows, gains = layer_table(spec, layer), attention_gains(spec, layer)
    value_gain, output_gain = effective_gain(rows["attention.v"]), effective_gain(rows["attention.o"])
    m, c = tokens.second_moment, tokens.correlation
    key_c = c * mean_rotation(spec, layer, n_tokens)
    std = logit_std(spec, gains.query * gains.key, m)
    mean = softmax_averages(spec, layer, n_tokens, std * np.sqrt(1 - key_c), c)
    mixed = m * incoherent_average(c, mean.participation)
    behind = gradient * output_gain * rows["attention.o"].fan_out / rows["attention.o"].fan_in
    logit = std**2 * projected_share(spec) * value_gain * behind * (1 - c) * (1 - key_c)
    if spec.attention is not None and spec.attention.qk_norm != "none":
        logit = logit / m  # the logits of normalised queries and keys do not grow with the input
    query = logit * (mean.square + mean.spread / spec.d_model)
    group = spec.kv_group_size
    return {
        "attention.q": query / gains.query,
        "attention.k": group * query / gains.key,
        "attention.v": group * behind * mixed,
        "attention.o": gradient * value_gain * mixed,
    }
