"""Grouped-query attention at initialisation: g = n_heads / n_kv_heads query heads share keys and values.

Heads o_h = V_{group(h)}' p_h with attention rows p_h, output sum_h W_O^h o_h. Given the rows and the tokens' Gram C the
values of a group are Gaussian with covariance sigma_V^2 C, so that E o_h.o_h' / head_dim = sigma_V^2 p_h' C p_h' within
a group and 0 between groups. Independent output maps add the heads' powers whatever their covariance: sharing leaves
the mean second moment as it is. It raises the spread from network to network, and the mean only if output maps of a
group are aligned or the initialisation depends on the number of key/value heads.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from varprop.errors import AssumptionError, require
from varprop.spec import ModelSpec, layer_table
from varprop.theory.linear import effective_gain
from varprop.theory.namespace import checked
from varprop.theory.softmax import softmax_overlap, softmax_participation


def head_covariance(correlation: Any, overlap: Any, value_gain: Any) -> Any:
    """E o_h.o_h' / head_dim of two heads that share values: value_gain * (c + (1 - c) * overlap).

    correlation: c of exchangeable tokens of unit second moment; overlap: sum_j p_hj p_h'j, the participation for
    h = h'; value_gain: sigma_V^2. Heads of different groups have covariance 0. Exact given the attention rows.
    Source: derived in proofs/prove_gqa.py. Checked by: tests/theory/test_gqa.py.

    >>> head_covariance(0.5, 0.5, 2.0)
    1.5
    """
    checked("correlation", correlation, "numbers in [0, 1]", 0.0, 1.0)
    checked("overlap", overlap, "numbers in [0, 1]", 0.0, 1.0)
    checked("value_gain", value_gain, "numbers >= 0", 0.0)
    return value_gain * (correlation + (1 - correlation) * overlap)


def head_cosine(correlation: Any, overlap: Any, participation: Any) -> Any:
    """kappa, the correlation of two heads of a group: (c + (1 - c) X) / (c + (1 - c) Y).

    correlation: c of exchangeable tokens; overlap: X = E sum_j p_hj p_h'j of two heads at one token; participation:
    Y = E sum_j p_hj^2. Exact as a ratio of means. 1 for near-uniform attention (X = Y = 1/T) or equal tokens. Source:
    derived in proofs/prove_gqa.py. Checked by: tests/theory/test_gqa.py.

    >>> head_cosine(0.0, 0.25, 0.5), head_cosine(1.0, 0.25, 0.5)
    (0.5, 1.0)
    """
    checked("correlation", correlation, "numbers in [0, 1]", 0.0, 1.0)
    checked("overlap", overlap, "numbers in [0, 1]", 0.0, 1.0)
    checked("participation", participation, "numbers in (0, 1]", 1e-300, 1.0)
    return (correlation + (1 - correlation) * overlap) / (correlation + (1 - correlation) * participation)


def aligned_mean_factor(kv_group_size: Any, alignment: Any, kappa: Any) -> Any:
    """Factor on the mean second moment if output maps of a group are aligned: 1 + eta (g - 1) kappa.

    kv_group_size: g >= 1 query heads per key/value head; alignment: eta = E tr(W_O^h' W_O^h'') / E |W_O^h|^2 of two
    heads of a group, 0 for i.i.d. output weights, in [-1/(g - 1), 1]; kappa: `head_cosine`. Exact. Without sharing
    (g = 1), aligned output maps change nothing. Source: derived in proofs/prove_gqa.py. Checked by:
    tests/theory/test_gqa.py.

    >>> aligned_mean_factor(4, 0.0, 0.9), aligned_mean_factor(4, 0.5, 1.0), aligned_mean_factor(1, 0.5, 1.0)
    (1.0, 2.5, 1.0)
    """
    checked("kv_group_size", kv_group_size, "numbers >= 1", 1.0)
    checked("alignment", alignment, "numbers in [-1, 1]", -1.0, 1.0)
    checked("kappa", kappa, "numbers in [0, 1]", 0.0, 1.0)
    return 1 + alignment * (kv_group_size - 1) * kappa


def attention_relative_variance(n_heads: Any, head_dim: Any, kv_group_size: Any, kappa: Any, d_model: Any) -> Any:
    """Variance over networks of one token's |out|^2 over its squared mean, at fixed attention rows.

    (1 + 2/d)(1 + r) - 1,  r = 2 (1 + (g - 1) kappa^2) / (n_heads head_dim).

    kappa: p_h' C p_h' / p_h' C p_h of two heads of a group, the same for all. Exact for Gaussian value and output
    weights; r is the variance of the heads' total power, 2/d that of the output weights. 1 / (r + 2/d) is half of the
    number of independent units that an attention output averages over: with kappa = 1, sharing leaves
    n_kv_heads head_dim of n_heads head_dim. Attention rows that vary add the relative variance of p' C p.
    Source: derived in proofs/prove_gqa.py. Checked by: tests/theory/test_gqa.py.

    >>> attention_relative_variance(8, 16, 1, 1.0, 128)
    0.031494140625
    >>> round(attention_relative_variance(8, 16, 8, 1.0, 128), 4)
    0.1426
    """
    checked("n_heads", n_heads, "numbers >= 1", 1.0)
    checked("head_dim", head_dim, "numbers >= 1", 1.0)
    checked("kv_group_size", kv_group_size, "numbers >= 1", 1.0)
    checked("kappa", kappa, "numbers in [0, 1]", 0.0, 1.0)
    checked("d_model", d_model, "numbers >= 1", 1.0)
    power = 2 * (1 + (kv_group_size - 1) * kappa**2) / (n_heads * head_dim)
    return power + 2 * (1 + power) / d_model


def xavier_value_gain(d_model: Any, n_kv_heads: Any, head_dim: Any) -> Any:
    """sigma_V^2 = 2 d / (d + n_kv_heads head_dim) of the Xavier rule: it grows as key/value heads are removed.

    1 for as many key/value heads as fill d_model, 2 in the limit of none. The key matrix has the same gain. fan_in
    and fixed standard deviations do not depend on n_kv_heads. Exact. Source: derived in proofs/prove_gqa.py.

    >>> xavier_value_gain(128, 8, 16), xavier_value_gain(128, 2, 16)
    (1.0, 1.6)
    """
    checked("d_model", d_model, "numbers >= 1", 1.0)
    checked("n_kv_heads", n_kv_heads, "numbers >= 1", 1.0)
    checked("head_dim", head_dim, "numbers >= 1", 1.0)
    return 2 * d_model / (d_model + n_kv_heads * head_dim)


def gqa_effect(
    spec: ModelSpec, n_kv_heads: int, *, n_tokens: int, token_correlation: float = 0.0, layer: int = 1
) -> dict[str, float]:
    """Attention with `n_kv_heads` key/value heads against the same model with one per query head, at unit input.

    token_correlation: c of exchangeable tokens after the norm, in [0, 1]; attention is full, without positions. Values:

        second_moment        ratio of the mean second moments of one layer's output: 1 unless the initialisation
                             depends on n_kv_heads (`xavier`: values gain, and sharper logits)
        relative_variance    ratio of `attention_relative_variance`
        kappa                `head_cosine` within a group; query heads of a group have independent queries and the
                             same keys: X is `softmax_overlap` at query correlation 0, 1/T up to O(s^4 / head_dim)

    Quadrature at infinite d_model. n_kv_heads = n_heads gives ratios 1 exactly. Raises `AssumptionError` without
    attention, for a number of key/value heads that does not divide n_heads, and outside the domains. Source: derived in
    proofs/prove_gqa.py. Checked by: tests/theory/test_gqa.py.

    >>> from varprop import presets
    >>> effect = gqa_effect(presets.tiny(), presets.tiny().n_heads, n_tokens=16)
    >>> effect["second_moment"], effect["relative_variance"]
    (1.0, 1.0)
    """
    require(spec.attention is not None, AssumptionError, "spec.attention", None, "missing", "a model with attention")
    count = isinstance(n_kv_heads, (int, np.integer)) and not isinstance(n_kv_heads, bool)
    good = count and 1 <= n_kv_heads <= spec.n_heads and spec.n_heads % n_kv_heads == 0
    require(bool(good), AssumptionError, "n_kv_heads", n_kv_heads, "outside the domain", f"a divisor of {spec.n_heads}")
    checked("token_correlation", token_correlation, "a number in [0, 1]", 0.0, 1.0)
    shared = _layer_moments(spec, int(n_kv_heads), n_tokens, float(token_correlation), layer)
    whole = _layer_moments(spec, spec.n_heads, n_tokens, float(token_correlation), layer)
    return {
        "second_moment": shared["second_moment"] / whole["second_moment"],
        "relative_variance": shared["relative_variance"] / whole["relative_variance"],
        "kappa": shared["kappa"],
    }


def _layer_moments(spec: ModelSpec, n_kv_heads: int, n_tokens: int, correlation: float, layer: int) -> dict[str, float]:
    """Second moment, relative variance and kappa of one layer's attention with this many key/value heads."""
    spec = spec.with_fields({"n_kv_heads": n_kv_heads})
    assert spec.attention is not None
    rows = layer_table(spec, layer)
    query, key, value, output = (effective_gain(rows[f"attention.{name}"]) for name in "qkvo")
    scale = spec.attention.logit_scale or spec.head_dim**-0.5
    std = scale * (spec.head_dim * query * key * (1 - correlation)) ** 0.5
    participation = min(1.0, softmax_participation(n_tokens, std, spec.head_dim))
    overlap = softmax_overlap(n_tokens, std, 0.0, spec.head_dim)
    kappa = float(head_cosine(correlation, min(overlap, participation), participation))
    power = output * head_covariance(correlation, participation, value)
    spread = attention_relative_variance(spec.n_heads, spec.head_dim, spec.n_heads // n_kv_heads, kappa, spec.d_model)
    return {"second_moment": float(power), "relative_variance": float(spread), "kappa": kappa}
