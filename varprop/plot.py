"""Figures from result Datasets, and from nothing else. Every function returns a matplotlib `Figure` to save or to show.

Theory is a line with its claimed error as a band, simulation is points with 95 % t intervals over networks, training is
lines by step. Colours are those of Okabe and Ito, told apart by readers who do not see all colours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter, MaxNLocator
from numpy.typing import NDArray
from scipy import stats as distributions

from varprop import stats
from varprop.errors import ArgumentError

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
VERDICT_STYLE = {"agrees": ("#009E73", "o"), "underpowered": ("#E69F00", "s"), "disagrees": ("#D55E00", "X")}
LABELS = {
    "second_moment": "second moment (per neuron)",
    "variance": "variance (per neuron)",
    "token_correlation": "token correlation (dimensionless)",
    "branch_correlation": "branch correlation (dimensionless)",
}
INTERVAL = 0.95
Curve = tuple[NDArray[Any], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]


def plot_profiles(
    datasets: Mapping[str, xr.Dataset],
    variable: str = "second_moment",
    site: str = "resid_post",
    steps: Sequence[int] | None = None,
) -> Figure:
    """`variable` at `site` (a branch for branch variables) over the layers, one series per named result.

    steps: training steps to draw, the nearest recorded ones; first and last by default. Results of one spec share a
    colour where there are several specs. Raises `ArgumentError` for an unknown site or variable.
    """
    figure, (axes,) = _figure(1)
    specs = list(dict.fromkeys(str(d.attrs["spec_id"]) for d in datasets.values()))
    for index, (name, dataset) in enumerate(datasets.items()):
        key = specs.index(str(dataset.attrs["spec_id"])) if len(specs) > 1 else index
        colour = COLOURS[key % len(COLOURS)]
        values = _at(dataset, variable, site)
        if "step" in values.dims:
            chosen = _steps(values, steps)
            for rank, step in enumerate(chosen):
                shade = _tint(colour, 0.6 * (1 - (rank + 1) / len(chosen)))
                _line(axes, _curve(values.sel(step=step), "layer"), shade, f"{name}, step {step:,}", band=True)
        elif dataset.attrs["source"] == "theory":
            claimed = _at(dataset, "theory_error", site) if _has_theory_error(dataset, variable) else None
            _theory(axes, values, claimed, colour, name)
        else:
            _points(axes, _curve(values, "layer"), colour, name)
    _finish(axes, "layer (0 = embedding)", f"{LABELS.get(variable, variable.replace('_', ' '))}\nat {site}")
    return figure


def plot_ratio(comparison: Any, sites: Sequence[str] = ("attn_out", "resid_mid", "mlp_out", "resid_post")) -> Figure:
    """Measured over predicted by layer (their difference on an absolute scale), one panel per site.

    comparison: a `Check` or its Dataset. Bars: 95 % intervals; grey: the error that the prediction claims; colour and
    marker: the verdict. `resid_pre` is left out by default, being `resid_post` of the layer before.
    """
    dataset: xr.Dataset = getattr(comparison, "dataset", comparison)
    absolute = "ratio" not in dataset
    present = [s for s in sites if bool((dataset.verdict.sel(site=s) != "absent").any())]
    figure, panels = _figure(len(present), shared=True)
    dof = int(dataset.attrs["degrees_of_freedom"])
    seen: set[str] = set()
    for axes, site in zip(panels, present, strict=True):
        cells = dataset.sel(site=site)
        exists = (cells.verdict != "absent").values
        layer, verdict = cells.layer.values[exists], cells.verdict.values[exists]
        centre, claimed = cells.deviation.values[exists], cells.theory_error.values[exists]
        half = distributions.t.isf((1 - INTERVAL) / 2, dof) * cells.deviation_stderr.values[exists]
        low, high = centre - half, centre + (half if absolute else stats.widened_below(half))
        scale = (lambda x: x) if absolute else np.exp
        axes.fill_between(layer, scale(-claimed), scale(claimed), color="0.5", alpha=0.25, lw=0, zorder=1)
        axes.axhline(scale(0.0), color="0.3", lw=0.8, zorder=1)
        for name, (colour, marker) in VERDICT_STYLE.items():
            of = verdict == name
            if of.any():
                seen.add(name)
                y = scale(centre[of])
                bars = np.abs(np.stack([y - scale(low[of]), scale(high[of]) - y]))
                axes.errorbar(layer[of], y, bars, fmt=marker, color=colour, ms=4.5, lw=1.1, zorder=3)
        axes.set_title(site, fontsize=10)
        what = "measured − predicted" if absolute else "measured / predicted"
        _decorate(axes, "layer", what)
        axes.label_outer(remove_inner_ticks=False)
    shown = {name: style for name, style in VERDICT_STYLE.items() if name in seen}
    handles = [Line2D([], [], color=c, marker=m, ls="", ms=5, label=name) for name, (c, m) in shown.items()]
    handles.append(Line2D([], [], color="0.5", alpha=0.4, lw=7, label="claimed error"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    figure.suptitle(f"{str(dataset.attrs['variable']).replace('_', ' ')}: {dataset.attrs['verdict']}", fontsize=11)
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
    figure, panels = _figure(bool(losses) + bool(streams))
    if losses:
        for name, colour in zip(losses, COLOURS, strict=False):
            label = name.replace("_loss", "")
            _line(panels[0], _curve(dataset[name], "step"), colour, label, band=True, marker="")
        _finish(panels[0], "step", "loss (nats per token)")
    if streams:
        axes, values = panels[-1], _at(dataset, streams[0], "resid_post")
        layers = values.layer.values
        colours = colormaps["viridis"].resampled(len(layers))
        for rank, layer in enumerate(layers):
            x, y, _, _ = _curve(values.sel(layer=layer), "step")
            axes.plot(x, y, color=colours(rank), lw=1.2)
        edges = np.append(layers - 0.5, layers[-1] + 0.5)
        scale = ScalarMappable(BoundaryNorm(edges, len(layers)), colours)
        bar = figure.colorbar(scale, ax=axes, label="layer", pad=0.02)
        bar.locator = MaxNLocator(9, integer=True)
        bar.update_ticks()
        _finish(axes, "step", f"{LABELS[streams[0]]}\nat resid_post", legend=False)
    return figure


def plot_growth(datasets: Mapping[str, xr.Dataset], variable: str = "variance") -> Figure:
    """`variable` of the stream by layer at the first and at the last step, one line per run; untrained results left."""
    figure, panels = _figure(2, shared=True)
    for index, (name, dataset) in enumerate(datasets.items()):
        values = _at(dataset, variable, "resid_post")
        ends = [values.isel(step=i) for i in (0, -1)] if "step" in values.dims else [values]
        for axes, end in zip(panels, ends, strict=False):
            _line(axes, _curve(end, "layer"), COLOURS[index % len(COLOURS)], name, band=True)
    for axes, title in zip(panels, ("first step", "last step"), strict=True):
        axes.set_title(title, fontsize=10)
        _decorate(axes, "layer (0 = embedding)", f"{LABELS.get(variable, variable)}\nat resid_post")
    panels[1].set_ylabel("")
    _log_if_wide(panels)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)
    return figure


# Reading --------------------------------------------------------------------------------------------------------------


def _at(dataset: xr.Dataset, variable: str, place: str) -> xr.DataArray:
    """The variable at one site or branch."""
    if variable not in dataset:
        raise ArgumentError(f"variable={variable!r} is missing; expected one of {list(dataset.data_vars)}")
    values = dataset[variable]
    dim = "branch" if "branch" in values.dims else "site"
    if place not in dataset[dim].values:
        raise ArgumentError(f"{dim}={place!r} is unknown; expected one of {dataset[dim].values.tolist()}")
    return values.sel({dim: place})


def _has_theory_error(dataset: xr.Dataset, variable: str) -> bool:
    return "theory_error" in dataset and variable in ("second_moment", "variance")


def _steps(values: xr.DataArray, steps: Sequence[int] | None) -> list[int]:
    recorded = values.step.values
    wanted = (recorded[0], recorded[-1]) if steps is None else steps
    return sorted({int(recorded[np.abs(recorded - step).argmin()]) for step in wanted})


def _curve(values: xr.DataArray, along: str) -> Curve:
    """x, mean over the replicates, and the ends of its 95 % t interval (the mean twice for a single replicate)."""
    others = [dim for dim in values.dims if dim not in ("network", "seed", along)]
    if others:
        raise ArgumentError(
            f"dimensions={others} cannot be drawn as replicates; expected one grid point: .isel({others[0]}=0)"
        )
    array = values.transpose(..., along).values.astype(np.float64)
    x = values[along].values
    array = array.reshape(-1, array.shape[-1])
    exists = np.isfinite(array).all(axis=0)
    array, x = array[:, exists], x[exists]
    mean = array.mean(axis=0)
    low, high = stats.t_interval(array, level=INTERVAL) if len(array) > 1 else (mean, mean)
    return x, mean, low, high


# Drawing --------------------------------------------------------------------------------------------------------------


def _figure(n_panels: int, shared: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure of up to two panels in a row, so that it stays readable on a narrow page."""
    columns = min(2, max(1, n_panels))
    rows = -(-max(1, n_panels) // columns)
    figure = Figure(figsize=(5.6 if columns == 1 else 8.0, 3.6 if rows == 1 else 2.6 * rows), dpi=150)
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, sharex=shared, sharey=shared, squeeze=False).flat)
    for unused in panels[max(1, n_panels) :]:
        unused.remove()
    return figure, panels[: max(1, n_panels)]


def _theory(axes: Axes, values: xr.DataArray, claimed: xr.DataArray | None, colour: str, name: str) -> None:
    x, mean, _, _ = _curve(values, "layer")
    if claimed is not None:
        error = _curve(claimed, "layer")[1]
        axes.fill_between(x, mean * np.exp(-error), mean * np.exp(error), color=colour, alpha=0.18, lw=0)
    axes.plot(x, mean, color=colour, lw=1.6, label=name)


def _points(axes: Axes, curve: Curve, colour: str, name: str) -> None:
    x, mean, low, high = curve
    bars = np.stack([mean - low, high - mean])
    axes.errorbar(
        x, mean, bars, fmt="o", color=colour, ms=4, lw=1, capsize=2, mfc="white", mew=1.2, label=name, zorder=3
    )


def _line(axes: Axes, curve: Curve, colour: Any, name: str, *, band: bool = False, marker: str = ".") -> None:
    x, mean, low, high = curve
    if band and bool((high > low).any()):
        axes.fill_between(x, low, high, color=colour, alpha=0.18, lw=0)
    axes.plot(x, mean, color=colour, lw=1.5, marker=marker, ms=5, label=name)


def _tint(colour: str, amount: float) -> tuple[float, ...]:
    """The colour mixed with white."""
    return tuple(channel + (1 - channel) * amount for channel in to_rgb(colour))


def _decorate(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(True, color="0.9", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _log_if_wide(panels: Sequence[Axes]) -> None:
    """A logarithmic axis where the lines and points drawn span more than a decade."""
    drawn = [np.asarray(line.get_ydata(), dtype=np.float64) for axes in panels for line in axes.get_lines()]
    values = np.concatenate([y[np.isfinite(y)] for y in drawn] or [np.ones(1)])
    if values.size and values.min() > 0 and values.max() > 10 * values.min():
        for axes in panels:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(LogFormatter())


def _finish(axes: Axes, x_label: str, y_label: str, legend: bool = True) -> None:
    _decorate(axes, x_label, y_label)
    _log_if_wide([axes])
    if legend and axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=True, framealpha=0.85, edgecolor="none", fontsize=9, loc="best")
