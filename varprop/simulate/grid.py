"""`grid`: `sample` at every combination of some fields, one file per point: a kill loses one point per worker."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import xarray as xr
from rich.console import Console
from rich.progress import track

from varprop import results
from varprop.errors import ArgumentError, SchemaError
from varprop.simulate.inputs import positive_integer, read_inputs
from varprop.simulate.sampling import check_device, sample
from varprop.spec import ModelSpec
from varprop.spec.axes import combinations, dimensions, plain

RUN_ARGUMENTS = ("n_tokens", "token_correlation")


def grid(
    spec: ModelSpec,
    axes: Mapping[str, Sequence[Any]],
    *,
    directory: str | Path,
    n_networks: int,
    n_tokens: int | None = None,
    token_correlation: float = 0.0,
    seed: int = 0,
    n_workers: int = 1,
    progress: bool = True,
    device: str = "cpu",
) -> xr.Dataset:
    """`sample` at every combination of `axes`, as one Dataset with the axes as its first dimensions.

    axes: names that `ModelSpec.with_fields` takes, or `n_tokens` and `token_correlation` (as dimension
    `input_token_correlation`; they then replace the argument), each with its distinct values; values that are not all
    numbers or all text are labelled by their JSON. directory: each point is saved there as `<id>.nc`, the id being
    the hash of its spec and arguments; valid files are reused, damaged ones redone. n_workers: processes. A point is
    bitwise the same in any grid, on any number of workers, and from `sample` alone. Raises `ArgumentError` or
    `SpecError` before anything runs.
    """
    points = _points(spec, axes, n_tokens, token_correlation)
    n_workers = positive_integer("n_workers", n_workers)
    check_device(device)
    shared = {
        "n_networks": positive_integer("n_networks", n_networks),
        "seed": positive_integer("seed", seed, minimum=0),
        "device": device,
    }
    folder = Path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"directory={str(directory)!r} cannot be made ({error.strerror}); expected a writable directory"
        raise ArgumentError(message) from None
    tasks = [json.dumps({**point, **shared}, sort_keys=True) for point in points]
    missing = [task for task in dict.fromkeys(tasks) if not _is_finished(folder, task)]
    runs = joblib.Parallel(n_jobs=n_workers, return_as="generator_unordered")(
        joblib.delayed(run_point)(folder, task) for task in missing
    )
    bar = Console(stderr=True)
    hidden = not (progress and sys.stderr.isatty())
    for _ in track(runs, "grid points", total=len(missing), console=bar, disable=hidden, transient=True):
        pass
    return _assemble(spec, axes, [results.load(_path(folder, task)) for task in tasks], shared)


def run_point(folder: Path, task: str) -> None:
    """Sample one point, described by its canonical JSON, and save it."""
    arguments = json.loads(task)
    spec = ModelSpec.from_dict(arguments.pop("spec"))
    dataset = sample(spec, **arguments, progress=False)
    dataset.attrs["task_id"] = task_id(task)
    results.save(dataset, _path(folder, task))


def task_id(task: str) -> str:
    """First 16 hexadecimal digits of the SHA-256 of a point's canonical JSON."""
    return hashlib.sha256(task.encode()).hexdigest()[:16]


def _path(folder: Path, task: str) -> Path:
    return folder / f"{task_id(task)}.nc"


def _is_finished(folder: Path, task: str) -> bool:
    try:
        return results.load(_path(folder, task)).attrs.get("task_id") == task_id(task)
    except SchemaError:
        return False


def _points(
    spec: ModelSpec, axes: Mapping[str, Sequence[Any]], n_tokens: int | None, token_correlation: float
) -> list[dict[str, Any]]:
    """Spec and run arguments of every combination, the last axis fastest."""
    points = []
    for fields in combinations(axes):
        arguments = {"n_tokens": n_tokens, "token_correlation": token_correlation}
        arguments |= {name: fields.pop(name) for name in RUN_ARGUMENTS if name in fields}
        changed = spec.with_fields(fields)
        checked = read_inputs(changed, **arguments, inputs=None)
        run = {"n_tokens": checked.n_tokens, "token_correlation": checked.token_correlation}
        points.append({"spec": changed.to_dict(), **run})
    return points


def _assemble(
    spec: ModelSpec, axes: Mapping[str, Sequence[Any]], points: list[xr.Dataset], shared: Mapping[str, Any]
) -> xr.Dataset:
    labels = dimensions(axes)
    dims, shape = tuple(labels), tuple(map(len, labels.values()))
    variables = {}
    for name, first in points[0].data_vars.items():
        stacked = np.stack([point[name].values for point in points])
        variables[str(name)] = ((*dims, *map(str, first.dims)), stacked.reshape(*shape, *first.shape))
    first = points[0].attrs
    same = {name: value for name, value in first.items() if all(point.attrs[name] == value for point in points)}
    dataset = results.new(
        variables,
        source="simulation",
        spec_json=spec.to_json(),
        spec_id=spec.spec_id,
        n_tokens=same.get("n_tokens", 0),
        coords=labels,
        seed_entropy=first["seed_entropy"],
        dtype=first["dtype"],
        device=first["device"],
        attributes={
            "axes": json.dumps({name: [plain(v) for v in values] for name, values in axes.items()}),
            **{name: same.get(name, "") for name in ("method", "inputs", "token_correlation", "torch_version")},
            "seed": str(shared["seed"]),
            "n_networks": shared["n_networks"],
        },
    )
    if "n_tokens" not in same:
        dataset.attrs["n_tokens"] = ""
    return dataset
