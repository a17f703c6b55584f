"""Profiles over the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from varprop.errors import ArgumentError, require
from varprop.plot.reading import BAND, INTERVAL, at_place, curve, place_of, step_dimension
from varprop.plot.style import (
    COLOURS,
    decorate,
    draw_line,
    draw_points,
    finish,
    label,
    log_if_wide,
    new_figure,
    tint,
)

BANDS = {
    None: "",
    "interval": f" ({100 * INTERVAL:g} % interval of the mean)",
    "quantiles": f" ({100 * BAND[0]:g} to {100 * BAND[1]:g} % of the networks)",
}
"""What a band shows, as the legend says it."""


def plot_profiles(
    datasets: Mapping[str, xr.Dataset],
    variable: str = "second_moment",
    site: str = "resid_post",
    steps: Sequence[int] | None = None,
    band: str | None = None,
) -> Figure:
    """`variable` at `site` (a branch for branch variables) over the layers, one series per named result.

    steps: training steps to draw, the nearest recorded ones; first and last by default. band: how simulated networks
    are drawn: None as points with the 95 % t interval of their mean, "interval" as a line with that interval as a
    band, "quantiles" as a line with the band that holds 90 % of the networks. Results of one spec share a colour where
    there are several specs. Raises `ArgumentError` for an unknown site, variable or band.
    """
    require(band in BANDS, ArgumentError, "band", band, "unknown", "None, interval or quantiles")
    figure, (axes,) = new_figure(1)
    specs = list(dict.fromkeys(str(d.attrs["spec_id"]) for d in datasets.values()))
    for index, (name, dataset) in enumerate(datasets.items()):
        key = specs.index(str(dataset.attrs["spec_id"])) if len(specs) > 1 else index
        colour = COLOURS[key % len(COLOURS)]
        values = at_place(dataset, variable, site)
        along = step_dimension(values)
        if along:
            chosen = _steps(values[along].values, steps)
            for rank, step in enumerate(chosen):
                shade = tint(colour, 0.6 * (1 - (rank + 1) / len(chosen)))
                draw_line(axes, curve(values.sel({along: step}), "layer"), shade, f"{name}, step {step:,}")
        elif dataset.attrs["source"] == "theory":
            claimed = at_place(dataset, "theory_error", site) if _has_theory_error(dataset, variable) else None
            _theory(axes, values, claimed, colour, name)
        elif band is None:
            draw_points(axes, curve(values, "layer"), colour, name)
        else:
            draw_line(axes, curve(values, "layer", band), colour, name + BANDS[band])
    place = next((place_of(dataset, variable, site) for dataset in datasets.values()), "")
    finish(axes, "layer (0 = embedding)", label(variable) + (f"\nat {place}" if place else ""))
    return figure


def plot_growth(datasets: Mapping[str, xr.Dataset], variable: str = "variance") -> Figure:
    """`variable` of the stream by layer at the first and at the last step, one line per run; untrained results left."""
    figure, panels = new_figure(2, shared=True)
    for index, (name, dataset) in enumerate(datasets.items()):
        values = at_place(dataset, variable, "resid_post")
        ends = [values.isel(step=i) for i in (0, -1)] if "step" in values.dims else [values]
        for axes, end in zip(panels, ends, strict=False):
            draw_line(axes, curve(end, "layer"), COLOURS[index % len(COLOURS)], name)
    for axes, title in zip(panels, ("first step", "last step"), strict=True):
        axes.set_title(title, fontsize=10)
        decorate(axes, "layer (0 = embedding)", f"{label(variable)}\nat resid_post")
    panels[1].set_ylabel("")
    log_if_wide(panels)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)
    return figure


def _has_theory_error(dataset: xr.Dataset, variable: str) -> bool:
    return "theory_error" in dataset and variable in ("second_moment", "variance")


def _steps(recorded: NDArray[Any], steps: Sequence[int] | None) -> list[int]:
    wanted = (recorded[0], recorded[-1]) if steps is None else steps
    return sorted({int(recorded[np.abs(recorded - step).argmin()]) for step in wanted})


def _theory(axes: Axes, values: xr.DataArray, claimed: xr.DataArray | None, colour: str, name: str) -> None:
    x, mean, _, _ = curve(values, "layer")
    if claimed is not None:
        error = curve(claimed, "layer")[1]
        axes.fill_between(x, mean * np.exp(-error), mean * np.exp(error), color=colour, alpha=0.18, lw=0)
    axes.plot(x, mean, color=colour, lw=1.6, label=name)
