"""Whether `check` keeps its false-fail rate and its power over ensembles whose mean is known exactly (small version).

The full one, 4,000 calls of each of 36 settings, is experiments/benchmarks/calibration_small.py with its JSON result.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from experiments.benchmarks import calibration_small as calibration
from varprop.compare import check
from varprop.stats import POWER, clopper_pearson

# Each bound below is a 1 - 1e-4 interval: over the 12 assertions a correct program fails with probability 1e-3 at most.
LEVEL = 1 - 2e-4


@pytest.mark.parametrize("family", calibration.FAMILIES)
@pytest.mark.parametrize("n_networks, spread, edge", [(8, 0.3, 0.0), (64, 0.05, 0.02)])
def test_false_fail_rate_and_power(family, n_networks, spread, edge):
    """400 calls: a true rate above 0.06 would fail with probability above 0.98; a power below 0.75 likewise."""
    row = calibration.measure(family, spread, n_networks, edge, calls=400)
    assert clopper_pearson(row["failed"], row["calls"], LEVEL)[0] <= calibration.FALSE_FAIL_RATE
    for name in ("power_measured_high", "power_measured_low"):
        assert clopper_pearson(round(200 * row[name]), 200, LEVEL)[1] >= POWER


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
    path = Path(calibration.__file__).with_suffix(".json")
    rows = json.loads(path.read_text())["rows"]
    settings = len(calibration.FAMILIES) * len(calibration.SPREADS) * len(calibration.NETWORKS) * len(calibration.EDGES)
    assert len(rows) == settings
    assert all(row["calls"] == calibration.CALLS for row in rows)
    assert all(row["false_fail_rate"] <= calibration.FALSE_FAIL_RATE for row in rows)
    assert all(row["power_measured_low_interval"][1] >= POWER for row in rows if row["n_networks"] >= 16)
    assert all(min(row["power_measured_low"], row["power_measured_high"]) >= 0.87 for row in rows)


def test_smoke_runs_every_setting(capsys):
    rows = calibration.main(["--smoke"])
    assert len(rows) == len(capsys.readouterr().out.splitlines()) == 36


@pytest.mark.long
@pytest.mark.parametrize("family", calibration.FAMILIES)
@pytest.mark.parametrize("spread", calibration.SPREADS)
def test_false_fail_rate_long(family, spread):
    """20,000 calls at 8 networks, another seed: a true rate of 0.014 would fail with probability above 0.9."""
    row = calibration.measure(family, spread, 8, 0.0, calls=20_000, seed=11)
    assert clopper_pearson(row["failed"], row["calls"], LEVEL)[0] <= calibration.FALSE_FAIL_RATE
