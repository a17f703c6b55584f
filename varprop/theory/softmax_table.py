"""Softmax moments of i.i.d. normal logits at any real number of keys, interpolated: microseconds a value.

The integrals of softmax.py hold at real n (they are analytic in n), and one grid in (x, z) serves every n. Stored on a
grid in (log n, s) are log(n E sum p^2), E sum_{j != k} p_j p_k z_j z_k and E sum_{j != k} p_j p_k (z_j^2 - 1), each
over its leading order s^2 (1 - 1/n), which leaves smooth functions for a bicubic spline.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import scipy.interpolate

from varprop.theory.softmax import Z_MAX, component_weights

MAX_KEYS = 1e9
MAX_STD = 4.0
"""Largest number of keys and largest logit standard deviation in the table."""
N_GRID = (80, 40)
SMALLEST = (1e-3, 0.02)
"""Grid start: n - 1 and s. The ratios are 0/0 at n = 1 and s = 0, and constant this close to them."""


class SoftmaxTable:
    """Averages of p = softmax(s z) over n keys, as functions of arrays n >= 1 and s^2 in [0, MAX_STD^2].

    sphere_dim: None for normal z, else z is a component of a uniform point on the sphere |u|^2 = sphere_dim.
    Errors: participation below 2e-5 of itself, pair and diagonal below 3e-4 s^2 (1 - 1/n). Arguments beyond the grid
    take its edge.

    >>> table = softmax_table()
    >>> float(table.participation(16.0, 0.0)), round(float(1 / table.participation(1024.0, 2.25)), 1)
    (0.0625, 118.9)
    """

    def __init__(self, sphere_dim: int | None = None) -> None:
        log_n = np.linspace(math.log1p(SMALLEST[0]), math.log(MAX_KEYS), N_GRID[0])
        std = np.linspace(SMALLEST[1], MAX_STD, N_GRID[1])
        columns = np.stack([_ratios(np.exp(log_n), float(s), sphere_dim) for s in std], axis=-1)
        self._splines = [scipy.interpolate.RectBivariateSpline(log_n, std, ratio, s=0) for ratio in columns]

    def log_excess(self, n: np.ndarray, variance: np.ndarray) -> np.ndarray:
        """log(n E sum p^2): 0 at n = 1 and at variance 0, variance at n -> infinity and small variance."""
        return self._value(0, n, variance)

    def participation(self, n: np.ndarray, variance: np.ndarray) -> np.ndarray:
        """E sum_j p_j^2."""
        return np.exp(self.log_excess(n, variance)) / n

    def pair(self, n: np.ndarray, variance: np.ndarray) -> np.ndarray:
        """E sum_{j != k} p_j p_k z_j z_k."""
        return self._value(1, n, variance)

    def diagonal(self, n: np.ndarray, variance: np.ndarray) -> np.ndarray:
        """E sum_{j != k} p_j p_k (z_j^2 - 1)."""
        return self._value(2, n, variance)

    def _value(self, which: int, n: np.ndarray, variance: np.ndarray) -> np.ndarray:
        n = np.clip(n, 1.0, MAX_KEYS)
        variance = np.clip(variance, 0.0, MAX_STD**2)
        return self._splines[which](np.log(n), np.sqrt(variance), grid=False) * variance * (1 - 1 / n)


@functools.cache
def softmax_table(sphere_dim: int | None = None) -> SoftmaxTable:
    """The table of a logit law, built on first use (0.1 s)."""
    return SoftmaxTable(sphere_dim)


def _ratios(n: np.ndarray, s: float, sphere_dim: int | None) -> np.ndarray:
    """The three stored ratios, (3, len(n)): the integrals of softmax.py with the steps used there."""
    z_step = min(0.5, 0.3 / s)
    z = np.arange(-Z_MAX, Z_MAX + z_step / 2, z_step)
    weight = component_weights(z, sphere_dim)
    x = np.arange(-Z_MAX * s - math.log(MAX_KEYS) - 22, Z_MAX * s + 4, 0.25)
    t_e = np.exp(np.minimum(x[:, None] + s * z, 30.0))  # exp(-e^30) is zero already
    survival = np.exp(-t_e)
    log_m0 = np.log1p(-np.minimum(-np.expm1(-t_e) @ weight, 1 - 1e-15))
    first = t_e * survival
    excess = weight * (z**2 - 1)
    square, tilted, single = (t_e * first) @ weight, first @ (weight * z), first @ excess - (t_e * first) @ excess
    others = np.exp((n[:, None] - 1) * log_m0)
    participation = 0.25 * n * (others @ square)
    pair = 0.25 * n * (n - 1) * (np.exp((n[:, None] - 2) * log_m0) @ tilted**2)
    diagonal = 0.25 * n * (others @ single)
    leading = s**2 * (1 - 1 / n)
    return np.stack([np.log(n * participation), pair, diagonal]) / leading
