"""Measured over predicted, with the verdicts of `compare.check`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy import stats as distributions

from varprop import stats
from varprop.errors import ArgumentError
from varprop.plot.reading import INTERVAL
from varprop.plot.style import decorate, new_figure

VERDICT_STYLE = {"agrees": ("#009E73", "o"), "underpowered": ("#E69F00", "s"), "disagrees": ("#D55E00", "X")}
DRAWN_SITES = ("attn_out", "resid_mid", "mlp_out", "resid_post")
"""Drawn by default; `resid_pre` is left out, being `resid_post` of the layer before."""
GRID_COLUMNS = 4


def plot_ratio(comparison: Any, sites: Sequence[str] | None = None) -> Figure:
    """Measured over predicted by layer (their difference on an absolute scale), small multiples.

    comparison: a `Check`, its Dataset, or a Dataset of comparisons over grid axes; a mapping of names to checks. One
    panel per site (all but `resid_pre`), or per grid point or name (at `resid_post`) and site where there are several.
    Bars: 95 % intervals; grey: the error that the prediction claims; colour and marker: the verdict. Raises
    `ArgumentError` where nothing is compared.
    """
    points = dict(_points(comparison))
    if not points:
        raise ArgumentError("comparison is empty; expected at least one outcome of check")
    single = list(points) == [""]
    wanted = sites if sites is not None else DRAWN_SITES if single else ("resid_post",)
    shown = []
    for (name, dataset), site in itertools.product(points.items(), wanted):
        if site not in dataset.site.values:
            raise ArgumentError(f"site={site!r} is unknown; expected one of {dataset.site.values.tolist()}")
        cells = dataset.sel(site=site)
        if np.isin(cells.verdict.values, list(VERDICT_STYLE)).any():
            title = ", ".join(part for part in (name, site if single or len(wanted) > 1 else "") if part)
            shown.append((title, cells))
    if not shown:
        raise ArgumentError(f"sites={list(wanted)} hold no verdict; expected a comparison with cells that exist")
    figure, panels = new_figure(len(shown), shared=True, columns=2 if single else GRID_COLUMNS)
    what = "measured − predicted" if "ratio" not in shown[0][1] else "measured / predicted"
    seen: set[str] = set()
    for axes, (title, cells) in zip(panels, shown, strict=True):
        seen |= _draw(axes, cells)
        axes.set_title(title, fontsize=10 if single else 8)
        decorate(axes, "layer", what)
        axes.label_outer(remove_inner_ticks=False)
    styles = {name: style for name, style in VERDICT_STYLE.items() if name in seen}
    handles = [Line2D([], [], color=c, marker=m, ls="", ms=5, label=name) for name, (c, m) in styles.items()]
    handles.append(Line2D([], [], color="0.5", alpha=0.4, lw=7, label="claimed error"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    figure.suptitle(_headline(points.values()), fontsize=11)
    return figure


def _points(comparison: Any) -> Iterator[tuple[str, xr.Dataset]]:
    """Names with Datasets over (layer, site); one without a name for a single comparison."""
    if isinstance(comparison, Mapping) and not isinstance(comparison, xr.Dataset):
        for name, one in comparison.items():
            for inner, dataset in _points(one):
                yield ", ".join(part for part in (str(name), inner) if part), dataset
        return
    dataset: xr.Dataset = getattr(comparison, "dataset", comparison)
    if "verdict" not in dataset:
        raise ArgumentError(f"comparison={list(dataset.data_vars)} has no verdict; expected the outcome of check")
    axes = [str(dim) for dim in dataset.verdict.dims if dim not in ("layer", "site")]
    for index in itertools.product(*(range(dataset.sizes[dim]) for dim in axes)):
        point = dataset.isel(dict(zip(axes, index, strict=True)))
        yield ", ".join(f"{dim}={point[dim].item()}" for dim in axes), point


def _headline(datasets: Any) -> str:
    """The variable, and how many comparisons have each verdict (or the verdict of the only one)."""
    verdicts = [_verdict(dataset) for dataset in datasets]
    variable = next(str(dataset.attrs["variable"]) for dataset in datasets).replace("_", " ")
    if len(verdicts) == 1:
        return f"{variable}: {verdicts[0]}"
    return f"{variable}: " + ", ".join(f"{verdicts.count(v)} {v}" for v in VERDICT_STYLE if v in verdicts)


def _verdict(dataset: xr.Dataset) -> str:
    found = set(dataset.verdict.values.ravel().tolist())
    return next((name for name in reversed(VERDICT_STYLE) if name in found), "absent")


def _draw(axes: Axes, cells: xr.Dataset) -> set[str]:
    """One panel; the verdicts that it shows."""
    exists = np.isin(cells.verdict.values, list(VERDICT_STYLE))
    layer, verdict = cells.layer.values[exists], cells.verdict.values[exists]
    centre, claimed = cells.deviation.values[exists], cells.theory_error.values[exists]
    half = distributions.t.isf((1 - INTERVAL) / 2, int(cells.attrs["degrees_of_freedom"]))
    half = half * cells.deviation_stderr.values[exists]
    absolute = "ratio" not in cells
    low, high = centre - half, centre + (half if absolute else stats.widened_below(half))
    # No bar where nothing bounds the mean.
    scale = (lambda x: x) if absolute else (lambda x: np.exp(np.where(x < stats.LARGEST_LOG, x, np.inf)))
    axes.fill_between(layer, scale(-claimed), scale(claimed), color="0.5", alpha=0.25, lw=0, zorder=1)
    axes.axhline(0.0 if absolute else 1.0, color="0.3", lw=0.8, zorder=1)
    for name, (colour, marker) in VERDICT_STYLE.items():
        of = verdict == name
        if of.any():
            y = scale(centre[of])
            bars = np.abs(np.stack([y - scale(low[of]), scale(high[of]) - y]))
            axes.errorbar(layer[of], y, bars, fmt=marker, color=colour, ms=4.5, lw=1.1, zorder=3)
    return set(verdict.tolist())
