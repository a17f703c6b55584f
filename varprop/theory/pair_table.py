"""A branch rule for two exchangeable tokens, tabulated for many specs at once.

A rule maps (second moment m, correlation c) of the branch's input to (second moment, covariance) of its output. Over
depth it is needed thousands of times, at almost the same m (a norm holds it near 1) and slowly moving c. The table
holds log(second moment) and (1 - correlation of the output) / (1 - c), which keeps equal tokens equal and resolves
the approach to c = 1: cubic splines in the angle arccos c, in which kernels are smooth, times a Chebyshev series in
log m. Interpolation error: below 1e-7 (tests/theory/test_exchangeable.py).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.interpolate

N_ANGLES = 65
CHUNK = 500
"""Specs tabulated at a time, which bounds the memory."""

Rule = Callable[[np.ndarray, np.ndarray, slice], tuple[np.ndarray, np.ndarray]]
"""(second moments (S, M, 1), correlations (A,), which specs) -> second moment and covariance, both (S, M, A)."""


class PairTable:
    """`table(state)` with state (2, n_specs) = second moment and covariance of the input; returns those of the output.

    low, high: (n_specs,) range of the input's second moment; outside it the nearest end is used (the caller checks).
    """

    def __init__(self, rule: Rule, low: np.ndarray, high: np.ndarray) -> None:
        angle = np.linspace(0.0, np.pi / 2, N_ANGLES)
        self._per_angle = (N_ANGLES - 1) / (np.pi / 2)
        low, high = np.log(low), np.log(high)
        self._middle, half = (high + low) / 2, np.maximum((high - low) / 2, 1e-9)
        self._inverse_half = 1 / half
        count = _n_moments(float(half.max()))
        nodes = -np.cos(np.pi * (np.arange(count) + 0.5) / count)
        self._orders = np.arange(count)
        to_series = np.linalg.inv(np.polynomial.chebyshev.chebvander(nodes, count - 1))
        moments = np.exp(self._middle[:, None] + half[:, None] * nodes)[..., None]
        pieces = []
        for start in range(0, len(low), CHUNK):
            chosen = slice(start, start + CHUNK)
            second_moment, covariance = rule(moments[chosen], np.cos(angle), chosen)
            apart = (1 - covariance / second_moment)[..., 1:] / (1 - np.cos(angle[1:]))
            limit = apart[..., :4] @ _TO_ZERO_ANGLE
            apart = np.concatenate([limit[..., None], apart], axis=-1)
            values = np.stack([np.log(second_moment), apart], axis=-1)  # (S, M, A, 2)
            values = np.einsum("pm,smaf->aspf", to_series, values)
            spline = scipy.interpolate.CubicSpline(angle * self._per_angle, values).c[::-1]  # (4, A-1, S, P, 2)
            pieces.append(np.moveaxis(spline, (0, 1), (2, 1)))  # (S, A-1, 4, P, 2)
        self._table = np.ascontiguousarray(np.concatenate(pieces)).reshape(len(low), N_ANGLES - 1, 4, -1)
        self._rows = np.arange(len(low))

    def __call__(self, state: np.ndarray) -> np.ndarray:
        second_moment, covariance = state
        correlation = np.minimum(covariance / second_moment, 1.0)
        position = np.arccos(correlation) * self._per_angle
        index = np.minimum(position.astype(np.intp), N_ANGLES - 2)
        along = (position - index)[:, None] ** _CUBIC
        cell = (along[:, None, :] @ self._table[self._rows, index]).reshape(len(index), -1, 2)
        log_second_moment, apart = self._at(second_moment, cell).T
        out = np.empty_like(state)
        np.exp(log_second_moment, out=out[0])
        np.multiply(out[0], 1 - (1 - correlation) * apart, out=out[1])
        return out

    def _at(self, second_moment: np.ndarray, cell: np.ndarray) -> np.ndarray:
        """Chebyshev series (n_specs, orders, 2) in log m, summed."""
        if cell.shape[1] == 1:
            return cell[:, 0]
        place = np.maximum(np.minimum((np.log(second_moment) - self._middle) * self._inverse_half, 1.0), -1.0)
        return (np.cos(np.arccos(place)[:, None] * self._orders)[:, None, :] @ cell)[:, 0]


_CUBIC = np.arange(4)
_TO_ZERO_ANGLE = np.array([4.0, -6.0, 4.0, -1.0])
"""The cubic through four equidistant points, one step before the first."""


def _n_moments(half_range: float) -> int:
    """Chebyshev points for a half range of log second moment."""
    for limit, count in ((1e-8, 1), (1e-4, 2), (1e-2, 3), (0.1, 5)):
        if half_range <= limit:
            return count
    return round(6 + 4 * half_range)
