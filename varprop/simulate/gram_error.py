"""What `method="gram"` neglects of weight masks, to first order.

Given its inputs u, a masked pre-activation is normal with a random variance V s^2 |u|^2, E V = 1; the method puts
V = 1. Ranked masks are counted as if their entries were independent, of the kurtosis of the entries kept.
Legend: T tokens, n inputs of a matrix, b side of its mask blocks (1 for other masks), nu excess of its entries,
kurtosis E u^4 / (E u^2)^2 of its inputs.
"""

from __future__ import annotations

import functools
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
    """First-order relative error of second moments of one layer, means over networks: `neglected_variance` of the worst
    matrix, 0 without masks.

    Real networks have second moments that differ by at most Var V of the matrix before the activation (by exactly that
    for an ungated relu2, by nothing for relu). Inputs: kurtosis 3, behind an activation that of its output at tokens of
    second moment 1. Too large for n_of_m masks, whose entries balance each other. An order of magnitude, and no bound,
    where it is near 1. Fourth moments are outside the claim: they grow by Var V of the last matrix and by what the
    masks before the activation and on the gate add. At d_model 64, d_ff 256 and density 1/2 the logarithm of explicit
    over gram is 0.098 +- 0.004 (SwiGLU) and 0.367 +- 0.011 (relu2 with a gate), where log(1 + claim) is 0.076 and
    0.195; that of the second moments 0.004 and 0.045 (command in experiments/LOG.md).
    Source: derived in proofs/prove_gram.py. Checked by: tests/simulate/test_gram_masked.py.

    >>> from varprop import presets
    >>> spec = presets.tiny().with_fields(feed_forward=None)
    >>> method_error(spec), round(method_error(spec.with_fields(density=0.25)), 4)  # 3 * 3 / 130
    (0.0, 0.0692)
    """
    return _largest(spec, neglected_variance)


def method_spread_error(spec: ModelSpec, n_tokens: int) -> float:
    """First-order relative error of variances over networks of second moments of one layer: `neglected_spread` of the
    worst matrix, 0 without masks.

    For independent tokens, and for the part of the variance that comes from that matrix. Not small for T > n tokens:
    what a network's mask keeps is common to them, while the rest of their power averages out. Outside the claim are
    stacks, whose layers see the masks of all layers before them, and fourth moments: those of a SwiGLU branch of
    d_model 32 at density 1/2 vary more by a logarithm of 1.76 +- 0.24, where log(1 + claim) is 0.39
    (command in experiments/LOG.md).
    Source: derived in proofs/prove_gram.py. Checked by: tests/simulate/test_gram_masked.py.

    >>> from varprop import presets
    >>> spec = presets.tiny().with_fields(feed_forward=None, density=0.25)
    >>> round(method_spread_error(spec, 1), 4), round(method_spread_error(spec, 127), 4)  # 4.5 * (3 / 130, 129 / 256)
    (0.1038, 2.2676)
    """
    return _largest(spec, functools.partial(neglected_spread, n_tokens=n_tokens))


def neglected_variance(excess: Any, kurtosis: Any, side: Any, fan_in: Any) -> Any:
    """Var V = nu (kurtosis + b - 1) / (n + kurtosis - 1), a third of the excess kurtosis of a pre-activation.

    excess: nu of the mask (`entry_excess`). Ratio of means over independent inputs; exact for normalised Gaussian ones.
    Source: derived in proofs/prove_gram.py.

    >>> neglected_variance(3, 3, 1, 34)
    0.25
    """
    return excess * (kurtosis + side - 1) / (fan_in + kurtosis - 1)


def neglected_spread(excess: Any, kurtosis: Any, side: Any, fan_in: Any, n_tokens: Any) -> Any:
    """Relative change of Var(sum y^2) by a mask: nu (T + b + kurtosis - 2 + b (b T + kurtosis - 1) / 2) over T + n +
    kurtosis - 2, of the outputs y of one matrix for T independent tokens of independent inputs.

    Ratio of means over inputs. At T = 1, b = 1: 3/2 Var V. Source: derived in proofs/prove_gram.py.

    >>> neglected_spread(2, 3, 1, 15, 1)
    0.5294117647058824
    """
    shared = side * (side * n_tokens + kurtosis - 1) / 2
    return excess * (n_tokens + side + kurtosis - 2 + shared) / (n_tokens + fan_in + kurtosis - 2)


def entry_excess(mask: MaskSpec) -> float:
    """nu: 1 / density - 1, for ranked masks E w^4 / (3 (E w^2)^2) - 1 of the entries w, zeros included.

    >>> entry_excess(MaskSpec(density=0.25)), entry_excess(MaskSpec(kind="block", density=0.5))
    (3.0, 1.0)
    """
    return 1 / mask.density - 1 if mask.kind == "block" else mask_excess_kurtosis(mask, 1) / 9


def _largest(spec: ModelSpec, error: Callable[..., Any]) -> float:
    """The largest error(excess, kurtosis, side, fan_in) of all masked matrices."""
    one_of_each = {spec.is_moe(layer): layer for layer in range(1, spec.n_layers + 1)}.values()
    largest = 0.0
    for layer in one_of_each:
        rows = layer_table(spec, layer)
        for name, row in rows.items():
            if row.mask is not None:
                side = min(row.mask.block_size, row.fan_in) if row.mask.kind == "block" else 1
                kurtosis = _input_kurtosis(spec, rows, name)
                largest = max(largest, float(error(entry_excess(row.mask), kurtosis, side, row.fan_in)))
    return largest


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
