"""Whether `check` keeps its false-fail rate and its power over ensembles whose mean is known exactly (small version).

The full one, 4,000 calls of each of 96 settings, is experiments/benchmarks/calibration_small.py with its JSON result.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from experiments.benchmarks import calibration_small as calibration
from varprop.compare import check
from varprop.stats import POWER, clopper_pearson

# Each bound below is a 1 - 1e-4 interval: over the 24 assertions a correct program fails with probability 2e-3 at most.
LEVEL = 1 - 2e-4


@pytest.mark.parametrize("family", calibration.FAMILIES)
@pytest.mark.parametrize("n_networks, spread, edge", [(8, 0.3, 0.0), (64, 0.05, 0.02), (4, 1.0, 0.0)])
def test_false_fail_rate_and_power(family, n_networks, spread, edge):
    """2,000 calls: a true rate above 0.025 would fail with probability above 0.98; a power below 0.84 likewise.

    At 4 networks and spread 1 what is called detectable is a factor e^140, and its power is not claimed.
    """
    row = calibration.measure(family, spread, n_networks, edge, calls=2000)
    assert clopper_pearson(row["failed"], row["calls"], LEVEL)[0] <= calibration.FALSE_FAIL_RATE
    for name in ("power_measured_high", "power_measured_low") if spread < 1 else ():
        assert clopper_pearson(round(1000 * row[name]), 1000, LEVEL)[1] >= POWER


@pytest.mark.parametrize("n_networks, spread", [(16, 0.05), (16, 0.3), (64, 0.05)])
def test_false_fail_rate_of_branches_that_are_mostly_zero(n_networks, spread):
    """2,000 calls; each branch is 0 in 70 % of the networks. A true rate above 0.025 fails with probability 0.98."""
    row = calibration.measure("zeros", spread, n_networks, 0.0, calls=2000)
    assert clopper_pearson(row["failed"], row["calls"], LEVEL)[0] <= calibration.FALSE_FAIL_RATE


@pytest.mark.parametrize("factor", [1e2, 1e6, 1e12])
def test_one_huge_network_makes_no_disagreement(factor):
    """A correct prediction, 64 networks, one of them larger by the factor at every layer and site."""
    rng = np.random.default_rng(9)
    values = calibration.ensemble(rng, "log_normal", 0.1, 64)
    values[17] *= factor
    found = calibration.outcome(calibration.exact_mean(), values, 0.0)
    assert set(found["verdict"][1:].ravel()) == {"underpowered"}


def test_a_gross_error_is_seen_on_either_side_by_few_networks():
    """Eight networks of spread 0.3 of the mean, a prediction wrong by a thousand: every cell disagrees."""
    values = calibration.ensemble(np.random.default_rng(9), "log_normal", 0.3, 8)
    for factor in (1e3, 1e-3):
        found = calibration.outcome(factor * calibration.exact_mean(), values, 0.0)
        assert set(found["verdict"][1:].ravel()) == {"disagrees"}


def test_many_calls_at_once_are_the_single_ones():
    """The form in which the calibration runs against the arithmetic of `check`."""
    rng = np.random.default_rng(4)
    values = calibration.ensemble(rng, "chi_square", 0.3, 8, (5,))
    mean = np.stack([calibration.exact_mean() * factor for factor in (1.0, 1.5, 0.5, 3.0, 0.2)])
    rejected, detectable = calibration.verdicts(mean, values, 0.02)
    for call in range(5):
        found = calibration.outcome(mean[call], values[:, call], 0.02)
        assert ((found["verdict"] == "disagrees") == rejected[call]).all()
        np.testing.assert_allclose(found["detectable"], detectable[call], rtol=1e-10)
    assert rejected.any()
    assert not rejected[0].any()


def test_check_computes_what_is_calibrated():
    """The Dataset interface gives the verdicts and p-values of the array arithmetic bit by bit."""
    rng = np.random.default_rng(3)
    values, mean = calibration.ensemble(rng, "log_normal", 0.1, 16), calibration.exact_mean()
    expected = calibration.outcome(mean, values, 0.02)
    outcome = check(calibration.as_result(mean, "theory", 0.02), calibration.as_result(values, "simulation"))
    assert outcome.dataset.verdict.values.tolist() == expected["verdict"].tolist()
    # check adds 16 units of rounding to the band
    np.testing.assert_allclose(outcome.dataset.p_value.values, expected["p_value"], rtol=1e-10)


def test_ensembles_have_the_mean_that_they_state():
    """4 standard errors over 20,000 networks and 31 cells: fails with probability 0.002 at most, once (fixed seed)."""
    rng = np.random.default_rng(5)
    for family in calibration.FAMILIES:
        values = calibration.ensemble(rng, family, 0.3, 20_000)
        stderr = values.std(axis=0) / np.sqrt(len(values))
        distance = np.abs(values.mean(axis=0) - calibration.exact_mean()) / stderr
        assert np.nanmax(distance) < 4


def test_committed_result_supports_the_claim():
    """The families outside the claim are there too, and fail as stated: no test of a mean can cover them."""
    rows = json.loads(Path(calibration.__file__).with_suffix(".json").read_text())["rows"]
    assert [(r["family"], r["spread"], r["n_networks"], r["theory_error"]) for r in rows] == list(calibration.SETTINGS)
    assert all(row["calls"] == calibration.CALLS for row in rows)
    inside = [row for row in rows if row["family"] in calibration.FAMILIES]
    assert all(row["interval"][0] <= calibration.FALSE_FAIL_RATE for row in inside)
    assert sum(row["failed"] for row in inside) <= calibration.FALSE_FAIL_RATE / 2 * sum(r["calls"] for r in inside)
    zeros = [row for row in rows if row["family"] == "zeros" and row["n_networks"] >= 16]
    assert len(zeros) == 4
    assert all(row["interval"][0] <= calibration.FALSE_FAIL_RATE for row in zeros)
    for row in inside:
        power = min(row["power_measured_low"], row["power_measured_high"])
        assert power >= 0.88 or row["detectable"] > 1 or row["spread"] > 1
        if row["n_networks"] >= 16 and row["spread"] <= 0.3:
            assert min(row[f"power_{side}_interval"][1] for side in ("measured_low", "measured_high")) >= POWER


def test_smoke_runs_every_setting(capsys):
    rows = calibration.main(["--smoke"])
    assert len(rows) == len(capsys.readouterr().out.splitlines()) == len(calibration.SETTINGS)


@pytest.mark.long
@pytest.mark.parametrize("family", calibration.FAMILIES)
@pytest.mark.parametrize("spread", (*calibration.SPREADS, 1.0))
def test_false_fail_rate_long(family, spread):
    """20,000 calls at 8 networks, another seed: a true rate of 0.014 would fail with probability above 0.9."""
    row = calibration.measure(family, spread, 8, 0.0, calls=20_000, seed=11)
    assert clopper_pearson(row["failed"], row["calls"], LEVEL)[0] <= calibration.FALSE_FAIL_RATE
