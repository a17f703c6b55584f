"""The benchmark of `method="gram"` runs in small and writes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.benchmarks import gram_speed


@pytest.mark.parametrize("part", ["ratio", "root", "wide"])
def test_smoke(part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gram_speed.main([part, "--smoke", "--out", str(tmp_path)])
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_results_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gram_speed.PARTS, "root", lambda smoke: [{"smoke": smoke}])
    gram_speed.main(["root", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "gram_speed_root.json").read_text())["rows"] == [{"smoke": False}]
