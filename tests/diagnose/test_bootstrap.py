"""Standard errors by resampling sequences, against the ones that are known."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from varprop.diagnose import measure, table
from varprop.diagnose.bootstrap import mean_itself, ratio, resample_weights, stderr, with_stderr
from varprop.diagnose.measure import Definition

from . import zoo

RESAMPLING = 0.15
"""Relative: four times the error of a standard deviation over 400 resamples, 1 / sqrt(800)."""


def test_of_a_mean_it_is_the_textbook_one() -> None:
    values = np.random.default_rng(0).normal(size=(50, 4)) * [1, 2, 3, 4]
    np.testing.assert_allclose(stderr(mean_itself, values), values.std(axis=0, ddof=1) / np.sqrt(50), rtol=RESAMPLING)


def test_of_few_sequences_it_is_not_too_small() -> None:
    """Over many draws of 4 sequences its square is the variance of their mean: the factor S / (S - 1)."""
    draws = np.random.default_rng(1).normal(size=(4, 20_000))
    assert np.mean(stderr(mean_itself, draws) ** 2) == pytest.approx(1 / 4, rel=0.1)


def test_of_a_ratio_it_is_the_spread_over_many_draws() -> None:
    rng = np.random.default_rng(2)
    below = rng.gamma(20.0, size=(64, 500))
    above = 2 * below + rng.normal(size=below.shape)
    claimed = np.sqrt(np.mean(stderr(ratio, above, below) ** 2))
    spread = (above.mean(axis=0) / below.mean(axis=0)).std()
    assert claimed == pytest.approx(spread, rel=RESAMPLING)
    alone = np.sqrt(np.mean(stderr(lambda mean: mean / below.mean(axis=0), above) ** 2))
    assert alone > 3 * claimed  # sequences are drawn together, numerator and denominator


def test_of_one_sequence_it_is_unknown() -> None:
    assert np.isnan(stderr(mean_itself, np.ones((1, 3)))).all()


@pytest.mark.parametrize("family", ["llama", "olmoe"])
@pytest.mark.parametrize("definition", ["paper", "released"])
def test_a_model_on_one_sequence_has_no_errors_over_sequences(family: str, definition: Definition) -> None:
    """Of every score that one sequence allows; only errors over probes, and what is exact, are numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = measure(zoo.make(family), zoo.tokens(1, 8), scores="all", definition=definition)
    names = [str(name) for name in found.data_vars if str(name).endswith("_stderr")]
    assert len(names) > 5
    for name in names:
        over_probes = name.startswith(("jacobian", "branch_jacobian")) and name != "jacobian_norm_stderr"
        assert bool((found[name] > 0).any()) <= (over_probes and "sequence" not in name), name
        value = found[name.removesuffix("_stderr").removesuffix("_sequence")]
        if not over_probes and bool((value != 0).any()):
            assert bool(found[name].isnull().any()), name
    if definition == "paper":
        assert "influence" in table(found)
        assert "±" not in table(found)


def test_resamples() -> None:
    weights = resample_weights(5, seed=3)
    assert weights.shape == (400, 5)
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    np.testing.assert_allclose(weights.mean(axis=0), 0.2, atol=0.05)
    np.testing.assert_array_equal(weights, resample_weights(5, seed=3))
    assert not np.array_equal(weights, resample_weights(5, seed=4))


def test_value_and_error_together() -> None:
    values = np.random.default_rng(0).normal(size=(10, 3))
    found = with_stderr("score", ("layer",), mean_itself, values, seed=1)
    np.testing.assert_allclose(found["score"][1], values.mean(axis=0))
    np.testing.assert_allclose(found["score_stderr"][1], stderr(mean_itself, values, seed=1))


def test_a_ratio_to_nothing_is_zero() -> None:
    np.testing.assert_array_equal(ratio(np.array([[1.0, 2.0]]), np.array([4.0, 0.0])), [[0.25, 0.0]])
