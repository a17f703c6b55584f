"""Masked linear maps y = (M * W) u with independent Gaussian entries of W and gain = fan_in * Var(w) before masking.

Given u, E|y|^2 per output = gain * retained_variance * |u|^2 / fan_in. For masks drawn independently of W this is
exact at any width; ranked masks (magnitude) use the quantile of an infinite matrix, a relative error below 1/kept.
Trained weights are coherent + noise: an independent mask keeps density^2 of the coherent power, density of the noise.
"""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple

import numpy as np
import scipy.special

from varprop.errors import AssumptionError, require
from varprop.spec import MaskSpec, TensorRow
from varprop.theory.namespace import checked, erfcinv, normal_density

RESCALE_POWERS = {"none": 0.0, "inverse_sqrt": -0.5, "inverse": -1.0}


def _density(value: Any) -> Any:
    return checked("density", value, "numbers in (0, 1]", 1e-300, 1.0)


def linear_second_moment(second_moment: Any, gain: Any, retained: Any = 1) -> Any:
    """Second moment of an output entry of a masked linear map: gain * retained * second_moment.

    second_moment: of the input entries. Exact at any width. Raises `AssumptionError` for negative numbers.
    Source: derived in proofs/prove_linear.py. Checked by: tests/theory/test_linear.py.

    >>> linear_second_moment(2.0, 1.5, 0.25)
    0.75
    """
    second_moment, gain, retained = (
        checked(name, value, "numbers >= 0", 0.0)
        for name, value in (("second_moment", second_moment), ("gain", gain), ("retained", retained))
    )
    return gain * retained * second_moment


def bernoulli_retained_variance(density: Any, factor: Any = 1) -> Any:
    """Share of the entry variance that an independent 0/1 mask keeps: density * factor^2.

    density: in (0, 1]; factor: multiplier of kept entries (`rescale_factor`). Exact; increases with the density at a
    fixed factor. Raises `AssumptionError` outside the domain. Source: derived in proofs/prove_linear.py.

    >>> bernoulli_retained_variance(0.25, 2.0)
    1.0
    """
    return _density(density) * checked("factor", factor, "finite numbers") ** 2


def rescale_factor(density: Any, rescale: str) -> Any:
    """The factor on kept entries: none 1, inverse_sqrt density^(-1/2), inverse density^(-1).

    An independent mask then keeps density, 1 or 1 / density of the variance, and density^2, density or 1 of the power
    of a coherent matrix. Raises `AssumptionError` for another rule or a density outside (0, 1].

    >>> rescale_factor(0.25, "inverse_sqrt"), rescale_factor(0.25, "inverse")
    (2.0, 4.0)
    """
    known = isinstance(rescale, str) and rescale in RESCALE_POWERS
    require(known, AssumptionError, "rescale", rescale, "unknown", "one of " + ", ".join(RESCALE_POWERS))
    return _density(density) ** RESCALE_POWERS[rescale]


def bernoulli_excess_kurtosis(density: Any, input_kurtosis: Any, fan_in: Any) -> Any:
    """Excess kurtosis of an output given the input: 3 (1 - density) / density * input_kurtosis / fan_in.

    input_kurtosis: fan_in * sum u^4 / (sum u^2)^2, 3 for wide Gaussian inputs (mean 3 fan_in / (fan_in + 2)). Exact for
    Gaussian weights; falls with the density. Raises `AssumptionError` outside the domains.
    Source: derived in proofs/prove_linear.py. Checked by: tests/theory/test_linear.py.

    >>> bernoulli_excess_kurtosis(0.5, 3, 90)
    0.1
    """
    fan_in = checked("fan_in", fan_in, "numbers >= 1", 1.0)
    input_kurtosis = checked("input_kurtosis", input_kurtosis, "numbers >= 1", 1.0)
    density = _density(density)
    return 3 * (1 - density) / density * input_kurtosis / fan_in


def bernoulli_fourth_moment(density: Any, square_mean: Any, fourth_mean: Any, fan_in: Any) -> Any:
    """E y^4 of an output at gain 1: 3 (density^2 (P - K / fan_in) + density K / fan_in).

    square_mean: P, the mean of (sum u^2 / fan_in)^2; fourth_mean: K, that of sum u^4 / fan_in. Given inputs: their own
    values. Independent Gaussian inputs of second moment q: P = q^2 (1 + 2 / fan_in), K = 3 q^2, so that
    E y^4 / q^2 = 3 density^2 (1 - 1 / fan_in) + 9 density / fan_in. Multiply by (gain * factor^2)^2.
    Exact for Gaussian weights at any width. Raises `AssumptionError` outside the domains.
    Source: derived in proofs/prove_linear.py. Checked by: tests/theory/test_linear.py.

    >>> bernoulli_fourth_moment(1.0, 1.0, 3.0, 8), bernoulli_fourth_moment(0.5, 1.25, 3.0, 8)
    (3.0, 1.21875)
    """
    square_mean = checked("square_mean", square_mean, "numbers >= 0", 0.0)
    fourth_mean = checked("fourth_mean", fourth_mean, "numbers >= 0", 0.0)
    fan_in = checked("fan_in", fan_in, "numbers >= 1", 1.0)
    density, single = _density(density), fourth_mean / fan_in
    return 3 * (density**2 * (square_mean - single) + density * single)


def block_concentration(block_size: Any, fan_in: Any) -> Any:
    """Mean of sum_b |u_b|^4 / |u|^4 over blocks of inputs: (block_size + 2) / (fan_in + 2).

    Exact for Gaussian inputs, normalised or not, and block_size dividing fan_in; its inverse is the number of blocks
    that count. Raises `AssumptionError` outside the domains. Source: derived in proofs/prove_linear.py.

    >>> block_concentration(4, 22)
    0.25
    """
    fan_in = checked("fan_in", fan_in, "numbers >= 1", 1.0)
    block_size = checked("block_size", block_size, "numbers >= 1", 1.0)
    return (block_size + 2) / (fan_in + 2)


def block_excess_kurtosis(density: Any, concentration: Any) -> Any:
    """Excess kurtosis of an output whose inputs are kept in blocks: 3 (1 - density) / density * concentration.

    concentration: sum_b |u_b|^4 / |u|^4 of the inputs (`block_concentration` for Gaussian ones; blocks of one entry:
    the Bernoulli mask). A third of it is the relative covariance of y_i^2 and y_j^2 for two outputs of one block row,
    which share their mask. Exact for Gaussian weights. Raises `AssumptionError` outside the domains.
    Source: derived in proofs/prove_linear.py. Checked by: tests/theory/test_linear.py.

    >>> block_excess_kurtosis(0.5, 0.25)
    0.75
    """
    concentration = checked("concentration", concentration, "numbers in [0, 1]", 0.0, 1.0)
    density = _density(density)
    return 3 * (1 - density) / density * concentration


def structured_second_moment(density: Any, coherent: Any, entries: Any, noise: Any = 0, factor: Any = 1) -> Any:
    """Second moment of (M * (W + N)) u for a fixed W, noise N and an independent 0/1 mask M:

    factor^2 (density^2 coherent + density (1 - density) entries + density noise).

    coherent: (sum_j W_ij u_j)^2; entries: sum_j W_ij^2 u_j^2; noise: gain_noise * |u|^2 / fan_in; all per output. With
    products of two tokens in place of squares: their covariance. Exact at any width. Increases with the density at a
    fixed factor if entries <= 2 coherent + noise; else, where the inputs of a row cancel, masking some of them raises
    it. Raises `AssumptionError` outside (0, 1] and for numbers that are not finite. Source: derived in
    proofs/prove_linear.py. Checked by: tests/theory/test_linear.py.

    >>> structured_second_moment(0.5, 4.0, 0.0), structured_second_moment(0.5, 0.0, 0.0, 4.0)
    (1.0, 2.0)
    """
    coherent, entries, noise, factor = (
        checked(name, value, "finite numbers")
        for name, value in (("coherent", coherent), ("entries", entries), ("noise", noise), ("factor", factor))
    )
    density = _density(density)
    return factor**2 * (density**2 * coherent + density * (1 - density) * entries + density * noise)


class AttentionMaskFactors(NamedTuple):
    """What masks on the four matrices of attention multiply: the variance of the logits and of the values."""

    logit_variance: Any
    value_variance: Any


def attention_mask_factors(q: Any = 1, k: Any = 1, v: Any = 1, o: Any = 1) -> AttentionMaskFactors:
    """Factors of masks with these retained variances: logits retained_q * retained_k, output retained_v * retained_o.

    Masks on Q and K flatten the attention weights and masks on V and O scale its output: at one density rho without
    rescaling both factors are rho^2. Exact. Raises `AssumptionError` for negative numbers.
    Source: derived in proofs/prove_linear.py.

    >>> attention_mask_factors(q=0.5, k=0.5, v=0.5)
    AttentionMaskFactors(logit_variance=0.25, value_variance=0.5)
    """
    q, k, v, o = (checked(name, value, "numbers >= 0", 0.0) for name, value in (("q", q), ("k", k), ("v", v), ("o", o)))
    return AttentionMaskFactors(q * k, v * o)


def _threshold(density: Any, xp: Any) -> Any:
    """The tau above which a share `density` of standard normal magnitudes lies."""
    return xp.sqrt(2) * erfcinv(density, xp)


def magnitude_retained_variance(density: Any, xp: Any = np) -> Any:
    """Share of the variance of Gaussian entries that the largest `density` of them hold: density + 2 tau phi(tau).

    tau solves density = 2 (1 - Phi(tau)). Exact for the quantile of an infinite matrix; increasing (slope tau^2) and
    concave, so never below the density. Raises `AssumptionError` outside (0, 1].
    Source: derived in proofs/prove_linear.py. Checked by: tests/theory/test_linear.py.

    >>> round(float(magnitude_retained_variance(0.5)), 3), round(float(magnitude_retained_variance(0.25)), 3)
    (0.929, 0.724)
    """
    density = _density(density)
    tau = _threshold(density, xp)
    return density + 2 * tau * normal_density(tau, xp)


def magnitude_fourth_moment(density: Any, xp: Any = np) -> Any:
    """E w^4 of standard normal entries over the largest `density` of them: 3 e + 2 tau^3 phi(tau).

    e, tau: as in `magnitude_retained_variance`. Exact for an infinite matrix. Raises `AssumptionError` outside (0, 1].
    Source: derived in proofs/prove_linear.py.

    >>> float(magnitude_fourth_moment(1.0))
    3.0
    """
    density = _density(density)
    tau = _threshold(density, xp)
    return 3 * magnitude_retained_variance(density, xp) + 2 * tau**3 * normal_density(tau, xp)


def ranked_moment(kept: int, group: int, power: int) -> float:
    """E[|w|^power, kept] per entry, for the `kept` largest in magnitude of every `group` standard normal entries.

    kept, group, power: integers >= 1, kept <= group. E = 2 int_0^inf w^power phi(w) P(Bin(group - 1, 2 Phi(-w)) < kept)
    dw, by Gauss-Legendre on [0, 12] (error below 1e-12). Raises `AssumptionError` outside the domains.
    Source: derived in proofs/prove_linear.py. Checked by: tests/theory/test_linear.py.

    >>> ranked_moment(4, 4, 2), round(ranked_moment(2, 4, 2), 4)
    (1.0, 0.8676)
    """
    for name, value in (("group", group), ("kept", kept), ("power", power)):
        integer = isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= 1
        require(integer, AssumptionError, name, value, "outside the domain", "an integer >= 1")
    require(kept <= group, AssumptionError, "kept", kept, "outside the group", f"an integer in 1..{group}")
    if kept == group:
        return math.prod(range(power - 1, 0, -2)) * (math.sqrt(2 / math.pi) if power % 2 else 1.0)
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

    3 (E w^4 / (E w^2)^2 - 3) / fan_in over masked entries w, leading order in 1/fan_in (n_of_m entries of a group are
    dependent); a block mask, which keeps or drops `block_size` inputs at once: `block_excess_kurtosis`.

    >>> mask_excess_kurtosis(MaskSpec(density=0.5), 90)
    0.1
    """
    if mask is None or mask.density == 1:
        return 0.0
    if mask.kind == "magnitude":
        ratio = float(magnitude_fourth_moment(mask.density) / magnitude_retained_variance(mask.density) ** 2)
        return 3 * abs(ratio - 3) / fan_in
    if mask.kind == "n_of_m":
        kept = round(mask.density * mask.group)
        ratio = ranked_moment(kept, mask.group, 4) / ranked_moment(kept, mask.group, 2) ** 2
        return 3 * abs(ratio - 3) / fan_in
    if mask.kind == "block":
        return float(block_excess_kurtosis(mask.density, block_concentration(min(mask.block_size, fan_in), fan_in)))
    return float(bernoulli_excess_kurtosis(mask.density, 3, fan_in))


def effective_gain(row: TensorRow) -> float:
    """Gain of a tensor after its mask: fan_in * std^2 * retained variance."""
    return row.gain * retained_variance(row.mask, row.fan_in * row.fan_out)


def gain_error(row: TensorRow) -> float:
    """Relative error of `effective_gain`: 1/kept for a magnitude mask, else 0."""
    if row.mask is None or row.mask.kind != "magnitude" or row.mask.density == 1:
        return 0.0
    return 1 / kept_entries(row.mask.density, row.fan_in * row.fan_out)
