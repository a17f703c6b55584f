"""Mixtures of experts: routed output E f_t.f_s / d = O_ts K_E(t, s), O_ts = E sum_i g_i(t) g_i(s) over gates g.

Exact when the experts are independent of each other and of the router. The gates' law is in gates.py: O on the diagonal
is S_2 = `gate_second_moment`, off it `gate_overlap`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from varprop.errors import AssumptionError, require
from varprop.spec import MoESpec, TensorRow
from varprop.theory.activation import activation_kernel
from varprop.theory.feed_forward import feed_forward_gram
from varprop.theory.gates import gate_overlap
from varprop.theory.linear import effective_gain


def mix_shared(routed, shared, top_k, mixing: str):
    """Moments of routed and shared outputs combined: sum, or mean = (shared + top_k * routed) / (top_k + 1).

    Exact for independent routed and shared experts. Source: derived in proofs/prove_moe.py.

    >>> mix_shared(1.0, 2.0, 2, "sum"), mix_shared(1.0, 5.0, 2, "mean")
    (3.0, 1.0)
    """
    return routed + shared if mixing == "sum" else (shared + top_k**2 * routed) / (top_k + 1) ** 2


def moe_gram(gram: np.ndarray, rows: Mapping[str, TensorRow], part: MoESpec, d_model: int) -> np.ndarray:
    """Gram matrices of a mixture's output, (..., T, T), from those of the normalised tokens.

    rows: the layer's tensors by their name within the layer. Router logits of two tokens have the standard deviation
    sqrt(gain * second moment) of each and the correlation of the tokens; two tokens of unlike second moments take the
    overlap at their geometric mean, scaled to the two diagonals. Raises `AssumptionError` for expert-choice routing,
    where tokens compete.
    """
    require(part.routing == "token_choice", AssumptionError, "moe.routing", part.routing, "not covered", "token_choice")
    diagonal = np.diagonal(gram, axis1=-2, axis2=-1)
    size = np.sqrt(diagonal)
    cosine = np.clip(gram / (size[..., :, None] * size[..., None, :]), -1.0, 1.0)
    routed = _token_overlap(cosine, np.sqrt(effective_gain(rows["moe.router"])) * size, part)
    routed *= part.gate_multiplier**2
    routed *= feed_forward_gram(gram, _matrices(rows, "moe.experts."), part.activation, part.gated, d_model)
    if part.n_shared_experts == 0:
        return routed
    shared = feed_forward_gram(gram, _matrices(rows, "moe.shared."), part.activation, part.gated, d_model)
    if part.shared_gate:
        shared = shared * activation_kernel("sigmoid", rows["moe.shared_gate"].gain * diagonal.mean(), cosine)
    return mix_shared(routed, shared, part.top_k, part.shared_mixing)


def _token_overlap(cosine: np.ndarray, std: np.ndarray, part: MoESpec) -> np.ndarray:
    """Gate overlaps (..., T, T) of tokens of router-logit standard deviations std (..., T)."""
    if np.ptp(std) <= 1e-9 * std.max():
        return overlap_of(part, std.flat[0], cosine)
    power = overlap_of(part, std, 1.0)
    middle = np.sqrt(std[..., :, None] * std[..., None, :])
    product = power[..., :, None] * power[..., None, :]
    return overlap_of(part, middle, cosine) / overlap_of(part, middle, 1.0) * np.sqrt(product)


def overlap_of(part: MoESpec, logit_std: Any, correlation: Any) -> Any:
    """`gate_overlap` of a mixture's router, without `gate_multiplier`."""
    return gate_overlap(
        part.n_experts,
        part.top_k,
        logit_std,
        correlation,
        normalize=part.normalize_gates,
        router=part.router,
        gate_order=part.gate_order,
    )


def _matrices(rows: Mapping[str, TensorRow], prefix: str) -> dict[str, TensorRow]:
    return {name.removeprefix(prefix): row for name, row in rows.items() if name.startswith(prefix)}
