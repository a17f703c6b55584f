"""Norm placements and depth scalings side by side, uncorrelated branches: increment, second moment and block share.

v: second moment of one block at unit input (sums of its branches add). `lns` here is a branch of degree 1 (linear or
ReLU networks, attention at fixed rows); a gated one: `lns_gated_increment`.
"""

from __future__ import annotations

from typing import Any, get_args

import numpy as np

from varprop.errors import AssumptionError, require
from varprop.spec.parts import DepthRule, Placement
from varprop.theory.activation import activation_second_moment
from varprop.theory.domain import check_number
from varprop.theory.namespace import harmonic

VARIANTS = ("pre", "lns", "inverse_sqrt_2L", "inverse_sqrt_L", "inverse_L", "peri", "reordered", "deepnorm", "mix")
"""Names of `NormSpec.placement` and `ResidualSpec.rule`; inverse_sqrt_2L is also the scaled initialisation."""
assert set(VARIANTS) <= {*get_args(Placement), *get_args(DepthRule)}


def variant_second_moment(
    variant: str, layer: Any, n_layers: Any, increment: Any, start: Any = 1, post_layers: Any = 0, xp: Any = np
) -> Any:
    """Second moment q_l of the stream after block l of L, uncorrelated branches:

    pre q_0 + v l;  lns q_0 + v H_l;  inverse_sqrt_2L q_0 + v l / (2 L);  inverse_sqrt_L q_0 + v l / L;
    inverse_L q_0 + v l / L^2;  peri, reordered q_0 + v l, v = gain^2 times the branches of a block whatever they
    compute;  deepnorm 1;  mix 1 + v (l - post_layers) in the pre layers.

    layer: l in 1..L; increment: v >= 0; start: q_0 >= 0; post_layers: of mix. Exact without eps.
    Raises `AssumptionError` outside the domain. Source: derived in proofs/prove_scaling.py.

    >>> [round(float(variant_second_moment(v, 16, 16, 1.0)), 2) for v in ("pre", "lns", "inverse_L", "deepnorm")]
    [17.0, 4.38, 1.06, 1.0]
    """
    if xp is np:
        _check(variant, layer, n_layers, increment, start)
        check_number("post_layers", post_layers, 0)
    if variant == "deepnorm":
        return start / start if xp is not np else np.ones_like(np.asarray(layer, dtype=float))[()]
    if variant == "mix":
        beyond = layer - post_layers
        return 1 + increment * (np.maximum(beyond, 0) if xp is np else beyond)
    total = harmonic(layer, xp) if variant == "lns" else layer
    return start + increment * total / _depth_divisor(variant, n_layers)


def variant_share(
    variant: str, layer: Any, n_layers: Any, increment: Any, start: Any = 1, post_layers: Any = 0, xp: Any = np
) -> Any:
    """Share of block l in the stream after it (before the norm where the norm follows the sum): v_l / q_l.

    pre 1 / (l + q_0 / v);  lns 1 / (l (H_l + q_0 / v));  deepnorm v / (v + 8 M sqrt(2 M)), M = L layers, two-matrix
    branches of degree 1 (gain (8 M)^{-1/4} on each matrix, skip scale (2 M)^{1/4}); mix in its post layers v / (1 + v).
    Arguments as `variant_second_moment`. Exact without eps. Source: derived in proofs/prove_scaling.py.

    >>> [round(float(variant_share(v, 16, 16, 1.0)), 4) for v in ("pre", "lns", "inverse_sqrt_L", "deepnorm")]
    [0.0588, 0.0143, 0.0312, 0.0014]
    """
    if variant == "deepnorm":
        if xp is np:
            _check(variant, layer, n_layers, increment, start)
        return increment / (increment + 8 * n_layers * xp.sqrt(2 * n_layers))
    second_moment = variant_second_moment(variant, layer, n_layers, increment, start, post_layers, xp)
    if variant == "mix":
        if xp is np:
            second_moment = np.where(np.asarray(layer) <= post_layers, 1 + increment, second_moment)[()]
        return increment / second_moment
    own = increment / (layer if variant == "lns" else 1)
    return own / _depth_divisor(variant, n_layers) / second_moment


def lns_gated_increment(
    layer: Any, gate_gain: float, up_gain: float, down_gain: float, activation: str = "silu"
) -> Any:
    """Second moment that a gated network adds in layer l under LNS: g_o (g_u / l) E phi(sqrt(g_g / l) z)^2.

    Falls like g_o g_u g_g phi'(0)^2 / l^2 for smooth phi: the sum over layers is bounded. layer: l >= 1; gains of
    gate, up and down after masks. Exact (quadrature as `activation_second_moment`).
    Source: derived in proofs/prove_scaling.py.

    >>> [round(float(np.sum(lns_gated_increment(np.arange(1, n + 1), 0.81, 0.81, 1.0))), 3) for n in (8, 128, 1024)]
    [0.327, 0.346, 0.347]
    """
    check_number("layer", layer, 1)
    for name, value in (("gate_gain", gate_gain), ("up_gain", up_gain), ("down_gain", down_gain)):
        check_number(name, value, 0, above=True)
    layer = np.asarray(layer, dtype=float)
    return down_gain * up_gain / layer * activation_second_moment(activation, gate_gain / layer)


def predecessor_step(second_moment: Any, layer: Any = 1, xp: Any = np) -> Any:
    """The recursion of 2502.05795 (Lemmas 3.2 and 4.1): q (1 + 1 / (sqrt(l) sqrt(q))), l = 1 in all layers for Pre-LN.

    Pre-LN: q_l -> l^2 / 4, never exponential; LNS: q_l = l exactly for q_1 = 1. It keeps the correlation term of
    `stream_step` and drops v. Exact. Source: derived in proofs/prove_scaling.py.

    >>> float(predecessor_step(4.0)), float(predecessor_step(9.0, layer=9))
    (6.0, 10.0)
    """
    if xp is np:
        check_number("second_moment", second_moment, 0)
        check_number("layer", layer, 1)
    return second_moment + xp.sqrt(second_moment / layer)


def _depth_divisor(variant: str, n_layers: Any) -> Any:
    return {"inverse_sqrt_2L": 2 * n_layers, "inverse_sqrt_L": n_layers, "inverse_L": n_layers**2}.get(variant, 1)


def _check(variant: str, layer: Any, n_layers: Any, increment: Any, start: Any) -> None:
    require(variant in VARIANTS, AssumptionError, "variant", variant, "unknown", "one of " + ", ".join(VARIANTS))
    check_number("n_layers", n_layers, 1)
    check_number("layer", layer, 1)
    check_number("increment", increment, 0, above=True)
    check_number("start", start, 0)
