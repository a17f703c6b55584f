"""A grid over two axes as a heat map, with the value written in every cell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LogNorm, Normalize, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, LogFormatter
from numpy.typing import NDArray

from varprop import stats
from varprop.errors import ArgumentError, require
from varprop.plot.reading import INTERVAL, at_place, place_of
from varprop.plot.style import label, new_figure
from varprop.summary import REPLICATES

ABSENT = "0.85"
HATCH = "////"


@dataclass(frozen=True)
class Cells:
    """What is drawn, (y, x): numbers (NaN where there are none) and whether their intervals are wide."""

    values: NDArray[np.float64]
    wide: NDArray[np.bool_]


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

    dataset: a result over grid axes, of a variable with layers; every other axis has to be selected first, as with
    `.sel(density=1.0)`. layer: None = the last one that a point has. site: or a branch. Networks and layers that a
    point lacks (NaN) are left out; a point without any is grey. theory: a prediction with the same two axes; then the
    ratio of the mean to it at the same layer is drawn (the difference for a correlation), with colours that part at 1
    (0). Hatched: a wide interval, the 95 % interval over networks reaches further than `resolution` from the estimate,
    as a log ratio (an absolute difference), or there is one network only. No verdict: that is `compare.check`, point
    by point. Source: intervals of `stats`. Checked by: tests/plot/test_heat_map.py.
    Raises `ArgumentError` for unknown names, other axes left, and a prediction over another grid.
    """
    require(resolution > 0, ArgumentError, "resolution", resolution, "outside the domain", "a number > 0")
    absolute = variable.endswith("_correlation")
    measured, layers = _replicates(dataset, variable, x, y, site, layer)
    if theory is None:
        cells = Cells(_means(measured), np.zeros(measured.shape, dtype=bool))
    else:
        _require_same_grid(dataset, theory, x, y)
        predicted, _ = _replicates(theory, variable, x, y, site, layers)
        cells = _compared(measured, _means(predicted), absolute=absolute, resolution=resolution)
    if np.isnan(cells.values).all():
        raise ArgumentError(f"layer={layer!r}, site={site!r} hold no number; expected a layer and a site that exist")
    figure, (axes,) = new_figure(1)
    n_rows, n_columns = cells.values.shape
    figure.set_size_inches(max(4.6, 2.4 + 0.75 * n_columns), max(2.6, 1.3 + 0.42 * n_rows))
    compared = theory is not None
    norm, colours, form = _colours(cells.values, compared=compared, absolute=absolute, resolution=resolution)
    axes.imshow(np.ma.masked_invalid(cells.values), norm=norm, cmap=colours, aspect="auto")
    what = label(variable) if not compared else "measured − predicted" if absolute else "measured / predicted"
    ends = norm.inverse(np.linspace(0, 1, 5)) if compared else None
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=axes, label=what, pad=0.02, ticks=ends, format=form)
    bar.minorticks_off()
    _write(axes, cells, norm, colours)
    for name, axis in ((x, axes.xaxis), (y, axes.yaxis)):
        labels = [_text(value) for value in dataset[name].values]
        axis.set_ticks(range(len(labels)), labels=labels)
        axis.set_label_text(name)
    words = variable.replace("_", " "), "last layer" if layer is None else f"layer {layer}"
    axes.set_title(", ".join(filter(None, (*words, place_of(dataset, variable, site)))), fontsize=9)
    if cells.wide.any():
        text = f"wide interval (beyond ±{resolution:g})"
        key = Patch(facecolor="none", edgecolor="0.3", hatch=HATCH, lw=0, label=text)
        figure.legend(handles=[key], loc="outside lower center", frameon=False, fontsize=9)
    return figure


# Reading --------------------------------------------------------------------------------------------------------------


def _replicates(
    dataset: xr.Dataset, variable: str, x: str, y: str, site: str, layers: NDArray[Any] | int | None
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The finite replicates of every cell and the layer that they are of, (y, x) both.

    The first is an object array of float arrays, empty where there is no number. layers: one for all, one for each, or
    None for the last one that has numbers.
    """
    values = at_place(dataset, variable, site)
    axes = [str(dim) for dim in values.dims if dim not in (*REPLICATES, "layer")]
    for name in (x, y):
        require(name in axes, ArgumentError, "axis", name, "no axis of the grid", f"one of {axes}")
    require(x != y, ArgumentError, "axis", x, "given for both x and y", "two axes")
    rest = [name for name in axes if name not in (x, y)]
    if rest:
        raise ArgumentError(f"axes={rest} are left; expected two: select one value first, .isel({rest[0]}=0)")
    if "layer" not in values.dims:
        raise ArgumentError(f"variable={variable!r} has no layers; expected one that has")
    known = values.layer.values.tolist()
    for one in () if layers is None else np.unique(layers):
        require(one in known, ArgumentError, "layer", int(one), "unknown", f"one of {known}")
    array = values.transpose(y, x, "layer", ...).values.astype(np.float64)
    array = array.reshape(*array.shape[:3], -1)
    cells, chosen = np.empty(array.shape[:2], dtype=object), np.empty(array.shape[:2], dtype=np.int64)
    for index in np.ndindex(cells.shape):
        exists = np.isfinite(array[index])
        if layers is None:
            position = max(np.flatnonzero(exists.any(axis=1)), default=0)
        else:
            position = known.index(np.broadcast_to(layers, cells.shape)[index])
        cells[index] = array[index][position, exists[position]]
        chosen[index] = known[position]
    return cells, chosen


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


def _colours(
    values: NDArray[np.float64], *, compared: bool, absolute: bool, resolution: float
) -> tuple[Normalize, Colormap, Any]:
    """Norm, colours and tick format: cividis for values, purple and orange about 1 or 0 for comparisons.

    Comparisons reach `resolution` at least, so that what agrees is pale.
    """
    found = values[np.isfinite(values)]
    if not compared:
        wide = bool(found.min() > 0 and found.max() > 10 * found.min())
        norm = LogNorm(found.min(), found.max()) if wide else Normalize(found.min(), found.max())
        return norm, colormaps["cividis"].with_extremes(bad=ABSENT), LogFormatter() if wide else None
    reach = max(float(np.abs(found if absolute else np.log(found)).max()), resolution)
    norm = Normalize(-reach, reach) if absolute else LogNorm(np.exp(-reach), np.exp(reach))
    return norm, colormaps["PuOr"].with_extremes(bad=ABSENT), FuncFormatter(lambda value, _: f"{value:.3g}")


def _write(axes: Axes, cells: Cells, norm: Normalize, colours: Colormap) -> None:
    """Numbers in the cells, on a plain ground where they are hatched."""
    for (row, column), value in np.ndenumerate(cells.values):
        red, green, blue, _ = ground = colours(norm(value)) if np.isfinite(value) else to_rgba(ABSENT)
        ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
        plain = None
        if cells.wide[row, column]:
            box = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, hatch=HATCH, edgecolor="0.4", lw=0)
            axes.add_patch(box)
            plain = {"facecolor": ground, "edgecolor": "none", "pad": 1.5}
        text = _number(value)
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color=ink, bbox=plain)


def _number(value: float) -> str:
    """Three digits, zeros at the end too."""
    if not np.isfinite(value):
        return "–"
    return f"{value:#.3g}".rstrip(".") if abs(value) < 1000 else f"{value:,.0f}" if abs(value) < 1e5 else f"{value:.2g}"


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (int, float, np.number)) else str(value)
