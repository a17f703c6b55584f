"""varprop.theory.scaling: against summed increments; the predecessor's recursion; LNS sums."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from varprop.errors import AssumptionError
from varprop.spec import FeedForwardSpec, ModelSpec, NormSpec, ResidualSpec
from varprop.theory import predict
from varprop.theory.scaling import (
    VARIANTS,
    lns_gated_increment,
    predecessor_step,
    variant_second_moment,
    variant_share,
)
from varprop.theory.stream import stream_profile

RELU = FeedForwardSpec(d_ff=128, activation="relu", gated=False)


@given(increment=st.floats(1e-3, 1e3), start=st.floats(0, 1e3), n_layers=st.integers(1, 60))
def test_lns_is_the_sum_of_its_increments(increment, start, n_layers):
    steps = increment / np.arange(1, n_layers + 1)
    profile = stream_profile(start, steps)
    layers = np.arange(1, n_layers + 1)
    np.testing.assert_allclose(variant_second_moment("lns", layers, n_layers, increment, start), profile[1:], rtol=1e-9)
    np.testing.assert_allclose(variant_share("lns", layers, n_layers, increment, start), steps / profile[1:], rtol=1e-9)


@pytest.mark.parametrize("rule", ["one", "inverse_sqrt_2L", "inverse_sqrt_L", "inverse_L"])
def test_residual_rules_against_predict(rule):
    spec = ModelSpec(
        d_model=64, n_layers=9, feed_forward=RELU, residual=ResidualSpec(rule=rule), norm=NormSpec(eps=0.0)
    )
    profile = predict(spec, n_tokens=2).second_moment.sel(site="resid_post").values
    variant = "pre" if rule == "one" else rule
    np.testing.assert_allclose(variant_second_moment(variant, np.arange(1, 10), 9, 0.5), profile[1:], rtol=1e-9)


def test_lns_is_more_identity_like_at_initialisation():
    layers = np.arange(2, 65)
    assert (variant_share("lns", layers, 64, 1.0) < variant_share("pre", layers, 64, 1.0)).all()


def test_predecessor_is_quadratic_never_exponential():
    """Local exponent of q <- q + sqrt(q) over l = 1000..4000, and LNS q_l = l."""
    q, lns = [1.0], 1.0
    for layer in range(1, 4000):
        q.append(float(predecessor_step(q[-1])))
        lns = float(predecessor_step(lns, layer))
    assert np.log(q[3999] / q[999]) / np.log(4) == pytest.approx(2.0, abs=0.01)
    assert q[3999] == pytest.approx(4000**2 / 4, rel=0.005)
    assert lns == pytest.approx(4000, rel=1e-12)


def test_gated_lns_sum_saturates():
    """sigma = 0.9: 0.327, 0.342, 0.346, 0.347 at L = 8, 32, 128, 1024."""
    sums = np.cumsum(lns_gated_increment(np.arange(1, 1025), 0.81, 0.81, 1.0))
    np.testing.assert_allclose(sums[[7, 31, 127, 1023]], [0.327, 0.342, 0.346, 0.347], atol=6e-4)
    late = lns_gated_increment(1e4, 0.81, 0.81, 1.0)
    assert late == pytest.approx(0.81**2 / 4 / 1e8, rel=1e-3)


@pytest.mark.parametrize("bad", ["x", None, float("nan"), -1.0, 0])
def test_bad_input(bad):
    for call in (
        lambda: variant_second_moment("pre", bad, 4, 1.0),
        lambda: variant_second_moment("pre", 1, bad, 1.0),
        lambda: variant_second_moment("pre", 1, 4, bad),
        lambda: variant_share(bad, 1, 4, 1.0),
        lambda: lns_gated_increment(1, bad, 1.0, 1.0),
    ):
        with pytest.raises(AssumptionError, match=r"^\w+=.* expected [^\n]*$"):
            call()


def test_every_variant_is_finite():
    for variant in VARIANTS:
        assert 0 < float(variant_share(variant, 3, 8, 0.5, post_layers=2)) < 1
        assert np.isfinite(variant_second_moment(variant, np.arange(1, 9), 8, 0.5)).all()
