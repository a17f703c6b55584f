"""Two-scalar recursion and its tables against direct evaluation, and `predict(over=...)` against single calls."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from varprop import presets, results
from varprop.errors import AccuracyWarning, ArgumentError, AssumptionError
from varprop.spec import ModelSpec
from varprop.theory import predict
from varprop.theory.exchangeable_table import ExchangeableTable
from varprop.theory.pair_table import PairTable
from varprop.theory.softmax import softmax_moments, softmax_overlap

PLACEMENTS = ("pre", "post", "peri", "reordered", "mix", "lns")


def small(**changes: object) -> ModelSpec:
    full = {"d_model": 64, "n_heads": 2, "d_ff": 128, "n_layers": 3, "pattern": "full", "rope_theta": None}
    return presets.tiny().with_fields({**full, **changes})


@pytest.mark.parametrize(
    "n_tokens, head_dim, d_model, low, high, error",
    [
        (128, 64, 512, 0.9, 0.9001, 1e-8),
        (16, 16, 256, 0.2, 1.5, 1e-6),
        (10**7, 64, 1024, 1.0, 1.0, 1e-7),
        (32, 32, 128, 5.0, 5.0, 1e-4),
    ],
)
def test_softmax_moments_are_interpolated(n_tokens, head_dim, d_model, low, high, error):
    table = ExchangeableTable(n_tokens, head_dim, d_model, low, high)
    rng = np.random.default_rng(0)
    for std, c in zip(rng.uniform(low, high, 4), rng.uniform(0, 1, 4), strict=True):
        exact = softmax_moments(n_tokens, std * math.sqrt(1 - c), head_dim, d_model)
        participation, pair, diagonal = table.moments(np.array(std * math.sqrt(1 - c)))
        assert participation == pytest.approx(exact.participation, rel=error)
        assert (pair, diagonal) == pytest.approx((exact.pair, exact.diagonal), abs=error)
        overlap = table.overlap(np.array([std]), np.array([c]))[0, 0]
        assert overlap == pytest.approx(softmax_overlap(n_tokens, std * math.sqrt(1 - c), c, head_dim), rel=error)


@pytest.mark.parametrize("ratio", [1.0, 1.01, 2.0, 50.0])
def test_pair_table_interpolates_a_rule(ratio):
    """The arc-cosine kernel times m^1.5, over ranges of m of every size."""

    def rule(m, c, chosen):
        kernel = (np.sqrt(1 - c**2) + c * (np.pi - np.arccos(c))) / np.pi
        second_moment = m**1.5 * scale[chosen, None, None] * np.ones_like(c)
        return second_moment, second_moment * kernel

    scale = np.array([0.5, 3.0])
    table = PairTable(rule, np.ones(2), np.full(2, ratio))
    for c in (0.0, 0.01, 0.5, 0.9, 0.9999, 1.0):
        m = np.array([1.0, ratio**0.7])
        expected, covariance = rule(m[:, None, None], np.array([c]), slice(0, 2))
        found = table(np.array([m, c * m]))
        np.testing.assert_allclose(found[0], expected[:, 0, 0], rtol=1e-7)
        np.testing.assert_allclose(found[1], covariance[:, 0, 0], rtol=1e-7)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_placements_agree_with_drawn_heads(placement, kind):
    """The whole Gram matrix with drawn heads shares no table: within 4 of its standard errors or 0.5 %, wide enough
    that the O(1/d) terms in which the two differ are below that."""
    spec = small(d_model=512, n_heads=8, n_layers=4).with_fields({"norm.placement": placement, "norm.kind": kind})
    fast, drawn = (predict(spec, n_tokens=24, token_correlation=0.2, method=m) for m in ("auto", "sampled"))
    for name, least in (("second_moment", 5e-3), ("token_correlation", 4e-3)):
        scale = fast[name] if name == "second_moment" else 1.0
        allowed = np.maximum(4 * drawn[f"{name}_stderr"], least * scale)
        assert (np.abs(drawn[name] - fast[name]) <= allowed)[1:].all()


def test_axes_equal_single_predictions():
    axes = {"density": [1.0, 0.25], "activation": ["silu", "relu"], "token_correlation": [0.0, 0.5], "n_heads": [1, 2]}
    whole = predict(small(), n_tokens=12, over=axes)
    assert whole.second_moment.dims == ("density", "activation", "input_token_correlation", "n_heads", "layer", "site")
    for density, activation, correlation, heads in ((1.0, "relu", 0.5, 1), (0.25, "silu", 0.0, 2)):
        spec = small(density=density, activation=activation, n_heads=heads)
        alone = predict(spec, n_tokens=12, token_correlation=correlation)
        chosen = whole.sel(density=density, activation=activation, input_token_correlation=correlation, n_heads=heads)
        for name in ("second_moment", "token_correlation", "theory_error", "token_correlation_error"):
            np.testing.assert_allclose(chosen[name], alone[name], rtol=1e-6, atol=1e-9)
        assert (chosen.exactness == alone.exactness).all()


def test_axes_mix_kinds_of_attention_and_round_trip(tmp_path):
    whole = predict(small(), n_tokens=8, over={"pattern": ["full", "causal"], "n_tokens": [4, 8]})
    alone = predict(small(pattern="causal"), n_tokens=4)
    np.testing.assert_array_equal(whole.second_moment.sel(pattern="causal", n_tokens=4), alone.second_moment)
    assert results.identical(results.load(results.save(whole, tmp_path / "over.nc")), whole)


def test_mixture_axes():
    spec = presets.tiny_moe().with_fields(
        {"d_model": 64, "n_heads": 2, "d_expert": 64, "n_layers": 2, "pattern": "full", "rope_theta": None}
    )
    whole = predict(spec, n_tokens=8, over={"top_k": [1, 2], "gate_multiplier": [1.0, 2.0]})
    alone = predict(spec.with_fields(top_k=1, gate_multiplier=2.0), n_tokens=8)
    chosen = whole.second_moment.sel(top_k=1, gate_multiplier=2.0)
    np.testing.assert_allclose(chosen, alone.second_moment, rtol=1e-6)


def test_collapsed_tokens_stay_collapsed_and_nearly_collapsed_ones_are_resolved():
    spec = small(n_layers=400)
    warnings.simplefilter("ignore", AccuracyWarning)  # pytest restores the filters
    one = predict(spec, n_tokens=16, token_correlation=1.0)
    assert (one.token_correlation.sel(site="resid_post") == 1).all()
    near = predict(spec, n_tokens=16, token_correlation=1 - 1e-9).token_correlation.sel(site="resid_post")
    assert (1 - near)[0] == pytest.approx(1e-9, rel=1e-6)
    assert ((near > 0.9) & (near < 1)).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"n_tokens": 10**7},
        {"n_tokens": 1},
        {"n_tokens": 2, "token_correlation": 1.0},
    ],
)
def test_extreme_tokens_are_finite(changes):
    dataset = predict(small(), **changes)
    assert np.isfinite(dataset.second_moment.values[1:]).all()


@pytest.mark.parametrize(
    "fields",
    [
        {"init.overrides": {"q": 3.0, "k": 3.0}},
        {"density": 1e-6},
        {"eps": 0.0},
        {"branch_multiplier": 1e3},
        {"skip_multiplier": 0.1},
    ],
)
def test_extreme_specs_are_finite(fields):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AccuracyWarning)
        dataset = predict(small(**fields), n_tokens=12)
    assert np.isfinite(dataset.second_moment.values[1:]).all()
    assert (np.abs(dataset.token_correlation.values[1:]) <= 1 + 1e-9).all()


def test_a_tiny_embedding_is_swallowed_by_eps():
    """u has second moment m = q / (q + eps) = 1e-12: uniform attention adds m / T, and q stays what it is."""
    dataset = predict(small(eps=1.0, embedding_std=1e-6), n_tokens=12)
    np.testing.assert_allclose(dataset.second_moment.sel(site="attn_out")[1], 1e-12 / 12, rtol=1e-6)
    middle = 13e-12 / 12  # and silu is x / 2 there: E (gate up / 2)^2 = m^2 / 4
    np.testing.assert_allclose(dataset.second_moment.sel(site="mlp_out")[1], middle**2 / 4, rtol=1e-6)


def test_a_large_claimed_error_is_a_warning():
    with pytest.warns(AccuracyWarning, match=r"theory_error=\d"):
        predict(small(n_layers=100), n_tokens=12)


def test_a_stream_that_overflows_is_an_error():
    with pytest.raises(AssumptionError, match="second_moment"):
        predict(small(n_layers=200, skip_multiplier=1e3), n_tokens=4)


@pytest.mark.parametrize(
    "axes, message",
    [
        ({"n_layers": [1, 2]}, "not an axis"),
        ({"density": []}, "empty"),
        ({"density": [0.5, 0.5]}, "repeats"),
        ({"density": 0.5}, "not a sequence"),
    ],
)
def test_bad_axes(axes, message):
    with pytest.raises(ArgumentError, match=message):
        predict(small(), n_tokens=4, over=axes)


def test_long_contexts_need_exchangeable_tokens():
    with pytest.raises(AssumptionError, match=r"n_tokens=10000000 is too many for a position-resolved recursion"):
        predict(small(pattern="causal"), n_tokens=10**7)
