"""`grid`: `sample` at every combination of some fields; finished networks are kept, any number of processes help."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import joblib
import torch
import xarray as xr
from joblib.externals.loky.process_executor import TerminatedWorkerError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from varprop.errors import ArgumentError, SchemaError, require
from varprop.simulate import shards
from varprop.simulate.collect import assemble
from varprop.simulate.drain import drain
from varprop.simulate.inputs import positive_integer
from varprop.simulate.plan import Plan, Point, make_plan
from varprop.simulate.sampling import check_device
from varprop.simulate.stop import StopRule
from varprop.spec import ModelSpec
from varprop.spec.axes import Axes


def grid(
    spec: ModelSpec,
    axes: Axes,
    *,
    directory: str | Path,
    n_networks: int,
    n_tokens: int | None = None,
    token_correlation: Any = 0.0,
    inputs: Any = None,
    text: int | None = None,
    corpus: str = "embedded",
    seed: int = 0,
    method: str = "explicit",
    backward: bool = False,
    n_probes: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    draw_device: str | None = None,
    stop: StopRule | None = None,
    round_networks: int | None = None,
    n_workers: int = 1,
    devices: Sequence[str] | None = None,
    progress: bool = True,
) -> xr.Dataset:
    """`sample` at every combination of `axes`, as one Dataset with the axes as its first dimensions.

    axes: distinct values by field name. Names are those that `ModelSpec.with_fields` takes, `n_tokens`, and
    `token_correlation` (as dimension `input_token_correlation`); or a name of your own with named sets of changes,
    `model={"dense": {}, "moe": {"feed_forward": None, "n_experts": 8, "top_k": 2}}`. Values that are not all numbers or
    all text are labelled by their JSON. n_networks: at every point; with `stop` at most. text: read that many
    windows of `n_tokens` tokens of `corpus`, as of `text_tokens` with this seed. Other arguments: as of `sample`.

    Variables: those of `sample`, NaN at networks and layers that a point does not have (`results.present` drops them);
    `n_networks` over the axes; `last_layer` where depths differ; `stop_error`, what the rule measured at the end; with
    method="gram" its claims `method_error` and `method_spread_error`.
    A point is bitwise the same in any grid, on any number of workers of one kind of device, and from `sample` alone.
    end_condition: `complete`; with `stop` also `n_networks` (a point ended there before its target) or `budget`.

    directory: networks are drawn in rounds of `round_networks` (by default 8 blocks of `sample`, 1 on an accelerator)
    and each round is a file there. Finished rounds are reused, also by grids with more points or networks; damaged ones
    are computed again, with a `DamagedShardWarning`. Any number of processes, on any machines that share the directory
    and its file locks, may run the same grid at once: each round is computed by one of them, and a kill loses at most
    the round of each process killed.
    n_workers: processes here, through joblib, so that they are tasks of a Dask cluster in

        with dask.distributed.Client(address), joblib.parallel_config(backend="dask"):
            grid(..., directory="/a folder that all nodes share", n_workers=64)

    devices: process i computes on devices[i mod their number]; by default all of those of the kind
    `device`. Raises `ArgumentError` or `SpecError` before anything runs.
    """
    plan = make_plan(
        spec,
        axes,
        n_networks=n_networks,
        n_tokens=n_tokens,
        token_correlation=token_correlation,
        inputs=inputs,
        text=text,
        corpus=corpus,
        seed=seed,
        method=method,
        backward=backward,
        n_probes=n_probes,
        dtype=dtype,
        device=device,
        draw_device=draw_device,
        stop=stop,
        round_networks=round_networks,
    )
    return run_plan(plan, directory, n_workers=n_workers, devices=devices, progress=progress)


def run_plan(
    plan: Plan,
    directory: str | Path,
    *,
    n_workers: int = 1,
    devices: Sequence[str] | None = None,
    progress: bool = True,
) -> xr.Dataset:
    """The grid of a plan, as `grid` gives it: computes what is missing, waits for what other processes are at."""
    folder, began = Path(directory), time.monotonic()
    partial = plan.stop is not None and plan.stop.max_seconds is not None
    while True:
        with _bar(plan, folder, progress):
            _compute(plan, folder, plan.distinct, n_workers, devices, wait=True, began=began)
        try:
            return assemble(plan, [folder], partial=partial)
        except SchemaError:
            if not _discard_damaged(folder, plan.distinct):
                raise


def help_with(
    plan: Plan,
    directory: str | Path,
    shard: tuple[int, int] = (0, 1),
    *,
    only_own: bool = False,
    n_workers: int = 1,
    devices: Sequence[str] | None = None,
    progress: bool = True,
) -> int:
    """Compute missing rounds until other processes are at all that is left; return the number computed here.

    shard: (i, n) begins with the points i, i + n, ... only_own: leaves the others to machines with other directories,
    to be joined by `assemble`. Raises `ArgumentError` unless 0 <= i < n.
    """
    index, count = shard
    require(0 <= index < count, ArgumentError, "shard", f"{index}/{count}", "outside the domain", "0/n to n-1/n")
    folder, own = Path(directory), plan.distinct[index::count]
    others = () if only_own else tuple(point for i, point in enumerate(plan.distinct) if i % count != index)
    _discard_damaged(folder, own)
    with _bar(plan, folder, progress):
        return _compute(plan, folder, (*own, *others), n_workers, devices, wait=False, began=time.monotonic())


def _compute(
    plan: Plan,
    folder: Path,
    points: Sequence[Point],
    n_workers: int,
    devices: Sequence[str] | None,
    *,
    wait: bool,
    began: float,
) -> int:
    """Rounds computed by `n_workers` processes and, for what they leave, here."""
    n_workers = positive_integer("n_workers", n_workers)
    places = list(devices) if devices else _all_devices(plan.device)
    for place in places:
        kind = check_device(place, "devices").partition(":")[0]
        require(kind == plan.device, ArgumentError, "devices", place, "of another kind", f"devices of {plan.device}")
    limit = plan.stop.max_seconds if plan.stop else None

    def left() -> float | None:
        return None if limit is None else limit - (time.monotonic() - began)

    computed = 0
    if n_workers > 1:
        jobs = [
            joblib.delayed(drain)(
                plan,
                folder,
                places[worker % len(places)],
                points=_rotated(points, worker, n_workers),
                wait=False,
                seconds=left(),
            )
            for worker in range(n_workers)
        ]
        try:
            parallel: Any = joblib.Parallel(n_jobs=n_workers, pre_dispatch="all")
            computed += sum(parallel(jobs))
        except TerminatedWorkerError:
            raise MemoryError("a worker process was killed; finished rounds are kept") from None
    return computed + drain(plan, folder, places[0], points=points, wait=wait, seconds=left())


def _rotated(points: Sequence[Point], worker: int, n_workers: int) -> list[Point]:
    """All points, beginning at a place of the worker's own, so that workers seldom meet."""
    start = worker * len(points) // n_workers
    return [*points[start:], *points[:start]]


def _all_devices(kind: str) -> list[str]:
    """Every device of a kind."""
    return [f"cuda:{i}" for i in range(torch.cuda.device_count())] if kind == "cuda" else [kind]


def _discard_damaged(folder: Path, points: Sequence[Point]) -> int:
    """Remove every damaged round, with a `DamagedShardWarning` each; return how many were found."""
    found = ((span, path, point) for point in points for span, path in shards.spans([folder], point).items())
    return sum(shards.read_or_discard(path, point, span) is None for span, path, point in found)


@contextlib.contextmanager
def _bar(plan: Plan, folder: Path, progress: bool) -> Iterator[None]:
    """A bar on standard error of the networks in the folder, whoever computed them; none without a terminal."""
    if not (progress and sys.stderr.isatty()):
        yield
        return
    columns = TextColumn("sampling, networks"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    total = plan.most_networks * len(plan.distinct) if plan.stop is None else None
    ended = threading.Event()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("networks", total=total)

        def follow() -> None:
            pause = 0.5
            while not ended.wait(pause):
                began = time.monotonic()
                spans = (span for point in plan.distinct for span in shards.spans([folder], point))
                bar.update(task, completed=sum(stop - first for first, stop in spans))
                pause = max(0.5, 20 * (time.monotonic() - began))

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
