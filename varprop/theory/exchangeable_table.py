"""Softmax moments of one attention, tabulated: a recursion over depth needs them at thousands of logit sizes.

Chebyshev interpolation in the logit standard deviation and, for two queries, in the token correlation. The functions
are entire in both, so the error falls geometrically with the number of nodes; `ExchangeableTable` takes as many as
keep it below 1e-6 (relative) for logit standard deviations up to 4 and 1e-4 up to 8.
Checked by: tests/theory/test_exchangeable.py.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.polynomial import chebyshev

from varprop.theory.softmax import softmax_moments, softmax_overlap

NARROW = 1e-3
"""Relative width of a range of logit sizes over which three nodes are exact to rounding of the table."""


class ExchangeableTable:
    """Softmax moments for logits of standard deviation `low`..`high` (uncorrelated tokens), correlation 0..1.

    Raises `AssumptionError` where `softmax_overlap` does.
    """

    def __init__(self, n_tokens: int, head_dim: int, d_model: int, low: float, high: float) -> None:
        self.n_tokens = n_tokens
        self._high = high
        std = high * _unit_nodes(math.ceil(14 + 5 * high))
        rows = [softmax_moments(n_tokens, float(s), head_dim, d_model) for s in std]
        values = np.array([[math.log(n_tokens * m.participation), m.pair, m.diagonal] for m in rows])
        self._moments = chebyshev.chebfit(2 * std / max(high, 1e-300) - 1, values, len(std) - 1)
        wide = high - low > NARROW * high
        self._low, self._width = low, max(high - low, 1e-12)
        outer = low + self._width * _unit_nodes(math.ceil(5 + 4 * (high - low)) if wide else 3)
        correlation = _unit_nodes(math.ceil(6 + 4 * high))
        pairs = [
            [math.log(n_tokens * softmax_overlap(n_tokens, s * math.sqrt(1 - c), c, head_dim)) for c in correlation]
            for s in outer.tolist()
        ]
        along = chebyshev.chebfit(2 * correlation - 1, np.transpose(pairs), len(correlation) - 1)
        self._overlap = chebyshev.chebfit(self._position(outer), along.T, len(outer) - 1)

    def _position(self, std: np.ndarray) -> np.ndarray:
        return 2 * (std - self._low) / self._width - 1

    def moments(self, std: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`SoftmaxMoments` at logit standard deviations (any shape) that the softmax sees: 0..high."""
        log_count, pair, diagonal = chebyshev.chebval(2 * std / max(self._high, 1e-300) - 1, self._moments)
        return np.exp(log_count) / self.n_tokens, pair, diagonal

    def overlap(self, std: np.ndarray, correlation: np.ndarray) -> np.ndarray:
        """Two-query overlap, (*std.shape, n): logits of uncorrelated tokens `std`, token correlations (n,)."""
        outer = chebyshev.chebvander(self._position(std), self._overlap.shape[0] - 1)
        inner = chebyshev.chebvander(2 * correlation - 1, self._overlap.shape[1] - 1)
        return np.exp(outer @ self._overlap @ inner.T) / self.n_tokens


@functools.lru_cache(maxsize=64)
def exchangeable_table(n_tokens: int, head_dim: int, d_model: int, low: float, high: float) -> ExchangeableTable:
    """`ExchangeableTable`, built once for the same arguments."""
    return ExchangeableTable(n_tokens, head_dim, d_model, low, high)


def _unit_nodes(count: int) -> np.ndarray:
    """Chebyshev points of the first kind on (0, 1)."""
    return (1 - np.cos(np.pi * (np.arange(count) + 0.5) / count)) / 2
