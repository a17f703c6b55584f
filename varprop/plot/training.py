"""A training over its steps: losses, and what was recorded of every layer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import xarray as xr
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from varprop.errors import ArgumentError
from varprop.plot.reading import at_place, curve, step_dimension
from varprop.plot.style import COLOURS, draw_line, finish, label, new_figure

Panel = Callable[[Figure, Axes], None]


def plot_training(dataset: xr.Dataset) -> Figure:
    """Loss curves; then, as far as they are there, the layers over the steps and the spread of the tokens.

    dataset: `train_loss` (seed, step) and `validation_loss` (seed, evaluation_step, evaluation) in nats per token;
    `variance` or `second_moment` (seed, step, layer, site) of the stream, one line per layer coloured by depth;
    `variance_quantile` (seed, probe_step, layer, site, quantile) of the last state over the layers; over the steps of
    the probe `attention_concentration`, and the load of the busiest expert of `expert_load` in units of an equal share.
    Lines are means over seeds, bands of losses 95 % t intervals where there are two. Raises `ArgumentError` where none
    of the first three is there. Checked by: tests/plot/test_training.py.
    """
    panels = _panels(dataset)
    if not panels:
        raise ArgumentError(f"dataset={list(dataset.data_vars)} is without step; expected a training result")
    figure, axes = new_figure(len(panels))
    for panel, own in zip(panels, axes, strict=True):
        panel(figure, own)
    return figure


def _panels(dataset: xr.Dataset) -> list[Panel]:
    stepped = {str(name): values for name, values in dataset.data_vars.items() if step_dimension(values)}
    panels: list[Panel] = []
    if {"train_loss", "validation_loss"} & set(stepped):
        panels.append(lambda figure, axes: _losses(axes, stepped))
    stream = next((name for name in ("variance", "second_moment") if name in stepped), None)
    if stream is not None:
        values = at_place(dataset, stream, "resid_post")
        panels.append(lambda figure, axes: _by_layer(figure, axes, values, f"{label(stream)}\nat resid_post"))
    if not panels:
        return []
    if "variance_quantile" in stepped:
        panels.append(lambda figure, axes: _token_quantiles(axes, dataset))
    if "attention_concentration" in stepped:
        attention = stepped["attention_concentration"]
        text = label("attention_concentration").replace(" (", "\n(")
        panels.append(lambda figure, axes: _by_layer(figure, axes, attention, text))
    if "expert_load" in stepped:
        busiest = stepped["expert_load"].max("expert") * dataset.sizes["expert"]
        panels.append(
            lambda figure, axes: _by_layer(figure, axes, busiest, "load of the busiest expert\n(1 = balanced)")
        )
    return panels


def _losses(axes: Axes, stepped: dict[str, xr.DataArray]) -> None:
    series: dict[str, xr.DataArray] = {}
    if "train_loss" in stepped:
        series["train"] = stepped["train_loss"]
    if "validation_loss" in stepped:
        validation = stepped["validation_loss"]
        for kind in validation.evaluation.values:
            series[f"validation, {str(kind).replace('_', ' ')}"] = validation.sel(evaluation=kind)
    for (name, values), colour in zip(series.items(), COLOURS, strict=False):
        draw_line(axes, curve(values, step_dimension(values)), colour, name, marker="")
    finish(axes, "step", "loss (nats per token)")


def _by_layer(figure: Figure, axes: Axes, values: xr.DataArray, y_label: str) -> None:
    """One line over the steps for each layer that has numbers, coloured by depth."""
    layers = [int(layer) for layer in values.layer.values if bool(np.isfinite(values.sel(layer=layer)).any())]
    colours = colormaps["viridis"].resampled(len(layers))
    for rank, layer in enumerate(layers):
        x, y, _, _ = curve(values.sel(layer=layer), step_dimension(values))
        axes.plot(x, y, color=colours(rank), lw=1.2)
    finish(axes, "step", y_label, legend=False)
    if len(layers) == 1:
        axes.set_title(f"layer {layers[0]}", fontsize=9)
        return
    edges = np.array([*layers, layers[-1] + 1]) - 0.5
    bar = figure.colorbar(ScalarMappable(BoundaryNorm(edges, len(layers)), colours), ax=axes, label="layer", pad=0.02)
    bar.locator = MaxNLocator(9, integer=True)
    bar.update_ticks()


def _token_quantiles(axes: Axes, dataset: xr.Dataset) -> None:
    """Median and quantile bands over tokens by layer in the last state, means over seeds."""
    last = at_place(dataset, "variance_quantile", "resid_post").isel(probe_step=-1)
    levels = last["quantile"].values
    curves = [curve(last.isel(quantile=i), "layer")[:2] for i in range(len(levels))]
    x = curves[0][0]
    for i in range(len(levels) // 2):
        name = f"{100 * levels[i]:g} to {100 * levels[-1 - i]:g} % of the tokens"
        low, high = curves[i][1], curves[-1 - i][1]
        axes.fill_between(x, low, high, color=COLOURS[0], alpha=0.15 + 0.15 * i, lw=0, label=name)
        axes.plot(x, low, x, high, color=COLOURS[0], lw=0.4)
    axes.plot(x, curves[len(levels) // 2][1], color=COLOURS[0], lw=1.5, label="median token")
    axes.set_title(f"step {int(last.probe_step):,}, sinks left out", fontsize=9)
    finish(axes, "layer (0 = embedding)", f"{label('variance')}\nat resid_post")
