"""What is said of standard errors over few sequences."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from varprop.diagnose import measure
from varprop.errors import AccuracyWarning

from . import zoo

SCORES = ("weights", "influence", "usefulness", "jacobian", "permutation")


def said(n_sequences: int, **options: Any) -> list[str]:
    options = {"permutation_pairs": 0, "n_probes": 4} | options
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        measure(zoo.make("llama"), zoo.tokens(n_sequences, 6), scores=SCORES, options=options)
    return [str(one.message) for one in found if "standard errors over fewer" in str(one.message)]


def test_scores_over_few_sequences_are_named_once_with_their_option() -> None:
    (message,) = said(12, jacobian_tokens=1, permutation_tokens=18)
    for part in ("usefulness: 6 (fit_share)", "jacobian: 2 (jacobian_tokens)", "permutation: 3 (permutation_tokens)"):
        assert part in message
    assert "influence" not in message
    (message,) = said(4, jacobian_tokens=6)
    assert "influence, permutation: 4" not in message  # the second has an option of its own
    assert "influence: 4 (all sequences)" in message
    assert "weights" not in message  # they have no standard errors


def test_nothing_is_said_from_8_sequences_on() -> None:
    assert said(16) == []


def test_the_stated_coverage() -> None:
    """Means of 2, 4 and 8 normal numbers, 40,000 times: the share within 2 standard errors, to 0.01."""
    rng = np.random.default_rng(0)
    for n, share in ((2, 0.70), (4, 0.86), (8, 0.91)):
        values = rng.normal(size=(40_000, n))
        inside = np.abs(values.mean(axis=1)) < 2 * values.std(axis=1, ddof=1) / n**0.5
        assert inside.mean() == pytest.approx(share, abs=0.01)


def test_it_is_an_accuracy_warning() -> None:
    with pytest.warns(AccuracyWarning, match="fewer than 8 sequences"):
        measure(zoo.make("llama"), zoo.tokens(2, 6), scores="influence")
