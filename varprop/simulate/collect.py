"""What is in the directories of a grid: assembled as one Dataset, or counted."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from varprop import results
from varprop.errors import ArgumentError, ReducedBatchWarning, SchemaError
from varprop.measure.jacobian import DEFINITIONS
from varprop.points import stacked
from varprop.simulate import shards
from varprop.simulate.drain import Needs
from varprop.simulate.plan import Plan, Point, Span, first_gap, n_missing
from varprop.spec.axes import axes_json, dimensions

CLAIMS = ("method_error", "method_spread_error")
OF_POINTS = ("spec", "spec_id", "n_tokens", "token_correlation", "inputs", "n_sequences")
"""Attributes of a point that its task decides; beside them it has those of `SHARED`."""
SHARED = ("method", "exactness", *CLAIMS, "inputs", "n_sequences", "token_correlation", "draw_device", "n_probes")
"""Attributes that a grid has where its points agree, else empty."""
MADE_WITH = ("varprop_version", "torch_version", "device_name")


@dataclass(frozen=True)
class Status:
    """How far a grid is.

    running: points that processes are at. seconds_left: at the mean speed so far, of the `processes` now at work, which
    are as many as rounds are being computed (at least one).
    """

    n_points: int
    finished: int
    running: int
    processes: int
    networks: int
    networks_missing: int
    rounds: int
    damaged: tuple[str, ...]
    reduced: int
    seconds_left: float

    def __str__(self) -> str:
        waiting = self.n_points - self.finished - self.running
        more = "at least " if self.networks_missing else ""
        lines = [
            f"points    {self.finished} finished, {self.running} running, {waiting} waiting, of {self.n_points}",
            f"networks  {self.networks} in {self.rounds} rounds, {more}{self.networks_missing} missing",
            f"damaged   {len(self.damaged)} rounds{', to be computed again' if self.damaged else ''}",
        ]
        if self.reduced:
            lines.append(
                f"memory    short in {self.reduced} rounds, computed in smaller batches; the numbers are the same"
            )
        if self.networks_missing and self.rounds:
            workers = f"{self.processes} processes" if self.processes > 1 else "one process"
            lines.append(f"left      about {_duration(self.seconds_left)} with {workers} at this speed")
        return "\n".join([*lines, *(f"          {path}" for path in self.damaged)])


def _duration(seconds: float) -> str:
    units = (("days", 86400), ("hours", 3600), ("minutes", 60))
    return next((f"{seconds / size:.1f} {name}" for name, size in units if seconds >= size), f"{seconds:.0f} seconds")


def status(plan: Plan, directory: str | Path) -> Status:
    """How far the grid in `directory` is; reads and verifies every round, changes nothing."""
    folder = Path(directory)
    counts = {
        "finished": 0,
        "running": 0,
        "processes": 0,
        "networks": 0,
        "networks_missing": 0,
        "rounds": 0,
        "reduced": 0,
    }
    damaged, seconds = [], 0.0
    needs = Needs(plan, [folder], shards.read)
    for point in plan.distinct:
        good: dict[Span, Path] = {}
        for span, path in shards.spans([folder], point).items():
            try:
                attributes = shards.read(path, point, span).attrs
            except SchemaError:
                damaged.append(str(path))
                continue
            good[span] = path
            seconds += attributes["seconds"]
            counts["networks"] += span[1] - span[0]
            counts["reduced"] += ReducedBatchWarning.__name__ in attributes["notes"]
        wanted, finished = needs.of(point, good)
        counts["rounds"] += len(good)
        counts["finished"] += finished
        processes = 0 if finished else shards.n_claimed(folder, point)
        counts["processes"] += processes
        counts["running"] += processes > 0
        counts["networks_missing"] += n_missing(good, wanted)
    left = counts["networks_missing"] * seconds / max(1, counts["networks"]) / max(1, counts["processes"])
    return Status(n_points=len(plan.distinct), damaged=tuple(damaged), seconds_left=left, **counts)


def assemble(plan: Plan, directories: Sequence[str | Path], *, partial: bool = False) -> xr.Dataset:
    """One Dataset from the rounds in any number of directories, such as those of several machines.

    Raises `ArgumentError` if networks are missing, unless `partial`, and `SchemaError` for a damaged round, naming it.
    """
    folders = [Path(directory) for directory in directories]
    read = functools.cache(shards.read)
    needs = Needs(plan, folders, read)
    extent: dict[str, int] = {}
    points, errors, missing = {}, {}, []
    for point in plan.distinct:
        found = shards.spans(folders, point)
        wanted, finished = needs.of(point, found)
        missing += [] if finished else [point.id]
        extent[point.id] = wanted if finished else min(wanted, first_gap(list(found)))
        if extent[point.id]:
            points[point.id] = _networks(point, found, extent[point.id], read)
        errors[point.id] = needs.error(point, found, extent[point.id])
        read.cache_clear()
    if missing and not partial:
        message = f"{len(missing)} of {len(plan.distinct)} points are missing or unfinished, the first {missing[0]}"
        raise ArgumentError(f"directory={', '.join(map(str, folders))}: {message}; expected a finished grid")
    if not points:
        raise ArgumentError(f"directory={', '.join(map(str, folders))} holds nothing of this grid; expected its rounds")
    return _dataset(plan, points, extent, errors, _end_condition(plan, errors, bool(missing)))


def _end_condition(plan: Plan, errors: dict[str, float], unfinished: bool) -> str:
    if plan.stop is None or unfinished:
        return "budget" if unfinished else "complete"
    short = any(not error <= plan.stop.stderr for error in errors.values())
    at_budget = plan.most_networks < plan.n_networks
    return ("budget" if at_budget else "n_networks") if short else "complete"


def _networks(point: Point, found: dict[Span, Path], n_networks: int, read: Callable[..., xr.Dataset]) -> xr.Dataset:
    """The first networks of a point, from its rounds, which may overlap; `reduced` and `made_with` as attributes."""
    pieces, at = [], 0
    for (first, stop), path in sorted(found.items(), key=lambda item: (item[0][0], -item[0][1])):
        if at < n_networks and at < stop:
            whole = read(path, point, (first, stop))
            pieces.append(whole.isel(network=slice(at - first, min(stop, n_networks) - first)))
            at = stop
    joined = results.merge(pieces, "network") if len(pieces) > 1 else pieces[0]
    made = {json.dumps({name: piece.attrs[name] for name in MADE_WITH}) for piece in pieces}
    reduced = sum(ReducedBatchWarning.__name__ in piece.attrs["notes"] for piece in pieces)
    return joined.assign_attrs(made_with=json.dumps(sorted(made)), reduced=reduced)


def _dataset(
    plan: Plan, points: dict[str, xr.Dataset], extent: dict[str, int], errors: dict[str, float], end_condition: str
) -> xr.Dataset:
    labels = dimensions(plan.axes)
    shape = tuple(map(len, labels.values()))
    ids = [point.id for point in plan.points]
    depths = [point.spec.n_layers for point in plan.points]
    within = {"network": range(max(extent.values())), "layer": range(max(depths) + 1)}
    variables = stacked([points.get(i) for i in ids], labels, within)
    variables["n_networks"] = (tuple(labels), np.array([extent[i] for i in ids]).reshape(shape))
    if len(set(depths)) > 1:
        variables["last_layer"] = (tuple(labels), np.array(depths).reshape(shape))
    if plan.stop is not None:
        variables["stop_error"] = (tuple(labels), np.array([errors[i] for i in ids]).reshape(shape))
    first = next(iter(points.values())).attrs
    for name in CLAIMS if first["method"] == "gram" else ():
        claims = [points[i].attrs[name] if i in points else np.nan for i in ids]
        variables[name] = (tuple(labels), np.array(claims).reshape(shape))
    own = [_attributes(point, points.get(point.id)) for point in plan.points]
    variables[results.POINT] = (tuple(labels), results.point_variable(own).reshape(shape))
    same = {k: v for k, v in first.items() if all(point.attrs[k] == v for point in points.values())}
    dataset = results.new(
        variables,
        source="simulation",
        spec_json=plan.spec.to_json(),
        spec_id=plan.spec.spec_id,
        n_tokens=same.get("n_tokens", 0),
        coords=labels | {"definition": list(DEFINITIONS)},
        seed_entropy=first["seed_entropy"],
        dtype=first["dtype"],
        device=plan.device,
        end_condition=end_condition,
        attributes={
            "axes": axes_json(plan.axes),
            **{name: same.get(name, "") for name in SHARED if name in first},
            "seed": str(plan.seed),
            "n_networks": plan.n_networks,
            "stop": "" if plan.stop is None else json.dumps(vars(plan.stop)),
            "made_with": _made_with(points),
        },
    )
    if "n_tokens" not in same:
        dataset.attrs["n_tokens"] = ""
    reduced = sum(point.attrs["reduced"] for point in points.values())
    if reduced:
        message = f"memory was short in {reduced} rounds: computed in smaller batches; the numbers are the same"
        warnings.warn(message, ReducedBatchWarning, stacklevel=2)
    return dataset


def _attributes(point: Point, dataset: xr.Dataset | None) -> dict[str, Any]:
    """Attributes of a point as `sample` gives them; of one without networks what is known."""
    known = json.loads(point.task) | {"spec": point.spec.to_json(), "spec_id": point.spec.spec_id}
    of_networks = {} if dataset is None else {k: dataset.attrs[k] for k in SHARED if k in dataset.attrs}
    return {name: known[name] for name in OF_POINTS} | of_networks


def _made_with(points: dict[str, xr.Dataset]) -> str:
    """Versions and device as JSON; where points differ, a list with the points of each."""
    groups: dict[str, list[str]] = {}
    for point_id, dataset in points.items():
        for text in json.loads(dataset.attrs["made_with"]):
            groups.setdefault(text, []).append(point_id)
    if len(groups) == 1:
        return next(iter(groups))
    return json.dumps([{**json.loads(text), "points": ids} for text, ids in sorted(groups.items())])
