"""varprop.theory.growth: laws and asymptotes against brute iteration; known limits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from varprop import presets
from varprop.errors import AssumptionError
from varprop.spec import AttentionSpec, FeedForwardSpec, InitSpec, ModelSpec, NormSpec, ResidualSpec
from varprop.theory import predict
from varprop.theory.activation import activation_second_moment
from varprop.theory.coherent import coherent_second_moment
from varprop.theory.growth import SMALL_SIGNAL, Increment, classify, classify_spec
from varprop.theory.stream import stream_step

RELU = FeedForwardSpec(d_ff=256, activation="relu", gated=False)
SWIGLU = FeedForwardSpec(d_ff=256)


def spec(**parts) -> ModelSpec:
    return ModelSpec(**{"d_model": 64, "n_layers": 16, "feed_forward": RELU, **parts})


def brute(branches, depth, correlation=0.0, start=1.0, skip=1.0, proportional=False):
    q = start
    for layer in range(1, depth + 1):
        for b in branches:
            v = b.value * layer**-b.layer_power * depth**-b.depth_power * (q if proportional else 1)
            q = skip**2 * q + v + 2 * skip * correlation * (v * q) ** 0.5
    return q


CASES = [
    ([Increment(0.5)], 0.0, "linear", 1.0, 1e-12),
    ([Increment(0.5), Increment(0.3, 1.0)], 0.0, "linear", 1.0, 1e-9),
    ([Increment(0.7, 1.0)], 0.0, "logarithmic", 1.0, 1e-9),
    ([Increment(0.7, 0.5)], 0.0, "polynomial", 0.5, 1e-9),
    ([Increment(0.7, 2.0)], 0.0, "bounded", 0.0, 1e-9),
    ([Increment(0.7, 0.0, 1.0)], 0.0, "bounded", 0.0, 1e-12),
    ([Increment(0.7, 0.0, 2.0)], 0.0, "bounded", 0.0, 1e-12),
    ([Increment(0.5)], 0.4, "polynomial", 2.0, 2e-3),
    ([Increment(0.4), Increment(0.6)], 0.4, "polynomial", 2.0, 1e-3),
    ([Increment(0.7, 1.0)], 0.4, "linear", 1.0, 0.05),
    ([Increment(0.7, 2.0)], 0.4, "logarithmic", 2.0, 0.2),
    ([Increment(0.7, 3.0)], 0.4, "bounded", 0.0, 0.02),
    ([Increment(0.7, 0.0, 1.0)], 0.4, "linear", 1.0, 0.02),
    ([Increment(0.7, 0.0, 2.0)], 0.4, "bounded", 0.0, 1e-3),
]


@pytest.mark.parametrize("branches,correlation,law,exponent,error", CASES)
def test_law_and_asymptote_at_depth_2048(branches, correlation, law, exponent, error):
    """`error`: relative error of the asymptote, which shrinks with the depth unless it is rounding."""
    found = classify(branches, correlation=correlation)
    assert (found.law, found.exponent) == (law, exponent)
    errors = [abs(float(found.asymptote(n)) / brute(branches, n, correlation) - 1) for n in (128, 2048)]
    assert errors[1] < error
    assert errors[1] < max(0.95 * errors[0], 1e-9)


@pytest.mark.parametrize(
    "options,law",
    [
        ({"skip_scale": 1.1}, "exponential"),
        ({"skip_scale": 1.1, "correlation": 0.3}, "exponential"),
        ({"proportional": True, "correlation": 0.2}, "exponential"),
        ({"skip_scale": 0.9}, "bounded"),
        ({"correlation": -0.3}, "bounded"),
    ],
)
@pytest.mark.parametrize("branches", [[Increment(0.5)], [Increment(0.4), Increment(0.6)]])
def test_exponential_and_settling(options, law, branches):
    found = classify(branches, **options)
    names = {"skip_scale": "skip"}
    last = brute(branches, 300, **{names.get(k, k): v for k, v in options.items()})
    assert found.law == law
    assert float(found.asymptote(300)) == pytest.approx(last, rel=1e-6)


def test_no_increment_and_zero_start():
    assert classify(0.0, start=2.0).coefficient == 2.0
    assert float(classify(1.0, start=0.0).asymptote(10)) == 10.0


def test_xiong_interval():
    """2002.04745, Lemma 2: (1 + l/2) d <= E|x_l|^2 <= (1 + 3 l/2) d; the asymptote is the upper end."""
    relu = spec(attention=AttentionSpec(n_heads=4, pattern="full", rope_theta=None))
    layer = np.arange(17)
    q = predict(relu, n_tokens=32).second_moment.sel(site="resid_post").values
    assert (q >= 1 + layer / 2 - 1e-9).all()
    assert (q <= 1 + 3 * layer / 2 + 1e-9).all()
    assert classify_spec(relu).coefficient == pytest.approx(1.5)


def test_spec_against_the_exact_profile():
    """ReLU without attention: v = 1/2 exactly."""
    found = classify_spec(spec())
    profile = predict(spec(norm=NormSpec(eps=0.0)), n_tokens=4).second_moment.sel(site="resid_post").values
    assert found.law == "linear"
    np.testing.assert_allclose([float(found.asymptote(n)) for n in range(1, 17)], profile[1:], rtol=1e-12)


@pytest.mark.parametrize(
    "changes,correlation,law,exponent,coefficient",
    [
        ({"norm": NormSpec(placement="lns")}, 0.0, "logarithmic", 1.0, 0.5),
        ({"norm": NormSpec(placement="lns")}, 0.5, "linear", 1.0, 4 * 0.25 * 0.5),
        ({"norm": NormSpec(placement="lns"), "feed_forward": SWIGLU}, 0.0, "bounded", 0.0, None),
        ({"norm": NormSpec(placement="lns"), "feed_forward": SWIGLU}, 0.5, "logarithmic", 2.0, 0.25 * 0.25),
        ({"norm": NormSpec(placement="peri")}, 0.0, "linear", 1.0, 1.0),
        ({"norm": NormSpec(placement="reordered")}, 0.5, "polynomial", 2.0, 0.25),
        ({"norm": NormSpec(placement="post")}, 0.5, "bounded", 0.0, 1.0),
        ({"norm": NormSpec(placement="mix", post_fraction=0.25)}, 0.0, "linear", 1.0, 0.375),
        ({"norm": NormSpec(placement="mix", post_fraction=0.25)}, 0.5, "polynomial", 2.0, 0.25 * 0.5 * 0.5625),
        ({"residual": ResidualSpec(rule="inverse_sqrt_2L")}, 0.0, "bounded", 0.0, 1.25),
        ({"residual": ResidualSpec(rule="inverse_sqrt_L")}, 0.5, "linear", 1.0, 0.125),
        ({"residual": ResidualSpec(rule="inverse_L")}, 0.0, "bounded", 0.0, 1.0),
        ({"residual": ResidualSpec(rule="inverse_L")}, 1.0, "bounded", 0.0, (1 + 0.5**0.5) ** 2),
        ({"init": InitSpec(output_scaling="inverse_sqrt_2L")}, 0.0, "bounded", 0.0, 1.25),
        ({"residual": ResidualSpec(skip_multiplier=1.1)}, 0.0, "exponential", 2 * np.log(1.1), 1 + 0.5 / 0.21),
    ],
)
def test_placements_and_depth_rules(changes, correlation, law, exponent, coefficient):
    found = classify_spec(spec(**changes), correlation=correlation)
    assert (found.law, found.exponent) == (law, pytest.approx(exponent))
    if coefficient is not None:
        assert found.coefficient == pytest.approx(coefficient)


def test_blocks_of_two_branches():
    """The paper's dense model: attention adds sigma_OV^2 c*, and c* = 0 leaves the feed-forward part alone."""
    dense = presets.get("paper_dense_1b")
    assert classify_spec(dense).coefficient == pytest.approx(0.7560, rel=1e-3)
    both = classify_spec(dense, token_correlation=1.0)
    assert both.coefficient == pytest.approx(0.7560 + 0.6711, rel=1e-3)
    parallel = classify_spec(replace(dense, block="parallel"), token_correlation=1.0, correlation=0.5)
    assert parallel.coefficient == pytest.approx(0.25 * (0.7560 + 0.6711), rel=1e-3)


def test_published_slope_is_that_of_a_coherent_stream():
    """Published last-layer variance at its peak over 12..32 layers: log-log slope 1.84 (read off the figure, +-0.1).

    A common component with r = 0.5 in the limit gives it; uncorrelated blocks give at most 1.
    """
    depths = np.array([12.0, 16.0, 24.0, 32.0])
    slopes = [
        np.polyfit(np.log(depths), np.log(coherent_second_moment(depths, 1 - r**2, r**2)), 1)[0] for r in (0.0, 0.5)
    ]
    assert slopes[0] < 1
    assert slopes[1] == pytest.approx(1.84, abs=0.1)


@pytest.mark.parametrize(
    "call",
    [
        lambda: classify("x"),
        lambda: classify(float("nan")),
        lambda: classify(-1.0),
        lambda: classify(None),
        lambda: classify(1.0, correlation=1.5),
        lambda: classify(1.0, start=-1.0),
        lambda: classify(1.0, skip_scale=0.0),
        lambda: classify(1.0, skip_scale=1.5, correlation=-0.5),
        lambda: classify([Increment(1.0, 1.0)], correlation=-0.5),
        lambda: Increment(float("inf")),
        lambda: Increment(1.0, True),
        lambda: classify_spec(spec(attention=AttentionSpec(n_heads=4)), token_correlation=2.0),
    ],
)
def test_bad_input_is_one_line(call):
    with pytest.raises(AssumptionError, match=r"^[\w .+-]+=.* expected [^\n]*$"):
        call()


@pytest.mark.parametrize(
    "increments, depth",
    [
        ([Increment(1.0, 3.0, 0.0), Increment(1.0, 0.0, 2.0)], 40_000),
        ([Increment(1.0, 3.0, 0.0), Increment(0.5, 1.0, 1.0)], 40_000),
    ],
)
def test_summable_and_depth_scaled_branches_add_up(increments, depth):
    """Both reach the limit of sqrt(q): brute iteration of 40,000 layers, O(1 / sqrt(depth)) from the limit."""
    law = classify(increments, correlation=0.5)
    q = 1.0
    for layer in range(1, depth + 1):
        for b in increments:
            q = float(stream_step(q, b.value * layer**-b.layer_power * depth**-b.depth_power, 0.5))
    assert law.law == "bounded"
    assert q == pytest.approx(law.coefficient, rel=0.02)


def test_branches_that_add_nothing_still_take_the_skip_scale():
    one = classify([Increment(1.0)], skip_scale=1.05)
    two = classify([Increment(1.0), Increment(0.0)], skip_scale=1.05)
    assert two.exponent == pytest.approx(2 * one.exponent)
    assert classify([Increment(0.0)], proportional=True, skip_scale=1.1).law == "exponential"


@pytest.mark.parametrize("name", SMALL_SIGNAL)
def test_small_signals(name):
    """The second moment of the activation at variance 1e-6, where the next order is below 1e-5."""
    coefficient, power = SMALL_SIGNAL[name]
    assert float(activation_second_moment(name, 1e-6)) / 1e-6**power == pytest.approx(coefficient, rel=1e-5)


@pytest.mark.parametrize("activation,gated,power", [("relu", True, 2), ("relu", False, 1), ("relu2", False, 2)])
def test_every_gain_counts_under_lns(activation, gated, power):
    """Increments coefficient * gains / l^power, exact for relu and relu2; each gain is different."""
    gains = {"gate": 1.7, "up": 0.6, "down": 2.3} if gated else {"up": 0.6, "down": 2.3}
    widths = {"gate": 64, "up": 64, "down": 256}
    std = tuple((name, (gain / widths[name]) ** 0.5) for name, gain in gains.items())
    part = FeedForwardSpec(d_ff=256, activation=activation, gated=gated)
    lns = spec(feed_forward=part, norm=NormSpec(placement="lns"), init=InitSpec(overrides=std))
    inner = {("relu", True): 0.5 * 1.7 * 0.6, ("relu", False): 0.5 * 0.6, ("relu2", False): 1.5 * 0.6**2}
    step = inner[activation, gated] * 2.3
    found = classify_spec(lns)
    if power == 1:
        assert (found.law, found.coefficient) == ("logarithmic", pytest.approx(step))
    else:
        start = (lns.tensor_table()[0].init_std * lns.embedding_scale) ** 2
        assert (found.law, found.coefficient) == ("bounded", pytest.approx(start + step * np.pi**2 / 6))
