"""The one kind of result: a labelled `xarray.Dataset`. Build, validate, save, load, merge.

Dimensions, variables and attributes are listed in `DIMENSIONS`, `VARIABLES` and `ATTRIBUTES`. Layer 0 is the embedding,
where only the site `resid_post` exists: variables are NaN there at the other sites, and nowhere else.
"""

from __future__ import annotations

import datetime
import functools
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from varprop._version import __version__
from varprop.errors import SchemaError
from varprop.files import replacing

SCHEMA_VERSION = 1
SITES = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
"""Reading points of a block. `attn_out` and `mlp_out` are what is added to the stream."""
BRANCHES = ("attn", "mlp")
SOURCES = ("theory", "simulation", "training", "checkpoint", "comparison")
DIMENSIONS = (
    *("network", "seed", "layer", "site", "branch", "source_layer", "target_layer", "step", "head", "expert"),
    *("matrix", "position", "sequence", "quantile", "probe", "definition"),
)
"""Reserved dimension names; grid axes are added under the name of the spec field they vary."""
ATTRIBUTES = (
    *("schema_version", "source", "spec", "spec_id", "seed_entropy", "n_tokens", "dtype", "device"),
    *("varprop_version", "git_commit", "git_dirty", "created_at", "command", "end_condition"),
)
MOMENTS = ("second_moment", "variance", "token_correlation")
"""Variables that every reader gives, floating point over layer and site."""
VOLATILE_ATTRIBUTES = ("created_at", "command", "git_commit", "git_dirty", "end_condition")
"""Attributes that two runs of the same thing may differ in."""

Variables = Mapping[str, tuple[Sequence[str], Any]]


def new(
    variables: Variables,
    *,
    source: str,
    spec_json: str,
    spec_id: str,
    n_tokens: int,
    coords: Mapping[str, Any] | None = None,
    seed_entropy: str = "",
    dtype: str = "float64",
    device: str = "cpu",
    end_condition: str = "complete",
    attributes: Mapping[str, Any] | None = None,
) -> xr.Dataset:
    """A validated result Dataset.

    variables: name -> (dimensions, array). `layer` and `site` get their coordinates by themselves; other dimensions
    get theirs from `coords` or 0..n-1. attributes: further strings and numbers to keep with the result.
    Raises `SchemaError` where the result breaks the schema.
    """
    data = {name: (tuple(dims), np.asarray(values)) for name, (dims, values) in variables.items()}
    sizes = {dim: size for dims, values in data.values() for dim, size in zip(dims, values.shape, strict=True)}
    known: dict[str, Any] = {"site": list(SITES), "branch": list(BRANCHES), **(coords or {})}
    labels = {dim: known[dim] if dim in known else np.arange(size) for dim, size in sizes.items()}
    dataset = xr.Dataset(data, coords=labels)
    commit, dirty = _git_state()
    dataset.attrs = {
        "schema_version": SCHEMA_VERSION,
        "source": source,
        "spec": spec_json,
        "spec_id": spec_id,
        "seed_entropy": str(seed_entropy),
        "n_tokens": int(n_tokens),
        "dtype": dtype,
        "device": device,
        "varprop_version": __version__,
        "git_commit": commit,
        "git_dirty": dirty,
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "end_condition": end_condition,
        **(attributes or {}),
    }
    validate(dataset)
    return dataset


@functools.cache
def _git_state() -> tuple[str, str]:
    """Commit of the checkout this package lies in and "true"/"false" for local changes; empty when installed."""
    folder = Path(__file__).resolve().parent
    try:
        run = functools.partial(subprocess.run, cwd=folder, capture_output=True, text=True, timeout=10, check=True)
        commit = run(["git", "rev-parse", "HEAD"]).stdout.strip()
        dirty = run(["git", "status", "--porcelain", "--untracked-files=no", "--", "."]).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "", ""
    return commit, "true" if dirty else "false"


def validate(dataset: xr.Dataset, where: str = "result") -> None:
    """Raise `SchemaError` unless `dataset` follows the schema; NaN only where a site does not exist."""
    for name in ATTRIBUTES:
        if name not in dataset.attrs:
            raise SchemaError(f"{where}: attribute {name!r} is missing; expected a varprop result")
    if str(dataset.attrs["schema_version"]) != str(SCHEMA_VERSION):
        version = dataset.attrs["schema_version"]
        raise SchemaError(f"{where}: schema_version={version} is unknown; expected {SCHEMA_VERSION}")
    if dataset.attrs["source"] not in SOURCES:
        raise SchemaError(f"{where}: source={dataset.attrs['source']!r} is unknown; expected one of {SOURCES}")
    for name, value in dataset.attrs.items():
        if not isinstance(value, (str, int, float, np.integer, np.floating)) or isinstance(value, bool):
            raise SchemaError(f"{where}: attribute {name}={value!r} is not a string or a number; expected one")
    if "site" in dataset.coords and tuple(dataset.site.values) != SITES:
        raise SchemaError(f"{where}: site={tuple(dataset.site.values)} is wrong; expected {SITES}")
    if "layer" in dataset.dims and len(set(dataset.layer.values.tolist())) < dataset.sizes["layer"]:
        raise SchemaError(f"{where}: layer={dataset.layer.values.tolist()} repeats a layer; expected distinct layers")
    for dim, size in dataset.sizes.items():
        if size == 0:
            raise SchemaError(f"{where}: dimension {dim!r} is empty; expected at least one entry")
    for name in MOMENTS:
        if name in dataset and (dataset[name].dtype.kind != "f" or "layer" not in dataset.coords):
            raise SchemaError(f"{where}: {name} is no floating-point array over layers; expected a varprop result")
    for name, values in dataset.data_vars.items():
        if values.dtype.kind == "f":
            _check_finite(values, f"{where}: {name}")


def _check_finite(values: xr.DataArray, where: str) -> None:
    array = values.to_numpy()
    absent = np.zeros((1,) * array.ndim, dtype=bool)
    if "layer" in values.dims and "site" in values.dims:
        absent = _along(values, "layer", values.layer == 0) & _along(values, "site", values.site != "resid_post")
        if not (np.isnan(array) | ~absent).all():
            raise SchemaError(f"{where} has values at layer 0 outside resid_post; expected NaN there")
    elif "layer" in values.dims:  # of a branch, a Jacobian, attention or gates: layer 0 has none
        absent = _along(values, "layer", values.layer == 0)
    bad = ~np.isfinite(array) & ~absent
    if bad.any():
        index = np.argwhere(bad)[0]
        labels = ", ".join(f"{dim}={values[dim].values[i]}" for dim, i in zip(values.dims, index, strict=True))
        raise SchemaError(f"{where} is {array[tuple(index)]} at {labels}; expected a finite number")


def _along(values: xr.DataArray, dim: str, mask: xr.DataArray) -> np.ndarray:
    """A mask over one dimension in a shape that broadcasts against `values`."""
    return mask.to_numpy().reshape([-1 if name == dim else 1 for name in values.dims])


def save(dataset: xr.Dataset, path: str | Path) -> Path:
    """Validate and write as netCDF-4 under a temporary name, then rename; `ArgumentError` if it cannot be written."""
    validate(dataset)
    with replacing(path) as temporary:
        dataset.to_netcdf(temporary, engine="h5netcdf")
    return Path(path)


def load(path: str | Path) -> xr.Dataset:
    """The result in a file, in memory and validated; `SchemaError` if it is missing, truncated or of another kind."""
    source = Path(path)
    if not source.is_file():
        raise SchemaError(f"file={str(path)!r} is missing; expected a result file (netCDF)")
    try:
        with xr.open_dataset(source, engine="h5netcdf") as opened:
            dataset = opened.load()
    except Exception as error:  # every fault of a damaged HDF5 file has its own exception type
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SchemaError(
            f"file={str(path)!r} is truncated or no netCDF-4 file ({reason}); expected a result file"
        ) from None
    validate(dataset, where=str(path))
    return dataset


def merge(datasets: Sequence[xr.Dataset], dim: str) -> xr.Dataset:
    """Results of one source joined along `dim` in the order given; attributes that differ become empty strings."""
    if not datasets:
        raise SchemaError("datasets=[] is empty; expected at least one result")
    options: dict[str, Any] = {"data_vars": "all", "coords": "minimal", "compat": "override", "join": "exact"}
    try:
        joined = xr.concat(datasets, dim=dim, combine_attrs="drop", **options)
    except ValueError as error:
        raise SchemaError(f"datasets differ ({str(error).splitlines()[0]}); expected equal coordinates") from None
    first = datasets[0].attrs
    joined.attrs = {k: v if all(d.attrs.get(k) == v for d in datasets) else "" for k, v in first.items()}
    joined.attrs["schema_version"] = SCHEMA_VERSION
    validate(joined)
    return joined


def identical(a: xr.Dataset, b: xr.Dataset) -> bool:
    """Whether two results are bitwise equal in variables and coordinates and agree in all lasting attributes."""
    first, second = ({k: v for k, v in d.attrs.items() if k not in VOLATILE_ATTRIBUTES} for d in (a, b))
    return a.equals(b) and first == second
