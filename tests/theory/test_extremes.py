"""Cases at the edge of the theory's domain that once gave wrong numbers."""

from __future__ import annotations

import numpy as np
import pytest

from varprop import presets
from varprop.errors import AssumptionError
from varprop.spec import ModelSpec
from varprop.theory import predict
from varprop.theory.error import inverse_width
from varprop.theory.gates import gate_second_moment
from varprop.theory.softmax import softmax_overlap


def small(**changes: object) -> ModelSpec:
    return presets.tiny().with_fields({"d_model": 64, "n_layers": 3, "d_ff": 96, **changes})


def test_full_attention_with_huge_logits_keeps_correlations_in_range() -> None:
    """The two-query series does not resolve them: heads are drawn, and a correlation stays within [-1, 1]."""
    spec = small(pattern="full", rope_theta=None).with_fields({"init.overrides": {"q": 2.0, "k": 2.0}})
    dataset = predict(spec, n_tokens=12)
    correlation = dataset.token_correlation.values[1:]
    assert np.isfinite(correlation).all()
    assert np.abs(correlation).max() <= 1
    with pytest.raises(AssumptionError, match="logit_std=50 is too large"):
        softmax_overlap(16, 50, 0.5)


def test_identical_tokens_stay_identical_through_a_mixture() -> None:
    """Equal tokens have the second moment of the gates as their overlap. Near c = 1 a router takes the square root of
    1 - c: rounding of 1e-12 shows as 1e-6."""
    moe = {"n_experts": 6, "top_k": 3, "d_expert": 32, "n_shared_experts": 1, "shared_gate": True}
    dataset = predict(small(feed_forward=None, moe=moe), n_tokens=12, token_correlation=1.0)
    assert dataset.token_correlation.sel(site="mlp_out").values[1:] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("logit_std", [float("inf"), float("nan"), -1.0])
def test_gates_refuse_what_is_no_standard_deviation(logit_std: float) -> None:
    with pytest.raises(AssumptionError, match="logit_std="):
        gate_second_moment(8, 2, logit_std, normalize=True)


def test_one_expert_has_gate_one() -> None:
    assert gate_second_moment(1, 1, 3.0, normalize=False) == pytest.approx(1.0, abs=1e-12)


def test_narrow_branches_claim_more() -> None:
    wide, narrow = small(), small(head_dim=2, d_ff=4)
    assert inverse_width(narrow) / inverse_width(wide) == pytest.approx(9.375)
    claims = [
        float(predict(s, n_tokens=8, method="sampled").theory_error.sel(layer=3, site="attn_out"))
        for s in (wide, narrow)
    ]
    assert claims[1] / claims[0] == pytest.approx(9.375, rel=0.01)  # the rest is the eps of the norm


def test_an_unrescaled_mask_is_a_change_of_scale() -> None:
    """Density 1/4 has the second moments of dense weights of half the standard deviation; rescaled, those of dense."""
    last = {
        name: float(predict(spec, n_tokens=8).second_moment.sel(layer=3, site="resid_post"))
        for name, spec in {
            "dense": small(),
            "half": small().with_fields({"init.gain": 0.5}),
            "masked": small(density=0.25),
            "rescaled": small(density=0.25).with_fields(
                {f"masks.{m}.rescale": "inverse_sqrt" for m in ("q", "k", "v", "o", "gate", "up", "down")}
            ),
        }.items()
    }
    assert last["masked"] == pytest.approx(last["half"], rel=1e-12)
    assert last["rescaled"] == pytest.approx(last["dense"], rel=1e-12)


def test_equal_tokens_survive_rounding_in_drawn_heads() -> None:
    """OLMo2's placement: the stream grows, and its cosines pass 1 by rounding."""
    spec = small(placement="reordered", n_layers=16, activation="relu", gated=False)
    dataset = predict(spec, n_tokens=16, token_correlation=1.0)
    assert dataset.token_correlation.sel(site="resid_post").values == pytest.approx(1.0, abs=1e-6)
