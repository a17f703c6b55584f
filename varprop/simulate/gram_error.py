"""What `method="gram"` neglects of weight masks, to first order.

Given its inputs u, a masked pre-activation is normal with a random variance V s^2 |u|^2, E V = 1; the method puts
V = 1.
Legend: T tokens, n inputs of a matrix, b side of its mask blocks (1 for other masks).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from varprop.spec import MaskSpec, ModelSpec, TensorRow, layer_table
from varprop.theory.activation import activation_fourth_moment, activation_second_moment
from varprop.theory.linear import effective_gain, mask_excess_kurtosis

EXACT: dict[str, Any] = {"exactness": "exact", "method_error": 0.0, "method_spread_error": 0.0}
"""The claims of a sample whose matrices were all drawn."""


def gram_claims(spec: ModelSpec, n_tokens: int) -> dict[str, Any]:
    """The attributes `exactness`, `method_error` and `method_spread_error` of a sample with `method="gram"`.

    >>> from varprop import presets
    >>> gram_claims(presets.tiny(), 64)["exactness"]
    'exact in law'
    """
    error = method_error(spec)
    return {
        "exactness": "leading order in 1/(density * fan_in)" if error else "exact in law",
        "method_error": error,
        "method_spread_error": method_spread_error(spec, n_tokens),
    }


def method_error(spec: ModelSpec) -> float:
    """First-order relative error of means over networks; 0 where no weight is masked.

    The largest Var V of all matrices: nu (kurtosis + b - 1) / n, with nu = 1 / density - 1 for Bernoulli and block
    masks and E w^4 / (3 (E w^2)^2) - 1 of the masked entries w for ranked ones (an upper bound for n_of_m), and
    kurtosis that of the inputs: 3, behind an activation that of its output at tokens of second moment 1. The fourth
    moment of a branch is too small by the share Var V of its last matrix, its second moment off by at most Var V of the
    matrix before the activation (by exactly that for an ungated relu2, by nothing for relu).
    Source: derived in proofs/prove_gram.py. Checked by: tests/simulate/test_gram_masked.py.

    >>> from varprop import presets
    >>> spec = presets.tiny().with_fields(feed_forward=None)
    >>> method_error(spec), method_error(spec.with_fields(density=0.25))  # 3 * 3 / 128
    (0.0, 0.0703125)
    """
    return _largest(spec, lambda mask, n, kurtosis: _variance_of_entries(mask) * (kurtosis + _side(mask, n) - 1) / n)


def method_spread_error(spec: ModelSpec, n_tokens: int) -> float:
    """First-order relative error of variances over networks (of a layer's power), an upper estimate; 0 without masks.

    The largest nu (T + b + kurtosis - 2 + b (b T + kurtosis - 1) / 2) / (T + n + 1) of all matrices, as in
    `method_error`, for independent tokens; less for correlated ones. 3/2 `method_error` for one token and b = 1; not
    small for T > n tokens: what a network's mask keeps is common to them, while the rest of their power averages out.
    Source: derived in proofs/prove_gram.py. Checked by: tests/simulate/test_gram_masked.py.

    >>> from varprop import presets
    >>> spec = presets.tiny().with_fields(feed_forward=None, density=0.25)
    >>> round(method_spread_error(spec, 1), 4), round(method_spread_error(spec, 127), 4)  # 4.5 * (3 / 130, 129 / 256)
    (0.1038, 2.2676)
    """

    def error(mask: MaskSpec, n: int, kurtosis: float) -> float:
        side = _side(mask, n)
        shared = side * (side * n_tokens + kurtosis - 1) / 2
        return _variance_of_entries(mask) * (n_tokens + side + kurtosis - 2 + shared) / (n_tokens + n + 1)

    return _largest(spec, error)


def _largest(spec: ModelSpec, error: Callable[[MaskSpec, int, float], float]) -> float:
    """The largest error of all masked matrices, from mask, inputs and kurtosis of the inputs."""
    one_of_each = {spec.is_moe(layer): layer for layer in range(1, spec.n_layers + 1)}.values()
    tables = [layer_table(spec, layer) for layer in one_of_each]
    errors = (
        float(error(row.mask, row.fan_in, _input_kurtosis(spec, rows, name)))
        for rows in tables
        for name, row in rows.items()
        if row.mask is not None
    )
    return max(errors, default=0.0)


def _side(mask: MaskSpec, fan_in: int) -> int:
    return min(mask.block_size, fan_in) if mask.kind == "block" else 1


def _variance_of_entries(mask: MaskSpec) -> float:
    """nu: 1 / density - 1, or what has its place for ranked masks."""
    if mask.kind == "block":
        return 1 / mask.density - 1
    return mask_excess_kurtosis(mask, 1) / 9


def _input_kurtosis(spec: ModelSpec, rows: Mapping[str, TensorRow], name: str) -> float:
    """E u^4 / (E u^2)^2 over the inputs of a matrix."""
    prefix, _, matrix = name.rpartition(".")
    if matrix != "down":
        return 3.0
    part = spec.moe if prefix.startswith("moe") else spec.feed_forward
    assert part is not None
    gain = effective_gain(rows[f"{prefix}.gate" if part.gated else f"{prefix}.up"])
    ratio = activation_fourth_moment(part.activation, gain) / activation_second_moment(part.activation, gain) ** 2
    return float(ratio) * (3 if part.gated else 1)
