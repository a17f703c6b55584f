"""The layer scores of checkpoints on one page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, ScalarFormatter
from numpy.typing import NDArray

from varprop.errors import ArgumentError
from varprop.plot.style import COLOURS, decorate, log_if_wide, new_figure

Z = 1.96
"""Standard errors of a 95 % interval."""
LAYER = "layer"
PANEL_INCHES = 3.4, 2.9
THEORY = "theory at initialisation"
NOT_MEASURED = "0.82"
"""The grey of pairs of layers that were not measured."""
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
    with a linear map in place of the layer), causal matrix, its theory at initialisation and its means over later
    layers, permutation scores (grey: not swapped), distance of the Jacobian from the identity by definition and as the
    paper draws it, keys that attention uses, loss with the k least useful layers removed, by each score that ranks
    layers (bars of neighbouring orders side by side; of random orders mean and range). Bars are 95 % intervals, 1.96
    standard errors of the result; dashed lines what theory expects of the network at initialisation
    (`<name>_at_initialisation`). The lines above the panels name model, text and what bars mean. Several results
    stand side by side (of two, two panels a row), with one scale for lines; panels that not all of them have come last,
    one after the other. Checked by: tests/plot/test_diagnosis.py. Raises `ArgumentError` where nothing can be drawn.
    """
    n = len(datasets)
    places = [[(p, name) for name, dataset in datasets.items() if p.exists(dataset)] for p in PANELS]
    places = sorted((row for row in places if row), key=lambda row: len(row) < n)  # stable: those of all results first
    if not places:
        raise ArgumentError(f"datasets={list(datasets)} hold no score of layers; expected results of diagnose.measure")
    figure, cells = new_figure(sum(map(len, places)), columns=4 if n == 2 else n if n > 1 else 3)
    free = iter(cells)
    orders: dict[str, Any] = {}
    for row in places:
        drawn = [next(free) for _ in row]
        for axes, (panel, name) in zip(drawn, row, strict=True):
            panel.draw(axes, datasets[name])
            axes.set_title(f"{name}\n{panel.title}" if n > 1 else panel.title, fontsize=9)
            if panel.label is not None:
                orders |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        if not row[0][0].is_map:
            _share_scale(drawn)
    n_rows, n_columns = cells[0].get_gridspec().get_geometry()  # type: ignore[union-attr]
    figure.set_size_inches(PANEL_INCHES[0] * n_columns, PANEL_INCHES[1] * n_rows)
    for axes in cells:
        _small(axes)
    if orders:
        title, columns = "layers removed, least useful first, by", min(5, 2 * n_columns)
        about: dict[str, Any] = {"fontsize": 7, "title_fontsize": 8, "frameon": False}
        figure.legend(orders.values(), orders, title=title, loc="outside lower center", ncols=columns, **about)
    lines = [about_result(name, dataset) for name, dataset in datasets.items()]
    figure.suptitle("\n".join([*lines, BARS]), fontsize=9 if n_columns > 1 else 6)
    return figure


BARS = "bars: 95 % intervals (1.96 standard errors), over sequences; of the Jacobian over random directions"


def has_panels(dataset: xr.Dataset) -> bool:
    """Whether `plot_diagnosis` draws anything of a result."""
    return any(panel.exists(dataset) for panel in PANELS)


def about_result(name: str, dataset: xr.Dataset) -> str:
    """Name, text, sequences x tokens, number type, and the definition where it is not the paper's.

    >>> about = {"n_sequences": 16, "data": "texts/novel.txt", "definition": "released"}
    >>> result = xr.Dataset(attrs={"n_tokens": 512, "dtype": "float32"} | about)
    >>> about_result("a model", result)
    'a model: novel.txt, 16 × 512 tokens, float32, as the released code'
    """
    given = dataset.attrs
    text = [Path(str(given["data"])).name] if given.get("data") else []
    count = f"{given['n_sequences']} × " if "n_sequences" in given else ""
    released = ["as the released code"] if _released(dataset) else []
    parts = [*text, f"{count}{given['n_tokens']} tokens", str(given["dtype"]), *released]
    return f"{name}: {', '.join(parts)}"


def _released(dataset: xr.Dataset) -> bool:
    return dataset.attrs.get("definition") == "released"


def _small(axes: Axes) -> None:
    """Letters and ticks for panels of a few inches; the legend below, where it covers nothing."""
    axes.tick_params(labelsize=8)
    for text in (axes.xaxis.label, axes.yaxis.label):
        text.set_fontsize(8)
    if axes.get_yscale() == "log":
        low, high = np.log10(axes.get_ylim())
        axes.yaxis.set_major_locator(LogLocator(numticks=7))
        axes.yaxis.set_major_formatter(FuncFormatter(_power))
        axes.yaxis.set_minor_formatter(NullFormatter())
        if high - low < 2:
            axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            axes.yaxis.set_minor_formatter(FuncFormatter(_power))
            axes.tick_params(axis="y", which="minor", labelsize=6)
    elif isinstance(formatter := axes.yaxis.get_major_formatter(), ScalarFormatter):
        formatter.set_useOffset(False)
    handles, names = axes.get_legend_handles_labels()
    if axes.get_legend() is not None:
        unique: dict[str, Any] = dict(zip(names, handles, strict=True))
        if unique.pop(THEORY, None) is not None:  # last, and one entry for all definitions
            unique[THEORY] = Line2D([], [], color="0.5", ls="--", lw=1)
        about: dict[str, Any] = {"fontsize": 7, "frameon": False, "columnspacing": 1.0, "borderaxespad": 0.0}
        axes.legend(unique.values(), unique, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2, **about)


def _power(value: float, _: object = None) -> str:
    """A tick of a logarithmic axis: a plain number, or a power of ten where that is long."""
    if 1e-3 <= value < 1e4:
        return f"{value:g}"
    exponent = int(np.floor(np.log10(value) + 1e-9))
    factor = round(value / 10.0**exponent)
    times = "" if factor == 1 else rf"{factor} \times "
    return f"${times}10^{{{exponent}}}$"


def _share_scale(row: list[Axes]) -> None:
    """One vertical scale for all panels of a row, linear where one of them cannot be logarithmic."""
    log_if_wide(row)
    if len({axes.get_yscale() for axes in row}) > 1:
        for axes in row:
            axes.set_yscale("linear")
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
    axes.errorbar(x, mean, bar, fmt="o-", color=colour, ms=3, lw=0.8, elinewidth=1, capsize=2, label=name)


def _expected(axes: Axes, dataset: xr.Dataset, name: str, colour: str = "0.5", **place: str) -> None:
    """What theory expects at initialisation, where the result has it."""
    if f"{name}_at_initialisation" in dataset:
        values = dataset[f"{name}_at_initialisation"].sel(place)
        axes.plot(values[LAYER], values, color=colour, ls="--", lw=1, label=THEORY, zorder=1)


def _layers(axes: Axes, label: str, legend: bool = True) -> None:
    decorate(axes, "layer (0 = embedding)", label)
    log_if_wide([axes])
    if legend:
        axes.legend()


def _variance(axes: Axes, dataset: xr.Dataset) -> None:
    """Bars where the result has errors; the median and the sinks have none."""
    stream = dataset.sel(site="resid_post")
    lines = {"mean": "variance", "mean without sinks": "variance_without_sinks", "mean of sinks": "sink_variance"}
    curves = {label: (stream[name], _errors(stream, name)) for label, name in lines.items() if name in stream}
    if "variance_quantile" in stream and 0.5 in stream["quantile"]:
        median = stream["variance_quantile"].sel(quantile=0.5)
        curves["median of tokens"] = median, xr.zeros_like(median)
    for colour, (label, (values, errors)) in zip(COLOURS, curves.items(), strict=False):
        _profile(axes, values, errors, colour, label)
    _expected(axes, dataset, "variance", site="resid_post")
    _layers(axes, "variance (per neuron)")


def _one_profile(name: str, label: str) -> Callable[[Axes, xr.Dataset], None]:
    def draw(axes: Axes, dataset: xr.Dataset) -> None:
        _profile(axes, dataset[name], _errors(dataset, name), COLOURS[0], "measured")
        _expected(axes, dataset, name)
        _layers(axes, label, legend=f"{name}_at_initialisation" in dataset)

    return draw


def _usefulness(axes: Axes, dataset: xr.Dataset) -> None:
    """The released code fits and evaluates on the same sequences, under the name of what is held out otherwise."""
    label = "in sample, released" if _released(dataset) else "held out"
    names = {label: "usefulness_loss_ratio", "in sample": "usefulness_loss_ratio_in_sample"}
    for colour, (text, name) in zip(COLOURS, names.items(), strict=False):
        if name in dataset:
            _profile(axes, dataset[name], _errors(dataset, name), colour, text)
    axes.axhline(1, color="0.5", lw=0.8)
    _layers(axes, "loss ratio")


def _jacobian(axes: Axes, dataset: xr.Dataset) -> None:
    values, errors = dataset["jacobian_deviation"], _errors(dataset, "jacobian_deviation")
    for colour, label in zip(COLOURS, values["definition"].values.tolist(), strict=False):
        _profile(axes, values.sel(definition=label), errors.sel(definition=label), colour, str(label).replace("_", " "))
        _expected(axes, dataset, "jacobian_deviation", colour, definition=label)
    _layers(axes, "‖J − I‖² / d")


def _pruning(removal: str) -> Callable[[Axes, xr.Dataset], None]:
    """A line for each order, which the legend of the figure names; random ones as their mean and range."""

    def draw(axes: Axes, dataset: xr.Dataset) -> None:
        values, errors = (
            each.sel(removal=removal) for each in (dataset["pruning_loss"], _errors(dataset, "pruning_loss"))
        )
        base, orders = dataset["pruning_base_loss"].item(), values["removed_by"].values.tolist()
        x = np.append(0, values["n_removed"].to_numpy())
        random = [name for name in orders if name.startswith("random")]
        scores = [*(name for name in ORDERS if name in orders)]
        scores += [name for name in orders if name not in (*ORDERS, *random, "greedy")]
        if random:
            drawn = np.column_stack([np.full(len(random), base), values.sel(removed_by=random).to_numpy()])
            axes.fill_between(x, drawn.min(axis=0), drawn.max(axis=0), color="0.88", lw=0, zorder=0)
            axes.plot(x, drawn.mean(axis=0), color="0.6", lw=2, label="random: mean, range", zorder=1)
        styles = {name: _style(name) for name in scores} | ({"greedy": ("black", "-")} if "greedy" in orders else {})
        for place, (name, (colour, style)) in enumerate(styles.items()):
            shift = 0.6 * ((place + 0.5) / len(styles) - 0.5)  # so that bars of different orders stand side by side
            y, bars = (each.sel(removed_by=name).to_numpy() for each in (values, errors))
            about: dict[str, Any] = {"color": colour, "ls": style, "lw": 1.6 if name == "greedy" else 0.9}
            beside = np.append(0, x[1:] + shift)
            axes.plot(beside, np.append(base, y), label=name.replace("_", " "), zorder=3, **about)
            axes.errorbar(beside[1:], y, Z * bars, fmt="none", ecolor=colour, elinewidth=0.7, zorder=2)
        decorate(axes, "layers removed", "loss (nats per token)")
        log_if_wide([axes])

    return draw


def _style(order: str) -> tuple[str, str]:
    """Colour and dashes of a score, the same in every figure."""
    place = ORDERS.index(order) if order in ORDERS else len(ORDERS)
    return COLOURS[place % 6], "-" if place < 6 else "--"


def _map(name: str, label: str, measured: str = "") -> Callable[[Axes, xr.Dataset], None]:
    """A map over pairs of layers; measured: the variable that says which pairs hold a number, the others are grey."""

    def draw(axes: Axes, dataset: xr.Dataset) -> None:
        pairs = ("target_layer", "source_layer")
        values = dataset[name].sel({dim: dataset[dim] > 0 for dim in pairs}).transpose(*pairs)
        shown = values.to_numpy().astype(np.float64)
        if measured in dataset:
            there = dataset[measured].sel({dim: dataset[dim] > 0 for dim in pairs}).transpose(*pairs).to_numpy()
            shown = np.where(there.astype(bool), shown, np.nan)
        if measured:
            axes.set_facecolor(NOT_MEASURED)
        else:  # a layer has an effect on later ones alone
            shown = np.where(np.tri(len(shown), k=-1, dtype=bool), shown, np.nan)
        _draw_map(axes, shown, values["source_layer"].to_numpy(), label)

    return draw


def _draw_map(axes: Axes, shown: NDArray[np.float64], layers: NDArray[np.int64], label: str) -> None:
    found = shown[np.isfinite(shown)]
    norm = Normalize(*((min(0.0, found.min()), found.max()) if found.size and found.max() > 0 else (0.0, 1.0)))
    ends = (layers[0] - 0.5, layers[-1] + 0.5)
    image = np.ma.masked_invalid(shown)
    axes.imshow(image, norm=norm, cmap="cividis", origin="lower", extent=(*ends, *ends), aspect="equal")
    figure = axes.get_figure()
    assert figure is not None
    bar = figure.colorbar(ScalarMappable(norm, "cividis"), ax=axes, pad=0.02)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=8)
    ticks = np.unique(np.linspace(layers[0], layers[-1], min(6, len(layers))).round())  # the first and the last too
    for axis, text in ((axes.xaxis, "source layer"), (axes.yaxis, "target layer")):
        axis.set_label_text(text)
        axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])


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
        "causal matrix at initialisation, theory",
        ("causal_effect_at_initialisation",),
        _map("causal_effect_at_initialisation", "relative change"),
        is_map=True,
    ),
    Panel(
        "mean effect on later layers",
        ("causal_layer_score",),
        _one_profile("causal_layer_score", "relative change"),
    ),
    Panel(
        "swapped layers (grey: not swapped)",
        ("permutation_score",),
        _map("permutation_score", "change of the loss / loss", "permutation_measured"),
        is_map=True,
    ),
    Panel("Jacobian", ("jacobian_deviation",), _jacobian),
    Panel("Jacobian, as the paper draws it", ("jacobian_norm",), _one_profile("jacobian_norm", "‖J − I‖ / d")),
    Panel("attention", ("attention_effective_keys",), _one_profile("attention_effective_keys", "effective keys")),
    Panel("least useful layers skipped", ("pruning_loss",), _pruning("skip"), label=("removal", "skip")),
    Panel("least useful layers made linear", ("pruning_loss",), _pruning("linear"), label=("removal", "linear")),
)
"""In the order that they are drawn."""
