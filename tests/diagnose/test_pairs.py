"""Pairs of layers: every number can be drawn, and drawn pairs give unbiased estimates with the error they state."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from varprop.diagnose.pairs import Pairs, draw_pairs
from varprop.errors import ArgumentError

N_LAYERS = 14
N_ALL = N_LAYERS * (N_LAYERS - 1) // 2


@pytest.mark.parametrize("n_layers", [2, 3, 4, 5, 9, 20])
def test_every_number_of_pairs_can_be_drawn(n_layers: int) -> None:
    n_all = n_layers * (n_layers - 1) // 2
    for n_pairs in [0, *range(4, n_all + 2)]:
        pairs = draw_pairs(n_layers, n_pairs, np.random.default_rng(n_pairs))
        in_strata = np.bincount(pairs.stratum[pairs.drawn], minlength=len(pairs.sizes))
        assert pairs.drawn.sum() == (n_all if n_pairs == 0 else min(n_pairs, n_all))
        assert len(set(zip(pairs.first, pairs.second, strict=True))) == len(pairs.first)
        assert ((pairs.first >= 1) & (pairs.first < pairs.second) & (pairs.second <= n_layers)).all()
        assert (pairs.inclusion_weights * pairs.drawn).sum() == pytest.approx(n_all)
        assert ((in_strata >= 2) | (in_strata == pairs.sizes)).all()
        assert all(pairs.holds(layer).any() for layer in range(1, n_layers + 1))


def test_strata_are_ordered_by_distance_and_layer_1_is_apart() -> None:
    pairs = draw_pairs(20, 40, np.random.default_rng(0))
    with_first = pairs.first == 1
    assert not set(pairs.stratum[with_first]) & set(pairs.stratum[~with_first])
    for group in (with_first & pairs.drawn, ~with_first & pairs.drawn):
        lags = [pairs.lag[group & (pairs.stratum == h)] for h in sorted(set(pairs.stratum[group]))]
        assert all(a.max() <= b.min() for a, b in itertools.pairwise(lags))


@pytest.mark.parametrize("n_pairs", [-1, 1, 3])
def test_too_few_pairs_are_refused(n_pairs: int) -> None:
    with pytest.raises(ArgumentError, match=f"permutation_pairs={n_pairs} is"):
        draw_pairs(8, n_pairs, np.random.default_rng(0))


def truth(rng: np.random.Generator) -> np.ndarray:
    """Scores as models have them: layer 1 first by far, then by distance, and something of each pair's own."""
    scores = np.zeros((N_LAYERS + 1, N_LAYERS + 1))
    for i in range(1, N_LAYERS + 1):
        for j in range(i + 1, N_LAYERS + 1):
            scores[i, j] = 0.02 * (j - i) + 0.1 * rng.random() + (1 + rng.random()) * (i == 1)
    return scores


def noisy(
    pairs: Pairs, scores: np.ndarray, rng: np.random.Generator, n_sequences: int
) -> tuple[np.ndarray, np.ndarray]:
    """Means over sequences of scores with noise, part of it common to all pairs, and their influence."""
    common = 0.1 * rng.normal(size=(n_sequences, 1))
    each = scores[pairs.first, pairs.second] + common + rng.normal(size=(n_sequences, len(pairs.first)))
    mean = each.mean(axis=0)
    return mean, (each - mean) / n_sequences * (n_sequences / (n_sequences - 1)) ** 0.5


def test_estimates_from_all_pairs_are_sums() -> None:
    rng = np.random.default_rng(0)
    pairs, scores = draw_pairs(N_LAYERS, 0, rng), truth(rng)
    values = scores[pairs.first, pairs.second]
    coefficients = rng.normal(size=N_ALL)
    value, error = pairs.estimate(coefficients, values, np.zeros((1, N_ALL)))
    assert value == pytest.approx(coefficients @ values)
    assert error == 0
    members = np.stack([pairs.lag == lag for lag in range(1, N_LAYERS)])
    means, errors = pairs.group_means(members, members.sum(axis=1), values, np.zeros((1, N_ALL)))
    assert means == pytest.approx([np.diagonal(scores[1:, 1:], lag).mean() for lag in range(1, N_LAYERS)])
    assert (errors == 0).all()


@pytest.mark.parametrize("n_pairs, noise", [(12, False), (30, False), (12, True), (30, True), (0, True)])
def test_estimates_from_drawn_pairs_are_unbiased_and_their_errors_too(n_pairs: int, noise: bool) -> None:
    """1,000 draws: a mean is known to 1/32 of its spread (5 of these allowed), a mean square to about 5 % (25 %
    allowed). The noise of a score is as large as the spread of a stratum."""
    rng = np.random.default_rng(1)
    scores = truth(rng)
    expected = scores.sum() / N_ALL
    found = []
    for _ in range(1000):
        pairs = draw_pairs(N_LAYERS, n_pairs, rng)
        values, influence = scores[pairs.first, pairs.second], np.zeros((1, len(pairs.first)))
        if noise:
            values, influence = noisy(pairs, scores, rng, 12)
        found.append(pairs.estimate(np.full(len(values), 1 / N_ALL), values, influence))
    means, errors = np.array(found).T
    assert abs(means.mean() - expected) < 5 * means.std() / 1000**0.5
    assert (errors**2).mean() == pytest.approx(((means - expected) ** 2).mean(), rel=0.25)


def test_strata_beat_simple_random_sampling() -> None:
    """Of 20 pairs, in mean square, by more than two: the strata take out layer 1 and the distance."""
    rng = np.random.default_rng(2)
    scores = truth(rng)
    expected = scores.sum() / N_ALL
    of_all = scores[np.triu_indices(N_LAYERS + 1, 1)][N_LAYERS:]
    strata, simple = [], []
    for _ in range(500):
        pairs = draw_pairs(N_LAYERS, 20, rng)
        values = scores[pairs.first, pairs.second]
        strata.append(pairs.estimate(np.full(len(values), 1 / N_ALL), values, np.zeros((1, len(values))))[0])
        simple.append(rng.choice(of_all, 20, replace=False).mean())
    assert np.square(np.array(strata) - expected).mean() < np.square(np.array(simple) - expected).mean() / 2


def test_mean_of_a_group_of_which_some_pairs_are_swapped() -> None:
    """Two of three: the error of a simple random sample; one of two: with the spread of all pairs; none: NaN."""
    each = np.arange(3)
    pairs = Pairs(4, np.array([1, 1, 2]), np.array([2, 3, 3]), each * 0, each < 9, np.array([6]))
    members = np.array([[True, True, False], [False, False, True], [False, False, False]])
    scores = np.array([0.1, 0.5, 0.9])
    means, errors = pairs.group_means(members, np.array([3.0, 2.0, 1.0]), scores, np.zeros((1, 3)))
    assert means == pytest.approx([0.3, 0.9, np.nan], nan_ok=True)
    variances = [(1 / 2 - 1 / 3) * scores[:2].var(ddof=1), (1 - 1 / 2) * scores.var(ddof=1), np.nan]
    assert errors == pytest.approx(np.sqrt(variances), nan_ok=True)
