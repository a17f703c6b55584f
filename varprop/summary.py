"""`summarise`: an ensemble in a few numbers per cell: mean, intervals, spread and quantiles over networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray
from scipy import stats as distributions

from varprop import stats
from varprop.errors import ArgumentError, SchemaError, require

Array = NDArray[np.float64]
REPLICATES = ("network", "seed")
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
STATISTICS = ("mean", "stderr", "low", "high", "spread")


def quantile_interval(
    values: ArrayLike, probability: float, axis: int = 0, level: float = 0.95
) -> tuple[Array, Array, Array, float]:
    """A quantile over replicates, the ends of its interval and the coverage of that: (quantile, low, high, coverage).

    Ends: the order statistics x_(l), x_(u) with l = F^{-1}((1 - level)/2) and u = 1 + F^{-1}((1 + level)/2), F the law
    Bin(n, probability); they hold the quantile with probability P(l <= B < u) >= level whatever the continuous law of
    the replicates. Where n is too small for that, an end is the smallest or largest replicate, and the coverage, which
    is always exact, is below level. The quantile itself: the median-unbiased estimate of Hyndman and Fan 1996 (type 8).

    values: replicates along `axis`, any unit; probability, level in (0, 1). Raises `ArgumentError`.
    Source: David and Nagaraja, Order Statistics, 7.1. Checked by: tests/test_summary.py.

    >>> middle, low, high, coverage = quantile_interval(np.arange(1.0, 12.0), 0.5)
    >>> float(middle), float(low), float(high), round(coverage, 4)
    (6.0, 2.0, 10.0, 0.9883)
    """
    for name, value in (("probability", probability), ("level", level)):
        require(0 < value < 1, ArgumentError, name, value, "outside the domain", "a number in (0, 1)")
    array = np.sort(np.moveaxis(np.asarray(values, dtype=np.float64), axis, 0), axis=0)
    n = len(array)
    require(n >= 1, ArgumentError, "n", n, "too few replicates", "at least 1")
    law, tail = distributions.binom(n, probability), (1 - level) / 2
    lower, upper = max(1, int(law.ppf(tail))), min(n, int(law.isf(tail)) + 1)
    coverage = float(law.cdf(upper - 1) - law.cdf(lower - 1))
    middle = np.quantile(array, probability, axis=0, method="median_unbiased")
    return middle, array[lower - 1], array[upper - 1], coverage


def summarise(
    dataset: xr.Dataset, variable: str = "second_moment", level: float = 0.95, quantiles: Sequence[float] = QUANTILES
) -> xr.Dataset:
    """Mean, standard error, interval, spread and quantiles of a variable over the networks (or seeds) of a result.

    Variables: `<variable>_mean`, `_stderr`, `_low`, `_high` (interval of the mean), `_spread` (standard deviation over
    networks), and over `quantile` `_quantile`, `_quantile_low`, `_quantile_high`, `_quantile_coverage` as of
    `quantile_interval`; `n_networks`, the replicates of each cell. The interval of the mean is that of
    `stats.log_ratio_interval` where no replicate is negative, longer upwards for heavy spreads and Student's for small
    ones, so that no spread has to be chosen as the limit; for correlations, and where a replicate is negative, it is
    Student's. Attribute `interval_scale` says which: `log` or `linear`. Where all replicates but one are 0 the interval
    ends at the largest float, and where all are it begins at 0: n zeros do not show that a mean is 0.

    dataset: with a dimension `network` or `seed`; any others, such as the axes of a grid, are kept. A replicate that is
    NaN in a cell is left out there: points of a grid with fewer networks are padded so. level: coverage in (0, 1);
    quantiles: probabilities in (0, 1). Raises `ArgumentError`, also for a cell with one replicate, and `SchemaError`.

    >>> from varprop import results
    >>> values = np.random.default_rng(0).lognormal(0, 0.1, (50, 2, 5))
    >>> values[:, 0, :4] = np.nan
    >>> about = {"source": "simulation", "spec_json": "{}", "spec_id": "0" * 12, "n_tokens": 8}
    >>> drawn = results.new({"second_moment": (("network", "layer", "site"), values)}, **about)
    >>> found = summarise(drawn).sel(layer=1, site="mlp_out")
    >>> bool(found.second_moment_low < found.second_moment_mean < found.second_moment_high), int(found.n_networks)
    (True, 50)
    """
    require(0 < level < 1, ArgumentError, "level", level, "outside the domain", "a number in (0, 1)")
    if variable not in dataset:
        raise SchemaError(f"variable={variable!r} is missing; expected one of {list(dataset.data_vars)}")
    found = [dim for dim in REPLICATES if dim in dataset[variable].dims]
    require(len(found) == 1, ArgumentError, "dimensions", dataset[variable].dims, "wrong", f"one of {REPLICATES}")
    array = dataset[variable].transpose(found[0], ...)
    values = array.values.astype(np.float64)
    log_scale = "correlation" not in variable and not bool((values < 0).any())
    cells = values.reshape(len(values), -1)
    counts = (~np.isnan(cells)).sum(axis=0)
    columns = {name: np.full(cells.shape[1], np.nan) for name in STATISTICS}
    names = ("quantile", "quantile_low", "quantile_high", "quantile_coverage")
    over = {name: np.full((len(quantiles), cells.shape[1]), np.nan) for name in names}
    for n in np.unique(counts[counts > 0]):
        at = counts == n
        present = np.sort(cells[:, at], axis=0)[:n]  # NaN is sorted to the end
        for name, one in zip(STATISTICS, _moments(present, level, log_scale), strict=True):
            columns[name][at] = one
        for i, probability in enumerate(quantiles):
            for name, one in zip(names, quantile_interval(present, probability, level=level), strict=True):
                over[name][i, at] = one
    shape, dims = values.shape[1:], array.dims[1:]
    variables: dict[str, Any] = {f"{variable}_{k}": (dims, v.reshape(shape)) for k, v in columns.items()}
    for name, one in over.items():
        variables[f"{variable}_{name}"] = (("quantile", *dims), one.reshape(len(quantiles), *shape))
    variables["n_networks"] = (dims, counts.reshape(shape))
    coords = {dim: array[dim] for dim in dims if dim in array.coords} | {"quantile": list(quantiles)}
    attributes = {"interval_scale": "log" if log_scale else "linear", "interval_level": level}
    return xr.Dataset(variables, coords=coords, attrs={**dataset.attrs, **attributes})


def _moments(values: Array, level: float, log_scale: bool) -> tuple[Array, Array, Array, Array, Array]:
    """Mean, its standard error, ends of its interval, spread: over the first axis."""
    mean, stderr = stats.mean_and_stderr(values)
    if log_scale:
        ends = stats.log_ratio_interval(values, level=level)
        low, high = (np.exp(end) for end in ends)
        low = np.where(mean > 0, low, 0.0)
    else:
        low, high = stats.t_interval(values, level=level)
    return mean, stderr, low, high, stderr * np.sqrt(len(values))
