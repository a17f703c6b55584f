"""Which pairs of layers are swapped, and what the swapped ones say about all.

Pairs are drawn by stratified sampling without replacement. The pairs that hold layer 1 are strata of their own: they
are few and their scores are the largest by far. Within these and within the others, the pairs are sorted by their
distance |i - j| and cut into bands of equal size, of each of which two or three are drawn. So every linear function of
all pairs has an unbiased estimate and its sampling variance an unbiased one (Cochran, Sampling Techniques, 5.3-5.5).

Letters: `P` swapped pairs, `S` sequences, `H` strata, `G` groups of pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from varprop.errors import ArgumentError, require

Array = NDArray[np.float64]
FEWEST = 4
"""Fewest pairs that are drawn: two with layer 1 and two without."""
FIRST_SHARE = 1 / 8
"""Share of the drawn pairs that hold layer 1."""


@dataclass(frozen=True)
class Pairs:
    """Pairs of layers i < j, counted from 1, of a model of `n_layers`; every array has one entry for each pair.

    stratum: that the pair was drawn from, of `sizes` pairs in all. drawn: False for pairs that were added to a drawn
    sample so that every layer is in one; they say nothing about the other pairs.
    """

    n_layers: int
    first: NDArray[np.int64]
    second: NDArray[np.int64]
    stratum: NDArray[np.int64]
    drawn: NDArray[np.bool_]
    sizes: NDArray[np.int64]

    @property
    def lag(self) -> NDArray[np.int64]:
        """j - i."""
        return self.second - self.first

    @property
    def n_all(self) -> int:
        """Number of pairs that the model has."""
        return self.n_layers * (self.n_layers - 1) // 2

    def holds(self, layer: int) -> NDArray[np.bool_]:
        """Whether a layer is one of the pair."""
        return (self.first == layer) | (self.second == layer)

    @property
    def inclusion_weights(self) -> Array:
        """N_h / n_h: how many pairs of its stratum each pair stands for."""
        return self.sizes[self.stratum] / np.bincount(self.stratum[self.drawn], minlength=len(self.sizes))[self.stratum]

    def estimate(self, coefficients: Array, scores: Array, influence: Array) -> tuple[float, float]:
        """Sum over all pairs of coefficient times score, estimated, and its standard error.

        coefficients, scores: (P). influence: (S, P), how far each sequence moves each score. The variance has two
        parts: over sequences, sum_s (sum_p w_p a_p psi_sp)^2, and over pairs, sum_h N_h^2 (1 / n_h - 1 / N_h) s_h^2,
        where s_h^2 is the variance in a stratum of a_p P_p less that of its noise, sum_s var_p(a_p psi_sp). Both are
        unbiased. Checked by: tests/diagnose/test_pairs.py, over many draws of pairs and of sequences.
        """
        weights = self.inclusion_weights * self.drawn * coefficients
        variance = float(((influence @ weights) ** 2).sum())
        values, noise = coefficients * scores, coefficients * influence
        between = 0.0
        for stratum, size in enumerate(self.sizes):
            members = (self.stratum == stratum) & self.drawn
            n = int(members.sum())
            if 1 < n < size:
                spread = values[members].var(ddof=1) - noise[:, members].var(axis=1, ddof=1).sum()
                between += float(size**2 * (1 / n - 1 / size) * spread)
        return float(weights @ scores), (variance + max(between, 0.0)) ** 0.5

    def group_means(
        self, members: NDArray[np.bool_], sizes: Array, scores: Array, influence: Array
    ) -> tuple[Array, Array]:
        """Means over groups of pairs and their standard errors, (G) each; NaN for groups without a swapped pair.

        members: (G, P), which swapped pairs are of a group; sizes: (G), how many pairs it has in all. Exact where all
        are swapped. Otherwise the mean of the swapped ones weighted by what they stand for, with the standard error
        of a simple random sample (the spread of all swapped pairs where a group has one): good to see, not to test
        with.
        """
        weights = members * self.inclusion_weights
        total = weights.sum(axis=1, keepdims=True)
        weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
        variance = ((influence @ weights.T) ** 2).sum(axis=0)
        spread_of_all = scores.var(ddof=1) if len(scores) > 1 else 0.0
        for group, (which, size) in enumerate(zip(members, sizes, strict=True)):
            n = int(which.sum())
            if 0 < n < size:
                variance[group] += (1 / n - 1 / size) * (scores[which].var(ddof=1) if n > 1 else spread_of_all)
        empty = total[:, 0] == 0
        return np.where(empty, np.nan, weights @ scores), np.where(empty, np.nan, np.sqrt(variance))


def draw_pairs(n_layers: int, n_pairs: int, rng: np.random.Generator) -> Pairs:
    """All pairs of `n_layers` >= 2 layers where `n_pairs` is 0 or that many; otherwise `n_pairs` drawn ones.

    A layer that none of the drawn pairs holds gets one pair more, which only its own mean uses. Raises `ArgumentError`
    for fewer than 4 pairs.

    >>> rng = np.random.default_rng(0)
    >>> pairs = draw_pairs(12, 16, rng)
    >>> int(pairs.drawn.sum()), pairs.sizes.tolist(), round(pairs.inclusion_weights @ pairs.drawn)
    (16, [11, 8, 8, 8, 8, 8, 8, 7], 66)
    """
    first, second = np.triu_indices(n_layers, 1)
    first, second = first + 1, second + 1
    if n_pairs == 0 or n_pairs >= len(first):
        everything = np.ones(len(first), dtype=bool)
        return Pairs(n_layers, first, second, np.zeros(len(first), dtype=np.int64), everything, np.array([len(first)]))
    few = "too few for a standard error" if n_pairs >= 0 else "negative"
    require(n_pairs >= FEWEST, ArgumentError, "permutation_pairs", n_pairs, few, f"0 (all pairs), or at least {FEWEST}")
    by_lag = np.lexsort((first, second - first))
    with_first, others = by_lag[first[by_lag] == 1], by_lag[first[by_lag] > 1]
    n_others = min(n_pairs - max(2, round(FIRST_SHARE * n_pairs)), len(others))
    n_first = min(n_pairs - n_others, len(with_first))
    bands = [*_bands(with_first, n_first), *_bands(others, n_pairs - n_first)]
    chosen = [np.sort(rng.permutation(band)[:n]) for band, n in bands]
    stratum = np.repeat(np.arange(len(bands)), [len(part) for part in chosen])
    which = np.concatenate(chosen)
    of_pair = np.empty(len(first), dtype=np.int64)
    for number, (band, _) in enumerate(bands):
        of_pair[band] = number
    extra: list[int] = []
    for layer in range(1, n_layers + 1):
        holding = (first == layer) | (second == layer)
        if not holding[[*which, *extra]].any():
            extra.append(int(rng.choice(np.flatnonzero(holding & (first > 1)))))
    drawn = np.arange(len(which) + len(extra)) < len(which)
    which = np.append(which, extra).astype(np.int64)
    sizes = np.array([len(band) for band, _ in bands])
    return Pairs(n_layers, first[which], second[which], np.append(stratum, of_pair[extra]), drawn, sizes)


def _bands(pairs: NDArray[np.int64], n: int) -> list[tuple[NDArray[np.int64], int]]:
    """Sorted pairs cut into bands of equal size, and how many are drawn of each: two or three, `n` in all."""
    n_bands = max(1, n // 2)
    draws = [len(part) for part in np.array_split(np.arange(n), n_bands)]
    return list(zip(np.array_split(pairs, n_bands), draws, strict=True))
