"""The one kind of result: a labelled `xarray.Dataset`. Build, validate, save, load, merge.

Dimensions, variables and attributes are listed in `DIMENSIONS`, `VARIABLES` and `ATTRIBUTES`. Layer 0 is the embedding,
where only the site `resid_post` exists: variables are NaN there at the other sites, and those of
pairs of branches or blocks at either layer 0. A standard error of one sequence is NaN wherever it is not exactly 0, and
the scores of `MEASURED` and those of the last layer that speak of later layers are NaN where they were not measured. A
checkpoint whose branches cannot be told apart is NaN at every layer between `resid_pre` and `resid_post`. A variable
over `matrix` or `expert` is NaN at the layers that lack the matrix or the experts, then in every seed and at every
step.

A grid holds points of different extent. Its integer variables `n_networks` and `last_layer`, over the axes, say which
networks (labels below `n_networks`) and layers a point has; where points differ in another dimension, such as `step`,
the boolean variable `has_step`, over the axes and it, says which of its labels a point has. Floating-point variables
are NaN at the others. A variable that a point does not have, such as gates without a mixture, is NaN all over it. NaN
stands nowhere else. Its text
variable `point`, over the axes, holds what each point is: JSON of the attributes that it has as a result of its own.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from varprop._version import __version__
from varprop.errors import SchemaError
from varprop.files import replacing, replacing_folder, require_zarr

SCHEMA_VERSION = 1
SITES = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
"""Reading points of a block. `attn_out` and `mlp_out` are what is added to the stream."""
BRANCHES = ("attn", "mlp")
SOURCES = ("theory", "simulation", "training", "checkpoint", "comparison")
DIMENSIONS = (
    *("network", "seed", "layer", "site", "branch", "source_layer", "target_layer", "step", "head", "expert"),
    *("matrix", "position", "sequence", "quantile", "probe", "definition"),
    *("probe_step", "update_step", "evaluation_step", "evaluation"),
    *("attention_threshold", "query_position", "weight_threshold", "relative_threshold", "mask_density"),
    *("loss_ratio_threshold", "intervention", "n_removed", "removed_by", "removal", "lag", "defect"),
)
"""Reserved dimension names; grid axes are added under the name of the spec field they vary."""
STEPS = ("step", "probe_step", "update_step", "evaluation_step")
"""Dimensions of a training whose labels are updates made: of the training batch, the probe batch and evaluations."""
ATTRIBUTES = (
    *("schema_version", "source", "spec", "spec_id", "seed_entropy", "n_tokens", "dtype", "device"),
    *("varprop_version", "git_commit", "git_dirty", "created_at", "command", "end_condition"),
)
VARIABLES = (
    *("second_moment", "variance", "token_correlation", "fourth_moment", "branch_correlation"),
    *("attention_concentration", "attention_entropy", "gate_second_moment", "expert_load_concentration"),
    *("grad_second_moment", "jacobian_deviation", "jacobian_deviation_stderr"),
    *("n_networks", "last_layer", "point", "stop_error", "method_error", "method_spread_error"),
)
"""Variables of a simulation and of a grid of them."""
MOMENTS = ("second_moment", "variance", "token_correlation")
"""Variables that every reader gives, floating point over layer and site."""
MEASURED = {
    **dict.fromkeys(("permutation_score", "permutation_log_change"), "permutation_measured"),
    "permutation_layer_score": "permutation_layer_pairs",
    "permutation_by_lag": "permutation_lag_pairs",
}
"""Score of a diagnosis -> the variable that is 0 or False where it was not measured."""
EXTENT = {"network": ("n_networks", 0), "layer": ("last_layer", 1)}
"""Dimension -> the variable that says how far it goes at each point of a grid, and the label of its first entry."""
HAS = "has_"
"""Begins the name of a boolean variable over axes and a dimension: which labels of the dimension a point has."""
POINT = "point"
"""The variable that holds the attributes of each point of a grid."""
GRID_ATTRIBUTES = ("axes", "stop")
"""Attributes that a grid has and a point has not."""
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

    variables: name -> (dimensions, array); one with the name of its dimension holds the labels of it. `layer`, `site`
    and `branch` get their labels by themselves; other dimensions get theirs from `coords` or 0..n-1. attributes:
    further strings and numbers to keep with the result.
    Raises `SchemaError` where the result breaks the schema.
    """
    data = {name: (tuple(dims), np.asarray(values)) for name, (dims, values) in variables.items()}
    sizes = {dim: size for dims, values in data.values() for dim, size in zip(dims, values.shape, strict=True)}
    known: dict[str, Any] = {"site": list(SITES), "branch": list(BRANCHES), **(coords or {})}
    labels = {dim: known[dim] if dim in known else np.arange(size) for dim, size in sizes.items() if dim not in data}
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
    """Raise `SchemaError` unless `dataset` follows the schema; NaN only where a site or cell does not exist."""
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
    for name, _ in EXTENT.values():
        if name in dataset and dataset[name].dtype.kind not in "iu":
            raise SchemaError(f"{where}: {name} is no array of integers; expected counts over the axes of a grid")
    for dim in dataset.dims:
        if f"{HAS}{dim}" in dataset and dataset[f"{HAS}{dim}"].dtype.kind != "b":
            raise SchemaError(f"{where}: {HAS}{dim} is no array of booleans; expected which labels a point has")
    for name, values in dataset.data_vars.items():
        if values.dtype.kind == "f":
            _check_finite(dataset, str(name), f"{where}: {name}")


def _check_finite(dataset: xr.Dataset, name: str, where: str) -> None:
    values = dataset[name]
    array = values.to_numpy()
    missing = np.isnan(array)
    absent = np.zeros((1,) * array.ndim, dtype=bool)
    if "layer" in values.dims and "site" in values.dims:
        absent = _along(values, "layer", values.layer == 0) & _along(values, "site", values.site != "resid_post")
        if not (missing | ~absent).all():
            raise SchemaError(f"{where} has values at layer 0 outside resid_post; expected NaN there")
        if dataset.attrs["source"] == "checkpoint":  # whose branches may not be told apart
            own = tuple(values.dims.index(dim) for dim in values.dims if dim != "site")
            between = ~values.site.isin(["resid_pre", "resid_post"])
            absent = absent | (_along(values, "site", between) & missing.all(axis=own, keepdims=True))
    elif "layer" in values.dims:  # of a branch, a Jacobian, attention or gates: layer 0 has none
        absent = _along(values, "layer", values.layer == 0)
    for dim in {"source_layer", "target_layer"} & set(values.dims):  # pairs of branches or blocks: layer 0 is neither
        embedding = _along(values, dim, values[dim] == 0)
        if (missing | ~embedding).all():
            absent = absent | embedding
    if "matrix" in values.dims or "expert" in values.dims:
        own = [dim for dim in values.dims if dim in DIMENSIONS and dim not in ("layer", "matrix")]
        absent = absent | missing.all(axis=tuple(values.dims.index(dim) for dim in own), keepdims=True)
    absent = absent | _not_measured(dataset, name)
    if dataset.attrs["source"] == "comparison" and "verdict" in dataset and dataset.verdict.dims == values.dims:
        absent = absent | (dataset.verdict == "absent").to_numpy()
    for variable, dim, beyond in _beyond(dataset):
        if dim in values.dims:
            beyond = beyond.all([other for other in beyond.dims if other not in values.dims])
            beyond = beyond.broadcast_like(values).transpose(*values.dims).to_numpy()
            if not (missing | ~beyond).all():
                raise SchemaError(f"{where} has values beyond {variable}; expected NaN there")
            absent = absent | beyond
    if "axes" in dataset.attrs and name not in MOMENTS:
        within = tuple(i for i, dim in enumerate(values.dims) if dim in DIMENSIONS)
        absent = absent | missing.all(axis=within, keepdims=True)
    bad = ~np.isfinite(array) & ~absent
    if bad.any():
        index = np.argwhere(bad)[0]
        labels = ", ".join(f"{dim}={values[dim].values[i]}" for dim, i in zip(values.dims, index, strict=True))
        raise SchemaError(f"{where} is {array[tuple(index)]} at {labels}; expected a finite number")


def _not_measured(dataset: xr.Dataset, name: str) -> np.ndarray:
    """Where a score of a diagnosis, or its standard error, has no number; it broadcasts against its values."""
    values = dataset[name]
    score = name.removesuffix("_stderr")
    absent = np.zeros((1,) * values.ndim, dtype=bool)
    if score != name and not (values > 0).any():  # of one sequence no error is known but those that are exactly 0
        return ~absent
    if score.startswith("causal_layer_score") and "layer" in values.dims:  # nothing is behind the last layer
        absent = _along(values, "layer", values.layer == values.layer.max())
    if score in MEASURED and MEASURED[score] in dataset and dataset[MEASURED[score]].dims == values.dims:
        absent = absent | (dataset[MEASURED[score]] == 0).to_numpy()
    return absent


def _beyond(dataset: xr.Dataset) -> Iterator[tuple[str, str, xr.DataArray]]:
    """Variables that say which labels of a dimension a point has, the dimension, and where a point has none."""
    for dim, (extent, first) in EXTENT.items():
        if dim in dataset.dims and extent in dataset:
            yield extent, dim, dataset[dim] >= dataset[extent] + first
    for dim in map(str, dataset.dims):
        if HAS + dim in dataset:
            yield HAS + dim, dim, ~dataset[HAS + dim]


def at_step(dataset: xr.Dataset, step: int | None = None) -> xr.Dataset:
    """The state of a training after `step` updates, None = the last one: the result without its dimensions of steps.

    Variables that were not measured at that step are left out; results without steps are returned as they are. Raises
    `SchemaError` for a step that nothing was measured at.

    >>> variables = {"train_loss": (("step",), [3.0, 2.0, 1.0]), "validation_loss": (("evaluation_step",), [3.0, 1.5])}
    >>> about = {"source": "training", "spec_json": "{}", "spec_id": "0" * 12, "n_tokens": 8}
    >>> run = new(variables, **about, coords={"step": [0, 10, 20], "evaluation_step": [0, 20]})
    >>> at_step(run).validation_loss.item(), list(at_step(run, 10).data_vars)
    (1.5, ['train_loss'])
    """
    known = {dim: dataset[dim].values.tolist() for dim in STEPS if dim in dataset.dims}
    if not known:
        return dataset
    recorded = sorted({label for labels in known.values() for label in labels})
    chosen = recorded[-1] if step is None else step
    if chosen not in recorded:
        raise SchemaError(f"step={chosen} was not recorded; expected one of {', '.join(map(str, recorded))}")
    without = [dim for dim, labels in known.items() if chosen not in labels]
    left = dataset.drop_dims(without)
    return (
        left.sel({dim: chosen for dim in known if dim not in without})
        .drop_vars(STEPS, errors="ignore")
        .assign_coords(step=chosen)
    )


def point_variable(points: Sequence[Mapping[str, Any]]) -> NDArray[np.str_]:
    """The variable `point`, one text for each point: its attributes as JSON."""
    return np.array([json.dumps(attributes, sort_keys=True, default=lambda n: n.item()) for attributes in points])


def present(dataset: xr.Dataset) -> xr.Dataset:
    """One point of a grid as a result of its own; other results as they are.

    It has no networks, layers and variables beyond its own and no coordinates of the axes, and the attributes (spec,
    spec_id, n_tokens, ...) that `simulate.sample` or `theory.predict` gives for its spec alone.

    >>> values = np.array([[1.0, 2.0, np.nan], [3.0, 4.0, 5.0]])
    >>> about = {"source": "simulation", "spec_json": "{}", "spec_id": "0" * 12, "n_tokens": 8}
    >>> variables = {"loss": (("density", "network"), values), "n_networks": (("density",), [2, 3])}
    >>> grid = new(variables, **about, coords={"density": [1.0, 0.5]})
    >>> present(grid.sel(density=1.0)).loss.values
    array([1., 2.])
    """
    for variable, dim, beyond in list(_beyond(dataset)):
        if variable.startswith(HAS) and beyond.all():
            dataset = dataset.drop_dims(dim)
        elif set(beyond.dims) <= {dim}:
            dataset = dataset.isel({dim: ~beyond.to_numpy()}).drop_vars(variable)
    chosen = [f"{HAS}{dim}" for dim in DIMENSIONS if dim not in dataset.dims]  # of a label that was selected
    dataset = dataset.drop_vars(chosen, errors="ignore")
    if "axes" not in dataset.attrs:
        return dataset
    floating = [name for name, values in dataset.data_vars.items() if values.dtype.kind == "f" and name not in MOMENTS]
    dataset = dataset.drop_vars([name for name in floating if bool(dataset[name].isnull().all())])
    if POINT not in dataset or len(set(dataset[POINT].to_numpy().flat)) > 1 or set(dataset[POINT].dims) - {"network"}:
        return dataset
    numbers = {str(name): values.item() for name, values in dataset.data_vars.items() if not values.ndim}
    own = json.loads(str(dataset[POINT].to_numpy().flat[0]))
    axes = [name for name, values in dataset.coords.items() if not values.ndim and name not in DIMENSIONS]
    alone = dataset.drop_vars([POINT, *(name for name in numbers if name != POINT), *axes])
    attributes = {name: value for name, value in dataset.attrs.items() if name not in GRID_ATTRIBUTES}
    of_networks = {"n_networks": dataset.sizes["network"]} if "network" in dataset.sizes else {}
    alone.attrs = attributes | {k: v for k, v in numbers.items() if k != POINT} | own | of_networks
    return alone


def _along(values: xr.DataArray, dim: str, mask: xr.DataArray) -> np.ndarray:
    """A mask over one dimension in a shape that broadcasts against `values`."""
    return mask.to_numpy().reshape([-1 if name == dim else 1 for name in values.dims])


def checksum(dataset: xr.Dataset) -> str:
    """SHA-256 over variables, coordinates and lasting attributes, in an order and in bytes of their own.

    Equal for results that are `identical`.
    """
    digest = hashlib.sha256()
    lasting = {str(k): v for k, v in dataset.attrs.items() if k not in (*VOLATILE_ATTRIBUTES, "checksum")}
    digest.update(json.dumps(lasting, sort_keys=True, default=lambda number: number.item()).encode())
    for name in sorted(map(str, dataset.variables)):
        values = dataset.variables[name]
        array, kind = values.to_numpy(), values.dtype.kind
        if kind == "f":  # one bit pattern of NaN
            array = np.where(np.isnan(array), np.array(np.nan, array.dtype), array)
        text = json.dumps(array.astype(str).tolist()) if kind not in "fiub" else ""
        digest.update(json.dumps([name, values.dims, array.shape, text or array.dtype.name]).encode())
        digest.update(text.encode() or array.astype(array.dtype.newbyteorder("<")).tobytes())
    return f"sha256:{digest.hexdigest()}"


def sha256_of_array(array: np.ndarray) -> str:
    """`sha256:` and the hexadecimal hash of type, shape and bytes."""
    header = f"{array.dtype.str}{array.shape}".encode()
    return "sha256:" + hashlib.sha256(header + array.tobytes()).hexdigest()


def save(dataset: xr.Dataset, path: str | Path) -> Path:
    """Validate and write with a checksum under a temporary name, then rename; netCDF-4, or zarr where `path` ends so.

    Raises `ArgumentError` if it cannot be written (missing folder, full disk, no zarr installed).
    """
    validate(dataset)
    stamped = dataset.assign_attrs(checksum=checksum(dataset))
    if Path(path).suffix == ".zarr":
        require_zarr(path)
        with replacing_folder(path) as temporary:
            stamped.to_zarr(temporary, consolidated=False, zarr_format=2)  # 3 has no stable text type
    else:
        with replacing(path) as temporary:
            buffer = io.BytesIO()  # in memory first: the HDF5 library crashes the program when a disk is full
            with _without_cluster():
                stamped.to_netcdf(buffer, engine="h5netcdf")
            temporary.write_bytes(buffer.getbuffer())
    return Path(path)


def _without_cluster() -> contextlib.AbstractContextManager[object]:
    """In a task of a Dask cluster xarray would ask the scheduler for a lock on the file, here one in memory."""
    dask = sys.modules.get("dask")
    return contextlib.nullcontext() if dask is None else dask.config.set(scheduler="synchronous")


def load(path: str | Path, *, stamped: bool = False) -> xr.Dataset:
    """The result in a file, in memory, validated and its checksum verified.

    stamped: whether the checksum has to be there; files of early versions have none.
    Raises `SchemaError` if it is missing, truncated, changed or of another kind.
    """
    source = Path(path)
    zarr = source.suffix == ".zarr"
    if not (source.is_dir() if zarr else source.is_file()):
        raise SchemaError(f"file={str(path)!r} is missing; expected a result file (netCDF)")
    if zarr:
        require_zarr(path)
    options: dict[str, Any] = {"engine": "zarr", "consolidated": False} if zarr else {"engine": "h5netcdf"}
    try:
        with xr.open_dataset(source, **options) as opened:
            dataset = opened.load()
    except Exception as error:  # every fault of a damaged HDF5 file has its own exception type
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        kind = "zarr store" if zarr else "netCDF-4 file"
        raise SchemaError(f"file={str(path)!r} is truncated or no {kind} ({reason}); expected a result file") from None
    validate(dataset, where=str(path))
    recorded = dataset.attrs.pop("checksum", None)
    if recorded is None and stamped:
        raise SchemaError(f"file={str(path)!r} is damaged (its checksum is missing); expected a file as it was saved")
    if recorded is not None and recorded != checksum(dataset):
        raise SchemaError(f"file={str(path)!r} is damaged (its content has another checksum); expected {recorded}")
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
