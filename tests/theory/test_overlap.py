"""varprop.theory.overlap: proofs, drawn pairs, monotone and bounded, interpolation in the logit std, bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest

from proofs.check import ProofError
from proofs.prove_overlap import PROOFS, prove_no_interaction, prove_swap_rate
from varprop.errors import AssumptionError
from varprop.theory.gates import canonical, gates
from varprop.theory.overlap import gate_overlap, swap_rate

CORRELATIONS = np.array([0.05, 0.3, 0.6, 0.9, 0.99])


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.statement)
def test_proofs(proof) -> None:
    proof.function()


def test_a_wrong_constant_is_caught() -> None:
    with pytest.raises(ProofError):
        prove_swap_rate(lambda *args: 1.001 * swap_rate(*args))
    with pytest.raises(ProofError):
        prove_no_interaction(lambda *args, **options: 1.00001 * gate_overlap(*args, **options))


@pytest.mark.parametrize(
    "n_experts, top_k, std, normalize, router",
    [
        (8, 2, 0.905, False, "softmax"),
        (64, 8, 1.0, True, "softmax"),
        (16, 1, 1.0, False, "softmax"),
        (32, 4, 2.0, False, "sigmoid"),
        (8, 8, 1.5, True, "softmax"),
    ],
)
def test_against_drawn_pairs(n_experts: int, top_k: int, std: float, normalize: bool, router: str) -> None:
    """400,000 / E pairs per correlation, five standard errors plus 1 %: detects 5 % at E = 64, 2 % at E = 8."""
    law = canonical(n_experts, top_k, normalize, router, "score_then_top_k")
    predicted = gate_overlap(n_experts, top_k, std, CORRELATIONS, normalize=normalize, router=router)
    x, w = np.random.default_rng(5).standard_normal((2, 400_000 // n_experts, n_experts))
    for c, value in zip(CORRELATIONS, predicted, strict=True):
        products = (gates(std * x, law) * gates(std * (c * x + math.sqrt(1 - c**2) * w), law)).sum(axis=1)
        assert abs(products.mean() - value) < 5 * products.std() / len(x) ** 0.5 + 0.01 * value


def test_rises_with_the_correlation_and_continues_below_zero() -> None:
    c = np.linspace(-1, 1, 401)
    for std in (0.0, 1.0):
        overlap = gate_overlap(16, 2, std, c, normalize=True)
        assert np.isfinite(overlap).all()
        assert np.diff(overlap).min() > 0
        assert overlap[200] == pytest.approx(1 / 16, rel=1e-9)
        below, above = 1 - overlap[199] / overlap[200], overlap[201] / overlap[200] - 1
        assert below == pytest.approx(above, rel=0.03)  # one slope on both sides


def test_arrays_and_logit_stds_between_the_tables() -> None:
    c, std = np.array([0.0, 0.4, 1.0]), np.array([[0.7], [0.7000007], [1.37]])
    both = gate_overlap(8, 2, std, c, normalize=False)
    assert both.shape == (3, 3)
    np.testing.assert_allclose(both[2], gate_overlap(8, 2, 1.37, c, normalize=False), rtol=1e-12)
    np.testing.assert_allclose(both[0], both[1], rtol=3e-6)
    assert np.ndim(gate_overlap(8, 2, 0.7, 0.4, normalize=False)) == 0
    rounded = gate_overlap(8, 2, 0.7, 1 + 1e-12, normalize=False)
    assert rounded == pytest.approx(both[0, 2], rel=1e-9)


@pytest.mark.parametrize("n_experts, top_k, std", [(1, 1, 2.0), (8, 2, 50.0), (4096, 8, 1.0), (2, 1, 0.0)])
@pytest.mark.parametrize("normalize", [True, False])
def test_extremes(n_experts: int, top_k: int, std: float, normalize: bool) -> None:
    overlap = gate_overlap(n_experts, top_k, std, [-1.0, 0.0, 0.5, 1.0], normalize=normalize)
    assert np.isfinite(overlap).all()
    assert (np.diff(overlap) >= -1e-12).all()
    assert overlap[-1] <= 1 + 1e-5


@pytest.mark.parametrize("correlation", [1.1, math.nan, "0", None, [0.1, math.inf]])
def test_bad_correlation(correlation: object) -> None:
    with pytest.raises(AssumptionError, match="correlation="):
        gate_overlap(8, 2, 1.0, correlation, normalize=True)


@pytest.mark.long
@pytest.mark.parametrize("n_experts, top_k, std", [(8, 2, 0.9), (64, 8, 1.0), (256, 8, 0.25)])
def test_standard_error_of_the_tables(n_experts: int, top_k: int, std: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight seeds: the spread stays below 0.4 % (claimed: 0.3 %) at every correlation."""
    from varprop.theory import overlap as module

    law, drawn = canonical(n_experts, top_k, True, "softmax", "score_then_top_k"), module._drawn_shape
    tables = []
    for seed in range(8):
        monkeypatch.setattr(module, "_drawn_shape", lambda *args, seed=seed: drawn(*args, seed=seed))
        coefficients = module._log_overlap.__wrapped__(law, std)
        tables.append(np.polynomial.chebyshev.chebval(4 * np.arccos(CORRELATIONS) / math.pi - 1, coefficients))
    assert np.std(tables, axis=0, ddof=1).max() < 4e-3
