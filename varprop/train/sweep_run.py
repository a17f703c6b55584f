"""Training the runs of a sweep: one process per device, everything known of a run in its directory.

`DIRECTORY/<id>/` is the run directory of `fit` and holds beside its files `task.json` (what is run), `task.lock` (held
by the process that trains it), `result.nc` (the end), `failed.txt` (the line of a failure) and `log.txt` (what the
process printed). No file says that a run is under way: its lock does, which ends with the process.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from varprop import results
from varprop.errors import ArgumentError, SchemaError, Stopped, VarpropError, require
from varprop.files import write_text
from varprop.locks import claim, is_claimed, writing
from varprop.spec import ModelSpec
from varprop.train.config import TrainConfig
from varprop.train.log import check_names
from varprop.train.loop import fit
from varprop.train.signals import stop_on_signals
from varprop.train.sweep_file import Sweep, SweepRun

State = Literal["finished", "running", "failed", "stopped", "waiting"]
RESULT, FAILED, LOCK, TASK, LOG = "result.nc", "failed.txt", "task.lock", "task.json", "log.txt"
PAUSE = 0.1
"""Seconds between two looks at the processes."""
STOPPED = 3
"""Exit code of a process that a signal ended and whose state is saved."""


def state(run_dir: Path) -> State:
    """What the run in a directory is: `stopped` means killed or asked to end, to be resumed from its checkpoint."""
    if (run_dir / RESULT).exists():
        return "finished"
    if is_claimed(run_dir / LOCK):
        return "running"
    if (run_dir / FAILED).exists():
        return "failed"
    return "stopped" if (run_dir / "run.json").exists() else "waiting"


def failure(run_dir: Path) -> str:
    """The line of a failed run, empty for another."""
    with contextlib.suppress(OSError):
        return (run_dir / FAILED).read_text(encoding="utf-8", errors="replace").strip()
    return ""


def _keep_failure(run_dir: Path, line: str) -> None:
    with contextlib.suppress(ArgumentError):  # a full disk: the line is in the log, if anywhere
        write_text(run_dir / FAILED, line + "\n")


def write_task(sweep: Sweep, run: SweepRun, directory: Path, logs: Sequence[str] = ()) -> Path:
    """Make the directory of a run, from which `work` trains it; return it. logs: beside `log.jsonl`."""
    folder = directory / run.id
    task = {
        "spec": run.spec.to_dict(),
        "config": json.loads(run.config.to_json()),
        "corpus_dir": sweep.corpus_dir,
        "logs": ["jsonl", *logs],
    }
    text = json.dumps(task, indent=1, sort_keys=True) + "\n"
    with writing(folder / TASK):
        folder.mkdir(parents=True, exist_ok=True)
        known = (folder / TASK).read_text(encoding="utf-8") if (folder / TASK).exists() else None
    if known != text:
        write_text(folder / TASK, text)
    return folder


def work(run_dir: str | Path) -> None:
    """Train or resume the run of a directory made by `write_task`, unless it is finished or another process is at it.

    Every process of torchrun calls this; the first one claims, logs and saves. Raises what `fit` raises, after the
    line of a failure has been kept.
    """
    folder, first = Path(run_dir), os.environ.get("RANK", "0") == "0"
    spec, config, options = _read_task(folder)
    with claim(folder / LOCK) if first else contextlib.nullcontext(True) as mine:
        alone = os.environ.get("WORLD_SIZE", "1") == "1"  # else the other processes would wait for this one
        require(mine or alone, ArgumentError, "directory", str(folder), "in use by another process", "a free one")
        if not mine or (folder / RESULT).exists():
            return
        if first:
            (folder / FAILED).unlink(missing_ok=True)
        try:
            dataset = fit(spec, config, run_dir=folder, progress=False, **options)
            if first:
                results.save(dataset, folder / RESULT)
        except Exception as error:
            if first and not isinstance(error, Stopped):
                _keep_failure(folder, _line(error))
            raise


def _read_task(folder: Path) -> tuple[ModelSpec, TrainConfig, dict[str, Any]]:
    try:
        task = json.loads((folder / TASK).read_text(encoding="utf-8"))
        config = TrainConfig.from_json(json.dumps(task["config"]))
        return ModelSpec.from_dict(task["spec"]), config, {name: task[name] for name in ("corpus_dir", "logs")}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise ArgumentError(f"directory={str(folder)!r} has no task.json of a run; expected one of a sweep") from None


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, VarpropError) else f"{type(error).__name__}: {text}"


def run_sweep(
    sweep: Sweep,
    directory: str | Path,
    *,
    n_workers: int | None = None,
    retry: bool = False,
    logs: Sequence[str] = (),
    report: Callable[[str], None] = print,
) -> int:
    """Train what is not finished, each run in a process of its own; return the exit code of the command.

    n_workers: processes at a time; by default one for each CUDA device, or one without. Process i has the device i
    (mod their number) alone. Runs that processes of other commands are at are left to them; a killed run is resumed; a
    failed one is left as it is unless `retry`. logs: beside `log.jsonl`, of `log.NAMES`. report: takes a line for each
    beginning and end.

    On SIGTERM, SIGINT or SIGUSR1 the runs save their state and end; if this process is killed they go on. 0: nothing is
    left to do here. 1: a run failed. 3: a signal came.
    """
    folder, places = Path(directory), _places()
    count = len(places) if n_workers is None else n_workers
    whole = isinstance(count, int) and count >= 1
    require(whole, ArgumentError, "n_workers", count, "outside the domain", "an integer >= 1")
    check_names(["jsonl", *logs], folder)
    folders = {run.id: write_task(sweep, run, folder, logs) for run in sweep.distinct}
    labels = {run.id: about(values) for run, values in reversed(list(zip(sweep.runs, sweep.values(), strict=True)))}
    for run_dir in folders.values():
        _discard_damaged(run_dir, report)
    left = list(folders)
    todo = ("waiting", "stopped", *(("failed",) if retry else ()))
    with _Workers(places, count, report) as workers, stop_on_signals() as stop_requested:
        while True:
            workers.note_ends()
            if stop_requested():
                workers.stop()
            for slot in () if stop_requested() else workers.free():
                left = [id for id in left if state(folders[id]) in (*todo, "running")]
                id = next((id for id in left if state(folders[id]) in todo), None)
                if id is not None:
                    left.remove(id)
                    report(f"{id} begins: {labels[id]}")
                    workers.start(slot, folders[id])
            if not workers.busy():
                break
            time.sleep(PAUSE)
    states = [state(run_dir) for run_dir in folders.values()]
    report(", ".join(f"{states.count(name)} {name}" for name in dict.fromkeys(states)) + f" of {len(states)}")
    if stop_requested():
        return STOPPED
    return 0 if set(states) <= {"finished", "running"} else 1


def about(values: dict[str, Any]) -> str:
    """Labels of a run in a line.

    >>> about({"density": 0.5, "seed": 0})
    'density=0.5 seed=0'
    """
    return " ".join(f"{name}={value}" for name, value in values.items())


def _places() -> list[str | None]:
    """What CUDA_VISIBLE_DEVICES names, or the numbers of all devices; one place without a name where there is none."""
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return [*(named or map(str, range(torch.cuda.device_count())))] or [None]


class _Workers:
    """Up to `count` processes that train a run each. Those that are left at the end are asked to stop."""

    def __init__(self, places: Sequence[str | None], count: int, report: Callable[[str], None]) -> None:
        self._places, self._count, self._report = places, count, report
        self._children: dict[int, tuple[Path, subprocess.Popen[bytes]]] = {}
        self._stopping = False

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def busy(self) -> bool:
        return bool(self._children)

    def free(self) -> list[int]:
        return [slot for slot in range(self._count) if slot not in self._children]

    def start(self, slot: int, run_dir: Path) -> None:
        environment, place = dict(os.environ), self._places[slot % len(self._places)]
        if place is not None:
            environment["CUDA_VISIBLE_DEVICES"] = place
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self._count)))
        command = [sys.executable, "-m", "varprop", "sweep", "work", str(run_dir)]
        with writing(run_dir / LOG), (run_dir / LOG).open("ab") as log:
            # A session of its own: Ctrl-C reaches this process, which asks the runs to save their state.
            child = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        self._children[slot] = run_dir, child

    def note_ends(self) -> None:
        for slot, (run_dir, child) in list(self._children.items()):
            if child.poll() is not None:
                del self._children[slot]
                self._report(f"{run_dir.name} {_end(run_dir, child.returncode)}")

    def stop(self) -> None:
        if not self._stopping:
            self._stopping = True
            for _, child in self._children.values():
                child.terminate()


def _end(run_dir: Path, code: int) -> str:
    """What became of a run; the line of a failure that its process could not keep is kept here."""
    if code > 0 and code != STOPPED and state(run_dir) in ("waiting", "stopped"):
        _keep_failure(run_dir, f"the process ended with exit code {code}; its last lines are in {LOG}")
    found = state(run_dir)
    if found == "failed":
        return f"failed: {failure(run_dir)}"
    return f"was killed by signal {-code}; it goes on at the next call" if code < 0 else found


def _discard_damaged(run_dir: Path, report: Callable[[str], None]) -> None:
    """Remove a result that cannot be read; the run makes it again from its checkpoint."""
    if (run_dir / RESULT).exists():
        try:
            results.load(run_dir / RESULT, stamped=True)
        except SchemaError as error:
            report(f"{run_dir.name} is made again: {str(error).partition('; expected')[0]}")
            (run_dir / RESULT).unlink(missing_ok=True)
