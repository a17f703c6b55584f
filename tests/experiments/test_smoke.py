"""Every experiment runs end to end in small (`--smoke`) and leaves its results; a second run finds them done."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

EXPERIMENTS = sorted(p.stem for p in (Path(__file__).resolve().parents[2] / "experiments").glob("*.py"))


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name not in ("__init__", "common", "real_models")])
def test_experiment(name: str, tmp_path: Path) -> None:
    module = importlib.import_module(f"experiments.{name}")
    runs, out = tmp_path / "runs", tmp_path / "out"
    assert module.main(["--smoke", "--runs", str(runs), "--out", str(out)]) == 0
    produced = {p.suffix for p in out.iterdir()}
    assert ".png" in produced
    assert produced & {".nc", ".json"}
    finished = {p: p.stat().st_mtime_ns for p in runs.rglob("*") if p.suffix in (".nc", ".json")}
    assert finished
    assert module.main(["--smoke", "--runs", str(runs), "--out", str(out)]) == 0
    assert {p: p.stat().st_mtime_ns for p in runs.rglob("*") if p.suffix in (".nc", ".json")} == finished
