"""The speed benchmark runs end to end in its small form."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long
def test_train_speed_smoke() -> None:
    program = Path(__file__).parents[2] / "experiments" / "benchmarks" / "train_speed.py"
    run = subprocess.run([sys.executable, program, "--smoke"], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    row = json.loads(run.stdout)
    assert row["preset"] == "tiny"
    assert min(row[name] for name in ("plain_s", "fit_s", "recorded_s", "batch_s")) > 0
