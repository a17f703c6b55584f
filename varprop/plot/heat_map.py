"""A grid over two axes as a heat map, with the value written in every cell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, LogFormatter
from numpy.typing import NDArray

from varprop import stats
from varprop.errors import ArgumentError, require
from varprop.plot.reading import INTERVAL, REPLICATES, at_place
from varprop.plot.style import label, new_figure

ABSENT = "0.85"
HATCH = "////"


@dataclass(frozen=True)
class Cells:
    """What is drawn, (y, x): numbers (NaN where there are none) and whether too few networks stand behind them."""

    values: NDArray[np.float64]
    underpowered: NDArray[np.bool_]


def plot_heat_map(
    dataset: xr.Dataset,
    variable: str = "second_moment",
    *,
    x: str,
    y: str,
    layer: int | None = None,
    site: str = "resid_post",
    theory: xr.Dataset | None = None,
    resolution: float = 0.05,
) -> Figure:
    """Mean over networks of `variable` at one layer and site over the grid axes `x` and `y`, one cell per point.

    dataset: a result over grid axes; every other axis has to be selected first (`.sel(density=1.0)`). layer: None =
    the last one of each point. site: or a branch. Networks and layers that a point lacks (NaN) are left out; a point
    without any is grey. theory: a prediction with the same two axes; then the ratio of the mean to it is drawn (the
    difference for a correlation), with colours that part at 1 (0). Hatched: underpowered, the 95 % interval over
    networks reaches further than `resolution` from the estimate, as a log ratio (an absolute difference), or there is
    one network only. No verdict: that is `compare.check`, point by point.
    Raises `ArgumentError` for unknown names, other axes left, and a prediction over another grid.
    """
    require(resolution > 0, ArgumentError, "resolution", resolution, "outside the domain", "a number > 0")
    absolute = variable.endswith("_correlation")
    measured = _replicates(dataset, variable, x, y, layer, site)
    if theory is None:
        cells = Cells(_means(measured), np.zeros(measured.shape, dtype=bool))
    else:
        _require_same_grid(dataset, theory, x, y)
        predicted = _means(_replicates(theory, variable, x, y, layer, site))
        cells = _compared(measured, predicted, absolute=absolute, resolution=resolution)
    if np.isnan(cells.values).all():
        raise ArgumentError(f"layer={layer!r}, site={site!r} hold no number; expected a layer and a site that exist")
    figure, (axes,) = new_figure(1)
    n_rows, n_columns = cells.values.shape
    figure.set_size_inches(max(4.2, 2.4 + 0.75 * n_columns), max(2.6, 1.3 + 0.42 * n_rows))
    what = label(variable)
    if theory is not None:
        what = "measured − predicted " + what if absolute else "measured / predicted " + what.split(" (")[0]
    norm, colours, ticks = _colours(cells.values, compared=theory is not None, absolute=absolute)
    axes.imshow(np.ma.masked_invalid(cells.values), norm=norm, cmap=colours, aspect="auto")
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=axes, label=what, pad=0.02, format=ticks)
    bar.ax.yaxis.label.set_fontsize(9)
    _write(axes, cells, norm, colours)
    for name, axis in ((x, axes.xaxis), (y, axes.yaxis)):
        labels = [_text(value) for value in dataset[name].values]
        axis.set_ticks(range(len(labels)), labels=labels)
        axis.set_label_text(name.replace("_", " "))
    axes.set_title(f"{'last layer' if layer is None else f'layer {layer}'}, {site}", fontsize=10)
    if cells.underpowered.any():
        key = Patch(facecolor="none", edgecolor="0.3", hatch=HATCH, lw=0, label=f"underpowered for {resolution:g}")
        figure.legend(handles=[key], loc="outside lower center", frameon=False, fontsize=9)
    return figure


# Reading --------------------------------------------------------------------------------------------------------------


def _replicates(dataset: xr.Dataset, variable: str, x: str, y: str, layer: int | None, site: str) -> NDArray[Any]:
    """The finite replicates of every cell: an object array (y, x) of float arrays, empty where there are none."""
    values = at_place(dataset, variable, site)
    axes = [str(dim) for dim in values.dims if dim not in (*REPLICATES, "layer")]
    for name in (x, y):
        require(name in axes, ArgumentError, "axis", name, "no axis of the grid", f"one of {axes}")
    require(x != y, ArgumentError, "axis", x, "given for both x and y", "two axes")
    rest = [name for name in axes if name not in (x, y)]
    if rest:
        raise ArgumentError(f"axes={rest} are left; expected two: select one value first, .isel({rest[0]}=0)")
    if "layer" not in values.dims:
        values = values.expand_dims(layer=[0 if layer is None else layer])
    if layer is not None:
        known = values.layer.values.tolist()
        require(layer in known, ArgumentError, "layer", layer, "unknown", f"one of {known}")
        values = values.sel(layer=[layer])
    array = values.transpose(y, x, "layer", ...).values.astype(np.float64)
    array = array.reshape(*array.shape[:3], -1)
    cells = np.empty(array.shape[:2], dtype=object)
    for index in np.ndindex(cells.shape):
        exists = np.isfinite(array[index])
        last = np.flatnonzero(exists.any(axis=1))
        cells[index] = array[index][last[-1], exists[last[-1]]] if last.size else np.empty(0)
    return cells


def _means(cells: NDArray[Any]) -> NDArray[np.float64]:
    flat = [cell.mean() if cell.size else np.nan for cell in cells.ravel()]
    return np.array(flat, dtype=np.float64).reshape(cells.shape)


def _require_same_grid(dataset: xr.Dataset, theory: xr.Dataset, x: str, y: str) -> None:
    for name in (x, y):
        if name not in theory.coords:
            raise ArgumentError(f"theory has no axis {name!r}; expected a prediction over {x} and {y}")
        ours, theirs = dataset[name].values.tolist(), theory[name].values.tolist()
        require(ours == theirs, ArgumentError, f"theory {name}", theirs, "another axis", f"{ours}")


def _compared(measured: NDArray[Any], predicted: NDArray[np.float64], *, absolute: bool, resolution: float) -> Cells:
    """Ratios (differences) and where their intervals reach too far."""
    values, powerless = np.full(measured.shape, np.nan), np.zeros(measured.shape, dtype=bool)
    for index in np.ndindex(measured.shape):
        cell, expected = measured[index], predicted[index]
        if not cell.size or not np.isfinite(expected) or (not absolute and min(expected, cell.mean()) <= 0):
            continue
        values[index] = cell.mean() - expected if absolute else cell.mean() / expected
        if cell.size == 1:
            powerless[index] = True
            continue
        centre = values[index] if absolute else np.log(values[index])
        if absolute:
            ends = np.array(stats.t_interval(cell, level=INTERVAL)) - expected
        else:
            ends = np.array(stats.log_ratio_interval(cell, expected, level=INTERVAL))
        powerless[index] = np.abs(ends - centre).max() > resolution
    return Cells(values, powerless)


# Drawing --------------------------------------------------------------------------------------------------------------


def _colours(values: NDArray[np.float64], *, compared: bool, absolute: bool) -> tuple[Normalize, Colormap, Any]:
    """Norm, colours and tick format: cividis for values, purple and orange about 1 or 0 for comparisons."""
    found = values[np.isfinite(values)]
    if not compared:
        wide = bool(found.min() > 0 and found.max() > 10 * found.min())
        norm = LogNorm(found.min(), found.max()) if wide else Normalize(found.min(), found.max())
        return norm, colormaps["cividis"].with_extremes(bad=ABSENT), LogFormatter() if wide else None
    if absolute:
        reach = max(float(np.abs(found).max()), 1e-12)
        return Normalize(-reach, reach), colormaps["PuOr"].with_extremes(bad=ABSENT), None
    reach = max(float(np.abs(np.log(found)).max()), 1e-6)
    norm = LogNorm(np.exp(-reach), np.exp(reach))
    return norm, colormaps["PuOr"].with_extremes(bad=ABSENT), FuncFormatter(lambda ratio, _: f"{ratio:.3g}")


def _write(axes: Axes, cells: Cells, norm: Normalize, colours: Colormap) -> None:
    for (row, column), value in np.ndenumerate(cells.values):
        light = True
        if np.isfinite(value):
            red, green, blue, _ = colours(norm(value))
            light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
        if cells.underpowered[row, column]:
            box = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, hatch=HATCH, edgecolor="0.3", lw=0)
            axes.add_patch(box)
        text = f"{value:.3g}" if np.isfinite(value) else "–"
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color="black" if light else "white")


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (int, float, np.number)) else str(value)
