"""What is made of products with Jacobians: means over probes, halves and sequences, against simulation."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from varprop.diagnose.jacobian_statistics import diagonal_squares, summary

from .test_jacobian import Numbers


def synthetic(n_sequences: int, d_model: int, noise: float, seed: int) -> np.ndarray:
    """J_b - I, (S, P = 1, D, D): the same matrix and independent noise for each sequence."""
    rng = np.random.default_rng([5, seed])
    matrix = np.random.default_rng(4).normal(size=(d_model, d_model)) + np.diag(np.linspace(-2.0, 4.0, d_model))
    return (matrix + noise * rng.normal(size=(n_sequences, d_model, d_model)))[:, None]


def no_tokens(n_sequences: int) -> Numbers:
    return {name: np.ones((n_sequences, 1, 1)) for name in ("own_token", "all_sources")}


def test_mean_probes_are_unbiased() -> None:
    """The mean over all 8^3 draws of three probes is the exact value, to rounding; so are the squares."""
    matrices = synthetic(3, 3, 0.5, 0)
    exact = summary(matrices, None, no_tokens(3), 0)
    vectors = np.array(list(itertools.product([-1.0, 1.0], repeat=3)))
    total: dict[str, Any] = {}
    for chosen in itertools.product(vectors, repeat=3):
        probes = np.array(chosen)
        rows = np.einsum("spij,ki->spkj", matrices, probes)
        found = {name: summary(rows, probes, no_tokens(3), 0)[name] for name in BY_PART}
        found |= diagonal_squares(rows[:, 0].mean(axis=0), probes)[0]
        for name, value in found.items():
            total[name] = total.get(name, 0.0) + value / 8**3
    squared = {name: exact[name] ** 2 for name in ROOTS} | {"jacobian_diagonal_mean": exact["jacobian_diagonal_mean"]}
    for name, value in total.items():
        np.testing.assert_allclose(value, squared.get(name, exact[name]), rtol=1e-11, err_msg=name)


BY_PART = ("jacobian_deviation", "jacobian_deviation_split_half")
ROOTS = ("jacobian_diagonal_std", "jacobian_off_diagonal_norm", "jacobian_frobenius_norm")


def test_split_half_is_the_mean_over_all_halves() -> None:
    matrices = synthetic(4, 5, 1.0, 0)[:, 0]
    found = summary(matrices[:, None], None, no_tokens(4), 0)["jacobian_deviation_split_half"]
    halves = [half for half in itertools.combinations(range(4), 2) if 0 in half]
    products = []
    for half in halves:
        other = [b for b in range(4) if b not in half]
        products.append((matrices[list(half)].mean(axis=0) * matrices[other].mean(axis=0)).sum() / 5)
    np.testing.assert_allclose(found, np.mean(products), rtol=1e-12)


def test_split_half_has_no_noise_bias() -> None:
    """Over 1,000 draws of the noise: the truth within 5 standard errors; the plain value is larger by D noise^2 / S."""
    truth = (synthetic(1, 4, 0.0, 0) ** 2).sum() / 4
    rows = [summary(synthetic(4, 4, 2.0, seed), None, no_tokens(4), 0) for seed in range(1000)]
    split = np.array([row["jacobian_deviation_split_half"][0] for row in rows])
    plain = np.array([row["jacobian_deviation"][0, 2] for row in rows])
    assert abs(split.mean() - truth) < 5 * split.std() / 1000**0.5
    assert abs(plain.mean() - truth - 4 * 4.0 / 4) < 5 * plain.std() / 1000**0.5
    assert split.std() / 1000**0.5 < 0.05 * truth


def test_standard_errors_over_probes() -> None:
    """1,000 draws of 24 probes: mean squared standard error over variance, 1 within 25 %."""
    matrices = synthetic(3, 12, 0.5, 0)
    rng = np.random.default_rng(1)
    found: dict[str, list[Any]] = {}
    for _ in range(1000):
        probes = rng.choice([-1.0, 1.0], size=(24, 12))
        rows = np.einsum("spij,ki->spkj", matrices, probes)
        for name, value in summary(rows, probes, no_tokens(3), 0).items():
            found.setdefault(name, []).append(np.ravel(value)[-1])
    exact = summary(matrices, None, no_tokens(3), 0)
    for name in (*BY_PART, *ROOTS, "jacobian_diagonal_mean"):
        draws, errors = np.array(found[name]), np.array(found[f"{name}_stderr"])
        assert 0.75 < (errors**2).mean() / draws.var() < 1.25, name
        assert abs(draws.mean() - np.ravel(exact[name])[-1]) < 0.25 * draws.std(), name


@pytest.mark.parametrize("exact", [True, False])
def test_the_error_of_the_norm_is_of_probes_and_sequences(exact: bool) -> None:
    matrices = synthetic(6, 12, 1.0, 0)
    probes = None if exact else np.random.default_rng(1).choice([-1.0, 1.0], size=(24, 12))
    rows = np.einsum("spij,ki->spkj", matrices, np.eye(12) if probes is None else probes)
    found = summary(rows, probes, no_tokens(6), 3)
    errors = [found[f"jacobian_deviation{end}"][0, 2] for end in ("_stderr", "_sequence_stderr")]
    assert (errors[0] == 0) == exact
    of_norm = np.sqrt(errors[0] ** 2 + errors[1] ** 2) / (2 * np.sqrt(found["jacobian_deviation"][0, 2] * 12))
    np.testing.assert_allclose(found["jacobian_norm_stderr"], of_norm, rtol=1e-12)
    assert np.isnan(summary(rows[:1], probes, no_tokens(1), 3)["jacobian_norm_stderr"])


def test_standard_errors_over_sequences() -> None:
    """The linearised one written out; of split_half the jackknife in a loop."""
    matrices = synthetic(6, 5, 1.0, 0)
    found = summary(matrices, None, no_tokens(6), 3)
    mean = matrices.mean(axis=0)
    psi = [2 * (mean * (one - mean)).sum() / 5 for one in matrices]
    expected = (np.square(psi).sum() / 5 / 6) ** 0.5
    np.testing.assert_allclose(found["jacobian_deviation_sequence_stderr"][0, 2], expected, rtol=1e-10)
    norm = (found["jacobian_deviation"][0, 2] / 5) ** 0.5
    np.testing.assert_allclose(found["jacobian_norm_sequence_stderr"], expected / (2 * norm * 5), rtol=1e-10)
    left = []
    for b in range(6):
        kept = np.delete(matrices, b, axis=0)
        left.append(summary(kept, None, no_tokens(5), 0)["jacobian_deviation_split_half"][0])
    expected = np.sqrt(5 / 6 * ((np.array(left) - np.mean(left)) ** 2).sum())
    np.testing.assert_allclose(found["jacobian_deviation_split_half_sequence_stderr"][0], expected, rtol=1e-10)


@pytest.mark.parametrize("n_sequences, allowed", [(2, 0.35), (4, 0.3), (8, 0.25)])
@pytest.mark.parametrize("noise", [0.5, 2.0])
def test_standard_errors_over_few_sequences_are_as_wide_as_the_truth(
    n_sequences: int, allowed: float, noise: float
) -> None:
    """Root mean square of what is stated over the spread of 1,000 draws; of the square of a mean and of its root."""
    rows = [summary(synthetic(n_sequences, 8, noise, seed), None, no_tokens(n_sequences), 0) for seed in range(1000)]
    for name in ("jacobian_deviation", "jacobian_norm"):
        values, errors = (
            np.array([np.ravel(row[f"{name}{ending}"])[-1] for row in rows]) for ending in ("", "_sequence_stderr")
        )
        assert np.sqrt((errors**2).mean()) / values.std() == pytest.approx(1, abs=allowed), name
