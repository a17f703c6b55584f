"""varprop.theory.moe: gate law against its table, limits and drawn routers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varprop.errors import AssumptionError
from varprop.spec import MoESpec
from varprop.theory.moe import gate_overlap, gate_second_moment, gates


@pytest.mark.parametrize(
    "n_experts, top_k, std, normalised, plain",
    [
        (8, 2, 0.905, 0.546, 0.166),
        (64, 8, 0.905, 0.149, 0.0240),
        (32, 4, 0.905, 0.284, 0.0443),
        (64, 8, 2.0, 0.257, 0.157),
    ],
)
def test_table(n_experts, top_k, std, normalised, plain):
    assert gate_second_moment(n_experts, top_k, std, normalize=True) == pytest.approx(normalised, abs=5e-4)
    assert gate_second_moment(n_experts, top_k, std, normalize=False) == pytest.approx(plain, rel=4e-3)


@settings(max_examples=20, deadline=None)
@given(n_experts=st.integers(1, 64), data=st.data(), std=st.floats(0.0, 4.0))
def test_bounds(n_experts, data, std):
    top_k = data.draw(st.integers(1, n_experts))
    normalised = gate_second_moment(n_experts, top_k, std, normalize=True)
    plain = gate_second_moment(n_experts, top_k, std, normalize=False)
    assert 1 / top_k * (1 - 1e-6) <= normalised <= 1 + 1e-6
    assert plain <= normalised * (1 + 1e-6)  # the softmax sums to at most 1 over the active experts


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
@pytest.mark.parametrize("order", ["score_then_top_k", "top_k_then_score"])
@pytest.mark.parametrize("normalize", [True, False])
def test_against_drawn_routers(router, order, normalize):
    """20,000 routers, five standard errors."""
    part = MoESpec(n_experts=12, top_k=3, d_expert=8, router=router, gate_order=order, normalize_gates=normalize)
    logits = 1.1 * np.random.default_rng(0).standard_normal((20_000, 12))
    drawn = (gates(logits, part) ** 2).sum(axis=1)
    predicted = gate_second_moment(12, 3, 1.1, normalize=normalize, router=router, gate_order=order)
    assert abs(drawn.mean() - predicted) < 5 * drawn.std() / 20_000**0.5


def test_gates_have_the_right_number_of_experts():
    part = MoESpec(n_experts=6, top_k=2, d_expert=8, normalize_gates=True)
    g = gates(np.random.default_rng(0).standard_normal((5, 6)), part)
    assert ((g > 0).sum(axis=1) == 2).all()
    np.testing.assert_allclose(g.sum(axis=1), 1)


def test_overlap_between_its_limits():
    """Independent tokens: 1 / E with normalised gates; equal tokens: S_2. 4,000 draws, a standard error below 0.4 %."""
    part = MoESpec(n_experts=8, top_k=2, d_expert=8, normalize_gates=True)
    independent, equal = np.eye(2)[None], np.array([[[1.0, 0.0], [1.0, 0.0]]])
    rng = np.random.default_rng(0)
    assert gate_overlap(independent, 1.0, part, 4000, rng)[0, 0, 1] == pytest.approx(1 / 8, rel=0.05)
    full = gate_overlap(equal, 1.0, part, 4000, rng)[0]
    assert full[0, 1] == pytest.approx(full[0, 0], rel=0.02)


def test_outside_the_domain():
    with pytest.raises(AssumptionError, match=r"top_k=9 is outside the domain; expected 1\.\.8"):
        gate_second_moment(8, 9, 1.0, normalize=True)
