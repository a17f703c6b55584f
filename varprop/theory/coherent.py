"""A stream with coherent block outputs: f_l = m + xi_l, with one common component m and independent noise xi_l.

m, xi_l and the embedding x_0 are uncorrelated; a = E|xi_l|^2 / d (`noise`), b = E|m|^2 / d (`common`). Then

    q_l = q_0 + f a l + g b l^2,    block share U_l = (f a + g b) / q_l,

where f and g are the factors that a mechanism puts on noise and common component (1 and 1: none). An output mask drawn
independently of the weights has f = rho and g = rho^2. Random initialisation is b = 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from varprop.theory.domain import check_number


def coherent_second_moment(
    layer: Any, noise: Any, common: Any, start: Any = 1, noise_factor: Any = 1, common_factor: Any = 1, xp: Any = np
) -> Any:
    """Second moment of the stream after `layer` blocks: q_0 + f a l + g b l^2.

    layer: l >= 0, number or array; noise, common: a, b >= 0, second moments per block; start: q_0 >= 0;
    noise_factor, common_factor: f, g >= 0. Exact. Raises `AssumptionError` outside the domain. Source: derived in
    proofs/prove_coherent.py. Checked by: tests/theory/test_coherent.py on drawn streams.

    >>> coherent_second_moment(4, noise=0.5, common=0.25, start=1.0)
    7.0
    """
    if xp is np:
        _check(layer, noise, common, start, noise_factor, common_factor)
    return start + noise_factor * noise * layer + common_factor * common * layer**2


def coherent_share(
    layer: Any, noise: Any, common: Any, start: Any = 1, noise_factor: Any = 1, common_factor: Any = 1, xp: Any = np
) -> Any:
    """Share of block `layer` in the stream after it, U_l = (f a + g b) / q_l; arguments as `coherent_second_moment`.

    dU/df > 0 and dU/d(scale of both) > 0 for q_0 > 0 and b >= 0, at every l: less noise, or a smaller scale of all
    weights, never raises the share. dU/dg < 0 exactly where f a l (l - 1) > q_0: only what lowers the common component
    against the noise can raise it. 0 where the stream is 0. Exact. Source: derived in proofs/prove_coherent.py.

    >>> coherent_share(4, noise=0.5, common=0.25, start=1.0)
    0.10714285714285714
    """
    second_moment = coherent_second_moment(layer, noise, common, start, noise_factor, common_factor, xp)
    power = noise_factor * noise + common_factor * common
    if xp is not np:
        return power / second_moment
    return (
        power / np.where(second_moment > 0, second_moment, 1.0)
        if np.ndim(second_moment)
        else _ratio(power, second_moment)
    )


def coherent_correlation(layer: Any, noise: Any, common: Any, start: Any = 1, xp: Any = np) -> Any:
    """Branch correlation of block layer + 1 with the stream after `layer` blocks: b l / sqrt((a + b) q_l).

    Tends to sqrt(b / (a + b)) in depth. Raises `AssumptionError` where a + b or q_l is 0. Exact.
    Source: derived in proofs/prove_coherent.py.

    >>> round(float(coherent_correlation(1000, noise=0.75, common=0.25)), 3)
    0.499
    """
    second_moment = coherent_second_moment(layer, noise, common, start, xp=xp)
    if xp is np:
        check_number("noise + common", np.asarray(noise) + np.asarray(common), 0, above=True)
        check_number("second_moment", second_moment, 0, above=True)
    return common * layer / xp.sqrt((noise + common) * second_moment)


def masked_noise_factor(density: Any, spread: Any = 0, noise: Any = 1, xp: Any = np) -> Any:
    """Factor f of an output mask drawn independently of the weights: rho + rho (1 - rho) w / a; g is rho^2.

    density: rho in (0, 1]; spread: w >= 0, the row power sum_j M_ij^2 u_j^2 of the common matrix M, which the mask
    turns into noise (of order b / fan_in, hence 0, for a matrix of spread-out entries); noise: a > 0. Exact.
    Source: derived in proofs/prove_coherent.py. Checked by: tests/theory/test_coherent.py.

    >>> masked_noise_factor(0.5), masked_noise_factor(0.5, spread=0.1)
    (0.5, 0.525)
    """
    if xp is np:
        check_number("density", density, 0, 1, above=True)
        check_number("spread", spread, 0)
        check_number("noise", noise, 0, above=True)
    return density + density * (1 - density) * spread / noise


def optimal_density(layer: Any, noise: Any, common: Any, start: Any = 1, spread: Any = 0, xp: Any = np) -> Any:
    """Density of an independent output mask that makes the share U_l largest, over all rho > 0:

    rho* = (b' q_0 + sqrt(b'^2 q_0^2 + a'^2 b l (l - 1) q_0)) / (a' b l (l - 1)),   a' = a + w, b' = b - w.

    A value above 1 (infinity where l = 1 or a' b = 0) means that masking only lowers the share at this layer; the best
    density is then 1. 0 for q_0 = 0 and b > 0: the share rises as far as the density falls. Arguments as
    `coherent_second_moment`, layer >= 1; spread: w of `masked_noise_factor`. Exact. Raises `AssumptionError` outside
    the domain. Source: derived in proofs/prove_coherent.py. Checked by: tests/theory/test_coherent.py.

    >>> round(optimal_density(16, noise=0.75, common=0.25), 4), optimal_density(16, noise=1.0, common=0.0)
    (0.1348, inf)
    """
    if xp is np:
        _check(layer, noise, common, start)
        check_number("layer", layer, 1)
        check_number("spread", spread, 0)
    incoherent, coherent = noise + spread, common - spread
    divisor = incoherent * common * layer * (layer - 1)
    root = xp.sqrt(coherent**2 * start**2 + incoherent * divisor * start)
    if xp is not np:
        return (coherent * start + root) / divisor
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        # the second form of the root has no cancellation for b' < 0
        density = np.where(
            np.asarray(coherent) >= 0,
            (coherent * start + root) / divisor,
            incoherent * start / (root - coherent * start),
        )
    return _plain(np.where(np.asarray(divisor) > 0, density, np.inf))


def mitigation_onset(noise: Any, common: Any, start: Any = 1, xp: Any = np) -> Any:
    """Layer from which on a light output mask raises the share, rho* < 1: the l with l (l - 1) = q_0 (a + 2 b) / (a b).

    l = (1 + sqrt(1 + 4 q_0 (a + 2 b) / (a b))) / 2, a real number; infinity for a b = 0 and q_0 > 0. Arguments as
    `coherent_second_moment`. Exact. Source: derived in proofs/prove_coherent.py.

    >>> round(mitigation_onset(noise=0.75, common=0.25), 3), mitigation_onset(noise=1.0, common=0.0)
    (3.13, inf)
    """
    if xp is not np:
        return (1 + xp.sqrt(1 + 4 * start * (noise + 2 * common) / (noise * common))) / 2
    _check(1, noise, common, start)
    needed, product = np.asarray(start * (noise + 2 * common), dtype=float), np.asarray(noise * common, dtype=float)
    ratio = np.divide(needed, product, out=np.full(np.broadcast(needed, product).shape, np.inf), where=product > 0)
    return _plain((1 + np.sqrt(1 + 4 * np.where(needed > 0, ratio, 0.0))) / 2)


def break_even_density(layer: Any, noise: Any, common: Any, start: Any = 1, xp: Any = np) -> Any:
    """Density below which an independent output mask lowers the share U_l again: q_0 (a + b) / (b (a l (l - 1) - q_0)).

    U_l(rho) > U_l(1) exactly for rho between this and 1. A value of 1 or more means that no mask raises the share;
    infinity where a l (l - 1) <= q_0 or b = 0. Arguments as `coherent_second_moment`, layer >= 1. Exact.
    Source: derived in proofs/prove_coherent.py.

    >>> round(break_even_density(16, noise=0.75, common=0.25), 4)
    0.0223
    """
    if xp is not np:
        return start * (noise + common) / (common * (noise * layer * (layer - 1) - start))
    _check(layer, noise, common, start)
    check_number("layer", layer, 1)
    divisor = np.asarray(common * (noise * layer * (layer - 1) - start), dtype=float)
    power = np.asarray(start * (noise + common), dtype=float)
    out = np.full(np.broadcast(power, divisor).shape, np.inf)
    return _plain(np.divide(power, divisor, out=out, where=divisor > 0))


def break_even_common_factor(
    layer: Any, noise: Any, common: Any, start: Any = 1, noise_factor: Any = 1, xp: Any = np
) -> Any:
    """Factor g on the common component below which a mechanism with factor f on the noise raises the share U_l:

    g = (a (f q_1 - (a + b) f l) - (a + b) q_0) / (b (a l (l - 1) - q_0)),   q_1 = q_0 + a l + b l^2.

    -infinity (no g helps) where a l (l - 1) <= q_0 or b = 0; negative: no g helps. Arguments as
    `coherent_second_moment`, layer >= 1. Exact. Source: derived in proofs/prove_coherent.py.

    >>> round(break_even_common_factor(16, noise=0.75, common=0.25, noise_factor=0.5), 3)
    0.489
    """
    if xp is np:
        _check(layer, noise, common, start, noise_factor)
        check_number("layer", layer, 1)
    second_moment = coherent_second_moment(layer, noise, common, start, xp=xp)
    power = noise_factor * noise * (second_moment - (noise + common) * layer) - (noise + common) * start
    divisor = common * (noise * layer * (layer - 1) - start)
    if xp is not np:
        return power / divisor
    power, divisor = np.asarray(power, dtype=float), np.asarray(divisor, dtype=float)
    out = np.full(np.broadcast(power, divisor).shape, -np.inf)
    return _plain(np.divide(power, divisor, out=out, where=divisor > 0))


def critical_correlation(layer: Any, increment: Any, start: Any = 1, xp: Any = np) -> Any:
    """Branch correlation r above which a light output mask raises the share U_l, for b = r^2 v and a = (1 - r^2) v:

    r^2 = (K - 1 - sqrt((K - 1)^2 - 4 K)) / (2 K),   K = v l (l - 1) / q_0.

    increment: v > 0; layer: l >= 1; start: q_0 >= 0. Infinity (no r does) for K < 3 + 2 sqrt(2). Near r = 1 (no noise
    left) it ceases to again, above the root with +sqrt. Exact. Source: derived in proofs/prove_coherent.py.

    >>> round(critical_correlation(16, 1.0), 4), critical_correlation(2, 1.0)
    (0.0648, inf)
    """
    if xp is not np:
        k = increment * layer * (layer - 1) / start
        return xp.sqrt((k - 1 - xp.sqrt((k - 1) ** 2 - 4 * k)) / (2 * k))
    check_number("layer", layer, 1)
    check_number("increment", increment, 0, above=True)
    check_number("start", start, 0)
    ratio = np.asarray(start / np.maximum(np.asarray(increment * layer * (np.asarray(layer) - 1.0)), 1e-300))
    ratio = np.minimum(ratio, 1.0)  # K <= 1: no r helps, and nothing may overflow
    # in terms of 1 / K and without the cancellation of the difference: r^2 = 2 / K / (1 - 1/K + sqrt(...))
    root = (1 - ratio) ** 2 - 4 * ratio
    helps = (root >= 0) & (ratio < 1)
    square = 2 * ratio / np.where(helps, 1 - ratio + np.sqrt(np.where(helps, root, 1.0)), 1.0)
    return _plain(np.where(helps, np.sqrt(np.where(helps, square, 0.0)), np.inf))


def log_share(before: Any, after: Any, start: Any, end: Any, xp: Any = np) -> Any:
    """Share of one block in the growth of log variance from q_0 to q_L: ln(after / before) / ln(end / start).

    before, after: second moments around the block; all > 0, end != start. For q_l = q_0 + k F_l with F increasing, the
    share of the last block falls as the common scale k rises, from (F_L - F_{L-1}) / F_L at k -> 0: by this measure
    every reduction of all blocks alike makes depth more even. Exact. Source: derived in proofs/prove_coherent.py.

    >>> round(float(log_share(2.0, 4.0, 1.0, 4.0)), 3)
    0.5
    """
    if xp is np:
        for name, value in (("before", before), ("after", after), ("start", start), ("end", end)):
            check_number(name, value, 0, above=True)
        check_number("|end - start|", np.abs(np.asarray(end) - np.asarray(start)), 0, above=True)
    return xp.log(after / before) / xp.log(end / start)


def _check(layer: Any, noise: Any, common: Any, start: Any, noise_factor: Any = 1, common_factor: Any = 1) -> None:
    check_number("layer", layer, 0)
    for name, value in (
        ("noise", noise),
        ("common", common),
        ("start", start),
        ("noise_factor", noise_factor),
        ("common_factor", common_factor),
    ):
        check_number(name, value, 0)


def _ratio(power: Any, second_moment: Any) -> Any:
    return power / second_moment if second_moment > 0 else 0.0


def _plain(value: np.ndarray) -> Any:
    return float(value) if value.ndim == 0 else value
