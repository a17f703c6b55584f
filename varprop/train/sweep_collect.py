"""What is in the directory of a sweep: counted as rows, or collected as one Dataset."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from varprop import results
from varprop.errors import ArgumentError
from varprop.points import stacked
from varprop.spec.axes import axes_json, dimensions
from varprop.train import log
from varprop.train.budget import n_steps
from varprop.train.sweep_file import Sweep, SweepRun
from varprop.train.sweep_run import RESULT, State, failure, state


@dataclass(frozen=True)
class Row:
    """How far a run is, as its log tells: None where it does not. loss: of training, in nats per token."""

    id: str
    values: dict[str, Any]
    state: State
    step: int
    n_steps: int
    loss: float | None
    tokens_per_s: float | None
    seconds_left: float | None
    error: str


def status(sweep: Sweep, directory: str | Path) -> list[Row]:
    """A row for every run of a sweep; changes nothing in the directory."""
    pairs = zip(sweep.runs, sweep.values(), strict=True)
    return [_row(run, values, Path(directory) / run.id) for run, values in pairs]


def _row(run: SweepRun, values: dict[str, Any], run_dir: Path) -> Row:
    found, last = state(run_dir), n_steps(run.config, run.spec)
    records = log.read_jsonl(run_dir / "log.jsonl")
    step = last if found == "finished" else records[-1]["step"] if records else 0
    latest = {name: value for record in records for name, value in record.items()}
    speed = latest.get(log.SPEED)
    left = (last - step) * run.config.tokens_per_step / speed if speed and found == "running" else None
    return Row(run.id, values, found, step, last, latest.get(log.LOSS), speed, left, failure(run_dir))


def collect(sweep: Sweep, directory: str | Path, *, partial: bool = False) -> xr.Dataset:
    """The finished runs of a sweep as one Dataset: the axes and `seed` as first dimensions, then those of `fit`.

    Where points differ in depth, `last_layer` over the axes says where they end; where they differ in another dimension
    (`step` with budgets of other lengths, `head`, `expert`), the booleans `has_<dimension>`. Values are NaN beyond, and
    `results.present` drops them. Raises `ArgumentError` if runs are missing, unless `partial` (then `has_seed` says
    which there are), and `SchemaError` for a damaged result, naming it.
    """
    files = [Path(directory) / run.id / RESULT for run in sweep.runs]
    missing = [path.parent.name for path in files if not path.exists()]
    if missing and not partial:
        wrong = f"{len(missing)} of {len(files)} runs are missing or unfinished, the first {missing[0]}"
        raise ArgumentError(f"directory={str(directory)!r}: {wrong}; expected a finished sweep")
    loaded = {path: results.load(path, stamped=True) for path in dict.fromkeys(files) if path.exists()}
    if not loaded:
        raise ArgumentError(f"directory={str(directory)!r} holds no result of this sweep; expected its runs")
    runs = [loaded.get(path) for path in files]
    axes = dimensions(sweep.axes)
    shape, seeds = tuple(map(len, axes.values())), list(sweep.seeds)
    points = [runs[i : i + len(seeds)] for i in range(0, len(runs), len(seeds))]
    labels = _labels(list(loaded.values()))
    shared, varied = _further_coordinates(list(loaded.values()))
    within = [None if run is None else run.isel(seed=0, drop=True).reset_coords(varied) for run in runs]
    variables = stacked(within, axes | {"seed": seeds}, labels)
    for dim in labels:
        present = np.array([np.isin(labels[dim], _own(point, dim)) for point in points])
        known = present[[any(run is not None for run in point) for point in points]]
        if dim != "layer" and not known.all():
            variables[results.HAS + dim] = ((*axes, dim), present.reshape(*shape, len(labels[dim])))
    depths = [run.spec.n_layers for run in sweep.runs[:: len(seeds)]]
    if len(set(depths)) > 1:
        variables["last_layer"] = (tuple(axes), np.array(depths).reshape(shape))
    if missing:
        there = np.array([run is not None for run in runs])
        variables[results.HAS + "seed"] = ((*axes, "seed"), there.reshape(*shape, len(seeds)))
    own = [_of_point([run.attrs for run in point if run is not None]) for point in points]
    variables[results.POINT] = (tuple(axes), results.point_variable(own).reshape(shape))
    dataset = _dataset(sweep, variables, axes | {"seed": seeds} | labels, _agreed(own), bool(missing))
    return dataset.assign_coords(shared)


def _labels(runs: Sequence[xr.Dataset]) -> dict[str, list[Any]]:
    """All labels of every dimension within the runs: numbers in order, texts as they come."""
    labels: dict[str, list[Any]] = {}
    for run in runs:
        for dim in (str(name) for name in run.dims if name != "seed"):
            labels[dim] = list(dict.fromkeys([*labels.get(dim, []), *run[dim].values.tolist()]))
    return {dim: sorted(of) if all(isinstance(x, (int, float)) for x in of) else of for dim, of in labels.items()}


def _further_coordinates(runs: Sequence[xr.Dataset]) -> tuple[dict[str, xr.DataArray], list[str]]:
    """Coordinates beside the labels, such as the length of each evaluation: those all runs share, and the others."""
    names = dict.fromkeys(str(name) for run in runs for name in set(run.coords) - set(run.dims))
    first = {name: next(run[name] for run in runs if name in run) for name in names}
    shared = {name: of for name, of in first.items() if all(name in run and of.equals(run[name]) for run in runs)}
    return shared, [name for name in names if name not in shared]


def _own(point: Sequence[xr.Dataset | None], dim: str) -> list[Any]:
    """Labels of a dimension in the runs of a point, which differ in their seed alone."""
    return next((run[dim].values.tolist() for run in point if run is not None and dim in run.dims), [])


def _of_point(seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Lasting attributes of a point: what its seeds share, and the config without the seed if there are several."""
    agreed = {name: value for name, value in _agreed(seeds).items() if name not in results.VOLATILE_ATTRIBUTES}
    if len(seeds) > 1:
        config = {name: value for name, value in json.loads(seeds[0]["config"]).items() if name != "seed"}
        agreed["config"] = json.dumps(config, sort_keys=True, separators=(",", ":"))
    return agreed


def _agreed(several: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Attributes, empty where some differ; of nothing, none."""
    known = [attributes for attributes in several if attributes]
    names = dict.fromkeys(name for attributes in known for name in attributes)
    return {n: known[0].get(n) if all(a.get(n) == known[0].get(n) for a in known) else "" for n in names}


def _dataset(
    sweep: Sweep, variables: results.Variables, labels: dict[str, list[Any]], same: dict[str, Any], short: bool
) -> xr.Dataset:
    dataset = results.new(
        variables,
        source="training",
        spec_json=sweep.spec.to_json(),
        spec_id=sweep.spec.spec_id,
        n_tokens=same["n_tokens"] or 0,
        coords=labels,
        dtype=same["dtype"],
        device=same["device"],
        end_condition="budget" if short else "complete",
        attributes={
            **{name: value for name, value in same.items() if name not in results.ATTRIBUTES},
            "axes": axes_json(sweep.axes),
        },
    )
    if same["n_tokens"] == "":
        dataset.attrs["n_tokens"] = ""
    return dataset
