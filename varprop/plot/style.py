"""Colours, labels and the drawing that figures share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from varprop.plot.reading import Curve

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LABELS = {
    "second_moment": "second moment (per neuron)",
    "variance": "variance (per neuron)",
    "fourth_moment": "fourth moment (per neuron)",
    "token_correlation": "token correlation (dimensionless)",
    "branch_correlation": "branch correlation (dimensionless)",
    "attention_concentration": "attention concentration (dimensionless)",
    "attention_entropy": "attention entropy (nats)",
    "gate_second_moment": "gate second moment (dimensionless)",
    "branch_overlap": "overlap (per neuron)",
    "block_overlap": "overlap (per neuron)",
}


def label(variable: str) -> str:
    """Axis label with its unit."""
    return LABELS.get(variable, variable.replace("_", " "))


def new_figure(n_panels: int, *, shared: bool = False, columns: int = 2) -> tuple[Figure, list[Axes]]:
    """A figure of up to `columns` panels in a row, so that it stays readable on a narrow page."""
    columns = min(columns, max(1, n_panels))
    rows = -(-max(1, n_panels) // columns)
    width = 5.6 if columns == 1 else max(8.0, 2.6 * columns)
    figure = Figure(figsize=(width, 3.6 if rows == 1 else 2.6 * rows), dpi=150)
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, sharex=shared, sharey=shared, squeeze=False).flat)
    for unused in panels[max(1, n_panels) :]:
        unused.remove()
    return figure, panels[: max(1, n_panels)]


def draw_points(axes: Axes, curve: Curve, colour: str, name: str) -> None:
    x, mean, low, high = curve
    bars = np.stack([mean - low, high - mean])
    axes.errorbar(
        x, mean, bars, fmt="o", color=colour, ms=4, lw=1, capsize=2, mfc="white", mew=1.2, label=name, zorder=3
    )


def draw_line(axes: Axes, curve: Curve, colour: Any, name: str, marker: str = ".") -> None:
    x, mean, low, high = curve
    if bool((high > low).any()):
        axes.fill_between(x, low, high, color=colour, alpha=0.18, lw=0)
    axes.plot(x, mean, color=colour, lw=1.5, marker=marker, ms=5, label=name)


def tint(colour: str, amount: float) -> tuple[float, ...]:
    """The colour mixed with white."""
    return tuple(channel + (1 - channel) * amount for channel in to_rgb(colour))


def decorate(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(True, color="0.9", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def log_if_wide(panels: Sequence[Axes]) -> None:
    """A logarithmic axis where the lines and points drawn span more than a decade."""
    drawn = [np.asarray(line.get_ydata(), dtype=np.float64) for axes in panels for line in axes.get_lines()]
    values = np.concatenate([y[np.isfinite(y)] for y in drawn] or [np.ones(1)])
    if values.size and values.min() > 0 and values.max() > 10 * values.min():
        for axes in panels:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(LogFormatter())


def finish(axes: Axes, x_label: str, y_label: str, legend: bool = True) -> None:
    decorate(axes, x_label, y_label)
    log_if_wide([axes])
    if legend and axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=True, framealpha=0.85, edgecolor="none", fontsize=9, loc="best")
