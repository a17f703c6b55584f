"""QQ plots: whether p-values are uniform and test statistics follow their law."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import stats as distributions

from varprop.errors import ArgumentError, require
from varprop.plot.style import COLOURS, decorate, new_figure

LAWS = ("uniform", "normal", "t")
BAND = 0.95
"""Pointwise level of the band."""


def plot_qq(
    values: Any, *, law: str = "uniform", dof: int | None = None, layer: int | None = None, site: str = "resid_post"
) -> Figure:
    """Sorted values against the quantiles of their law, with the pointwise 95 % band of each order statistic.

    values: numbers, or a mapping of names to numbers for several series; or a list of `Check`s (or their Datasets),
    from each of which the cell at `layer` (None = the last) and `site` is taken: its p-value for "uniform", else
    deviation over standard error. law: "uniform" for p-values (drawn as -log10 p, small ones at the top right),
    "normal", or "t" with `dof` degrees of freedom (that of the checks where they are given).
    The i-th of n uniform values has the law Beta(i, n + 1 - i), which gives the band; other laws by their quantile
    function. Exact for independent values: cells of one check share their networks, hence one cell of each. A check
    tests whether the deviation lies within the claimed error, and its p-values are then 1 more often than uniform
    ones; they have to stay below the band's upper edge, not inside it, and its deviations follow the t law where the
    prediction is exact. Values beyond the band are filled. Neighbours move together, and many of them can leave the
    band at once: the Kolmogorov-Smirnov p-value in the legend is for all of them (of p-values: that they are too
    small). Raises `ArgumentError` for numbers outside the law's domain. Checked by: tests/plot/test_qq.py.
    """
    require(law in LAWS, ArgumentError, "law", law, "unknown", "one of " + ", ".join(LAWS))
    named = values if isinstance(values, Mapping) and not isinstance(values, xr.Dataset) else {"values": values}
    if not named:
        raise ArgumentError("values={} is empty; expected at least one series")
    figure, (axes,) = new_figure(1)
    figure.set_size_inches(5.2, 4.6)
    largest = 0
    for index, (name, given) in enumerate(named.items()):
        numbers, found = _numbers(given, law, layer, site)
        freedom = found if dof is None else dof
        good = law != "t" or (freedom is not None and freedom >= 1)
        require(good, ArgumentError, "dof", freedom, "missing or too small", "an integer >= 1 for the t law")
        expected, low, high = expected_quantiles(len(numbers), law, freedom)
        outside = (numbers < low) | (numbers > high)
        p_value = _kolmogorov_smirnov(numbers, law, freedom)
        x, y, low, high = (_drawn(array, law) for array in (expected, numbers, low, high))
        colour = COLOURS[index % len(COLOURS)]
        if len(numbers) > largest:  # the band of the longest series, drawn below the points
            largest, band = len(numbers), (x, low, high)
        text = f"{name}: n = {len(numbers)}, Kolmogorov–Smirnov p = {p_value:.2g}"
        axes.plot(x, y, "o", color=colour, ms=4, mfc="none", mew=1, label=text)
        axes.plot(x[outside], y[outside], "o", color=colour, ms=4, label="_beyond")
    x, low, high = band
    axes.fill_between(x, low, high, color="0.5", alpha=0.25, lw=0, zorder=0, label=f"{100 * BAND:g} % band (pointwise)")
    axes.plot([x.min(), x.max()], [x.min(), x.max()], color="0.3", lw=0.8, zorder=1)
    what = "−log10 p-value" if law == "uniform" else "standardised deviation (standard errors)"
    decorate(axes, f"{what}, expected of the {law} law", f"{what}, observed")
    axes.legend(frameon=True, framealpha=0.85, edgecolor="none", fontsize=9, loc="upper left")
    return figure


def expected_quantiles(n: int, law: str = "uniform", dof: int | None = None) -> tuple[NDArray[np.float64], ...]:
    """Expected value and the two ends of the 95 % band of each of n sorted values: (expected, low, high).

    Expected: the law's quantile at i / (n + 1), the mean of the i-th uniform order statistic. Ends: the law's quantiles
    at the 2.5 and 97.5 % quantiles of Beta(i, n + 1 - i). Exact for independent values. Source: textbook.

    >>> expected, low, high = expected_quantiles(1)
    >>> float(expected[0]), round(float(low[0]), 3), round(float(high[0]), 3)
    (0.5, 0.025, 0.975)
    """
    rank = np.arange(1, n + 1)
    tail = (1 - BAND) / 2
    ends = (distributions.beta.ppf(p, rank, n + 1 - rank) for p in (tail, 1 - tail))
    places = (rank / (n + 1), *ends)
    if law == "uniform":
        return places
    quantile = distributions.norm.ppf if law == "normal" else lambda p: distributions.t.ppf(p, dof)
    return tuple(quantile(p) for p in places)


def _numbers(given: Any, law: str, layer: int | None, site: str) -> tuple[NDArray[np.float64], int | None]:
    """Sorted numbers, and the degrees of freedom that the checks have."""
    items = list(given) if isinstance(given, Iterable) and not isinstance(given, xr.Dataset) else [given]
    dof = None
    if items and not isinstance(items[0], (int, float, np.number)):
        cells = [_cell(one, law, layer, site) for one in items]
        items, freedom = [value for value, _ in cells], {found for _, found in cells}
        if len(freedom) > 1 and law == "t":
            raise ArgumentError(f"dof={sorted(freedom)} differ between the checks; expected equal numbers of networks")
        dof = freedom.pop()
    array = np.asarray(items, dtype=np.float64).ravel()
    require(array.size > 0, ArgumentError, "values", [], "empty", "at least one number")
    good = np.isfinite(array).all() and (law != "uniform" or ((array >= 0) & (array <= 1)).all())
    domain = "p-values in [0, 1]" if law == "uniform" else "finite numbers"
    require(bool(good), ArgumentError, "values", f"{array.size} numbers", "outside the domain", domain)
    return np.sort(array), dof


def _kolmogorov_smirnov(numbers: NDArray[np.float64], law: str, dof: int | None) -> float:
    """p-value against the law; against smaller values alone where they are p-values, which may be conservative."""
    cumulative = {"uniform": distributions.uniform, "normal": distributions.norm, "t": distributions.t(dof or 1)}[law]
    side = "greater" if law == "uniform" else "two-sided"
    return float(distributions.kstest(numbers, cumulative.cdf, alternative=side).pvalue)


def _cell(comparison: Any, law: str, layer: int | None, site: str) -> tuple[float, int]:
    dataset: xr.Dataset = getattr(comparison, "dataset", comparison)
    if not isinstance(dataset, xr.Dataset) or "p_value" not in dataset:
        raise ArgumentError(f"values hold {type(comparison).__name__}; expected numbers or outcomes of check")
    try:
        cell = dataset.isel(layer=-1) if layer is None else dataset.sel(layer=layer)
        cell = cell.sel(site=site)
    except KeyError:
        raise ArgumentError(f"layer={layer!r}, site={site!r} is not in a check; expected a cell of each") from None
    value = cell.p_value if law == "uniform" else cell.deviation / cell.deviation_stderr
    return float(value), int(dataset.attrs["degrees_of_freedom"])


def _drawn(array: NDArray[np.float64], law: str) -> NDArray[np.float64]:
    """-log10 of p-values, where a p of 0 is drawn as the smallest positive float."""
    return -np.log10(np.maximum(array, np.finfo(np.float64).tiny)) if law == "uniform" else array
