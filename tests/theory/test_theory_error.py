"""experiments/theory_error.py runs, saves, and picks up what it saved."""

from __future__ import annotations

import runpy
from pathlib import Path

from varprop import results

EXPERIMENT = runpy.run_path(str(Path(__file__).parents[2] / "experiments" / "theory_error.py"))


def test_smoke(tmp_path, capsys):
    EXPERIMENT["main"](["--smoke", "--output", str(tmp_path)])
    table = capsys.readouterr().out
    files = sorted((tmp_path / "smoke").glob("*.nc"))
    assert len(files) == len(EXPERIMENT["tasks"](smoke=True))
    saved = [results.load(file).attrs["created_at"] for file in files]
    EXPERIMENT["main"](["--smoke", "--output", str(tmp_path)])
    assert [results.load(file).attrs["created_at"] for file in files] == saved  # finished tasks are not run again
    assert capsys.readouterr().out == table


def test_tasks_are_distinct():
    tasks = EXPERIMENT["tasks"]()
    assert len({EXPERIMENT["task_id"](task) for task in tasks}) == len(tasks) == 28
    for task in tasks:
        EXPERIMENT["make_spec"](task["case"], task["d_model"])
