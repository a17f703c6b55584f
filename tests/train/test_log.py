"""Logs of a run: lines, files that a kill may have cut, and packages that may be missing."""

from __future__ import annotations

import io
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from varprop.errors import ArgumentError
from varprop.train import log
from varprop.train.log import ConsoleLog, JsonLines, loggers, read_jsonl


def test_json_lines_hold_every_record(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "new" / "log.jsonl")
    lines.write(0, {"train/loss": 2.5, "gradient_norm": math.nan})
    lines.write(10, {"train/loss": 2.0})
    lines.close()
    text = (tmp_path / "new" / "log.jsonl").read_text()
    assert text == '{"step": 0, "train/loss": 2.5, "gradient_norm": null}\n{"step": 10, "train/loss": 2.0}\n'
    assert read_jsonl(tmp_path / "new" / "log.jsonl")[1] == {"step": 10, "train/loss": 2.0}
    assert read_jsonl(tmp_path / "none") == []
    (tmp_path / "damaged").write_text("[" * 100_000 + '\n\udcff\n{"step": 3}\n', errors="surrogateescape")
    assert read_jsonl(tmp_path / "damaged") == [{"step": 3}]


@pytest.mark.parametrize("cut", range(1, 32))
def test_a_resumed_log_is_the_undisturbed_one(cut: int, tmp_path: Path) -> None:
    """Killed within any byte of the record of step 20, resumed from a checkpoint at 10; then again from 10."""
    path = tmp_path / "log.jsonl"
    records = [(step, {"train/loss": 3.0 - step / 20}) for step in (0, 10, 20)]
    whole = "".join(json.dumps({"step": step, **values}) + "\n" for step, values in records)
    last = len(json.dumps({"step": 20, **records[2][1]})) + 1
    path.write_text(whole[: len(whole) - last + min(cut, last)])
    for _ in range(2):
        resumed = JsonLines(path, resume_step=10)
        for step, values in records[1:]:
            resumed.write(step, values)
        resumed.close()
        assert path.read_text() == whole
    assert [entry.name for entry in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    lines = JsonLines(tmp_path / "log.jsonl")
    lines._file = Path("/dev/full").open("ab", buffering=0)  # noqa: SIM115
    with pytest.raises(ArgumentError, match="No space left on device"):
        lines.write(0, {"train/loss": 1.0})


def test_the_console_without_a_terminal_has_plain_lines() -> None:
    stream = io.StringIO()
    console = ConsoleLog(100, 20, stream)
    console._began -= 60.0
    console.write(50, {"train/loss": 2.34567, "throughput/tokens_per_s": 912345.6, "throughput/mfu": 0.412})
    console.close()
    line, end = stream.getvalue().split("\n")
    assert end == ""
    assert line == "step  50  train/loss 2.346  throughput/tokens_per_s 912,346  throughput/mfu 0.412  left 0:01:40"


def test_the_console_on_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    stream = io.StringIO()
    console = ConsoleLog(100, 0, stream)
    console.write(50, {"train/loss": 2.34567, "throughput/tokens_per_s": 912345.6, "throughput/mfu": 0.412})
    console.close()
    text = stream.getvalue()
    assert "50/100" in text
    assert "loss 2.346  tokens_per_s 912,346  mfu 0.412" in text
    assert "left" not in text


@pytest.mark.parametrize(
    "names, message",
    [
        (["json"], "log='json' is unknown; expected one of console, jsonl, tensorboard, wandb"),
        (["console", "console"], "log='console' is given twice; expected each log once"),
        (["jsonl"], "log='jsonl' is given without a run directory; expected run_dir with it"),
    ],
)
def test_bad_names(names: list[str], message: str) -> None:
    with pytest.raises(ArgumentError) as raised:
        loggers(names, None)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    "name, modules, package",
    [
        ("tensorboard", ("tensorboard", "torch.utils.tensorboard"), "varprop[tensorboard]"),
        ("wandb", ("wandb",), "wandb"),
    ],
)
def test_a_missing_package_is_one_line(
    name: str, modules: tuple[str, ...], package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ArgumentError) as raised:
        loggers(["jsonl", name], tmp_path)
    assert str(raised.value).startswith(f"log='{name}' cannot be used (")
    assert str(raised.value).endswith(f"; expected it after: pip install '{package}'")


def test_tensorboard_reads_back_what_was_written(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for resume_step, steps in ((0, (0, 10, 20)), (10, (10, 20))):
        (board,) = loggers(["tensorboard"], tmp_path, resume_step)
        for step in steps:
            board.write(step, {"train/loss": 3.0 - step / 20})
        board.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(0, 3.0), (10, 2.5), (20, 2.0)]


def test_wandb_takes_the_same_run_when_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package: what it is called with."""
    calls: list[Any] = []

    class Run:
        def define_metric(self, name: str, step_metric: str) -> None:
            calls.append((name, step_metric))

        def log(self, values: dict[str, float]) -> None:
            calls.append(values)

        def finish(self) -> None:
            calls.append("finish")

    def init(**arguments: Any) -> Run:
        calls.append(arguments)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    for resume_step in (0, 10):
        (run,) = loggers(["wandb"], tmp_path, resume_step)
        run.write(10, {"train/loss": 2.0})
        run.close()
    first, second = calls[:4], calls[4:]
    assert first == second
    assert first[1:] == [("*", "step"), {"step": 10, "train/loss": 2.0}, "finish"]
    assert first[0]["resume"] == "allow"
    assert first[0]["project"] == "varprop"
    assert first[0]["dir"] == str(tmp_path)


def test_the_names_that_are_offered_can_be_made(tmp_path: Path) -> None:
    made = loggers(["console", "jsonl"], tmp_path, n_steps=10)
    for one in made:
        one.write(0, {log.LOSS: 1.0})
        one.close()
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 0, "train/loss": 1.0}\n'
