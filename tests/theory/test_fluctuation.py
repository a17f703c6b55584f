"""varprop.theory.fluctuation: its closed forms against drawn weights, the recursion against real networks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varprop import presets
from varprop.errors import AssumptionError
from varprop.simulate import sample
from varprop.spec import AttentionSpec, FeedForwardSpec, ModelSpec, MoESpec
from varprop.theory.branch_noise import FUNCTIONS, activation_unit, normal_unit
from varprop.theory.depth import predict
from varprop.theory.fluctuation import (
    SPREAD_ERROR,
    averaged_attention_variance,
    feed_forward_relative_variance,
    fluctuation,
    gaussian_covariance,
    gaussian_relative_variance,
    gram_covariance,
    required_networks_for,
    spread_profile,
)


def log_spread_and_stderr(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log(std / mean) over axis 0 and its standard error sqrt((kurtosis - 1) / (4 n)) (delta method)."""
    centred = values - values.mean(axis=0)
    variance = (centred**2).mean(axis=0)
    kurtosis = (centred**4).mean(axis=0) / variance**2
    return np.log(np.sqrt(variance) / values.mean(axis=0)), np.sqrt((kurtosis - 1) / (4 * len(values)))


# One branch


def drawn_powers(activation: str, gated: bool, correlation: float, n_networks: int) -> np.ndarray:
    """Output power of a feed-forward, d = 24, d_ff = 12, T = 4, for inputs whose Gram matrix is exact."""
    rng = np.random.default_rng(7)
    d, d_ff, n_tokens = 24, 12, 4
    root = np.linalg.cholesky((1 - correlation) * np.eye(n_tokens) + correlation)

    def inner() -> np.ndarray:  # (networks, T, d_ff): exactly Gaussian given the inputs
        return root @ rng.standard_normal((n_networks, n_tokens, d_ff))

    phi = FUNCTIONS.get(activation, lambda x: np.maximum(x, 0.0))  # relu has closed forms there
    hidden = phi(inner()) * (inner() if gated else 1.0)
    out = hidden @ rng.standard_normal((n_networks, d_ff, d))
    return (out**2).mean(axis=(1, 2))


@pytest.mark.parametrize("activation, gated", [("relu", False), ("gelu", False), ("silu", True)])
@pytest.mark.parametrize("correlation", [0.0, 0.7])
def test_feed_forward_law_is_exact(activation, gated, correlation):
    """16,000 networks, 4.5 standard errors of the standard deviation (about 1 % each): 6 cases, false fails 4e-5."""
    unit = activation_unit(activation, 1.0, correlation)
    unit = unit.times(normal_unit(correlation)) if gated else unit
    ratios = unit.fourth[:2] / unit.diagonal**2
    predicted = feed_forward_relative_variance(unit.off_diagonal / unit.diagonal, *ratios, 4, 24, 12)
    measured, stderr = log_spread_and_stderr(drawn_powers(activation, gated, correlation, 16_000))
    assert stderr < 0.04
    assert abs(measured - np.log(predicted) / 2) < 4.5 * stderr


@pytest.mark.parametrize("correlation, measured", [(0.0, 0.00094), (0.5, 0.0058), (0.9, 0.0134)])
def test_relu_at_128_tokens(correlation, measured):
    """Relative variances that an independent simulation (d = 256, d_ff = 683) gave, of 6 % standard error."""
    unit = activation_unit("relu", 1.0, correlation)
    ratios = unit.fourth[:2] / unit.diagonal**2
    predicted = feed_forward_relative_variance(unit.off_diagonal / unit.diagonal, *ratios, 128, 256, 683)
    assert predicted == pytest.approx(measured, rel=0.12)


@pytest.mark.parametrize("group", [1, 4])
def test_attention_law_at_fixed_patterns(group):
    """4,000 draws of values and outputs at random patterns; 5 % for the spread of the forms around their means."""
    rng = np.random.default_rng(1)
    n_tokens, d, n_heads, head_dim = 5, 48, 4, 16
    weights = rng.dirichlet(np.full(n_tokens, 2.0), (n_heads, n_tokens))
    forms = np.einsum("hts,gus->hgtu", weights, weights)  # P_h P_g' for uncorrelated tokens
    inside = forms[range(n_heads), range(n_heads)].mean(axis=0)
    across = np.mean([np.mean(forms[h, g] ** 2) for h in range(n_heads) for g in range(n_heads) if h != g])
    power = np.trace(inside) / n_tokens
    values = rng.standard_normal((4000, n_heads // group, n_tokens, head_dim))
    heads = weights @ np.repeat(values, group, axis=1)
    out = heads.swapaxes(1, 2).reshape(4000, n_tokens, -1) @ rng.standard_normal((4000, n_heads * head_dim, d))
    measured, stderr = log_spread_and_stderr((out**2).mean(axis=(1, 2)))
    square = np.mean(np.mean(forms[range(n_heads), range(n_heads)] ** 2, axis=0)) * n_tokens / power**2
    correlation = np.sqrt((square - 1) / (n_tokens - 1))
    predicted = averaged_attention_variance(correlation, np.sqrt(across) / power, n_tokens, d, n_heads, head_dim, group)
    assert abs(measured - np.log(predicted) / 2) < 4.5 * stderr + 0.05


def test_group_size_one_is_multi_head():
    assert averaged_attention_variance(0.3, 0.9, 8, 64, 4, 16, 1) == averaged_attention_variance(0.3, 0.1, 8, 64, 4, 16)


# The recursion against real networks

FULL = AttentionSpec(n_heads=4, pattern="full", rope_theta=None)
CAUSAL = AttentionSpec(n_heads=4, rope_theta=None)
SWIGLU, RELU = FeedForwardSpec(d_ff=192), FeedForwardSpec(d_ff=192, activation="relu", gated=False)
MOE = MoESpec(n_experts=8, top_k=2, d_expert=48, normalize_gates=True)
SHARED = MoESpec(n_experts=4, top_k=1, d_expert=48, n_shared_experts=1, shared_gate=True, shared_mixing="mean")
NETWORKS = {
    "relu": ({"feed_forward": RELU}, 0.0),
    "relu_correlated": ({"feed_forward": RELU}, 0.6),
    "gated": ({"feed_forward": SWIGLU}, 0.0),
    "gated_correlated": ({"feed_forward": SWIGLU}, 0.6),
    "attention": ({"attention": FULL}, 0.0),
    "block": ({"attention": FULL, "feed_forward": SWIGLU}, 0.0),
    "block_correlated": ({"attention": FULL, "feed_forward": SWIGLU}, 0.5),
    "parallel": ({"attention": FULL, "feed_forward": RELU, "block": "parallel"}, 0.2),
    "grouped": ({"attention": AttentionSpec(n_heads=4, n_kv_heads=1, pattern="full", rope_theta=None)}, 0.0),
    "mixture": ({"moe": MOE}, 0.3),
    "shared": ({"attention": FULL, "moe": SHARED}, 0.0),
    "causal": ({"attention": CAUSAL, "feed_forward": SWIGLU}, 0.0),
    "causal_correlated": ({"attention": CAUSAL, "feed_forward": SWIGLU}, 0.5),
}


def compare(spec: ModelSpec, correlation: float, n_networks: int) -> None:
    """Every site but the absent ones: within the claimed error and 4.5 standard errors of the measured spread."""
    predicted = fluctuation(spec, n_tokens=16, token_correlation=correlation).second_moment
    drawn = sample(spec, n_networks=n_networks, n_tokens=16, token_correlation=correlation, seed=11, progress=False)
    values = drawn.second_moment.values
    present = predicted > 0
    assert (present == (np.nan_to_num(values.mean(axis=0)) > 0)).all()
    measured, stderr = log_spread_and_stderr(values[:, present])
    assert (np.abs(measured - np.log(predicted[present])) < np.log1p(SPREAD_ERROR) + 4.5 * stderr).all()


@pytest.mark.parametrize("case", NETWORKS)
def test_against_real_networks(case):
    """200 networks of width 64, 3 layers: a standard error of 5 to 6 %, about 10 numbers in each of 13 cases.

    False-fail rate of the whole below 0.2 %; a spread off by 40 % is found.
    """
    fields, correlation = NETWORKS[case]
    compare(ModelSpec(d_model=64, n_layers=3, **fields), correlation, 200)


@pytest.mark.long
@pytest.mark.parametrize("case", NETWORKS)
def test_deep_networks(case):
    """1,000 networks of 16 layers, standard errors of 2 to 4 %."""
    fields, correlation = NETWORKS[case]
    compare(ModelSpec(d_model=64, n_layers=16, **fields), correlation, 1000)


def test_spread_of_the_correlation():
    """Streams of a full block, 300 networks: the standard deviation of the realised token correlation."""
    spec = ModelSpec(d_model=64, n_layers=3, attention=FULL, feed_forward=RELU)
    predicted = fluctuation(spec, n_tokens=16, token_correlation=0.3).token_correlation[:, 4]
    drawn = sample(spec, n_networks=300, n_tokens=16, token_correlation=0.3, seed=2, progress=False)
    values = drawn.token_correlation.sel(site="resid_post").values
    measured, stderr = log_spread_and_stderr(values)
    expected = np.log(predicted / values.mean(axis=0))
    assert (np.abs(measured - expected) < np.log1p(SPREAD_ERROR) + 4.5 * stderr).all()


# Limits and bad input


def test_one_token():
    """2/d for the tokens; the one-token law of a block, 2/d + (kurtosis ratio - 1)(1 + 2/d) / d_ff."""
    spec = ModelSpec(d_model=64, n_layers=1, feed_forward=RELU)
    spread = fluctuation(spec, n_tokens=1).second_moment
    assert spread[0, 4] == pytest.approx((2 / 64) ** 0.5)
    assert spread[1, 3] == pytest.approx((2 / 64 + 5 / 192 * (1 + 2 / 64)) ** 0.5)


def test_a_gaussian_stream_telescopes():
    """Without inner noise and response (wide inner layers, gated, c = 1) the spread stays sqrt(2 / d)."""
    spec = ModelSpec(d_model=64, n_layers=6, feed_forward=FeedForwardSpec(d_ff=10**8))
    spread = fluctuation(spec, n_tokens=9, token_correlation=1.0).second_moment
    np.testing.assert_allclose(spread[:, 4], (2 / 64) ** 0.5, rtol=1e-3)


def test_cosines_of_many_tokens_add_to_the_power():
    """A linear branch of infinite inner width, T = 2 d: 6,000 networks, 4.5 standard errors (0.9 % each; false-fail
    rate 7e-6) and 1/d. The covariance of cosines and Gram matrix is 40 % of the variance: 25 % of it are seen."""
    d, n_tokens, n_networks = 48, 96, 6000
    part = FeedForwardSpec(d_ff=10**8, activation="identity", gated=False)
    spec = ModelSpec(d_model=d, n_layers=1, feed_forward=part)
    q = (spec.tensor_table()[0].init_std * spec.embedding_scale) ** 2
    rng, powers = np.random.default_rng(5), []
    for _ in range(n_networks):
        x = rng.standard_normal((n_tokens, d))
        u = x / np.sqrt(np.mean(x**2, axis=1, keepdims=True))
        powers.append(np.mean((q**0.5 * x + u @ rng.standard_normal((d, d)) / d**0.5) ** 2))
    measured, stderr = log_spread_and_stderr(np.array(powers))
    predicted = fluctuation(spec, n_tokens=n_tokens).second_moment[1, 4]
    assert abs(measured - np.log(predicted)) < 4.5 * stderr + 1 / d


def test_grams_of_exchangeable_tokens_change_nothing():
    spec = ModelSpec(d_model=64, n_layers=2, attention=FULL, feed_forward=SWIGLU)
    profile = predict(spec, n_tokens=6, token_correlation=0.2)
    q, c = profile.second_moment.values, profile.token_correlation.values
    gram = q[..., None, None] * ((1 - c)[..., None, None] * np.eye(6) + c[..., None, None])
    wishart = np.array([[gram_covariance(site, 64) for site in layer] for layer in gram])
    plain, resolved = (
        spread_profile(spec, n_tokens=6, second_moment=q, token_correlation=c, wishart=w) for w in (None, wishart)
    )
    np.testing.assert_allclose(plain.second_moment, resolved.second_moment, rtol=1e-9)


@settings(max_examples=30, deadline=None)
@given(c=st.floats(0.0, 1.0), n_tokens=st.integers(1, 10**7), degrees=st.integers(1, 10**6))
def test_bounds_of_the_gaussian_law(c, n_tokens, degrees):
    value = gaussian_relative_variance(c, n_tokens, degrees)
    assert 2 / (degrees * n_tokens) * (1 - 1e-12) <= value <= 2 / degrees * (1 + 1e-12)
    covariance = gaussian_covariance(1.0, c, n_tokens, degrees)
    assert covariance[0, 0] >= covariance[1, 1] * (1 - 1e-12)


def test_gram_covariance_of_exchangeable_tokens():
    gram = 2 * (0.7 * np.eye(5) + 0.3)
    np.testing.assert_allclose(gram_covariance(gram, 9), gaussian_covariance(2.0, 0.3, 5, 9))


def test_small_and_large_arguments():
    base = ModelSpec(d_model=32, n_layers=2, attention=FULL, feed_forward=SWIGLU)
    for spec, n_tokens, c in (
        (base.with_fields({"init.overrides": {"q": 1e-9}}), 4, 0.0),
        (base.with_fields({"logit_scale": 50.0}), 4, 0.3),
        (base.with_fields(density=1e-3), 3, 1.0),
        (base, 10**7, 0.0),
        (presets.tiny_moe().with_fields(n_experts=1, top_k=1, n_layers=1), 3, 0.5),
    ):
        result = fluctuation(spec, n_tokens=n_tokens, token_correlation=c)
        assert np.isfinite(result.second_moment[1:]).all()
        assert np.isfinite(result.token_correlation[1:]).all()


def test_required_networks():
    assert required_networks_for(0.01, 0.1) == 100
    assert required_networks_for(0.0025, 0.0) == 2
    assert required_networks_for(np.float64(0.5), 1) == 4


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: required_networks_for(0.0, 0.1), "relative_stderr=0.0 is outside the domain; expected a finite"),
        (lambda: required_networks_for(0.1, -1.0), "spread=-1.0 is outside the domain; expected a finite number >= 0"),
        (lambda: required_networks_for(0.1, float("nan")), "spread=nan is outside"),
        (lambda: required_networks_for("0.1", 1.0), "relative_stderr='0.1' is outside"),  # type: ignore[arg-type]
        (lambda: required_networks_for(True, 1.0), "relative_stderr=True is outside"),
        (lambda: fluctuation(presets.tiny(), n_tokens=0), "n_tokens=0 is outside"),
        (lambda: fluctuation(presets.tiny(), n_tokens=4, token_correlation=2.0), "token_correlation=2.0 is outside"),
        (lambda: fluctuation(presets.tiny().with_fields(placement="peri"), n_tokens=4), "norm.placement='peri'"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(AssumptionError, match=message):
        call()
