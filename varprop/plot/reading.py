"""What figures read from Datasets: one site, curves over layers or steps, their bands."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from varprop import stats
from varprop.errors import ArgumentError
from varprop.results import STEPS
from varprop.summary import QUANTILES, REPLICATES

INTERVAL = 0.95
"""Level of the intervals of a mean."""
BAND = (QUANTILES[0], QUANTILES[-1])
"""Ends of the quantile bands over replicates: the outer ones of `summarise`."""
Curve = tuple[NDArray[Any], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]


def at_place(dataset: xr.Dataset, variable: str, place: str) -> xr.DataArray:
    """The variable at one site or branch; over all of it where it has neither."""
    if variable not in dataset:
        raise ArgumentError(f"variable={variable!r} is missing; expected one of {list(dataset.data_vars)}")
    values = dataset[variable]
    dim = next((dim for dim in ("branch", "site") if dim in values.dims), None)
    if dim is None:
        return values
    if place not in dataset[dim].values:
        raise ArgumentError(f"{dim}={place!r} is unknown; expected one of {dataset[dim].values.tolist()}")
    return values.sel({dim: place})


def place_of(dataset: xr.Dataset, variable: str, place: str) -> str:
    """`place` where the variable has sites or branches, else nothing."""
    return place if {"site", "branch"} & set(dataset[variable].dims) else ""


def step_dimension(values: xr.DataArray) -> str:
    """The dimension of training steps that the variable has, "" where it has none."""
    return next((dim for dim in STEPS if dim in values.dims), "")


def curve(values: xr.DataArray, along: str, band: str | None = "interval") -> Curve:
    """x, mean over the replicates, and the ends of its 95 % t interval or of the quantiles of the replicates.

    Replicates without a number are those that a grid lacks at this point; places without one do not exist. A single
    replicate, or band None, has the mean as both ends.
    """
    others = [dim for dim in values.dims if dim not in (*REPLICATES, along)]
    if others:
        raise ArgumentError(
            f"dimensions={others} cannot be drawn as replicates; expected one grid point: .isel({others[0]}=0)"
        )
    array = values.transpose(..., along).values.astype(np.float64)
    array = array.reshape(-1, array.shape[-1])
    array = array[np.isfinite(array).any(axis=1)]
    exists = np.isfinite(array).all(axis=0) & (len(array) > 0)
    array, x = array[:, exists], values[along].values[exists]
    if not array.size:
        raise ArgumentError(f"{values.name} is nowhere a number here; expected a site and a grid point that exist")
    mean = array.mean(axis=0)
    if len(array) < 2 or band is None:
        return x, mean, mean, mean
    low, high = stats.t_interval(array, level=INTERVAL) if band == "interval" else np.quantile(array, BAND, axis=0)
    return x, mean, low, high
