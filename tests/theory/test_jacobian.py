"""Jacobians and gradients: limits, symmetries, the paper's model, extremes and domains. Networks: test_backward.py."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.theory.test_backward import N_TOKENS, mixture, model
from varprop import presets
from varprop.errors import AssumptionError
from varprop.spec import ModelSpec
from varprop.theory.backward import gradient_second_moment, jacobian_product
from varprop.theory.gate_jacobian import gate_jacobian
from varprop.theory.jacobian import attention_jacobian, block_jacobian, feed_forward_jacobian
from varprop.theory.softmax_jacobian import power_moments, softmax_averages, visible_counts
from varprop.theory.weight_gradient import weight_gradients


def deviation(spec: ModelSpec, q=1.7, c=0.3, n_tokens: int = N_TOKENS, layer: int = 1):
    moments = {"second_moment": q, "token_correlation": c, "middle_second_moment": q, "middle_token_correlation": c}
    return block_jacobian(spec, layer, n_tokens=n_tokens, **moments)


@pytest.mark.parametrize("spec", [model(), model(pattern="causal"), mixture(), model(placement="post")])
def test_one_token_has_one_definition(spec):
    values = deviation(spec, c=1.0, n_tokens=1)
    assert values["all_sources"] == pytest.approx(values["own_token"]) == pytest.approx(values["token_mean"])


def test_equal_tokens_have_one_feed_forward():
    for spec in (model(attention=None), mixture(), mixture(n_shared_experts=1, shared_gate=True)):
        values = deviation(spec, c=1.0)
        assert values["token_mean"] == pytest.approx(values["own_token"], rel=2e-3)


def test_flat_logits_share_the_value_path():
    spec = model(feed_forward=None, logit_scale=1e-6)
    values = deviation(spec, q=1.0, n_tokens=100)
    assert values["all_sources"] == pytest.approx(0.01 * (1 - 1 / 128), rel=1e-6)
    assert values["own_token"] == pytest.approx(0.0001 * (1 - 1 / 128), rel=1e-4)
    causal = attention_jacobian(
        model(pattern="causal", logit_scale=1e-6), 1, n_tokens=100, second_moment=1.0, token_correlation=0.0
    )
    harmonic = np.mean(1 / np.arange(1, 101)) * (1 - 1 / 128)  # H_T / T
    assert causal["all_sources"] == pytest.approx(harmonic, rel=1e-4)


def test_reductions():
    assert deviation(model(density=1.0)) == deviation(model())
    assert deviation(model(n_kv_heads=1)) == deviation(model(n_kv_heads=4))
    one = mixture(n_experts=1, top_k=1, d_expert=64)
    assert deviation(one) == pytest.approx(deviation(model(attention=None, d_ff=64)))
    half = deviation(model(feed_forward=None, branch_multiplier=0.5))
    assert half == pytest.approx({name: value / 4 for name, value in deviation(model(feed_forward=None)).items()})
    wide = deviation(model(pattern="window", window=N_TOKENS))
    assert wide == pytest.approx(deviation(model(pattern="causal")))


def test_all_experts_active_equals_normalised():
    plain, normalised = (deviation(mixture(n_experts=4, top_k=4, normalize_gates=flag)) for flag in (False, True))
    assert plain == pytest.approx(normalised)


def test_arrays_equal_numbers():
    q, c = np.array([1.0, 2.0, 5.0]), np.array([0.0, 0.3, 0.9])
    for spec in (model(), mixture(), model(placement="peri", pattern="causal")):
        values = deviation(spec, q, c)
        for index in range(3):
            single = deviation(spec, float(q[index]), float(c[index]))
            assert {name: float(v[index]) for name, v in values.items()} == pytest.approx(single, rel=1e-4)


def test_paper_model_at_step_zero():
    """Dense 1B at T = 128: sqrt(token_mean / d) is at least what the value path alone gives (sigma_OV^2 = 0.671 for any
    T), and below the largest value that the paper plots (0.014; trained)."""
    spec = presets.get("paper_dense_1b")
    for q in (6.0, 13.0):
        found = (deviation(spec, q, 0.2, 128)["token_mean"] / spec.d_model) ** 0.5
        assert (0.671 / q / spec.d_model) ** 0.5 < found < 0.014


@settings(max_examples=20, deadline=None)
@given(
    q=st.floats(1e-3, 1e6),
    c=st.floats(0.0, 1.0),
    n_tokens=st.integers(1, 3000),
    scale=st.floats(1e-6, 2.0),
    pattern=st.sampled_from(["full", "causal", "window"]),
    placement=st.sampled_from(["pre", "lns", "peri", "post"]),
)
def test_own_is_part_of_all(q, c, n_tokens, scale, pattern, placement):
    window = 7 if pattern == "window" else None
    values = deviation(model(pattern=pattern, window=window, logit_scale=scale, placement=placement), q, c, n_tokens)
    assert 0 < values["own_token"] <= values["all_sources"] * (1 + 1e-9) < np.inf
    assert 0 < values["token_mean"] < np.inf


@pytest.mark.parametrize("n_tokens", [1, 2, 10**7])
@pytest.mark.parametrize("scale", [1e-10, 50.0])
def test_extremes(n_tokens, scale):
    for pattern in ("full", "causal"):
        values = deviation(model(pattern=pattern, logit_scale=scale / 32**0.5), 1.0, 0.0, n_tokens)
        assert all(np.isfinite(v) and v > 0 for v in values.values())


def test_thin_masks():
    assert 0 < deviation(model(attention=None, density=1e-9))["own_token"] < 1e-17


@pytest.mark.long
def test_sharp_router():
    sharp = deviation(mixture().with_fields({"init.overrides": (("router", 5.0),)}))
    assert all(np.isfinite(v) and v > 0 for v in sharp.values())


def test_large_logits_fall_like_their_inverse():
    spec = model(qk_norm="head")
    found = softmax_averages(spec, 1, 1000, np.array(64.0), np.array(0.0))
    y, square, spread = power_moments(np.array([1000.0]), 64.0)[:, 0]
    np.testing.assert_allclose(
        [1 - found.participation, found.square, found.spread], [1 - y, square, spread], rtol=0.01
    )


@pytest.mark.parametrize("std", [0.5, 2.0])
def test_equal_queries_have_one_attention_row(std):
    """Queries of correlation 1: p_t.p_t' is the participation, exactly."""
    found = softmax_averages(model(), 1, 16, np.array(std), np.array(1.0))
    assert found.pair_overlap == pytest.approx(found.participation, rel=1e-9)


def test_counts_cover_every_position():
    for n_tokens in (1, 7, 33, 1000, 10**6):
        for window in (None, 3, 500):
            spec = model(pattern="causal") if window is None else model(pattern="window", window=window)
            counts, weight = visible_counts(spec, 1, n_tokens)
            assert weight.sum() == pytest.approx(1)
            limit = n_tokens if window is None else min(window, n_tokens)
            mean = (limit * (limit + 1) / 2 + (n_tokens - limit) * limit) / n_tokens
            assert weight @ counts == pytest.approx(mean, rel=1e-3)


def test_table_equals_the_quadrature():
    for n_tokens, std in ((5, 0.3), (300, 1.7), (10**6, 4.0)):
        spec = model(qk_norm="head")  # no average over the query's norm
        found = softmax_averages(spec, 1, n_tokens, np.array(std), np.array(0.0))
        y, square, spread = power_moments(np.array([float(n_tokens)]), std)[:, 0]
        np.testing.assert_allclose([found.participation, found.square, found.spread], [y, square, spread], rtol=2e-4)


@pytest.mark.parametrize(
    "spec, arguments, message",
    [
        (model(), {"layer": 2}, "layer=2 is outside the domain; expected an integer in 1..1"),
        (model(), {"n_tokens": 0}, "n_tokens=0 is outside the domain; expected an integer >= 1"),
        (model(), {"n_tokens": True}, "n_tokens=True is outside the domain"),
        (model(), {"second_moment": 0.0}, "second_moment=0.0 is outside the domain; expected finite numbers > 0"),
        (model(), {"second_moment": np.nan}, "second_moment=nan"),
        (model(), {"second_moment": "one"}, "second_moment='one'"),
        (model(), {"second_moment": None}, "second_moment=None"),
        (model(), {"token_correlation": 1.5}, "token_correlation=1.5 is outside the domain"),
        (model(), {"second_moment": [1.0, 2.0], "token_correlation": [0.0] * 3}, "expected one shape"),
        (model(logit_softcap=5.0), {}, "attention.logit_softcap"),
        (model(sink_logit=True), {}, "attention.sink_logit"),
        (model(key_mask_density=0.5), {}, "attention.key_mask_density"),
    ],
)
def test_errors(spec, arguments, message):
    arguments = {"layer": 1, "n_tokens": 4, "second_moment": 1.0, "token_correlation": 0.0, **arguments}
    with pytest.raises(AssumptionError, match=message):
        attention_jacobian(spec, arguments.pop("layer"), **arguments)


def test_errors_of_other_functions():
    with pytest.raises(AssumptionError, match=r"moe\.routing='expert_choice' is not covered"):
        feed_forward_jacobian(mixture(routing="expert_choice"), 1, n_tokens=4, second_moment=1.0, token_correlation=0.0)
    two = {"second_moment": [1.0, 2.0], "token_correlation": [0.0, 0.0]}
    middle = {f"middle_{name}": value for name, value in two.items()}
    with pytest.raises(AssumptionError, match="expected one number for each of the 1 layers"):
        gradient_second_moment(model(), n_tokens=4, **two, **middle)
    with pytest.raises(AssumptionError, match=r"increment=0\.0 is outside the domain"):
        jacobian_product(1.0, 0.0, 0.5, 4)
    with pytest.raises(AssumptionError, match="top_k=9 is outside the domain"):
        gate_jacobian(8, 9, 1.0, normalize=True)
    with pytest.raises(AssumptionError, match=r"logit_std=-1\.0"):
        power_moments(np.array([4.0]), -1.0)
    with pytest.raises(AssumptionError, match=r"norm\.placement='post' is not covered; expected pre or lns"):
        weight_gradients(model(placement="post"), 1, n_tokens=4, **moments_at_one())


def moments_at_one() -> dict[str, float]:
    moments = {"second_moment": 1.0, "token_correlation": 0.0}
    return {**moments, **{f"middle_{name}": value for name, value in moments.items()}}
