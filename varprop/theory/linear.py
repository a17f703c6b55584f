"""Masked linear maps y = (M * W) u with independent Gaussian entries of W and gain = fan_in * Var(w) before masking.

Given u, E|y|^2 per output = gain * retained_variance * |u|^2 / fan_in. For masks drawn independently of W this is
exact at any width; ranked masks (magnitude) use the quantile of an infinite matrix, a relative error below 1/kept.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import scipy.special

from varprop.errors import AssumptionError, require
from varprop.spec import MaskSpec, TensorRow
from varprop.theory.namespace import erfinv, normal_density


def linear_second_moment(second_moment: Any, gain: Any, retained: Any = 1) -> Any:
    """Second moment of an output entry of a masked linear map: gain * retained * second_moment.

    second_moment: of the input entries. Exact at any width. Source: derived in proofs/prove_linear.py.

    >>> linear_second_moment(2.0, 1.5, 0.25)
    0.75
    """
    return gain * retained * second_moment


def bernoulli_retained_variance(density: Any, factor: Any = 1) -> Any:
    """Share of the entry variance that an independent 0/1 mask keeps: density * factor^2.

    factor: multiplier of kept entries. Exact. Source: derived in proofs/prove_linear.py.

    >>> bernoulli_retained_variance(0.25, 2.0)
    1.0
    """
    return density * factor**2


def bernoulli_excess_kurtosis(density: Any, input_kurtosis: Any, fan_in: Any) -> Any:
    """Excess kurtosis of an output given the input: 3 (1 - density) / density * input_kurtosis / fan_in.

    input_kurtosis: fan_in * sum u^4 / (sum u^2)^2, 3 for Gaussian inputs. Exact for Gaussian weights.
    Source: derived in proofs/prove_linear.py.

    >>> bernoulli_excess_kurtosis(0.5, 3, 90)
    0.1
    """
    return 3 * (1 - density) / density * input_kurtosis / fan_in


def magnitude_retained_variance(density: Any, xp: Any = np) -> Any:
    """Share of the variance of Gaussian entries that the largest `density` of them hold: density + 2 tau phi(tau).

    tau solves density = 2 (1 - Phi(tau)). Exact for the quantile of an infinite matrix. Source: derived in
    proofs/prove_linear.py.

    >>> round(float(magnitude_retained_variance(0.5)), 3), round(float(magnitude_retained_variance(0.25)), 3)
    (0.929, 0.724)
    """
    tau = xp.sqrt(2) * erfinv(1 - density, xp)
    return density + 2 * tau * normal_density(tau, xp)


def ranked_moment(kept: int, group: int, power: int) -> float:
    """E[|w|^power, kept] per entry, for the `kept` largest in magnitude of every `group` standard normal entries.

    E = 2 int_0^inf w^power phi(w) P(Bin(group - 1, 2 Phi(-w)) < kept) dw, by Gauss-Legendre on [0, 12] (error below
    1e-12). Raises `AssumptionError` unless 1 <= kept <= group. Source: derived in proofs/prove_linear.py.

    >>> ranked_moment(4, 4, 2), round(ranked_moment(2, 4, 2), 4)
    (1.0, 0.8676)
    """
    require(1 <= kept <= group, AssumptionError, "kept", kept, "outside the group", f"an integer in 1..{group}")
    if kept == group:
        return float(math.prod(range(power - 1, 0, -2)))
    x, weight = np.polynomial.legendre.leggauss(200)
    w = 6 * (x + 1)
    larger = 2 * scipy.special.ndtr(-w)
    in_top = scipy.special.bdtr(kept - 1, group - 1, larger)
    return float(np.sum(6 * weight * 2 * w**power * normal_density(w) * in_top))


def kept_entries(density: float, n_entries: int) -> int:
    """Entries that a magnitude mask keeps of a matrix: round(density * n_entries), at least one.

    >>> kept_entries(0.25, 100), kept_entries(1e-6, 100)
    (25, 1)
    """
    return max(1, round(density * n_entries))


def retained_variance(mask: MaskSpec | None, n_entries: int) -> float:
    """Share of the entry variance that a mask keeps of a matrix of `n_entries`, rescaling included; 1 for no mask.

    bernoulli, block: density * factor^2 (exact); n_of_m: order statistics (quadrature); magnitude: quantile of an
    infinite matrix at the share really kept (relative error below 1/kept).

    >>> half = MaskSpec(density=0.25, rescale="inverse_sqrt")
    >>> retained_variance(MaskSpec(density=0.25), 64), retained_variance(half, 64)
    (0.25, 1.0)
    """
    if mask is None:
        return 1.0
    if mask.kind == "magnitude":
        share = kept_entries(mask.density, n_entries) / n_entries
        kept = float(magnitude_retained_variance(share)) if share < 1 else 1.0
    elif mask.kind == "n_of_m":
        kept = ranked_moment(round(mask.density * mask.group), mask.group, 2)
    else:
        kept = mask.density
    return kept * mask.factor**2


def mask_excess_kurtosis(mask: MaskSpec | None, fan_in: int) -> float:
    """Excess kurtosis that a mask gives to a pre-activation with Gaussian inputs, in magnitude; 0 for no mask.

    3 (E w^4 / (E w^2)^2 - 3) / fan_in over masked entries w; a block mask keeps or drops `block_size` inputs at once,
    so that its fan-in counts blocks (leading order). n_of_m entries of a group are dependent: leading order too.

    >>> mask_excess_kurtosis(MaskSpec(density=0.5), 90)
    0.1
    """
    if mask is None or mask.density == 1:
        return 0.0
    if mask.kind == "magnitude":
        tau = math.sqrt(2) * float(erfinv(1 - mask.density))
        fourth = 3 * float(magnitude_retained_variance(mask.density)) + 2 * tau**3 * float(normal_density(tau))
        return 3 * abs(fourth / float(magnitude_retained_variance(mask.density)) ** 2 - 3) / fan_in
    if mask.kind == "n_of_m":
        kept = round(mask.density * mask.group)
        ratio = ranked_moment(kept, mask.group, 4) / ranked_moment(kept, mask.group, 2) ** 2
        return 3 * abs(ratio - 3) / fan_in
    if mask.kind == "block":  # given the kept blocks the output is Gaussian; |u|^2 over a block hardly varies
        return 3 * (1 - mask.density) / mask.density * min(mask.block_size, fan_in) / fan_in
    return float(bernoulli_excess_kurtosis(mask.density, 3, fan_in))


def effective_gain(row: TensorRow) -> float:
    """Gain of a tensor after its mask: fan_in * std^2 * retained variance."""
    return row.gain * retained_variance(row.mask, row.fan_in * row.fan_out)


def gain_error(row: TensorRow) -> float:
    """Relative error of `effective_gain`: 1/kept for a magnitude mask, else 0."""
    if row.mask is None or row.mask.kind != "magnitude" or row.mask.density == 1:
        return 0.0
    return 1 / kept_entries(row.mask.density, row.fan_in * row.fan_out)
