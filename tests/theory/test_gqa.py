"""varprop.theory.gqa: reduction to one key/value head per query head, and small Monte Carlo."""

from __future__ import annotations

import numpy as np
import pytest

from proofs.check import ProofError
from proofs.prove_gqa import PROOFS, prove_aligned_mean, prove_relative_variance
from varprop import presets
from varprop.errors import AssumptionError
from varprop.spec import ModelSpec
from varprop.theory.gqa import (
    aligned_mean_factor,
    attention_relative_variance,
    gqa_effect,
    head_cosine,
    head_covariance,
    xavier_value_gain,
)
from varprop.theory.softmax import softmax_overlap, softmax_participation

N_HEADS, HEAD_DIM, D_MODEL = 8, 8, 32


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.statement)
def test_proofs(proof) -> None:
    proof.function()


def test_a_wrong_constant_is_caught() -> None:
    with pytest.raises(ProofError):
        prove_aligned_mean(lambda g, eta, kappa: aligned_mean_factor(g + 1, eta, kappa))
    with pytest.raises(ProofError):
        prove_relative_variance(lambda n, h, g, kappa, d: attention_relative_variance(n, h, g, kappa, d) + 1 / d**2)


def full(**changes: object) -> ModelSpec:
    return presets.tiny().with_fields({"pattern": "full", "rope_theta": None, **changes})


def outputs(
    kv_group_size: int, kappa: float, n_networks: int, rng: np.random.Generator, alignment: float = 0.0
) -> np.ndarray:
    """|out|^2 / d of one token for heads of unit power and correlation kappa within a group; one per network."""
    n_kv = N_HEADS // kv_group_size
    common = rng.standard_normal((n_networks, n_kv, 1, HEAD_DIM))
    own = rng.standard_normal((n_networks, n_kv, kv_group_size, HEAD_DIM))
    heads = (kappa**0.5 * common + (1 - kappa) ** 0.5 * own).reshape(n_networks, -1)
    shared = rng.standard_normal((n_networks, n_kv, 1, HEAD_DIM, D_MODEL))
    maps = rng.standard_normal((n_networks, n_kv, kv_group_size, HEAD_DIM, D_MODEL))
    maps = (alignment**0.5 * shared + (1 - alignment) ** 0.5 * maps).reshape(n_networks, -1, D_MODEL)
    out = np.einsum("na,nad->nd", heads, maps)
    return np.mean(out**2, axis=1) / (N_HEADS * HEAD_DIM)


@pytest.mark.parametrize("kv_group_size", [1, 2, 8])
def test_mean_and_spread_over_networks(kv_group_size: int) -> None:
    """4,000 networks, four standard errors (false-fail rate 1e-4): detects 2 % of the mean, 15 % of the spread."""
    kappa, n = 0.8, 4000
    power = outputs(kv_group_size, kappa, n, np.random.default_rng(kv_group_size))
    assert abs(power.mean() - 1) < 4 * power.std() / n**0.5
    squares = (power - 1) ** 2
    predicted = attention_relative_variance(N_HEADS, HEAD_DIM, kv_group_size, kappa, D_MODEL)
    assert abs(squares.mean() - predicted) < 4 * squares.std() / n**0.5


@pytest.mark.parametrize("kv_group_size", [1, 4])
def test_aligned_output_maps(kv_group_size: int) -> None:
    """4,000 networks, four standard errors: detects 4 % of the factor."""
    power = outputs(kv_group_size, 0.7, 4000, np.random.default_rng(7), alignment=0.4)
    assert abs(power.mean() - aligned_mean_factor(kv_group_size, 0.4, 0.7)) < 4 * power.std() / 4000**0.5


@pytest.mark.parametrize("correlation", [0.0, 0.4])
def test_cosine_of_heads_that_share_keys(correlation: float) -> None:
    """1,200 groups of two heads on 16 tokens of width 512: five standard errors plus O(T/d), detects 10 %."""
    rng, n_tokens, head_dim, d_model, n = np.random.default_rng(3), 16, 16, 512, 1200
    covariances = np.empty((n, 2))
    for network in range(n):
        tokens = correlation**0.5 * rng.standard_normal(d_model)
        tokens = tokens + (1 - correlation) ** 0.5 * rng.standard_normal((n_tokens, d_model))
        tokens *= (d_model / np.sum(tokens**2, axis=1, keepdims=True)) ** 0.5
        keys = tokens @ rng.standard_normal((d_model, head_dim)) / d_model**0.5
        queries = rng.standard_normal((2, head_dim))
        logits = 1.5 * queries @ keys.T / head_dim**0.5
        rows = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        gram = rows @ (tokens @ tokens.T / d_model) @ rows.T
        covariances[network] = gram[0, 1], (gram[0, 0] + gram[1, 1]) / 2
    std = 1.5 * (1 - correlation) ** 0.5
    overlap = softmax_overlap(n_tokens, std, 0.0, head_dim)
    participation = softmax_participation(n_tokens, std, head_dim)
    for column, value in zip(covariances.T, (overlap, participation), strict=True):
        error = abs(column.mean() - head_covariance(correlation, value, 1.0))
        assert error < 5 * column.std() / n**0.5 + 0.02 * column.mean()  # O(T/d) value-key coupling
    spec = full(d_model=32, n_heads=2, n_kv_heads=2, logit_scale=1.5 / head_dim**0.5)
    effect = gqa_effect(spec, 1, n_tokens=n_tokens, token_correlation=correlation)
    for kappa in (head_cosine(correlation, overlap, participation), effect["kappa"]):
        excess = covariances[:, 0] - kappa * covariances[:, 1]
        assert abs(excess.mean()) < 5 * excess.std() / n**0.5 + 0.02 * covariances[:, 0].mean()


def test_sharing_changes_no_mean_unless_the_initialisation_does() -> None:
    spec = full()
    for rule, gain in (("fan_in", 1.0), ("fixed", 1.0)):
        effect = gqa_effect(spec.with_fields({"init.rule": rule}), 1, n_tokens=32)
        assert effect["second_moment"] == pytest.approx(gain, rel=1e-12)
        assert effect["relative_variance"] > 1
    xavier = spec.with_fields({"init.rule": "xavier"})
    raised = gqa_effect(xavier, 1, n_tokens=32, token_correlation=1.0)["second_moment"]
    width = spec.n_heads * spec.head_dim
    expected = xavier_value_gain(spec.d_model, 1, spec.head_dim) / xavier_value_gain(spec.d_model, 1, width)
    assert raised == pytest.approx(expected, rel=1e-12)
    assert gqa_effect(xavier, 1, n_tokens=32)["second_moment"] > expected  # logits are sharper, too


@pytest.mark.parametrize("n_tokens, correlation", [(1, 0.0), (16, 1.0), (10**6, 0.3)])
def test_limits(n_tokens: int, correlation: float) -> None:
    effect = gqa_effect(full(), 1, n_tokens=n_tokens, token_correlation=correlation)
    assert effect["kappa"] == pytest.approx(1.0, abs=1e-4)
    whole = gqa_effect(full(), full().n_heads, n_tokens=n_tokens, token_correlation=correlation)
    assert (whole["second_moment"], whole["relative_variance"]) == (1.0, 1.0)


def test_outside_the_domain() -> None:
    with pytest.raises(AssumptionError, match="n_kv_heads=3 is outside the domain; expected a divisor of"):
        gqa_effect(full(), 3, n_tokens=16)
    for bad in (float("nan"), "x", None, 1.5, True):
        with pytest.raises(AssumptionError, match="token_correlation="):
            gqa_effect(full(), 1, n_tokens=16, token_correlation=bad)  # type: ignore[arg-type]
    with pytest.raises(AssumptionError, match=r"kappa=2\.0 is outside the domain"):
        attention_relative_variance(8, 16, 2, 2.0, 64)
    with pytest.raises(AssumptionError, match=r"spec\.attention=None is missing"):
        gqa_effect(full(attention=None), 1, n_tokens=4)
