"""Profiles over the layers and curves over training steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from varprop.errors import ArgumentError, require
from varprop.plot.reading import BAND, INTERVAL, at_place, curve, place_of
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
        if "step" in values.dims:
            chosen = _steps(values, steps)
            for rank, step in enumerate(chosen):
                shade = tint(colour, 0.6 * (1 - (rank + 1) / len(chosen)))
                draw_line(axes, curve(values.sel(step=step), "layer"), shade, f"{name}, step {step:,}")
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


def plot_training(dataset: xr.Dataset) -> Figure:
    """Loss curves, and the variance of the stream over the steps with one line per layer coloured by depth.

    dataset: `train_loss` and `validation_loss` (seed, step) in nats per token, whichever exist; `variance` or
    `second_moment` (seed, step, layer, site). Lines are means over seeds, bands 95 % t intervals where there are two.
    """
    losses = [name for name in ("train_loss", "validation_loss") if name in dataset]
    streams = [name for name in ("variance", "second_moment") if name in dataset and "step" in dataset[name].dims]
    if not losses and not streams:
        raise ArgumentError(f"dataset={list(dataset.data_vars)} is without step; expected a training result")
    figure, panels = new_figure(bool(losses) + bool(streams))
    if losses:
        for name, colour in zip(losses, COLOURS, strict=False):
            draw_line(panels[0], curve(dataset[name], "step"), colour, name.replace("_loss", ""), marker="")
        finish(panels[0], "step", "loss (nats per token)")
    if streams:
        axes, values = panels[-1], at_place(dataset, streams[0], "resid_post")
        layers = values.layer.values
        colours = colormaps["viridis"].resampled(len(layers))
        for rank, layer in enumerate(layers):
            x, y, _, _ = curve(values.sel(layer=layer), "step")
            axes.plot(x, y, color=colours(rank), lw=1.2)
        edges = np.append(layers - 0.5, layers[-1] + 0.5)
        scale = ScalarMappable(BoundaryNorm(edges, len(layers)), colours)
        bar = figure.colorbar(scale, ax=axes, label="layer", pad=0.02)
        bar.locator = MaxNLocator(9, integer=True)
        bar.update_ticks()
        finish(axes, "step", f"{label(streams[0])}\nat resid_post", legend=False)
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


def _steps(values: xr.DataArray, steps: Sequence[int] | None) -> list[int]:
    recorded = values.step.values
    wanted = (recorded[0], recorded[-1]) if steps is None else steps
    return sorted({int(recorded[np.abs(recorded - step).argmin()]) for step in wanted})


def _theory(axes: Axes, values: xr.DataArray, claimed: xr.DataArray | None, colour: str, name: str) -> None:
    x, mean, _, _ = curve(values, "layer")
    if claimed is not None:
        error = curve(claimed, "layer")[1]
        axes.fill_between(x, mean * np.exp(-error), mean * np.exp(error), color=colour, alpha=0.18, lw=0)
    axes.plot(x, mean, color=colour, lw=1.6, label=name)
