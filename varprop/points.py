"""Results of the points of a grid as arrays over its axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr


def stacked(
    points: Sequence[xr.Dataset | None], axes: Mapping[str, Sequence[Any]], labels: Mapping[str, Sequence[Any]]
) -> dict[str, tuple[tuple[str, ...], Any]]:
    """Every variable of the points over the axes and its own dimensions, as `results.new` takes them.

    points: in the order of the axes, the last fastest; None = nothing is known of it. axes: dimension -> labels.
    labels: those of the dimensions within the points, in which a point may lack some: a point's values stand at its own
    labels, or at the first ones if it has none. Floating point where a value is absent, which is NaN there.

    >>> point = xr.Dataset({"x": (("layer",), [1, 2])}, coords={"layer": [0, 1]})
    >>> stacked([point, None], {"density": [1.0, 0.5]}, {"layer": [0, 1]})["x"][1]
    array([[ 1.,  2.],
           [nan, nan]])
    """
    variables: dict[str, tuple[tuple[str, ...], Any]] = {}
    place = {dim: {label: i for i, label in enumerate(of)} for dim, of in labels.items()}
    for name in dict.fromkeys(str(name) for point in points if point is not None for name in point.data_vars):
        having = [(i, point[name]) for i, point in enumerate(points) if point is not None and name in point]
        like = having[0][1]
        inner = tuple(map(str, like.dims))
        shape = [len(labels[dim]) if dim in labels else like.sizes[dim] for dim in inner]
        kind = np.result_type(*(values.dtype for _, values in having))
        rows = np.full((len(points), *shape), np.nan)
        for i, values in having:
            at = [_places(place[dim], values, dim) if dim in place else range(values.sizes[dim]) for dim in inner]
            rows[(i, *np.ix_(*at))] = values.to_numpy()
        whole = kind.kind == "f" or not np.isnan(rows).any()
        lengths = [len(of) for of in axes.values()]
        assert math.prod(lengths) == len(points)
        variables[name] = ((*axes, *inner), (rows.astype(kind) if whole else rows).reshape(*lengths, *shape))
    return variables


def _places(place: Mapping[Any, int], values: xr.DataArray, dim: str) -> list[int]:
    known = values[dim].values.tolist() if dim in values.coords else range(values.sizes[dim])
    return [place[label] for label in known]
