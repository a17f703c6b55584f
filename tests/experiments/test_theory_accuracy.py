"""The accuracy experiment: what it stops at, what it keeps, how it judges."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest

from experiments import theory_accuracy as experiment
from experiments.common import device_work, extrapolate, judge
from varprop import results
from varprop.simulate import sample
from varprop.simulate.block import networks_per_block

TASK = {**experiment.tasks(smoke=True)[1], "target": 0.02, "correlation_target": 0.02}


def test_tasks_are_distinct_and_build_specs() -> None:
    todo = experiment.tasks()
    assert len({experiment.task_id(task) for task in todo}) == len(todo)
    for task in todo:
        spec = experiment.make_spec(task)
        assert (spec.d_model, spec.n_layers, spec.n_heads) == (task["d_model"], task["depth"], 8)
    seen = {(t["case"], t["pattern"], t["depth"], t["d_model"]) for t in todo}
    for case in experiment.CASES:
        for pattern in experiment.PATTERNS:
            assert (case, pattern, 1, 512) in seen
            assert {(case, pattern, d, w) for d in (24, 128) for w in (256, 512, 1024)} <= seen


def test_inner_widths_grow_with_d_model() -> None:
    """Ratios of every matrix's fan-in to d_model are the same at all widths, so that finite-width terms are 1/d."""
    for case in experiment.CASES:
        shapes = []
        for width in experiment.WIDTHS:
            spec = experiment.make_spec(experiment._task(case, "causal", 2, width, 0.01))
            rows = [row for row in spec.tensor_table() if row.layer and row.matrix in ("q", "v", "o", "up", "down")]
            shapes.append([row.fan_in / width for row in rows])
        assert shapes[0] == shapes[1] == shapes[2]


def test_summary_is_mean_and_ratio_of_means() -> None:
    networks = sample(experiment.make_spec(TASK), n_networks=12, n_tokens=8, progress=False)
    found = experiment.summary(networks)
    at = {"layer": 3, "site": "resid_post"}
    q, c = networks.second_moment.sel(at).values, networks.token_correlation.sel(at).values
    ratio = (q * c).mean() / q.mean()
    assert found["second_moment"].sel(at).item() == pytest.approx(q.mean(), rel=1e-12)
    assert found["token_correlation"].sel(at).item() == pytest.approx(ratio, rel=1e-12)
    deleted = [np.delete(q * c, i).mean() / np.delete(q, i).mean() for i in range(12)]
    jackknife = math.sqrt(11 / 12 * np.sum((np.array(deleted) - np.mean(deleted)) ** 2))
    assert found["token_correlation_stderr"].sel(at).item() == pytest.approx(jackknife, rel=0.1)  # O(1/12) apart


def test_networks_are_added_until_the_target() -> None:
    dataset = experiment.simulate(TASK, "cpu", "cpu", math.inf)
    assert dataset.attrs["n_networks"] > experiment.FIRST_ROUND
    assert dataset.attrs["end_condition"] == "complete"
    at = {"layer": 3, "site": "resid_post"}
    assert float(dataset.second_moment_stderr.sel(at) / dataset.second_moment.sel(at)) <= TASK["target"]
    assert float(dataset.token_correlation_stderr.sel(at)) <= TASK["correlation_target"]


def test_a_deadline_leaves_a_result_that_is_redone(tmp_path: Path) -> None:
    started = time.time() + 0.01
    time.sleep(0.02)
    assert experiment.simulated(TASK, tmp_path, "cpu", "cpu", started) is None
    short = experiment.simulate(TASK, "cpu", "cpu", started)
    assert (short.attrs["end_condition"], short.attrs["n_networks"]) == ("deadline", experiment.FIRST_ROUND)
    path = results.save(short, tmp_path / f"accuracy-{experiment.task_id(TASK)}.nc")
    kept = experiment.simulated(TASK, tmp_path, "cpu", "cpu", started)
    assert kept is not None
    assert kept.attrs["end_condition"] == "deadline"
    experiment.simulated(TASK, tmp_path, "cpu", "cpu", math.inf)
    assert results.load(path).attrs["end_condition"] == "complete"


def test_stages_and_filters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert experiment.main(["--smoke", "--stage", "compare", *folders]) == 0
    assert not list((tmp_path / "runs").iterdir())
    assert experiment.main(["--smoke", "--stage", "simulate", "--cases", "post", *folders]) == 0
    assert len(list((tmp_path / "runs").iterdir())) == 1
    assert experiment.main(["--smoke", "--stage", "compare", *folders]) == 0
    table = json.loads((tmp_path / "out" / "theory_accuracy.json").read_text())
    assert len(table["missing"]) == 3
    assert len(table["rows"]) + len(table["not_covered"]) >= 1
    capsys.readouterr()
    assert experiment.main(["--dry-run", "--depths", "128", "--widths", "1024", *folders]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("L=128 d=1024" in line for line in lines) == len(lines) - 2 == 18


def test_extrapolation_recovers_a_line_and_its_error() -> None:
    """Weighted least squares: exact on a line; the claimed error is the spread of 4,000 noisy fits, within 6 %.

    The relative error of a spread over n draws is 1/sqrt(2 n) = 1.1 %: a false failure is a 5 sigma event.
    """
    widths, stderrs = np.array([256, 512, 1024]), np.array([0.004, 0.006, 0.005])
    exact = 1.01 + 3 / widths
    value, stderr = extrapolate(widths.tolist(), exact.tolist(), stderrs.tolist())
    assert value == pytest.approx(1.01, abs=1e-12)
    noise = np.random.default_rng(0).standard_normal((4000, 3)) * stderrs
    fits = [extrapolate(widths.tolist(), (exact + e).tolist(), stderrs.tolist())[0] for e in noise]
    assert np.std(fits) == pytest.approx(stderr, rel=0.06)


@pytest.mark.parametrize("depth, site, expected", [(1, "attn_out", "outside"), (24, "resid_post", "within")])
def test_verdicts(depth: int, site: str, expected: str) -> None:
    """2 % off at every width is outside for a block and inside for a stack; a stack may be saved by extrapolation."""
    base = {"case": "swiglu", "pattern": "causal", "depth": depth, "site": site, "stderr": 0.002}
    base |= {"correlation_difference": 0.03, "correlation_stderr": 0.002}
    rows = [{**base, "d_model": width, "ratio": 1.02} for width in ((256, 512, 1024) if depth > 1 else (512,))]
    verdict = experiment.verdicts(rows, experiment.extrapolations(rows))[0]
    assert verdict["second_moment"] == expected
    if depth > 1:
        assert verdict["correlation"] == "outside"
        slope = [{**row, "ratio": 1 + 60 / row["d_model"]} for row in rows]
        verdict = experiment.verdicts(slope, experiment.extrapolations(slope))[0]
        assert verdict["second_moment_d1024"] == "outside"
        assert verdict["second_moment_extrapolated"] == verdict["second_moment"] == "within"


def test_judge_needs_two_standard_errors() -> None:
    assert [judge(x, 0.004, 0.03) for x in (0.021, 0.025, 0.0385)] == ["within", "undecided", "outside"]


def test_work_is_proportional_to_networks_and_tokens() -> None:
    spec = experiment.make_spec(experiment._task("moe_8_2", "causal", 2, 256, 0.01))
    size = networks_per_block(spec, 64, "cuda")
    one, two = device_work(spec, 64, size), device_work(spec, 64, 2 * size)
    assert all(two[name] == pytest.approx(2 * one[name]) for name in one)
    per_token = spec.parameter_counts()["active_body"]  # each weight is a multiplication and an addition
    assert one["flops"] / (size * 64) == pytest.approx(2 * per_token, rel=0.1)
