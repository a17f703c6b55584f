"""varprop.theory.collapse: fixed points and exponents against iteration; known limits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from varprop import presets
from varprop.errors import AssumptionError
from varprop.spec import AttentionSpec, FeedForwardSpec, InitSpec, ModelSpec
from varprop.theory import predict
from varprop.theory.collapse import (
    attention_strength,
    correlation_step,
    feed_forward_kernel,
    rank_collapse,
    token_collapse,
)


def spec(output_gain=1.0, activation="silu", gated=True, attention=True) -> ModelSpec:
    return ModelSpec(
        d_model=64,
        n_layers=8,
        attention=AttentionSpec(n_heads=4) if attention else None,
        feed_forward=FeedForwardSpec(d_ff=256, activation=activation, gated=gated),
        init=InitSpec(overrides=(("o", output_gain**0.5 / 8),)),
    )


def iterate(found, kernel, start, n_layers):
    """The two-scalar recursion for infinitely many tokens, sequential branches."""
    q, c, path = 1.0, start, []
    for _ in range(n_layers):
        c, q = correlation_step(q, c, found.attention_gain * c, found.attention_gain * c), q + found.attention_gain * c
        ratio = float(kernel.ratio(np.array([c]))[0])
        c, q = correlation_step(q, c, found.increment, found.increment * ratio), q + found.increment
        path.append(c)
    return np.array(path)


@pytest.mark.parametrize(
    "output_gain,activation,gated",
    [(0.36, "silu", True), (1.0, "silu", True), (1.0, "relu", False), (0.2, "gelu", False)],
)
def test_fixed_point_and_exponent_against_iteration(output_gain, activation, gated):
    model = spec(output_gain, activation, gated)
    found, kernel = token_collapse(model), feed_forward_kernel(model, 1)
    start = min(0.999, found.fixed_point + 0.01) if found.fixed_point < 1 else 0.9
    distance = np.abs(iterate(found, kernel, start, 3000) - found.fixed_point)
    measured = np.log(distance[2999] / distance[749]) / np.log(4)
    assert distance[2999] < distance[749]
    assert measured == pytest.approx(found.exponent, abs=0.02)


def test_exponents_of_the_notes():
    """SwiGLU at unit gains, 1 - c ~ l^-0.4577 (iteration 0.4587, 0.4580)."""
    assert token_collapse(spec()).exponent == pytest.approx(-0.4577, abs=1e-4)
    assert token_collapse(spec(0.3)).fixed_point == 0.0  # below the line: tokens decorrelate
    assert token_collapse(spec(0.3)).collapses is False


def test_the_line_of_the_papers_dense_model():
    """sigma_OV^2 = 0.671 against v (1 - g(0)) = 0.675."""
    found = token_collapse(presets.get("paper_dense_1b"))
    assert found.attention_gain == pytest.approx(0.671, abs=5e-4)
    assert found.attention_gain / found.balance == pytest.approx(0.675, abs=5e-4)
    assert not found.collapses
    masked = [token_collapse(presets.get("paper_dense_1b").with_fields(density=x)) for x in (0.9, 0.5)]
    assert 1 < masked[0].balance < masked[1].balance  # a ~ rho^2 against v ~ rho^3
    assert 0.6 < masked[0].fixed_point < 0.7
    assert masked[1].fixed_point == 1.0


def test_smooth_networks_without_attention_do_not_collapse():
    """relu tends to equal tokens; gelu, silu and relu^2 stop at an interior correlation (kappa'(1) > 1)."""
    found = {
        name: token_collapse(spec(1.0, name, False, False)).fixed_point for name in ("relu", "gelu", "silu", "relu2")
    }
    assert found["relu"] == 1.0
    assert all(0.3 < found[name] < 0.8 for name in ("gelu", "silu", "relu2"))
    wide = replace(spec(1.0, "relu2", False, False), n_layers=60, d_model=8192)
    for start, sign in ((found["relu2"], 0), (0.2, 1), (0.9, -1)):
        profile = predict(wide, n_tokens=8, token_correlation=start).token_correlation.sel(site="resid_post").values
        assert np.sign(np.round(profile[-1] - profile[0], 3)) == sign


def test_mixtures_collapse_almost_but_never_fully():
    found = token_collapse(presets.get("d256_moe"))
    assert 0.95 < found.fixed_point < 0.999
    assert found.exponent < 0
    assert token_collapse(presets.get("paper_moe_7b_1b")).balance > 100


def test_rank_collapse_limits():
    assert rank_collapse(0.0, np.exp(1.0), 32) == pytest.approx((np.e - 1) / (np.e + 31))
    assert rank_collapse(0.3, 1.0, 16) == pytest.approx(0.3)
    assert rank_collapse(0.1, 1e9, 16) == pytest.approx(1.0, abs=1e-7)


def test_starting_point_chooses_the_basin():
    model = spec(0.3)
    assert token_collapse(model, token_correlation=0.5).fixed_point == pytest.approx(0.0, abs=1e-6)
    assert token_collapse(spec(), token_correlation=0.5).fixed_point == 1.0
    assert token_collapse(spec(), token_correlation=1.0).fixed_point == 1.0


@pytest.mark.parametrize(
    "call",
    [
        lambda: token_collapse(spec(), 9),
        lambda: token_collapse(spec(), 0),
        lambda: token_collapse(spec(), 1.0),
        lambda: token_collapse(spec(), token_correlation=float("nan")),
        lambda: token_collapse(spec(), token_correlation="x"),
        lambda: token_collapse(spec().with_fields({"norm.placement": "peri"})),
        lambda: token_collapse(spec().with_fields({"attention.pattern": "window", "attention.window": 4})),
    ],
)
def test_bad_input_is_one_line(call):
    with pytest.raises(AssumptionError, match=r"^[\w .]+=.* expected [^\n]*$"):
        call()


def test_a_drift_of_zero_moves_nothing():
    part = FeedForwardSpec(d_ff=256, activation="identity", gated=False)
    linear = ModelSpec(d_model=64, n_layers=4, feed_forward=part)
    assert token_collapse(linear, token_correlation=0.9).fixed_point == 0.9


def test_a_mask_after_the_softmax_multiplies_the_strength_by_the_squared_row_sum():
    """Equal tokens, 4,000 keys, 300 rows: 5 standard errors of 0.3 % (false-fail rate 1e-6)."""
    density = 0.3
    masked = spec().with_fields({"key_mask_density": density, "key_mask_place": "after_softmax"})
    kept = np.random.default_rng(1).random((300, 4000)) < density
    squares = kept.mean(axis=1) ** 2
    measured = attention_strength(masked, 1) / attention_strength(spec(), 1)
    assert abs(measured - squares.mean()) < 5 * squares.std() / 300**0.5
