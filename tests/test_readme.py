"""Every block of the README runs: shell blocks command by command, Python blocks as they stand, in reading order."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from varprop import presets, results
from varprop.__main__ import main
from varprop.theory import mitigation_table
from varprop.theory.mitigation import as_markdown

from .test_arrows import LEVEL, files_by_part

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"[-+]?\d+\.?\d*(?:e[-+]?\d+)?")


def test_the_readme_has_the_blocks_it_promises() -> None:
    kinds = {kind for kind, _ in BLOCKS}
    assert {"console", "bash", "toml", "python", "bibtex"} <= kinds


def test_set_up_commands_are_the_targets_of_the_makefile() -> None:
    commands = [line for kind, body in BLOCKS if kind == "console" for line in body.splitlines()]
    assert commands
    for line in commands:
        target = line.split("#")[0].split()
        assert target[0] == "make"
        subprocess.run(["make", "-n", *target[1:]], cwd=ROOT, check=True, capture_output=True)


def test_the_tour_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One folder and one Python session for the whole tour, as a reader would have."""
    monkeypatch.chdir(tmp_path)
    for name, (_, body) in zip(("grid", "sweep"), (block for block in BLOCKS if block[0] == "toml"), strict=True):
        (tmp_path / f"{name}.toml").write_text(body)
    session: dict[str, object] = {}
    for kind, body in BLOCKS:
        if kind == "bash":
            for line in body.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    assert words[0] == "varprop", line
                    assert main(words[1:]) == 0, line
        elif kind == "python":
            exec(compile(body, "README.md", "exec"), session)
    assert (tmp_path / "report.html").is_file()
    assert results.load(tmp_path / "verdict.nc").attrs["verdict"] == "agrees"  # 400 networks are enough
    drawn = results.load(tmp_path / "grid.nc").n_networks.values
    assert 16 == drawn.min() < drawn.max() == 48  # the rule ends points, as the text says


def test_every_dimension_of_a_result_is_in_the_table_once() -> None:
    section = README.split("\n## Results\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(names) == sorted(results.DIMENSIONS)


def test_the_table_of_parts_is_complete_and_in_the_order_of_the_imports() -> None:
    rows = re.findall(r"^\| (`varprop/[^|]*) \|", README, re.MULTILINE)
    parts = [name for row in rows for name in re.findall(r"`varprop/(\w+)(?:/|\.py)`", row)]
    expected = {part for part, _ in files_by_part()} - {"errors", "_version", "files", "__main__"}
    assert sorted(parts) == sorted(expected)
    assert [LEVEL[part] for part in parts] == sorted(LEVEL[part] for part in parts)


def test_the_tables_of_mitigation_are_those_of_the_code() -> None:
    """Same rows and words, and numbers equal to the last digit but one: rounding may differ between platforms."""
    tables = [line for line in README.splitlines() if line.startswith("|")]
    ladder, paper = (as_markdown(mitigation_table(presets.get(name))) for name in ("d256", "paper_dense_1b"))
    for line in (ladder + "\n" + paper.split("\n\n")[0]).splitlines():
        words = NUMBER.sub("#", line)
        same = [other for other in tables if NUMBER.sub("#", other) == words]
        numbers = [float(x) for x in NUMBER.findall(line)]
        near = [pytest.approx(numbers, rel=0.02, abs=0.02) == [float(x) for x in NUMBER.findall(o)] for o in same]
        assert not line or any(near), line
