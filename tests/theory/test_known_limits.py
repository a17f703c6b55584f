"""Results of other papers and reductions to simpler models, each through the functions that users call."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varprop import presets, results, testing
from varprop.errors import AccuracyWarning
from varprop.spec import AttentionSpec, FeedForwardSpec, MaskSpec, ModelSpec, MoESpec, NormSpec
from varprop.theory import predict
from varprop.theory.activation import activation_kernel, activation_second_moment
from varprop.theory.attention import incoherent_average
from varprop.theory.exchangeable import exchangeable_attention
from varprop.theory.feed_forward import plain_kernel
from varprop.theory.linear import retained_variance
from varprop.theory.moe import router_overlap
from varprop.theory.residual import residual_second_moment
from varprop.theory.softmax import softmax_overlap, softmax_participation

UNIFORM = AttentionSpec(n_heads=1, rope_theta=None, pattern="full", logit_scale=1e-9)
FULL = AttentionSpec(n_heads=2, rope_theta=None, pattern="full")
NO_EPS = NormSpec(eps=0.0)


def second_moments(spec: ModelSpec, n_tokens: int, site: str = "resid_post", correlation: float = 0.0) -> np.ndarray:
    return predict(spec, n_tokens=n_tokens, token_correlation=correlation).second_moment.sel(site=site).values


# Xiong et al. 2020 (arXiv 2002.04745), Lemma 2: (1 + l/2) d <= E|x_l|^2 <= (1 + 3 l/2) d for Pre-LN, Xavier, d_ff = d


def xiong(attention: AttentionSpec, n_layers: int) -> ModelSpec:
    relu = FeedForwardSpec(d_ff=64, activation="relu", gated=False)
    spec = ModelSpec(d_model=64, n_layers=n_layers, attention=attention, feed_forward=relu, norm=NO_EPS)
    return spec.with_fields({"init.rule": "xavier"})


@settings(max_examples=10, deadline=None)
@given(n_tokens=st.integers(1, 200), correlation=testing.correlations(), flat=st.booleans())
def test_xiong_interval(n_tokens, correlation, flat):
    layers = np.arange(6)
    found = second_moments(xiong(UNIFORM if flat else FULL, 5), n_tokens, correlation=correlation)
    assert (found >= (1 + layers / 2) * (1 - 1e-9)).all()
    # value-key coupling, which the lemma's uniform attention lacks, may add 1/d per layer
    assert (found <= (1 + 3 * layers / 2) * (1 + (1e-9 if flat else 1 / 64))).all()


def test_xiong_ends_are_reached():
    """One token (or equal ones): the upper end; many independent tokens in the first layer: the lower end."""
    layers = np.arange(6)
    np.testing.assert_allclose(second_moments(xiong(UNIFORM, 5), 1), 1 + 1.5 * layers, rtol=1e-12)
    np.testing.assert_allclose(second_moments(xiong(UNIFORM, 5), 9, correlation=1.0), 1 + 1.5 * layers, rtol=1e-9)
    assert second_moments(xiong(UNIFORM, 1), 10**6)[1] == pytest.approx(1.5, rel=1e-5)


# Noci et al. 2022 (arXiv 2206.03126): rank collapse of uniform attention and linear feed-forwards without norms


@settings(max_examples=50, deadline=None)
@given(
    start=testing.correlations(),
    n_tokens=st.integers(2, 1000),
    n_layers=st.integers(1, 60),
    attention=st.floats(0.01, 1.0),
    mlp=st.floats(0.0, 1.0),
)
def test_noci_rank_collapse(start, n_tokens, n_layers, attention, mlp):
    """rho_L = (E S - (1 - rho_0)) / (E S + (T - 1)(1 - rho_0)), S = 1 + (T - 1) rho_0, E = (1 + alpha_1^2)^L."""
    q, k = 1.0, start
    for _ in range(n_layers):
        mixed = q * incoherent_average(k / q, 1 / n_tokens)
        q, k = (residual_second_moment(x, mixed, branch_scale=attention) for x in (q, k))
        q, k = (residual_second_moment(x, plain_kernel(x, 1.0), branch_scale=mlp) for x in (q, k))
    grown = (1 + attention**2) ** n_layers * (1 + (n_tokens - 1) * start)
    expected = (grown - (1 - start)) / (grown + (n_tokens - 1) * (1 - start))
    assert k / q == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_noci_invariants_in_a_network_with_norms():
    """Flat attention adds the same to q and to the covariance: q - p is conserved, and the correlation only rises."""
    spec = ModelSpec(d_model=4096, n_layers=8, attention=UNIFORM, norm=NO_EPS)
    stream = predict(spec, n_tokens=32, token_correlation=0.1).sel(site="resid_post")
    q, c = stream.second_moment.values, stream.token_correlation.values
    np.testing.assert_allclose(q * (1 - c), 0.9, rtol=1e-3)  # the mean cosine is O(1/d) below the correlation
    assert (np.diff(c) > 0).all()


# Giorlandino and Goldt 2025 (arXiv 2505.24333): T -> infinity at logit std s = beta sqrt(ln T), s_c = sqrt(2 ln T)


@pytest.mark.parametrize("ratio", [1.5, 2.0, 4.0])
def test_giorlandino_goldt_condensed(ratio):
    """E sum p^2 -> 1 - s_c / s from above, slower than 1 / ln T: 15 % off at 10 million tokens."""
    n_tokens = np.array([10, 10**3, 10**5, 10**7])
    excess = [softmax_participation(int(n), ratio * math.sqrt(2 * math.log(n))) - (1 - 1 / ratio) for n in n_tokens]
    assert min(excess) > 0
    assert (np.diff(excess) < 0).all()
    assert excess[-1] < 0.18 * (1 - 1 / ratio)
    scaled = np.array(excess) * np.log(n_tokens)
    assert (np.diff(scaled[1:]) > 0).all()  # slower than 1 / ln T
    assert (np.diff(scaled[1:] / np.log(np.log(n_tokens[1:]))) < 0).all()  # faster than ln ln T / ln T


@pytest.mark.parametrize("ratio", [0.3, 0.7])
def test_giorlandino_goldt_spread_out(ratio):
    """Below s_c the participation vanishes."""
    found = [softmax_participation(n, ratio * math.sqrt(2 * math.log(n))) for n in (10, 10**3, 10**5, 10**7)]
    assert (np.diff(found) < 0).all()
    assert found[-1] < 0.02


def test_giorlandino_goldt_is_poor_at_practical_lengths():
    critical = math.sqrt(2 * math.log(1024))
    assert softmax_participation(1024, 4.0) == pytest.approx(0.2725, abs=1e-4)
    assert 1 - critical / 4 == pytest.approx(0.069, abs=1e-3)


# Kedia et al. 2024 (arXiv 2403.09635): one attention head at logit std s <= 0.36


@pytest.mark.parametrize("n_tokens", [16, 128, 1024])
@pytest.mark.parametrize("c", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("s", [0.1, 0.36])
def test_kedia_attention_at_small_logits(n_tokens, c, s):
    """Variance c + (1-c) e^{(1-c) s^2} / n + (1-c)^2 s^2 / d and covariance c + ((1-c) + 2 (1-c)^2 s^2 / d) / n.

    Apart by e^{s^2} / n of relative size (they take a log-normal sum) and 1/d (they do not shrink the cosine).
    """
    d = 512
    attention = AttentionSpec(n_heads=1, rope_theta=None, pattern="full", logit_scale=s / d**0.5)
    spec = ModelSpec(d_model=d, n_layers=1, attention=attention)
    found = exchangeable_attention(spec, n_tokens, c)
    variance = c + (1 - c) * math.exp((1 - c) * s**2) / n_tokens + (1 - c) ** 2 * s**2 / d
    covariance = c + ((1 - c) + 2 * (1 - c) ** 2 * s**2 / d) / n_tokens
    allowed = 1 / d + 1.6 * s**2 / n_tokens
    assert abs(variance / found[0] - 1) < allowed
    assert abs(covariance / found[1] - 1) < allowed


# Cho and Saul 2009; Hendrycks and Gimpel 2016


@pytest.mark.parametrize("c", [-0.7, 0.0, 0.4, 1.0])
def test_cho_saul_kernels(c):
    """Half of J_n / pi: J_1 = sin + (pi - angle) cos, J_2 = 3 sin cos + (pi - angle)(1 + 2 cos^2)."""
    angle = math.acos(c)
    j1 = math.sin(angle) + (math.pi - angle) * c
    j2 = 3 * math.sin(angle) * c + (math.pi - angle) * (1 + 2 * c**2)
    assert float(activation_kernel("relu", 1.7, np.array(c))) == pytest.approx(1.7 * j1 / (2 * math.pi), abs=1e-12)
    assert float(activation_kernel("relu2", 1.7, np.array(c))) == pytest.approx(1.7**2 * j2 / (2 * math.pi), abs=1e-12)


def test_gelu_tends_to_its_limits():
    """h / 2 for small h, relu for large h."""
    c = np.array([-0.5, 0.0, 0.7])
    large, small = 1e6, 1e-6
    np.testing.assert_allclose(activation_kernel("gelu", large, c), activation_kernel("relu", large, c), rtol=1e-5)
    np.testing.assert_allclose(activation_kernel("gelu", small, c), c * small / 4, atol=1e-12)


# Reductions


@pytest.mark.parametrize("kind", ["bernoulli", "magnitude", "n_of_m", "block"])
@pytest.mark.parametrize("spec", [presets.tiny(), presets.tiny_moe()], ids=["dense", "mixture"])
def test_unit_density_is_dense(kind, spec):
    spec = spec.with_fields(n_layers=2, pattern="full", rope_theta=None)
    mask = {"kind": kind, "density": 1.0}
    masked = spec.with_fields({f"masks.{name}": mask for name in ("q", "k", "v", "o", "gate", "up", "down", "router")})
    a, b = (predict(s, n_tokens=6, token_correlation=0.3) for s in (spec, masked))
    for name in ("second_moment", "token_correlation", "theory_error"):
        np.testing.assert_allclose(a[name], b[name], rtol=1e-9)


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_all_experts_active(router):
    """top_k = n_experts: the softmax is normalised already; equal logits give gates 1/E or, for a sigmoid, 1/2."""
    part = {"n_experts": 4, "top_k": 4, "d_expert": 32, "router": router}
    plain, normalised = MoESpec(**part), MoESpec(**part, normalize_gates=True)
    std = 1.3
    if router == "softmax":
        assert float(router_overlap(plain, std, 0.4)) == pytest.approx(
            float(router_overlap(normalised, std, 0.4)), rel=1e-9
        )
    else:
        assert float(router_overlap(plain, std, 0.4)) > float(router_overlap(normalised, std, 0.4))
    assert float(router_overlap(normalised, 0.0, 0.4)) == pytest.approx(1 / 4)
    assert float(router_overlap(plain, 0.0, 0.4)) == pytest.approx(1 / 4 if router == "softmax" else 1.0)


@pytest.mark.parametrize("n_experts, top_k", [(1, 1), (3, 2), (8, 3)])
@pytest.mark.parametrize("std", [0.0, 3.0])
@pytest.mark.parametrize("normalize", [False, True])
def test_gate_power_is_bounded(n_experts, top_k, std, normalize):
    """1/k <= S_2 <= 1 for normalised gates, S_2 <= 1 always, and two tokens overlap by at most S_2."""
    part = MoESpec(n_experts=n_experts, top_k=top_k, d_expert=8, normalize_gates=normalize)
    power = float(router_overlap(part, std, 1.0))
    assert (1 / top_k if normalize else 0.0) * (1 - 1e-6) < power <= 1 + 1e-6
    assert -1e-9 < float(router_overlap(part, std, 0.3)) <= power * (1 + 1e-3)  # the overlap is tabulated


def test_one_expert_is_a_feed_forward():
    dense = presets.tiny().with_fields(n_layers=2, attention=None)
    moe = {"n_experts": 1, "top_k": 1, "d_expert": 384}
    mixture = dense.with_fields(feed_forward=None, moe=moe)
    a, b = (predict(s, n_tokens=5, token_correlation=0.2) for s in (dense, mixture))
    np.testing.assert_allclose(a.second_moment, b.second_moment, rtol=1e-7)
    np.testing.assert_allclose(a.token_correlation, b.token_correlation, atol=1e-7)


def test_as_many_key_value_heads_as_query_heads():
    spec = presets.tiny().with_fields(n_layers=2, pattern="full", rope_theta=None)
    assert spec.with_fields(n_kv_heads=4) == spec
    assert results.identical(predict(spec.with_fields(n_kv_heads=4), n_tokens=6), predict(spec, n_tokens=6))


def test_shared_keys_leave_the_means_unchanged():
    spec = presets.tiny().with_fields(n_layers=3, pattern="full", rope_theta=None)
    a, b = (predict(s, n_tokens=6) for s in (spec, spec.with_fields(n_kv_heads=1)))
    np.testing.assert_allclose(a.second_moment, b.second_moment, rtol=1e-12)


def test_one_token_takes_the_whole_value():
    """v = 1 from attention (unit gains) and v from the feed-forward in every layer, exactly."""
    spec = presets.tiny().with_fields({"norm": NO_EPS, "n_layers": 4})
    step = 1 + float(activation_second_moment("silu", 1.0))
    np.testing.assert_allclose(second_moments(spec, 1), 1 + step * np.arange(5), rtol=1e-6)


def test_uniform_attention_over_a_window_of_one_is_one_token():
    spec = presets.tiny().with_fields(n_layers=1, pattern="window", window=1, rope_theta=None)
    found = predict(spec, n_tokens=5, token_correlation=0.4)
    assert found.second_moment.sel(layer=1, site="attn_out").item() == pytest.approx(1.0, rel=1e-4)
    assert found.token_correlation.sel(layer=1, site="attn_out").item() == pytest.approx(0.4, abs=0.01)


# Properties


@settings(max_examples=12, deadline=None)
@given(spec=testing.model_specs(placements=("pre",)), n_tokens=st.integers(1, 6), c=testing.correlations())
def test_every_prediction_is_finite_and_a_covariance(spec, n_tokens, c):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AccuracyWarning)  # these models are narrow
        found = predict(spec, n_tokens=n_tokens, token_correlation=c)
    present = found.isel(layer=slice(1, None))
    assert np.isfinite(present.second_moment).all()
    assert (present.second_moment >= 0).all()
    stream = found.token_correlation.sel(site="resid_post").values
    lowest = -1 / (n_tokens - 1) if n_tokens > 1 else 0.0
    assert (stream >= lowest - 1e-6).all()
    assert (stream <= 1 + 1e-6).all()
    grown = found.second_moment.sel(site="resid_post").values
    assert (np.diff(grown) > 0).all()


@settings(max_examples=30, deadline=None)
@given(
    sparse=testing.densities(),
    dense=testing.densities(),
    activation=st.sampled_from(testing.ACTIVATIONS),
    gated=st.booleans(),
    kind=st.sampled_from(["bernoulli", "magnitude"]),
)
def test_second_moment_rises_with_density(sparse, dense, activation, gated, kind):
    """E phi(h)^2 rises with the variance of h for every activation, so masks lower every feed-forward."""
    sparse, dense = sorted((sparse, dense))
    part = FeedForwardSpec(d_ff=128, activation=activation, gated=gated)
    spec = ModelSpec(d_model=128, n_layers=2, feed_forward=part)
    masks = ({"kind": kind, "density": x} for x in (sparse, dense))
    low, high = (
        second_moments(spec.with_fields({f"masks.{name}": mask for name in ("gate", "up", "down")}), 2)
        for mask in masks
    )
    assert (low <= high * (1 + 1e-9)).all()


@settings(max_examples=50, deadline=None)
@given(mask=testing.mask_specs())
def test_masks_keep_between_their_density_and_all(mask: MaskSpec):
    share = retained_variance(mask, 4096) / mask.factor**2
    assert mask.density * (1 - 0.01) <= share + 1 / 4096
    assert share <= 1 + 1e-9


@settings(max_examples=40, deadline=None)
@given(n_tokens=st.integers(1, 5000), s=st.floats(0.0, 4.0), c=testing.correlations())
def test_overlap_lies_between_uniform_and_participation(n_tokens, s, c):
    """1/T <= E sum p_t p_s <= E sum p^2 <= 1 (Cauchy-Schwarz); the two-query series is good to 1e-3 here."""
    power, overlap = softmax_participation(n_tokens, s), softmax_overlap(n_tokens, s, c)
    assert 1 / n_tokens * (1 - 1e-3) <= overlap <= power * (1 + 1e-3)
    assert power <= 1 + 1e-8
