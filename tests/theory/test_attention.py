"""varprop.theory.attention: the two engines agree, limits, and what the sampler draws."""

from __future__ import annotations

import numpy as np
import pytest

from varprop import presets
from varprop.errors import AssumptionError
from varprop.spec import ModelSpec
from varprop.theory.attention import attention_gains, draw_keys, rotate, sampled_attention
from varprop.theory.exchangeable import exchangeable_attention
from varprop.theory.moments import Moments
from varprop.theory.norm import cosine_mean
from varprop.theory.quadrature import gram_root


def full(**changes) -> ModelSpec:
    return presets.tiny().with_fields({"pattern": "full", "rope_theta": None, **changes})


def resolved(correlation: float, n_tokens: int, n_recursions: int) -> Moments:
    gram = np.full((n_tokens, n_tokens), correlation) + (1 - correlation) * np.eye(n_tokens)
    return Moments(np.broadcast_to(gram, (n_recursions, n_tokens, n_tokens)).copy(), n_tokens)


@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.8])
def test_engines_agree(correlation):
    """2,000 heads: second moment within 5 standard errors and 1 % (O(1/d) terms differ), covariance within 3 %."""
    spec, n_tokens, n_recursions = full(), 24, 500
    exact = exchangeable_attention(spec, n_tokens, correlation)
    drawn = sampled_attention(spec, 1, resolved(correlation, n_tokens, n_recursions), 4, np.random.default_rng(0))
    moments = Moments(drawn, n_tokens)
    q = moments.second_moment
    assert q.mean() == pytest.approx(exact[0], rel=0.01, abs=5 * q.std() / n_recursions**0.5)
    covariance = q * moments.token_correlation
    stderr = covariance.std() / n_recursions**0.5
    assert covariance.mean() == pytest.approx(exact[1], rel=0.03, abs=5 * stderr)


@pytest.mark.parametrize("pattern", ["causal", "full"])
def test_flat_logits_average_uniformly(pattern):
    spec = presets.tiny().with_fields(pattern=pattern, rope_theta=None, logit_scale=1e-9)
    drawn = Moments(sampled_attention(spec, 1, resolved(0.0, 8, 400), 4, np.random.default_rng(0)), 8)
    counts = np.arange(1, 9) if pattern == "causal" else np.full(8, 8)
    stderr = drawn.diagonal.std(axis=0) / 20
    assert (np.abs(drawn.diagonal.mean(axis=0) - 1 / counts) < 5 * stderr + 1e-12).all()


def test_one_token_passes_its_value():
    spec = presets.tiny()
    drawn = sampled_attention(spec, 1, Moments(np.ones((3, 1, 1)), 1), 4, np.random.default_rng(0))
    np.testing.assert_allclose(drawn, attention_gains(spec, 1).value_output)
    exact = exchangeable_attention(full(), 1, 0.0)
    np.testing.assert_allclose(exact, attention_gains(full(), 1).value_output)


def test_equal_tokens_pass_their_value():
    drawn = sampled_attention(presets.tiny(), 1, resolved(1.0, 6, 2), 4, np.random.default_rng(0))
    np.testing.assert_allclose(drawn, 1.0, atol=1e-6)  # the jitter of the root


@pytest.mark.parametrize("head_dim, d_model", [(8, 32), (16, 8)])
def test_keys_and_what_they_tell_have_the_right_means(head_dim, d_model):
    """Means over 20,000 draws at five standard errors: E k_a.k_b and E[C | keys] are the mean cosine up to O(1/d^2)."""
    cosine = np.array([[1.0, 0.5], [0.5, 1.0]])[None]
    rng = np.random.default_rng(0)
    keys, given = draw_keys(cosine, gram_root(cosine)[:, None], 20_000, head_dim, d_model, rng)
    product = (keys[0, :, 0] * keys[0, :, 1]).mean(axis=-1)
    second_order = 1 / d_model**2
    for drawn in (product, given[0, :, 0, 1]):
        assert abs(drawn.mean() - cosine_mean(0.5, d_model)) < 5 * drawn.std() / 20_000**0.5 + second_order
    np.testing.assert_allclose(given[0, :, [0, 1], [0, 1]], 1.0)
    size = (keys[0] ** 2).mean(axis=(-2, -1))
    assert abs(size.mean() - 1) < 5 * size.std() / 20_000**0.5 + second_order


def test_rotation_keeps_norms_and_relative_angles():
    x = np.random.default_rng(0).standard_normal(8)
    rotated = rotate(np.broadcast_to(x, (5, 8)), 100.0, 0.5)
    np.testing.assert_allclose((rotated**2).sum(axis=1), x @ x)
    np.testing.assert_array_equal(rotated[:, 4:], np.broadcast_to(x[4:], (5, 4)))
    np.testing.assert_allclose(rotated[0], x)
    np.testing.assert_allclose(rotated[1] @ rotated[3], rotated[0] @ rotated[2])


def test_assumptions_are_checked():
    with pytest.raises(AssumptionError, match="expected full attention without positions"):
        exchangeable_attention(presets.tiny(), 3, 0.0)
    with pytest.raises(AssumptionError, match="holds fewer than 3 positions"):
        sampled_attention(presets.tiny(), 1, Moments.exchangeable(1.0, 0.0, 3), 4, np.random.default_rng(0))


def test_coupling_of_explicit_tokens():
    """p' C p of 20,000 draws of 32 explicit tokens in 32 dimensions, less their mean cosine (which it follows).

    Within 5 standard errors (false-fail rate below 1e-6; each below 1 % of s^2 / d) plus the next order, s^2 / (T d)
    for one query and twice that for two. One query without the norm on the keys' side, or two queries without any
    coupling, are off by 0.1 s^2 / d and 0.16 s^2 / d.
    """
    n_tokens, width, head_dim, correlation, std, draws = 32, 32, 16, 0.3, 0.5, 20_000
    rng = np.random.default_rng(0)
    common, own = rng.standard_normal((draws, 1, width)), rng.standard_normal((draws, n_tokens, width))
    tokens = correlation**0.5 * common + (1 - correlation) ** 0.5 * own
    tokens /= np.linalg.norm(tokens, axis=-1, keepdims=True)
    cosines = tokens @ tokens.swapaxes(1, 2)
    queries, keys = (tokens @ rng.standard_normal((draws, width, head_dim)) for _ in range(2))
    weights = np.exp(std * head_dim**-0.5 * queries @ keys.swapaxes(1, 2))
    weights /= weights.sum(axis=-1, keepdims=True)
    form, spec = weights @ cosines @ weights.swapaxes(1, 2), full(d_model=width, n_heads=2, head_dim=head_dim)
    spec = spec.with_fields(logit_scale=std * head_dim**-0.5)
    exact = exchangeable_attention(spec, n_tokens, correlation)
    off = ~np.eye(n_tokens, dtype=bool)
    control = cosines[:, off].mean(axis=1) - cosine_mean(correlation, width)
    for where, theory, next_order in ((~off, exact[0], 1 / n_tokens), (off, exact[1], 2 / n_tokens)):
        reduced = form[:, where].mean(axis=1) - control
        stderr = reduced.std(ddof=1) / draws**0.5
        assert stderr < 0.01 * std**2 / width
        assert abs(reduced.mean() - theory) < 5 * stderr + next_order * std**2 / width
