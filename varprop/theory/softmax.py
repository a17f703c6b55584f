"""Moments of softmax weights p_j = e^{s z_j} / sum_k e^{s z_k} over T i.i.d. logits, exact at any T (quadrature).

From 1/Z^2 = int_0^inf t e^{-t Z} dt, with x = log t and M_0 = E e^{-t e^{s z}}:

    E sum_j p_j^2                    = T int t^2 E[e^{2sz - t e^{sz}}] M_0^{T-1} dx
    E sum_{j != k} p_j p_k z_j z_k   = T (T-1) int t^2 E[z e^{sz - t e^{sz}}]^2 M_0^{T-2} dx

The integrals use the trapezoidal rule in x and z, which converges exponentially for these analytic integrands; the
steps leave a relative error below 1e-8. Two queries (`softmax_overlap`) need the two-dimensional analogue.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from varprop.errors import AssumptionError, require
from varprop.theory.quadrature import chi_square_nodes, hermite_basis, normal_nodes

Z_MAX = 10.0
"""Normal tails beyond 10 standard deviations hold 1e-23: negligible even summed over 10^9 tokens."""
MAX_STD = 200
"""Largest logit standard deviation: the grid of an integral grows with its square; weights are one-hot long before."""
MAX_OVERLAP_STD = 8
"""Largest logit standard deviation that the two-query series resolves; beyond it heads are drawn (attention.py)."""


@dataclass(frozen=True)
class SoftmaxMoments:
    """Averages over i.i.d. normal logits z_j with p = softmax(s z).

    participation: E sum_j p_j^2. pair: E sum_{j != k} p_j p_k z_j z_k.
    diagonal: E sum_{j != k} p_j p_k (z_j^2 - 1).
    """

    participation: float
    pair: float
    diagonal: float


def _check(n_tokens: int, logit_std: float) -> None:
    require(n_tokens >= 1, AssumptionError, "n_tokens", n_tokens, "too small", "an integer >= 1")
    good = math.isfinite(logit_std) and 0 <= logit_std <= MAX_STD
    require(good, AssumptionError, "logit_std", logit_std, "outside the domain", f"a number in [0, {MAX_STD}]")


def softmax_participation(
    n_tokens: int, logit_std: float, head_dim: int | None = None, d_model: int | None = None
) -> float:
    """E sum_j p_j^2, the inverse of the effective number of attended tokens.

    n_tokens: T keys; logit_std: s of the i.i.d. normal logits; head_dim: if given, s^2 is averaged over the squared
    norm of the query, s^2 chi^2_{head_dim} / head_dim; d_model: if given, the logits are those of i.i.d. tokens
    uniform on the sphere |u|^2 = d: s sqrt(chi^2_d / d) times the component of u along a direction. Quadrature,
    relative error below 1e-8 (1e-5 with head_dim or d_model). Raises `AssumptionError` for T < 1 or s < 0.
    Source: derived in proofs/prove_attention.py.

    >>> softmax_participation(16, 0.0), round(softmax_participation(1, 3.0), 8)
    (0.0625, 1.0)
    >>> [round(1 / softmax_participation(1024, s), 1) for s in (0.5, 1.5, 4.0)]
    [797.8, 118.9, 3.7]
    """
    return softmax_moments(n_tokens, logit_std, head_dim, d_model).participation


def softmax_moments(
    n_tokens: int, logit_std: float, head_dim: int | None = None, d_model: int | None = None
) -> SoftmaxMoments:
    """All of `SoftmaxMoments`; arguments, exactness and errors as in `softmax_participation`.

    With d_model, z is the component of a token on the sphere along the direction that the query selects.
    """
    _check(n_tokens, logit_std)
    total = np.zeros(3)
    for query, p_query in _ratio_nodes(_n_chi_square(head_dim), head_dim):
        for direction, p_direction in _ratio_nodes(4 if (d_model or 0) < 256 else 2, d_model):
            part = _softmax_moments(n_tokens, logit_std * math.sqrt(query * direction), d_model)
            total += p_query * p_direction * np.array([part.participation, part.pair, part.diagonal])
    return SoftmaxMoments(*total.tolist())


def _n_chi_square(degrees: int | None) -> int:
    """Nodes for the chi-square average: a variable of many degrees hardly varies."""
    return 12 if (degrees or 0) < 64 else 7


def _ratio_nodes(n_nodes: int, degrees: int | None) -> list[tuple[float, float]]:
    """Nodes and probabilities of chi^2 / degrees; the number 1 for None."""
    if degrees is None:
        return [(1.0, 1.0)]
    return [(float(x), float(p)) for x, p in zip(*chi_square_nodes(n_nodes, degrees), strict=True)]


def component_weights(z: np.ndarray, d_model: int | None) -> np.ndarray:
    """Probabilities of grid points z: standard normal, or a component of a uniform point on the sphere |u|^2 = d.

    The latter's density is (1 - z^2 / d)^{(d - 3) / 2}; below d = 8 it is too rough for this grid and the normal law
    stands in.
    """
    if d_model is None or d_model < 8:
        weight = np.exp(-(z**2) / 2)
    else:
        weight = np.maximum(1 - z**2 / d_model, 0.0) ** ((d_model - 3) / 2)
    return weight / weight.sum()


@functools.lru_cache(maxsize=4096)
def _softmax_moments(n_tokens: int, s: float, d_model: int | None) -> SoftmaxMoments:
    if s == 0 or n_tokens == 1:
        return SoftmaxMoments(1 / n_tokens, 0.0, 0.0)
    z_step = min(0.5, 0.3 / s)
    z = np.arange(-Z_MAX, Z_MAX + z_step / 2, z_step)
    weight = component_weights(z, d_model)
    x_step = max(0.25, s / 32)
    x = np.arange(-Z_MAX * s - math.log(n_tokens) - 22, Z_MAX * s + 4, x_step)
    exponent = np.minimum(x[:, None] + s * z, 30.0)  # exp(-e^30) is zero already
    t_e = np.exp(exponent)
    survival = np.exp(-t_e)
    log_m0 = np.log1p(-np.minimum(-np.expm1(-t_e) @ weight, 1 - 1e-15))
    first = t_e * survival
    square = (t_e * first) @ weight
    others = np.exp((n_tokens - 1) * log_m0)
    participation = n_tokens * x_step * float(square @ others)
    tilted = first @ (weight * z)
    pair = n_tokens * (n_tokens - 1) * x_step * float(tilted**2 @ np.exp((n_tokens - 2) * log_m0))
    excess = weight * (z**2 - 1)
    single = first @ excess - (t_e * first) @ excess
    diagonal = n_tokens * x_step * float(single @ others)
    return SoftmaxMoments(participation, pair, diagonal)


def softmax_overlap(n_tokens: int, logit_std: float, correlation: float, head_dim: int | None = None) -> float:
    """E sum_j p_tj p_sj of two queries whose logits for one key have this correlation.

    n_tokens, logit_std: as in `softmax_participation`; correlation c in [0, 1]. head_dim: if given, averaged over the
    Wishart matrix of the two queries, whose entries have correlation c, by a Gauss rule of 4 x 3 x 5 nodes (3 x 2 x 3
    from head_dim 16 on): relative error below 1e-3 for head_dim >= 8 and s <= 1.5, 3e-3 at head_dim 1. Two-dimensional
    quadrature, T int int E[e^{x + y - t e^x - t' e^y}] M_0(t, t')^{T-1} dt dt'; the bivariate normal average is a
    Hermite (Mehler) series. Relative error below 1e-5 for s <= 2 and 1e-3 for s <= 4. Raises `AssumptionError` outside
    the domain.
    Source: derived in proofs/prove_attention.py.

    >>> round(softmax_overlap(64, 1.0, 0.0), 8), softmax_overlap(64, 0.0, 0.3)
    (0.015625, 0.015625)
    >>> bool(abs(softmax_overlap(64, 1.0, 1.0) / softmax_participation(64, 1.0) - 1) < 1e-6)
    True
    """
    _check(n_tokens, logit_std)
    require(0 <= correlation <= 1, AssumptionError, "correlation", correlation, "outside the domain", "[0, 1]")
    limit = f"a number in [0, {MAX_OVERLAP_STD}]"
    require(logit_std <= MAX_OVERLAP_STD, AssumptionError, "logit_std", logit_std, "too large for the series", limit)
    if n_tokens == 1:
        return 1.0
    if head_dim is None:
        return _overlap(n_tokens, logit_std, logit_std, correlation)
    total = 0.0
    other = math.sqrt(1 - correlation**2)
    n_along, n_across, n_mixed = (4, 3, 5) if head_dim < 16 else (3, 2, 3)
    for r2, p_r in zip(*chi_square_nodes(n_along, head_dim), strict=True):
        for w2, p_w in zip(*chi_square_nodes(n_across, head_dim - 1), strict=True):
            for n, p_n in zip(*normal_nodes(n_mixed), strict=True):
                # Bartlett: the part of q_s along q_t, and across it
                along = correlation * math.sqrt(r2) + other * n / math.sqrt(head_dim)
                across = other * math.sqrt(w2 * (head_dim - 1) / head_dim)
                size = math.hypot(along, across)
                cosine = along / size if size > 0 else 0.0
                std = (logit_std * math.sqrt(r2), logit_std * size)
                total += p_r * p_w * p_n * _overlap(n_tokens, *std, cosine)
    return float(total)


def _overlap(n_tokens: int, s: float, s_other: float, correlation: float) -> float:
    """The two-dimensional integral for logit standard deviations s and s_other."""
    if min(s, s_other) == 0:
        return 1 / n_tokens
    n_nodes = int(np.clip(24 * (1 + max(s, s_other) ** 2), 48, 400))
    x, zeroth, first = _laplace(n_tokens, s, n_nodes)
    y, zeroth_other, first_other = _laplace(n_tokens, s_other, n_nodes)
    power = correlation ** np.arange(n_nodes)
    m0 = np.maximum((zeroth * power) @ zeroth_other.T, 1e-300)
    m1 = (first * power) @ first_other.T
    step = (x[1] - x[0]) * (y[1] - y[0])
    return float(n_tokens * step * np.sum(m1 * np.exp((n_tokens - 1) * np.log(m0))))


@functools.lru_cache(maxsize=512)
def _laplace(n_tokens: int, s: float, n_nodes: int) -> tuple[np.ndarray, ...]:
    """Grid x = log t and Hermite coefficients of e^{-t e^{sz}} and t e^{sz - t e^{sz}}, (n_x, n_nodes) each.

    Grid points are dropped where the one-query integrand T t E[e^{sz - t e^{sz}}] M_0^{T-1}, which bounds the
    two-query one, is below 1e-11 of its maximum.
    """
    nodes, basis = hermite_basis(n_nodes)
    x_step = max(0.35, s / 20)
    x = np.arange(-8 * s - math.log(n_tokens) - 26, 8 * s + 4, x_step)
    t_e = np.exp(np.minimum(x[:, None] + s * nodes, 30.0))
    survival = np.exp(-t_e)
    weight = basis[0] ** 2
    log_m0 = np.log1p(-np.minimum(-np.expm1(-t_e) @ weight, 1 - 1e-15))
    bound = (t_e * survival) @ weight * np.exp((n_tokens - 1) * log_m0)
    keep = bound > 1e-11 * bound.max()
    scaled = basis.T * basis[0][:, None]
    return x[keep], survival[keep] @ scaled, (t_e * survival)[keep] @ scaled
