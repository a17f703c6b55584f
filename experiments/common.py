"""What the experiments share: their command line, and tasks run side by side."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import joblib

T = TypeVar("T")
Task = TypeVar("Task")


def options(
    description: str | None,
    arguments: Sequence[str] | None,
    device: str = "cpu",
    extend: Callable[[argparse.ArgumentParser], None] | None = None,
) -> argparse.Namespace:
    """`--smoke --device --n-workers --runs --out`, with both folders made; `extend` adds an experiment's own."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="seconds on a CPU")
    parser.add_argument("--device", default=device, help="torch device (default %(default)s)")
    parser.add_argument("--n-workers", type=int, default=1, help="tasks at a time")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the single tasks, kept for a resume")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    if extend is not None:
        extend(parser)
    parsed = parser.parse_args(arguments)
    for folder in (parsed.runs, parsed.out):
        folder.mkdir(parents=True, exist_ok=True)
    return parsed


def run_all(function: Callable[[Task], T], tasks: Sequence[Task], n_workers: int) -> list[T]:
    """`function` of every task, `n_workers` at a time, in the order of the tasks."""
    done = joblib.Parallel(n_jobs=n_workers)(joblib.delayed(function)(task) for task in tasks)
    return list(done)  # type: ignore[arg-type]
