"""varprop.theory.gates: table, bounds, extremes, drawn routers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proofs.check import ProofError
from proofs.prove_gates import PROOFS, prove_three_experts, prove_two_experts
from varprop.errors import AssumptionError
from varprop.theory.gates import canonical, gate_first_moment, gate_second_moment, gates


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.statement)
def test_proofs(proof) -> None:
    proof.function()


@pytest.mark.parametrize("prove", [prove_two_experts, prove_three_experts])
def test_a_wrong_constant_is_caught(prove) -> None:
    with pytest.raises(ProofError):
        prove(lambda *args, **options: gate_second_moment(*args, **options) * (1 + 1e-9))


@pytest.mark.parametrize(
    "n_experts, top_k, std, normalised, plain",
    [
        (8, 2, 0.905, 0.546, 0.166),
        (64, 8, 0.905, 0.149, 0.0240),
        (32, 4, 0.905, 0.284, 0.0443),
        (64, 8, 2.0, 0.257, 0.157),
    ],
)
def test_table(n_experts: int, top_k: int, std: float, normalised: float, plain: float) -> None:
    assert gate_second_moment(n_experts, top_k, std, normalize=True) == pytest.approx(normalised, abs=5e-4)
    assert gate_second_moment(n_experts, top_k, std, normalize=False) == pytest.approx(plain, rel=4e-3)


@settings(max_examples=20, deadline=None)
@given(n_experts=st.integers(1, 64), data=st.data(), std=st.floats(0.0, 4.0))
def test_bounds(n_experts: int, data: st.DataObject, std: float) -> None:
    top_k = data.draw(st.integers(1, n_experts))
    normalised = gate_second_moment(n_experts, top_k, std, normalize=True)
    plain = gate_second_moment(n_experts, top_k, std, normalize=False)
    first = gate_first_moment(n_experts, top_k, std, normalize=False)
    assert 1 / top_k * (1 - 1e-9) <= normalised <= 1 + 1e-9
    assert plain <= normalised * (1 + 1e-9)  # the softmax sums to at most 1 over the active experts
    assert first**2 / top_k * (1 - 1e-9) <= plain <= first * (1 + 1e-9)  # Cauchy-Schwarz; gates are at most 1


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
@pytest.mark.parametrize("order", ["score_then_top_k", "top_k_then_score"])
@pytest.mark.parametrize("normalize", [True, False])
def test_against_drawn_routers(router: str, order: str, normalize: bool) -> None:
    """20,000 routers, five standard errors (false-fail rate 6e-7): detects 2 %."""
    options = {"normalize": normalize, "router": router, "gate_order": order}
    drawn = gates(1.1 * np.random.default_rng(0).standard_normal((20_000, 12)), canonical(12, 3, *options.values()))
    assert ((drawn > 0).sum(axis=1) == 3).all()
    for rule, values in ((gate_second_moment, (drawn**2).sum(axis=1)), (gate_first_moment, drawn.sum(axis=1))):
        predicted = rule(12, 3, 1.1, **options)
        assert abs(values.mean() - predicted) <= 5 * values.std() / 20_000**0.5 + 1e-12


@pytest.mark.parametrize("top_k, normalize", [(2, True), (2, False), (8, True)])
def test_huge_logits_against_drawn_routers(top_k: int, normalize: bool) -> None:
    """s = 50: 20,000 routers, five standard errors: detects 0.5 %."""
    drawn = gates(
        50 * np.random.default_rng(1).standard_normal((20_000, 8)),
        canonical(8, top_k, normalize, "softmax", "score_then_top_k"),
    )
    values = (drawn**2).sum(axis=1)
    assert abs(values.mean() - gate_second_moment(8, top_k, 50.0, normalize=normalize)) < 5 * values.std() / 20_000**0.5


def test_extremes() -> None:
    assert gate_second_moment(1, 1, 3.0, normalize=False) == pytest.approx(1.0, abs=1e-12)
    assert gate_second_moment(8, 2, 1e12, normalize=False) == pytest.approx(1.0, abs=1e-5)
    assert gate_second_moment(8, 8, 0.7, normalize=False) == gate_second_moment(8, 8, 0.7, normalize=True)
    assert gate_second_moment(4096, 8, 0.0, normalize=False) == 8 / 4096**2
    assert math.isfinite(gate_second_moment(4096, 4096, 16.0, normalize=False))
    experts: Any = np.int64(8)
    assert gate_second_moment(experts, 2, np.float32(1), normalize=True) == gate_second_moment(8, 2, 1, normalize=True)
    array = gate_second_moment(8, 2, np.array([[0.05, 1.1], [3.3, 40.0]]), normalize=False)
    each = [gate_second_moment(8, 2, s, normalize=False) for s in (0.05, 1.1, 3.3, 40.0)]
    np.testing.assert_allclose(array.ravel(), each, rtol=1e-6)


@pytest.mark.parametrize("std", [-1.0, math.nan, math.inf, "1", None, True, 1j])
def test_bad_logit_std(std: object) -> None:
    with pytest.raises(AssumptionError, match="logit_std="):
        gate_second_moment(8, 2, std, normalize=True)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((8, 9, 1.0), r"top_k=9 is outside the domain; expected an integer in 1\.\.8"),
        ((8, 0, 1.0), "top_k=0"),
        ((8, 2.0, 1.0), "top_k="),
        ((0, 1, 1.0), "n_experts=0"),
        ((True, 1, 1.0), "n_experts=True"),
    ],
)
def test_bad_counts(arguments: tuple, message: str) -> None:
    with pytest.raises(AssumptionError, match=message):
        gate_second_moment(*arguments, normalize=True)


def test_bad_options() -> None:
    with pytest.raises(AssumptionError, match="router='relu' is unknown"):
        gate_second_moment(8, 2, 1.0, normalize=True, router="relu")
    with pytest.raises(AssumptionError, match="normalize=None is not a boolean"):
        gate_second_moment(8, 2, 1.0, normalize=None)  # type: ignore[arg-type]
    with pytest.raises(AssumptionError, match="logit_std=17"):
        gate_second_moment(8, 2, 17.0, normalize=True, router="sigmoid")
