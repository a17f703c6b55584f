"""Where a run tells how it goes: lines on the console, JSON lines, TensorBoard, Weights & Biases.

Names of values hold their unit where they have one: `train/loss` (nats per token), `throughput/tokens_per_s`,
`throughput/mfu`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from varprop.errors import ArgumentError, require
from varprop.files import replacing
from varprop.locks import writing

NAMES = ("console", "jsonl", "tensorboard", "wandb")
PACKAGES = {"tensorboard": ("torch.utils.tensorboard", "varprop[tensorboard]"), "wandb": ("wandb", "wandb")}
"""The module that a log needs, and what to install for it."""
LOSS, SPEED, MFU = "train/loss", "throughput/tokens_per_s", "throughput/mfu"


class Log(Protocol):
    """Takes the values of a step: numbers by name."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def loggers(
    names: Sequence[str], run_dir: str | Path | None, resume_step: int = 0, *, n_steps: int | None = None
) -> list[Log]:
    """The logs called `names`, of a run that goes on at `resume_step`: what they have from that step on is dropped.

    run_dir: the folder of the files `log.jsonl`, `tensorboard/` and `wandb/`. n_steps: where the run ends, for the time
    left. In a run of several processes only the first one logs. Raises `ArgumentError` for an unknown name or one given
    twice, a log that needs `run_dir` without it, and one whose package is not installed.
    """
    check_names(names, run_dir)
    folder = Path(run_dir or ".")
    made: list[Log] = []
    for name in names:
        if name == "console":
            made.append(ConsoleLog(n_steps, resume_step))
        elif name == "jsonl":
            made.append(JsonLines(folder / "log.jsonl", resume_step))
        elif name == "tensorboard":
            made.append(TensorBoard(folder / "tensorboard", resume_step))
        else:
            made.append(WandB(folder))
    return made


def check_names(names: Sequence[str], run_dir: str | Path | None) -> None:
    """`ArgumentError` as of `loggers`; nothing is made."""
    for name in names:
        require(name in NAMES, ArgumentError, "log", name, "unknown", "one of " + ", ".join(NAMES))
        require(list(names).count(name) == 1, ArgumentError, "log", name, "given twice", "each log once")
        placed = run_dir is not None or name == "console"
        require(placed, ArgumentError, "log", name, "given without a run directory", "run_dir with it")
        if name in PACKAGES:
            _module(name)


class ConsoleLog:
    """A line per record on stderr, and below them a bar where that is a terminal."""

    def __init__(self, n_steps: int | None = None, resume_step: int = 0, stream: TextIO | None = None) -> None:
        self._n_steps, self._first = n_steps, resume_step
        self._began = time.monotonic()
        self._console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True)
        columns = TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self._bar = Progress(
            *columns, TextColumn("{task.fields[last]}"), console=self._console, disable=not self._console.is_terminal
        )
        self._task = self._bar.add_task("training", total=n_steps, completed=resume_step, last="")
        self._bar.start()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        shown = "  ".join(f"{name} {_short(value)}" for name, value in values.items())
        left = self._time_left(step) if self._bar.disable else ""
        self._console.print(f"step {step:>{len(str(self._n_steps or step))}}  {shown}{left}", markup=False)
        names = [name for name in (LOSS, SPEED, MFU) if name in values]
        last = "  ".join(f"{name.rpartition('/')[2]} {_short(values[name])}" for name in names)
        fields: dict[str, Any] = {"last": last} if last else {}
        self._bar.update(self._task, completed=step, **fields)

    def _time_left(self, step: int) -> str:
        """The bar shows it where there is a terminal."""
        if self._n_steps is None or step <= self._first:
            return ""
        seconds = (time.monotonic() - self._began) * (self._n_steps - step) / (step - self._first)
        return f"  left {duration(seconds)}"

    def close(self) -> None:
        self._bar.stop()


def _short(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> duration(5025.2)
    '1:23:45'
    """
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


class JsonLines:
    """One JSON object a line, `{"step": 10, "train/loss": 3.2}`; a number that is not finite is null.

    A line is written in one piece when its step is recorded; a kill may leave a part of the last one, which goes at the
    next start, with the records from `resume_step` on.
    """

    def __init__(self, path: str | Path, resume_step: int = 0) -> None:
        self._path = Path(path)
        with writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            kept = [record for record in read_jsonl(self._path) if record["step"] < resume_step]
            with replacing(self._path) as temporary:
                temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        with writing(self._path):
            self._file = self._path.open("ab", buffering=0)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        numbers = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with writing(self._path):
            self._file.write((json.dumps({"step": step, **numbers}) + "\n").encode())

    def close(self) -> None:
        self._file.close()


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The whole records of a file of `JsonLines`; none if there is no file."""
    records = []
    with contextlib.suppress(FileNotFoundError):
        for line in Path(path).read_bytes().splitlines(keepends=True):
            with contextlib.suppress(ValueError, RecursionError):
                record = json.loads(line) if line.endswith(b"\n") else None
                if isinstance(record, dict) and isinstance(record.get("step"), int):
                    records.append(record)
    return records


class TensorBoard:
    """Scalars for TensorBoard, which hides what an earlier process wrote from `resume_step` on."""

    def __init__(self, folder: str | Path, resume_step: int = 0) -> None:
        module = _module("tensorboard")
        with writing(Path(folder)):
            self._writer = module.SummaryWriter(str(folder), purge_step=resume_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases in the project `varprop` (or $WANDB_PROJECT), the same one when a run is resumed.

    $WANDB_MODE=offline writes files alone. The x axis is `step`: values recorded twice, before and after a kill, stand
    there twice.
    """

    def __init__(self, run_dir: str | Path) -> None:
        wandb = _module("wandb")
        folder = Path(run_dir).resolve()
        with writing(folder / "wandb"):
            folder.mkdir(parents=True, exist_ok=True)
        identity = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
        project = os.environ.get("WANDB_PROJECT", "varprop")
        self._run = wandb.init(project=project, id=identity, name=folder.name, dir=str(folder), resume="allow")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


def _module(name: str) -> Any:
    """The module that a log needs; `ArgumentError` where it is not installed."""
    module, package = PACKAGES[name]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ArgumentError(
            f"log={name!r} cannot be used ({error}); expected it after: pip install '{package}'"
        ) from None
