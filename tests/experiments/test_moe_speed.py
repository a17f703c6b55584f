"""The benchmark of the mixture runs in small."""

from __future__ import annotations

import json

import pytest

from experiments.benchmarks import moe_speed


def test_smoke(capsys: pytest.CaptureFixture[str]) -> None:
    moe_speed.main(["--smoke", "--pieces"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["n_experts"], row["top_k"]) for row in rows] == [(8, 2), (64, 8)]
    assert all(row[f"{name}_tflops"] > 0 for row in rows for name in ("dense", "mixture", "products"))
    assert set(rows[0]["pieces_us"]) >= {"route", "assign", "spread", "collect"}
