"""The speed benchmarks run end to end in their small form."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.benchmarks import train_speed

ROOT = Path(__file__).parents[2]


def run(program: str, *arguments: str) -> list[dict[str, object]]:
    command = [sys.executable, "-m", f"experiments.benchmarks.{program}", "--smoke", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.long
def test_train_speed_smoke(tmp_path: Path) -> None:
    rows = run("train_speed", "--out", str(tmp_path / "speed.json"))
    assert [row["variant"] for row in rows[:-1]] == list(train_speed.VARIANTS)
    assert rows[-1]["speed_over_plain"] > 0  # type: ignore[operator]
    saved = json.loads((tmp_path / "speed.json").read_text())
    assert set(saved["widths"]["256"]["variants"]) == set(train_speed.VARIANTS)


@pytest.mark.long
def test_scaling_smoke() -> None:
    (row,) = run("scaling")
    assert row["n_processes"] == 1
    assert row["tokens_per_s"] > 0  # type: ignore[operator]


def test_the_committed_table_is_that_of_the_readme() -> None:
    paths = [ROOT / "experiments" / "results" / f"train_speed_{width}.json" for width in train_speed.WIDTHS]
    table = train_speed.as_markdown(paths)
    assert table in (ROOT / "README.md").read_text()
    assert table in (ROOT / "experiments" / "benchmarks" / "TRAIN_SPEED.md").read_text()
