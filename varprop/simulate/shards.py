"""Rounds of networks on disk: `directory/<point id>/<first>-<stop>.nc`, each with a lock while it is computed.

The lock is one of the operating system on `<first>-<stop>.lock`: it ends with the process that holds it, however that
ends. A round is claimed, then looked for once more, then computed, so that no two processes compute it.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import xarray as xr

from varprop import locks, results
from varprop.errors import DamagedShardWarning, SchemaError
from varprop.locks import writing
from varprop.simulate.plan import Point, Span
from varprop.simulate.sampling import sample

NAME = re.compile(r"(\d{1,16})-(\d{1,16})\.nc")
ATTRIBUTES = (
    *("method", "exactness", "method_error", "method_spread_error", "inputs", "n_sequences", "token_correlation"),
    *("draw_device", "torch_version", "device_name", "seconds", "notes", "contents"),
)
"""What the file of a round says of it beside the attributes of every result; `contents` is the set of variables."""
Directories = Sequence[Path]


def spans(directories: Directories, point: Point) -> dict[Span, Path]:
    """The rounds of a point that have a file; of several, the first that is whole, if one is."""
    found = {}
    for directory in directories:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for entry in os.scandir(directory / point.id):
                if match := NAME.fullmatch(entry.name):
                    span = int(match[1]), int(match[2])
                    if span not in found or not _is_whole(found[span], point, span):
                        found[span] = Path(entry.path)
    return found


def _is_whole(path: Path, point: Point, span: Span) -> bool:
    try:
        read(path, point, span)
    except SchemaError:
        return False
    return True


def read(path: Path, point: Point, span: Span) -> xr.Dataset:
    """The networks of a round; `SchemaError` unless the file is whole and of this point and round."""
    dataset = results.load(path, stamped=True)
    first, stop = span
    labels = dataset.network.values.tolist() if "network" in dataset.coords else []
    if dataset.attrs.get("task_id") != point.id or labels != list(range(first, stop)):
        raise SchemaError(f"file={str(path)!r} is of another point or round; expected {point.id} {first}-{stop}")
    absent = next((name for name in ATTRIBUTES if name not in dataset.attrs), None)
    if absent is not None or not isinstance(dataset.attrs["seconds"], float):
        raise SchemaError(f"file={str(path)!r} has no {absent or 'number of seconds'}; expected a file as it was saved")
    layers = dataset.layer.values.tolist() if "layer" in dataset.coords else []
    if layers != list(range(point.spec.n_layers + 1)) or dataset.attrs["contents"] != _contents(dataset):
        raise SchemaError(f"file={str(path)!r} lacks layers or variables; expected a file as it was saved")
    return dataset


def _contents(dataset: xr.Dataset) -> str:
    return json.dumps({str(name): values.dims for name, values in sorted(dataset.data_vars.items())})


def read_or_discard(path: Path, point: Point, span: Span) -> xr.Dataset | None:
    """As `read`, but a damaged file is removed, with a warning, and None."""
    try:
        return read(path, point, span)
    except SchemaError:
        with claim(path) as mine:
            if not mine:  # another process has seen it too and computes it
                return None
            try:
                return read(path, point, span)
            except SchemaError as error:
                reason = str(error).partition("; expected")[0]
                with writing(path):
                    path.unlink(missing_ok=True)
    warnings.warn(f"{reason}; this round is computed again", DamagedShardWarning, stacklevel=2)
    return None


def compute(directory: Path, point: Point, span: Span, device: str) -> bool:
    """Sample a round and save it, unless another process has it or is at it; whether it was done here."""
    first, stop = span
    path = directory / point.id / f"{first}-{stop}.nc"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with claim(path) as mine:
        if not mine or path.exists():
            return False
        for abandoned in path.parent.glob(f".{path.name}.*.part"):  # by a process that was killed as it wrote
            abandoned.unlink()
        began = time.monotonic()
        draws_there = point.arguments["draw_device"] == torch.device(device).type
        placed: dict[str, Any] = {"device": device, "draw_device": device if draws_there else "cpu"}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            dataset = sample(
                point.spec, **(point.arguments | placed), n_networks=stop - first, first_network=first, progress=False
            )
        dataset.attrs |= {
            "device": point.arguments["device"],
            "draw_device": point.arguments["draw_device"],
            "device_name": device_name(device),
            "process": f"{platform.node()}:{os.getpid()}",
            "task_id": point.id,
            "contents": _contents(dataset),
            "seconds": time.monotonic() - began,
            "notes": json.dumps([f"{warning.category.__name__}: {warning.message}" for warning in caught]),
        }
        results.save(dataset, path)
        path.with_suffix(".lock").unlink(missing_ok=True)  # whoever locks the file removed finds the round finished
    return True


def device_name(device: str) -> str:
    """Model of an accelerator, or the processor's architecture."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(torch.device(device))
    return platform.machine()


def claim(path: Path) -> contextlib.AbstractContextManager[bool]:
    """Whether this process has the lock of a round; never waits."""
    return locks.claim(path.with_suffix(".lock"))


def n_claimed(directory: Path, point: Point) -> int:
    """How many rounds of the point processes compute now, on machines that share the locks of this one."""
    return sum(map(locks.is_claimed, (directory / point.id).glob("*.lock")))
