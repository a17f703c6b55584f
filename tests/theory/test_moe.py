"""varprop.theory.moe: proofs, explicit small mixtures, unlike second moments, factors against a dense network."""

from __future__ import annotations

import math

import numpy as np
import pytest

from proofs.check import ProofError
from proofs.prove_moe import PROOFS, prove_reductions
from varprop import presets
from varprop.errors import AssumptionError
from varprop.spec import MoESpec, layer_table
from varprop.theory.feed_forward import FeedForwardGains
from varprop.theory.gates import canonical, gates
from varprop.theory.moe import (
    MoEGains,
    moe_against_dense,
    moe_covariance,
    moe_gains,
    moe_gram,
    moe_second_moment,
    router_overlap,
)

GAINS = MoEGains(1.0, FeedForwardGains(1.0, 1.0, 1.0), FeedForwardGains(1.0, 1.0, 1.0), 1.0)


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.statement)
def test_proofs(proof) -> None:
    proof.function()


def test_a_wrong_constant_is_caught() -> None:
    with pytest.raises(ProofError):
        prove_reductions(second=lambda *args: 1.0001 * moe_second_moment(*args))


def drawn_mixture(part: MoESpec, cosine: float, n_networks: int, d_model: int) -> np.ndarray:
    """f_t.f_s / d and |f_t|^2 / d of two tokens of unit second moment; every gain is 1. (n_networks, 2)."""
    rng = np.random.default_rng(9)
    law = canonical(part.n_experts, part.top_k, part.normalize_gates, part.router, part.gate_order)
    angle = np.array([[1.0, 0.0], [cosine, math.sqrt(1 - cosine**2)]])
    results = np.empty((n_networks, 2))
    for network in range(n_networks):
        frame = np.linalg.qr(rng.standard_normal((d_model, 2)))[0].T * d_model**0.5
        tokens = angle @ frame
        gate = part.gate_multiplier * gates(tokens @ rng.standard_normal((d_model, part.n_experts)) / d_model**0.5, law)
        up = rng.standard_normal((part.n_experts, d_model, part.d_expert)) / d_model**0.5
        down = rng.standard_normal((part.n_experts, part.d_expert, d_model)) / part.d_expert**0.5
        out = np.einsum("te,teh,ehd->td", gate, np.maximum(np.einsum("td,edh->teh", tokens, up), 0.0), down)
        up = rng.standard_normal((d_model, part.d_expert)) / d_model**0.5
        down = rng.standard_normal((part.d_expert, d_model)) / part.d_expert**0.5
        shared = np.maximum(tokens @ up, 0.0) @ down
        shared /= 1 + np.exp(-tokens @ rng.standard_normal((d_model, 1)) / d_model**0.5)
        mean = part.shared_mixing == "mean"
        out = (shared + part.top_k * out) / (part.top_k + 1) if mean else shared + out
        results[network] = out[0] @ out[1] / d_model, np.sum(out**2) / (2 * d_model)
    return results


@pytest.mark.parametrize("mixing, normalize, multiplier", [("sum", True, 1.0), ("mean", False, 2.0)])
def test_against_explicit_mixtures(mixing: str, normalize: bool, multiplier: float) -> None:
    """1,500 networks, five standard errors (false-fail rate 6e-7): detects 6 %."""
    part = MoESpec(
        n_experts=6, top_k=2, d_expert=24, n_shared_experts=1, shared_gate=True, shared_mixing=mixing,  # type: ignore[arg-type]
        normalize_gates=normalize, gate_multiplier=multiplier, activation="relu", gated=False,
    )  # fmt: skip
    drawn = drawn_mixture(part, 0.6, 1500, 24)
    predicted = moe_covariance(1.0, 1.0, 0.6, GAINS, part), moe_second_moment(1.0, GAINS, part)
    error = np.abs(drawn.mean(axis=0) - predicted)
    assert (error < 5 * drawn.std(axis=0) / len(drawn) ** 0.5).all()


@pytest.mark.parametrize("ratio, bias", [(2.0, 0.006), (5.0, 0.02)])
def test_tokens_of_unlike_second_moments(ratio: float, bias: float) -> None:
    """8,000 routers, E = 64, k = 8: five standard errors plus the stated error: detects 4 %."""
    part = MoESpec(n_experts=64, top_k=8, d_expert=4)
    law = canonical(64, 8, False, "softmax", "score_then_top_k")
    low, high = math.sqrt(0.5 / ratio**0.5), math.sqrt(0.5 * ratio**0.5)
    x, w = np.random.default_rng(4).standard_normal((2, 8000, 64))
    for c in (0.0, 0.5, 1.0):
        products = (gates(low * x, law) * gates(high * (c * x + math.sqrt(1 - c**2) * w), law)).sum(axis=1)
        predicted = router_overlap(part, low, c, high)
        assert abs(predicted - products.mean()) < 5 * products.std() / 8000**0.5 + bias * predicted


def test_gram_is_made_of_the_array_functions() -> None:
    spec = presets.tiny_moe()
    assert spec.moe is not None
    rows, part = layer_table(spec, 1), spec.moe
    gram = np.array([[1.0, 0.3, 0.2], [0.3, 1.0, 0.1], [0.2, 0.1, 2.0]])
    out = moe_gram(gram, rows, part, spec.d_model)
    gains = moe_gains(rows)
    np.testing.assert_allclose(np.diagonal(out), moe_second_moment([1.0, 1.0, 2.0], gains, part), rtol=1e-12)
    pair = moe_covariance(1.0, 2.0, 0.2 / 2**0.5, gains, part, spec.d_model)
    assert out[0, 2] == pytest.approx(float(pair), rel=1e-9)
    np.testing.assert_allclose(out, out.T, rtol=1e-12)
    np.testing.assert_array_equal(out, moe_gram(gram, rows, part, spec.d_model))
    equal = moe_gram(np.ones((2, 4, 4)), rows, part, spec.d_model)
    assert equal.shape == (2, 4, 4)
    np.testing.assert_allclose(equal, equal[0, 0, 0], rtol=1e-6)  # equal tokens stay equal


def test_gains_over_many_specs() -> None:
    part = MoESpec(n_experts=8, top_k=2, d_expert=8)
    router = np.array([0.1, 1.0, 4.0])
    gains = MoEGains(router, FeedForwardGains(np.array([1.0, 2.0, 3.0]), 1.0, 1.0))
    many = moe_second_moment(1.0, gains, part)
    for index in range(3):
        one = MoEGains(float(router[index]), FeedForwardGains(index + 1.0, 1.0, 1.0))
        assert many[index] == pytest.approx(float(moe_second_moment(1.0, one, part)), rel=1e-9)


def test_masked_router_flattens_the_gates() -> None:
    spec = presets.tiny_moe()
    masked = spec.with_fields({"masks.router": {"density": 0.25}})
    assert moe_gains(layer_table(masked, 1)).router == pytest.approx(moe_gains(layer_table(spec, 1)).router / 4)


def test_normalised_top_one_is_no_reduction() -> None:
    """k = 1 with normalised gates has the second moment of one expert; routing alone decorrelates tokens."""
    dense = presets.tiny()
    assert dense.feed_forward is not None
    moe = {"n_experts": 8, "top_k": 1, "d_expert": dense.feed_forward.d_ff, "normalize_gates": True}
    spec = dense.with_fields({"feed_forward": None, "moe": moe})
    factors = moe_against_dense(spec, dense)
    assert all(value == pytest.approx(1.0, abs=1e-9) for value in factors.values())
    assert moe_against_dense(spec, dense, correlation=1e-9)["routing"] == pytest.approx(1 / 8, rel=1e-6)


def test_outside_the_domain() -> None:
    part = MoESpec(n_experts=8, top_k=2, d_expert=8, routing="expert_choice")
    with pytest.raises(AssumptionError, match=r"moe\.routing='expert_choice' is not covered; expected token_choice"):
        moe_second_moment(1.0, GAINS, part)
    with pytest.raises(AssumptionError, match=r"second_moment=-1\.0 is outside the domain"):
        moe_second_moment(-1.0, GAINS, MoESpec(n_experts=8, top_k=2, d_expert=8))
    with pytest.raises(AssumptionError, match=r"correlation=0\.0 is outside the domain"):
        moe_against_dense(presets.tiny_moe(), presets.tiny(), correlation=0.0)
    with pytest.raises(AssumptionError, match=r"spec\.moe=None is not in layer 1"):
        moe_against_dense(presets.tiny(), presets.tiny())
