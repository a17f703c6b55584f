"""experiments.calibration: its exact means are exact, its cells are those promised, its intervals are right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats as distributions

from experiments import calibration
from varprop.compare import check
from varprop.simulate import sample
from varprop.theory import predict

TASKS = calibration.tasks()


def test_there_are_enough_verdicts_over_the_cells_promised():
    assert sum(task["verdicts"] for task in TASKS) >= 4000
    assert len({calibration.task_id(task) for task in TASKS}) == len(TASKS)
    cells = {(task["case"], task["depth"], task["d_model"]) for task in TASKS}
    for case in calibration.REFERENCE:
        assert {depth for name, depth, _ in cells if name == case} == {1, 4, 16, 64, 128}
        assert {width for name, _, width in cells if name == case} == {64, 256, 1024}
    assert all(task["method"] == "explicit" for task in TASKS if "masked" in task["case"])


def wick(task: calibration.Task) -> float:
    """What one layer adds to the mean second moment, from the second moments of the weights alone; eps neglected."""
    spec = calibration.make_spec(task)
    table = {row.name.removeprefix("layers.0."): row for row in spec.tensor_table()}
    kept = 0.25 if "masked" in task["case"] else 1.0

    def power(name: str) -> float:
        """Mean square of an output for inputs of mean square 1."""
        row = next(row for key, row in table.items() if key.split(".")[-1] == name or key.endswith(f".{name}.weight"))
        return kept * row.init_std**2 * row.shape[-1]

    if task["case"].startswith("gqa"):
        return power("v") * power("o")
    inner = power("up")
    return {"mlp relu": inner / 2, "linear masked": inner}[task["case"]] * power("down")


@pytest.mark.parametrize("case", ["mlp relu", "linear masked", "gqa one token", "gqa one token masked"])
@pytest.mark.parametrize("depth", [1, 16])
def test_the_exact_means_follow_from_the_second_moments_of_the_weights(case, depth):
    """Growth by the same amount in every layer, at any depth; eps takes 1e-5 of it at most."""
    task = next(t for t in TASKS if (t["case"], t["depth"], t["d_model"]) == (case, depth, 64))
    stream = predict(calibration.make_spec(task), n_tokens=task["n_tokens"]).second_moment.sel(site="resid_post").values
    np.testing.assert_allclose(np.diff(stream), wick(task), rtol=2e-5)


@pytest.mark.parametrize("case", list(calibration.EXACT))
def test_the_exact_means_hold_for_networks(case):
    """1,500 networks of two layers; false fails 0.002 a case; `check` would see 10 % everywhere."""
    task = {"case": case, "depth": 2, "d_model": 64, "n_tokens": 1 if "one token" in case else 8, "error": 0.0}
    spec = calibration.make_spec(task)
    predicted = predict(spec, n_tokens=task["n_tokens"])
    assert float(predicted.theory_error.max()) < 1e-5
    drawn = sample(spec, n_networks=1500, n_tokens=task["n_tokens"], seed=1)
    assert check(predicted, drawn, false_fail_rate=0.002, resolution=0.1).verdict == "agrees"


def test_sharing_a_reference_hardly_correlates_the_verdicts():
    """The formula of the docstring against the bivariate normal law, at r = 1/51 and two-sided p = 0.01."""
    r, z = 1 / 51, float(distributions.norm.isf(0.005))
    covariance: Any = np.array([[1, r], [r, 1]])
    law = distributions.multivariate_normal(mean=np.zeros(2), cov=covariance, abseps=1e-12, releps=1e-12)
    # both beyond z on either side: all but the four strips
    both = 2 * law.cdf([-z, -z]) + 2 * (distributions.norm.sf(z) - law.cdf([-z, -z]) - inside(law, z))
    correlation = (both - 0.01**2) / (0.01 * 0.99)
    formula = r**2 * (2 * z * distributions.norm.pdf(z)) ** 2 / (2 * 0.01 * 0.99)
    assert correlation == pytest.approx(formula, rel=0.05)
    assert (calibration.VERDICTS - 1) * formula < 0.01


def inside(law, z: float) -> float:
    """P(X > z, |Y| < z) of a centred bivariate normal law."""
    return float(law.cdf([-z, z]) - law.cdf([-z, -z]))


def test_the_smoke_run_resumes_and_reports(tmp_path, capsys):
    folders = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert calibration.main(["--smoke", *folders]) == 0
    first = (tmp_path / "out" / "calibration.json").read_text()
    assert "3 of 3 cells" in capsys.readouterr().out
    assert calibration.main(["--smoke", "--stage", "report", *folders]) == 0
    assert (tmp_path / "out" / "calibration.json").read_text() == first
    found = json.loads(first)
    assert found["all"]["false_fails"]["trials"] == found["all"]["underpowered_at_few"]["trials"] == 12
    assert found["all"]["power"]["trials"] == found["all"]["false_fails_with_power"]["trials"] == 4
    assert sum(found["all"]["seen_by_side"].values()) == found["all"]["power"]["successes"]
    assert found["missing"] == []
    assert found["command"].startswith("python -m experiments.calibration --smoke --runs")
    assert len({row["seed"] for row in found["rows"]}) == 3
    assert (tmp_path / "out" / "calibration.png").stat().st_size > 10_000
    text = (tmp_path / "out" / "calibration.md").read_text()
    assert text.splitlines()[2].startswith("| all | 4 | ")
    # The report again from the result alone; a part of the cells does not replace the whole.
    assert calibration.main(["--smoke", "--stage", "table", "--out", folders[-1], "--runs", str(tmp_path)]) == 0
    assert (tmp_path / "out" / "calibration.md").read_text() == text
    assert calibration.main(["--smoke", "--max-depth", "1", *folders]) == 2
    assert "holds 3 cells and is kept" in capsys.readouterr().err
    assert (tmp_path / "out" / "calibration.json").read_text() == first
    part = [*folders[:2], "--out", str(tmp_path / "part")]
    assert calibration.main(["--smoke", "--max-depth", "1", *part]) == 0
    missing = json.loads((tmp_path / "part" / "calibration.json").read_text())["missing"]
    assert missing == ["mlp relu L=2 d=64", "masked L=2 d=64"]


def test_the_committed_report_is_that_of_its_rows():
    folder = Path(calibration.__file__).parent / "results"
    found = json.loads((folder / "calibration.json").read_text())
    assert (folder / "calibration.md").read_text() == calibration.markdown(found)
    again = calibration.table(found["rows"])
    assert json.loads(json.dumps(again["all"])) == found["all"]
    assert (again["all"]["false_fails"]["successes"], again["all"]["false_fails"]["trials"]) == (23, 6060)
    assert found["missing"] == []
    assert len(found["not_drawn"]) == 4


def test_a_deadline_starts_no_cell(tmp_path, capsys):
    folders = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert calibration.main(["--smoke", "--max-seconds", "0", *folders]) == 0
    assert "0 of 3 cells" in capsys.readouterr().out
    assert not (tmp_path / "out" / "calibration.json").exists()


def test_rates_over_cells():
    """Equal cells: the t interval of the shares of the cells."""
    counts = [(0, 50), (3, 50), (1, 50), (2, 50)]
    shares = np.array([k / n for k, n in counts])
    expected = distributions.t.interval(0.95, 3, shares.mean(), distributions.sem(shares))
    found = calibration.rate(counts)["interval_over_cells"]
    assert found == pytest.approx((max(0, expected[0]), expected[1]))
