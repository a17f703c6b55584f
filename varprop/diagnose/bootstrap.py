"""Standard errors of a score over the sequences that it was measured on.

Sequences are the replicates: tokens of one are not independent. A score is a function of sums over sequences, and its
standard error the standard deviation of that function over resamples of whole sequences. Of one model: it says how
well the score of this model on this text is known, nothing of other trainings.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
N_RESAMPLES = 400


def resample_weights(n_sequences: int, seed: int, n_resamples: int = N_RESAMPLES) -> Array:
    """How often each sequence is drawn in each resample, over the number of sequences: (resamples, S).

    >>> resample_weights(4, 0).sum(axis=1)[:2]
    array([1., 1.])
    """
    rng = np.random.default_rng([seed, n_sequences])
    return rng.multinomial(n_sequences, np.full(n_sequences, 1 / n_sequences), size=n_resamples) / n_sequences


def stderr(statistic: Callable[..., Array], *per_sequence: Array, seed: int = 0) -> Array:
    """Standard deviation over resamples of `statistic(mean_1, mean_2, ...)`, of its shape; NaN for one sequence.

    per_sequence: arrays (S, ...) whose means over the S sequences the statistic is a function of. It is called with
    means that have a leading axis of resamples. The factor sqrt(S / (S - 1)) makes the standard error of a mean
    unbiased in its square. Of few sequences S it is itself known to about 1 / sqrt(2 (S - 1)) of it, and a share of
    layers above a threshold that no resample crosses has an error of 0: of 2 sequences take neither for certain.
    Checked by: tests/diagnose/test_bootstrap.py, the standard error of a mean and of a ratio.

    >>> values = np.random.default_rng(0).normal(size=(400, 3))
    >>> (stderr(lambda mean: mean, values) * 20).round(1)
    array([1. , 0.9, 1. ])
    """
    n_sequences = len(per_sequence[0])
    weights = resample_weights(n_sequences, seed)
    # A few resamples at a time: their means may be many numbers each.
    blocks = np.array_split(weights, len(weights) // 20)
    found = np.concatenate([statistic(*(np.tensordot(w, values, axes=1) for values in per_sequence)) for w in blocks])
    if n_sequences == 1:
        return np.full_like(found[0], np.nan)
    return found.std(axis=0, ddof=1) * (n_sequences / (n_sequences - 1)) ** 0.5


def with_stderr(
    name: str, dims: tuple[str, ...], statistic: Callable[..., Array], *per_sequence: Array, seed: int = 0
) -> dict[str, tuple[tuple[str, ...], Array]]:
    """`name` and `<name>_stderr` as variables along `dims`: the statistic of the means, and its `stderr`.

    >>> found = with_stderr("mean", (), mean_itself, np.array([1.0, 3.0]))
    >>> {key: float(value.round(1)) for key, (_, value) in found.items()}
    {'mean': 2.0, 'mean_stderr': 1.0}
    """
    value = statistic(*(values.mean(axis=0)[None] for values in per_sequence))[0]
    return {name: (dims, value), f"{name}_stderr": (dims, stderr(statistic, *per_sequence, seed=seed))}


def mean_itself(mean: Array) -> Array:
    """The statistic that a mean over sequences is of itself."""
    return mean


def ratio(numerator: Array, denominator: Array) -> Array:
    """numerator / denominator, 0 where the denominator is 0.

    >>> ratio(np.array([1.0, 1.0]), np.array([2.0, 0.0]))
    array([0.5, 0. ])
    """
    return np.divide(
        numerator, denominator, out=np.zeros(np.broadcast(numerator, denominator).shape), where=denominator != 0
    )
