"""The layer scores of checkpoints on one page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from varprop.errors import ArgumentError
from varprop.plot.style import COLOURS, draw_line, draw_points, finish, log_if_wide, new_figure

Z = 1.96
"""Standard errors of a 95 % interval."""
LAYER = "layer"
PANEL_INCHES = 3.4, 2.8
ORDERS = (
    *("block_influence", "relative_update", "causal_layer_score", "usefulness_loss_ratio", "linear_r_squared"),
    *("jacobian_norm", "permutation_layer_score", "ablation_loss_ratio"),
)
"""Scores that layers are removed by, for their colours; others come after them."""


@dataclass(frozen=True)
class Panel:
    """One panel: its title, the variables of which any makes it, how it is drawn, whether it is a map.

    label: a dimension and the label on it that has to be there.
    """

    title: str
    variables: tuple[str, ...]
    draw: Callable[[Axes, xr.Dataset], None]
    is_map: bool = False
    label: tuple[str, str] | None = None

    def exists(self, dataset: xr.Dataset) -> bool:
        """Whether the dataset has something for it."""
        there = self.label is None or (self.label[0] in dataset and self.label[1] in dataset[self.label[0]])
        return there and any(name in dataset for name in self.variables)


def plot_diagnosis(datasets: Mapping[str, xr.Dataset]) -> Figure:
    """One page of panels of results of `diagnose.measure`; panels that no result has variables for are left out.

    Variance of the stream by layer (mean, median over tokens, sinks apart), block influence, usefulness (loss ratio
    with a linear map in place of the layer), causal matrix, permutation scores, distance of the Jacobian from the
    identity by definition, keys that attention uses, loss with the k least useful layers removed, by
    each score that ranks layers (of random orders the mean). Bars are 95 %
    intervals, 1.96 standard errors of the result; dashed grey lines what theory expects of the network at
    initialisation (`<name>_at_initialisation`). Several results stand side by side, a column each, rows of lines
    with one scale. Checked by: tests/plot/test_diagnosis.py. Raises `ArgumentError` where nothing can be drawn.
    """
    panels = [panel for panel in PANELS if any(panel.exists(dataset) for dataset in datasets.values())]
    if not panels:
        raise ArgumentError(f"datasets={list(datasets)} hold no score of layers; expected results of diagnose.measure")
    n = len(datasets)
    figure, cells = new_figure(len(panels) * n, columns=n if n > 1 else min(3, len(panels)))
    orders: dict[str, Any] = {}
    for row, panel in enumerate(panels):
        drawn = []
        for axes, (name, dataset) in zip(cells[row * n : (row + 1) * n], datasets.items(), strict=True):
            if not panel.exists(dataset):
                axes.set_axis_off()
                continue
            panel.draw(axes, dataset)
            axes.set_title(f"{name}: {panel.title}" if n > 1 else panel.title, fontsize=9)
            drawn.append(axes)
            if panel.label is not None:
                orders |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        if not panel.is_map:
            _share_scale(drawn)
    n_rows, n_columns = cells[0].get_gridspec().get_geometry()  # type: ignore[union-attr]
    figure.set_size_inches(PANEL_INCHES[0] * n_columns, PANEL_INCHES[1] * n_rows)
    for axes in cells:
        _small(axes)
    if orders:
        title, columns = "layers removed, least useful first, by", min(5, 2 * n_columns)
        about: dict[str, Any] = {"fontsize": 7, "title_fontsize": 8, "frameon": False}
        figure.legend(orders.values(), orders, title=title, loc="outside lower center", ncols=columns, **about)
    if n == 1:
        figure.suptitle(next(iter(datasets)), fontsize=10)
    return figure


def _small(axes: Axes) -> None:
    """Letters for panels of a few inches."""
    axes.tick_params(labelsize=8)
    for text in (axes.xaxis.label, axes.yaxis.label):
        text.set_fontsize(8)
    legend = axes.get_legend()
    for text in () if legend is None else legend.get_texts():
        text.set_fontsize(7)


def _share_scale(row: list[Axes]) -> None:
    """One vertical scale for all panels of a row."""
    log_if_wide(row)
    low, high = zip(*(axes.get_ylim() for axes in row), strict=True)
    for axes in row:
        axes.set_ylim(min(low), max(high))


def _errors(dataset: xr.Dataset, name: str) -> xr.DataArray:
    """Standard errors of a variable, 0 where it has none."""
    error = dataset.get(f"{name}_stderr")
    return xr.zeros_like(dataset[name], dtype=np.float64) if error is None else error


def _profile(axes: Axes, values: xr.DataArray, errors: xr.DataArray, colour: str, name: str) -> None:
    """Values by layer with 95 % bars, where they exist."""
    exists = np.isfinite(values.to_numpy())
    x, mean, bar = (each.to_numpy()[exists] for each in (values[LAYER], values, Z * errors))
    draw_points(axes, (x, mean, mean - bar, mean + bar), colour, name)
    axes.plot(x, mean, color=colour, lw=0.8)


def _expected(axes: Axes, dataset: xr.Dataset, name: str, **place: str) -> None:
    """What theory expects at initialisation, where the result has it."""
    if f"{name}_at_initialisation" in dataset:
        values = dataset[f"{name}_at_initialisation"].sel(place)
        axes.plot(values[LAYER], values, color="0.5", ls="--", lw=1, label="theory at initialisation", zorder=1)


def _layers(axes: Axes, label: str, legend: bool = True) -> None:
    finish(axes, "layer (0 = embedding)", label, legend)


def _variance(axes: Axes, dataset: xr.Dataset) -> None:
    stream = dataset.sel(site="resid_post")
    lines = {"mean": "variance", "mean without sinks": "variance_without_sinks", "mean of sinks": "sink_variance"}
    curves = {label: stream[name] for label, name in lines.items() if name in stream}
    if "variance_quantile" in stream and 0.5 in stream["quantile"]:
        curves["median of tokens"] = stream["variance_quantile"].sel(quantile=0.5)
    for colour, (label, values) in zip(COLOURS, curves.items(), strict=False):
        y = values.to_numpy()
        draw_line(axes, (values[LAYER].to_numpy(), y, y, y), colour, label)
    _expected(axes, dataset, "variance", site="resid_post")
    _layers(axes, "variance (per neuron)")


def _one_profile(name: str, label: str) -> Callable[[Axes, xr.Dataset], None]:
    def draw(axes: Axes, dataset: xr.Dataset) -> None:
        _profile(axes, dataset[name], _errors(dataset, name), COLOURS[0], "measured")
        _expected(axes, dataset, name)
        _layers(axes, label, legend=f"{name}_at_initialisation" in dataset)

    return draw


def _usefulness(axes: Axes, dataset: xr.Dataset) -> None:
    names = {"held out": "usefulness_loss_ratio", "in sample": "usefulness_loss_ratio_in_sample"}
    for colour, (label, name) in zip(COLOURS, names.items(), strict=False):
        if name in dataset:
            _profile(axes, dataset[name], _errors(dataset, name), colour, label)
    axes.axhline(1, color="0.5", lw=0.8)
    _layers(axes, "loss ratio")


def _jacobian(axes: Axes, dataset: xr.Dataset) -> None:
    values, errors = dataset["jacobian_deviation"], _errors(dataset, "jacobian_deviation")
    for colour, label in zip(COLOURS, values["definition"].values.tolist(), strict=False):
        _profile(axes, values.sel(definition=label), errors.sel(definition=label), colour, str(label).replace("_", " "))
        _expected(axes, dataset, "jacobian_deviation", definition=label)
    handles, names = axes.get_legend_handles_labels()
    _layers(axes, "‖J − I‖² / d", legend=False)
    unique = dict(zip(names, handles, strict=True))  # one entry for all definitions of the theory
    axes.legend(unique.values(), unique.keys(), framealpha=0.85, edgecolor="none")


def _pruning(removal: str) -> Callable[[Axes, xr.Dataset], None]:
    """A line for each order, which the legend of the figure names; random ones as their mean."""

    def draw(axes: Axes, dataset: xr.Dataset) -> None:
        values, errors = (
            each.sel(removal=removal) for each in (dataset["pruning_loss"], _errors(dataset, "pruning_loss"))
        )
        base, orders = dataset["pruning_base_loss"].item(), values["removed_by"].values.tolist()
        x = np.append(0, values["n_removed"].to_numpy())
        random = [name for name in orders if name.startswith("random")]
        others = [name for name in orders if name not in (*ORDERS, *random, "greedy")]
        scores = [*ORDERS, *others]
        styles = {name: (COLOURS[i % 6], "-" if i < 6 else "--") for i, name in enumerate(scores) if name in orders}
        if "greedy" in orders:
            styles["greedy"] = "black", ":"
        for name, (colour, style) in styles.items():
            y, bars = (each.sel(removed_by=name).to_numpy() for each in (values, errors))
            text = name.replace("_", " ")
            axes.errorbar(x, np.append(base, y), np.append(0, Z * bars), color=colour, ls=style, lw=1.2, label=text)
        if random:
            mean = values.sel(removed_by=random).mean("removed_by").to_numpy()
            axes.plot(x, np.append(base, mean), color="0.6", lw=1.2, label="random")
        finish(axes, "layers removed", "loss (nats per token)", legend=False)

    return draw


def _map(name: str, label: str, measured: str = "") -> Callable[[Axes, xr.Dataset], None]:
    """A map over pairs of layers; measured: the variable that says which pairs hold a number."""

    def draw(axes: Axes, dataset: xr.Dataset) -> None:
        pairs = ("target_layer", "source_layer")
        values = dataset[name].sel({dim: dataset[dim] > 0 for dim in pairs}).transpose(*pairs)
        shown = values.to_numpy().astype(np.float64)
        if measured in dataset:
            there = dataset[measured].sel({dim: dataset[dim] > 0 for dim in pairs}).transpose(*pairs).to_numpy()
            shown = np.where(there.astype(bool), shown, np.nan)
        elif name == "causal_effect":  # a layer has an effect on later ones alone
            shown = np.where(np.tri(len(shown), k=-1, dtype=bool), shown, np.nan)
        _draw_map(axes, shown, values["source_layer"].to_numpy(), label)

    return draw


def _draw_map(axes: Axes, shown: NDArray[np.float64], layers: NDArray[np.int64], label: str) -> None:
    found = shown[np.isfinite(shown)]
    norm = Normalize(0, float(found.max()) if found.size and found.max() > 0 else 1)
    ends = (layers[0] - 0.5, layers[-1] + 0.5)
    image = np.ma.masked_invalid(shown)
    axes.imshow(image, norm=norm, cmap="cividis", origin="lower", extent=(*ends, *ends), aspect="equal")
    figure = axes.get_figure()
    assert figure is not None
    bar = figure.colorbar(ScalarMappable(norm, "cividis"), ax=axes, pad=0.02)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=8)
    for axis, text in ((axes.xaxis, "source layer"), (axes.yaxis, "target layer")):
        axis.set_label_text(text)
        axis.set_major_locator(MaxNLocator(6, integer=True))


PANELS = (
    Panel("variance of the stream", ("variance",), _variance),
    Panel("block influence", ("block_influence",), _one_profile("block_influence", "1 − cosine")),
    Panel(
        "layer replaced by a linear map",
        ("usefulness_loss_ratio", "usefulness_loss_ratio_in_sample"),
        _usefulness,
    ),
    Panel("causal matrix", ("causal_effect",), _map("causal_effect", "relative change"), is_map=True),
    Panel(
        "swapped layers",
        ("permutation_score",),
        _map("permutation_score", "change of the loss / loss", "permutation_measured"),
        is_map=True,
    ),
    Panel("Jacobian", ("jacobian_deviation",), _jacobian),
    Panel("attention", ("attention_effective_keys",), _one_profile("attention_effective_keys", "effective keys")),
    Panel("least useful layers skipped", ("pruning_loss",), _pruning("skip"), label=("removal", "skip")),
    Panel("least useful layers made linear", ("pruning_loss",), _pruning("linear"), label=("removal", "linear")),
)
"""In the order that they are drawn."""
