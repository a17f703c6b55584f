"""`varprop train`: a grown run goes on without its source; damage is told in one line."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from varprop.__main__ import main

Train = Callable[..., int]
SMALL = {"d_model": 16, "attention.n_heads": 2, "attention.n_kv_heads": 2, "feed_forward.d_ff": 16, "vocab_size": 32}


@pytest.fixture
def train(token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """A call of the command: n_layers, run directory, further arguments; the exit code."""
    monkeypatch.chdir(tmp_path)
    fields = {"n_steps": 4, "batch_size": 2, "n_tokens": 16, "warmup_steps": 0, "checkpoint_every": 2, "device": "cpu"}
    config = [text for name, value in fields.items() for text in ("--config", f"{name}={value}")]

    def run(n_layers: int, run_dir: str, *arguments: str) -> int:
        spec = [
            text for name, value in (SMALL | {"n_layers": n_layers}).items() for text in ("--set", f"{name}={value}")
        ]
        files = ["--run-dir", run_dir, "--out", f"{run_dir}.nc", "--config", f"corpus={token_file}"]
        return main(["train", "--spec", "tiny", *spec, *config, *files, *arguments])

    return run


def test_a_grown_run_goes_on_without_its_source(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(1, "shallow") == 0
    assert train(1, "other", "--config", "seed=1") == 0
    grown = (2, "deep", "--grow-from", "shallow")
    assert train(*grown) == 0
    capsys.readouterr()
    assert train(2, "deep", "--grow-from", "other") == 2  # a source that is there is looked at
    assert "holds a run with initial=" in capsys.readouterr().err
    shutil.rmtree("shallow")
    shutil.rmtree("deep/checkpoints/step-00000005")
    weights = Path("deep/model.safetensors").read_bytes()
    assert train(*grown) == 0
    assert Path("deep/model.safetensors").read_bytes() == weights
    capsys.readouterr()
    for run_dir, source in (("fresh", "shallow"), ("fresh", ""), ("other", "shallow")):
        assert train(2, run_dir, "--grow-from", source) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not Path("fresh").exists()


def test_a_damaged_checkpoint_is_told_in_one_line(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train(1, "run") == 0
    Path("run/checkpoints/step-00000005/checkpoint.json").write_text("")
    shown: list[str] = []
    monkeypatch.setattr(warnings, "showwarning", lambda *args: shown.append(warnings.formatwarning(*args[:4])))
    assert train(1, "run") == 0
    (line,) = shown
    assert line.startswith("varprop: warning: file='run/checkpoints/step-00000005/checkpoint.json' is damaged; ")
    assert line.endswith("; the checkpoint of step 4 is taken\n")


def test_no_whole_checkpoint_is_one_line(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(1, "run") == 0
    for path in Path("run/checkpoints").iterdir():
        (path / "checkpoint.json").write_text("[]")
    capsys.readouterr()
    assert train(1, "run") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("varprop: run_dir='run' has no whole checkpoint: file=")
