"""`required_networks` against `check` itself: enough networks, hardly more than enough, and pilots that fit."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from experiments.benchmarks import calibration_small as calibration
from varprop import presets
from varprop.errors import AccuracyWarning, ArgumentError, SchemaError
from varprop.simulate import required_networks, sample
from varprop.simulate.required import PILOT, cell_spread, networks_for, pilot_spread
from varprop.stats import POWER, clopper_pearson

SPEC = presets.tiny().with_fields(n_layers=2, d_model=64, d_ff=192)


@pytest.mark.parametrize("family", calibration.FAMILIES)
def test_check_on_that_many_networks_sees_the_error_and_is_seldom_underpowered(family):
    """200 calls on streams whose spread is known: an error of 10 % in the cell that varies most.

    Each side may fail wrongly with probability 1e-4 if power (or 1 - the rate of underpowered) is exactly 0.9; a true
    power of 0.75 is found out with probability 0.99.
    """
    rng = np.random.default_rng(2)
    many = calibration.ensemble(rng, family, 0.2, 50_000)
    spread = many.std(axis=0) / many.mean(axis=0)
    layer, site = np.unravel_index(np.nanargmax(spread), spread.shape)
    n = networks_for(math.log(1.1), float(spread[layer, site]), int((spread > 0).sum()))
    seen, settled, calls = 0, 0, 200
    for call in range(calls):
        drawn = calibration.ensemble(rng, family, 0.2, n)
        right = calibration.outcome(calibration.exact_mean(), drawn, 0.0, resolution=math.log(1.1))
        settled += not (right["verdict"] == "underpowered").any()
        wrong = calibration.exact_mean()
        wrong[layer, site] *= 1.1 if call % 2 else 1 / 1.1
        seen += calibration.outcome(wrong, drawn, 0.0)["verdict"][layer, site] == "disagrees"
    for count in (seen, settled):
        assert clopper_pearson(int(count), calls, 1 - 2e-4)[1] >= POWER
    assert seen < calls  # not far more networks than needed


def test_more_is_needed_for_less():
    n = required_networks(SPEC, 0.1, n_tokens=8)
    assert required_networks(SPEC, 0.05, n_tokens=8) > 2 * n
    assert required_networks(SPEC, 0.1, 0.99, n_tokens=8) > n
    assert required_networks(SPEC, 0.1, n_tokens=8, false_fail_rate=1e-4) > n
    assert required_networks(SPEC, 0.1, n_tokens=8, sites=["resid_post"]) < n
    assert required_networks(SPEC, 0.1, n_tokens=8, layers=[1]) <= n


def test_a_pilot_and_the_theory_ask_for_nearly_the_same():
    """The spread of 600 networks is known to 3 %; theory adds 10 %, the pilot its 95 % interval (5 %).

    Hence 20 %: the claim, and three standard errors of the pilot. Networks go with the square, within 30 % either way.
    """
    pilot = sample(SPEC, n_networks=600, n_tokens=8)
    drawn = cell_spread(SPEC, n_tokens=8, pilot=pilot)
    theory = cell_spread(SPEC, n_tokens=8)
    np.testing.assert_allclose(drawn, theory, rtol=0.2)
    assert required_networks(SPEC, 0.1, n_tokens=8, pilot=pilot) == pytest.approx(
        required_networks(SPEC, 0.1, n_tokens=8), rel=0.3
    )


def test_what_the_theory_does_not_cover_is_drawn():
    spec = SPEC.with_fields({"norm.placement": "post"})
    drawn = sample(spec, n_networks=PILOT, n_tokens=8, seed=3, method="gram")
    expected = pilot_spread(drawn.second_moment.values)
    np.testing.assert_array_equal(cell_spread(spec, n_tokens=8, seed=3), expected)
    narrow = SPEC.with_fields(d_model=32)
    assert required_networks(narrow, 0.1, n_tokens=8) > required_networks(SPEC, 0.1, n_tokens=8)


def test_a_pilot_is_raised_to_the_upper_end_of_its_interval():
    """20,000 pilots of 16: the raised spread is below the true one in 5 % (4 standard errors 0.6 %)."""
    values = np.random.default_rng(1).normal(1, 0.05, (16, 20_000))
    assert np.mean(pilot_spread(values) < 0.05) == pytest.approx(0.05, abs=0.0062)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"relative_error": 0}, "relative_error=0 is outside"),
        ({"relative_error": "much"}, "relative_error='much' is outside"),
        ({"relative_error": 1e-7}, "too small"),
        ({"power": 1.0}, "power=1.0 is outside"),
        ({"false_fail_rate": 0.0}, "false_fail_rate=0.0 is outside"),
        ({"layers": [3]}, r"layers=\[3\] is outside the model; expected layers in 0..2"),
        ({"sites": ["embedding"]}, "is unknown"),
        ({"sites": ["attn_out"], "layers": [0]}, "without a cell that varies"),
        ({"pilot": 4}, "pilot=4 is outside the domain; expected an integer >= 8"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        required_networks(SPEC, **{"relative_error": 0.1, "n_tokens": 8} | arguments)


def test_a_pilot_of_another_model_is_refused():
    pilot = sample(SPEC.with_fields(n_layers=1), n_networks=8, n_tokens=8)
    with pytest.raises(SchemaError, match="pilot: spec_id="):
        required_networks(SPEC, 0.1, n_tokens=8, pilot=pilot)
    pilot = sample(SPEC, n_networks=8, n_tokens=4)
    with pytest.raises(SchemaError, match="pilot: n_tokens=4 is another; expected 8"):
        required_networks(SPEC, 0.1, n_tokens=8, pilot=pilot)


def test_a_pilot_that_lacks_the_spread_of_its_masks_is_refused():
    masked = SPEC.with_fields(density=0.25)
    pilot = sample(masked, n_networks=8, n_tokens=8, method="gram")
    with pytest.raises(SchemaError, match=r"pilot: method_spread_error=.* is not 0; expected a sample with method"):
        required_networks(masked, 0.1, n_tokens=8, pilot=pilot)


def test_a_wide_spread_is_warned_of():
    """Narrow ungated relu2: the law of its networks is more skewed than the log-normal one of the same spread."""
    wide = SPEC.with_fields({"activation": "relu2", "gated": False, "d_model": 16, "d_ff": 16, "n_heads": 2})
    with pytest.warns(AccuracyWarning, match=r"spread=.* above 0.8"):
        required_networks(wide, 1.0, n_tokens=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        required_networks(SPEC, 0.1, n_tokens=8)
