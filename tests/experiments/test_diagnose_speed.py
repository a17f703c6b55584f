"""The speed benchmark on a CPU: both programs give the same numbers, and the table is drawn from the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.benchmarks import diagnose_speed

Capture = pytest.CaptureFixture[str]


def test_both_programs_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    pytest.importorskip("transformers", reason="needs transformers (the extra hf)")
    out = tmp_path / "speed.json"
    small = ["--d-model", "32", "--n-layers", "4", "--vocab-size", "60", "--n-sequences", "12", "--n-tokens", "24"]
    few = ["--released-tokens", "8", "--n-probes", "0", "--jacobian-layers", "2", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["diagnose_speed", *small, *few])
    with pytest.warns(UserWarning, match="usefulness"):
        diagnose_speed.main()
    rows = {row["score"]: row for row in json.loads(out.read_text())["rows"]}
    assert rows.keys() == diagnose_speed.AIMS.keys()
    for name, row in rows.items():
        assert row["difference"] < 2e-4, name
        assert row["ratio"] > 0
    monkeypatch.setattr("sys.argv", ["diagnose_speed", "--table", str(out)])
    capsys.readouterr()
    diagnose_speed.main()
    assert capsys.readouterr().out.count("| 32 |") == len(rows)
