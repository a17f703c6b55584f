"""A statistic of pairs of layers as a map, layer by layer."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from varprop.errors import ArgumentError, require
from varprop.plot.reading import at_place, step_dimension
from varprop.plot.style import label, new_figure
from varprop.summary import REPLICATES

LAYERS = ("source_layer", "target_layer")


def plot_depth_map(
    dataset: xr.Dataset,
    variable: str = "block_overlap",
    *,
    branch: str = "attn",
    step: int | None = None,
    normalised: bool = True,
) -> Figure:
    """`variable` over pairs of layers, source across and target upwards, mean over replicates.

    dataset: a result with the variable over source_layer and target_layer. branch: of a variable that has branches.
    step: the nearest recorded one; None = the last. normalised: each replicate's C_kl / sqrt(C_kk C_ll), the cosine of
    an overlap, between -1 and 1 (0 where a layer adds nothing), else the values themselves. Pairs that do not exist
    are left out. Checked by: tests/plot/test_training.py. Raises `ArgumentError` for unknown names, other axes and a
    variable without pairs of layers.
    """
    values = at_place(dataset, variable, branch)
    require(
        set(LAYERS) <= set(values.dims), ArgumentError, "variable", variable, "without pairs of layers", "an overlap"
    )
    along = step_dimension(values)
    title = variable.replace("_", " ") + (f", {branch}" if "branch" in dataset[variable].dims else "")
    if along:
        recorded = values[along].values
        chosen = int(recorded[-1] if step is None else recorded[np.abs(recorded - step).argmin()])
        values = values.sel({along: chosen})
        title += f", step {chosen:,}"
    rest = [dim for dim in values.dims if dim not in (*REPLICATES, *LAYERS)]
    if rest:
        raise ArgumentError(f"axes={rest} are left; expected pairs of layers alone: .isel({rest[0]}=0)")
    # Layers that hold no number are those that the branch does not exist in.
    by_source = np.isfinite(values.transpose(LAYERS[0], ...).to_numpy())
    exists = by_source.reshape(len(by_source), -1).any(axis=1)
    values = values.isel({dim: exists for dim in LAYERS}).transpose(..., "target_layer", "source_layer")
    array = values.to_numpy().astype(np.float64).reshape(-1, exists.sum(), exists.sum())
    shown = (_cosine(array) if normalised else array).mean(axis=0)
    figure, (axes,) = new_figure(1)
    reach = 1.0 if normalised else float(np.abs(shown).max())
    norm, layers = Normalize(-reach, reach), values.source_layer.values
    ends = (layers[0] - 0.5, layers[-1] + 0.5)
    axes.imshow(shown, norm=norm, cmap="PuOr", origin="lower", extent=(*ends, *ends), aspect="equal")
    what = "cosine" if normalised else label(variable)
    figure.colorbar(ScalarMappable(norm, "PuOr"), ax=axes, label=what, pad=0.02)
    for axis, name in ((axes.xaxis, "source layer"), (axes.yaxis, "target layer")):
        axis.set_label_text(name)
        axis.set_major_locator(MaxNLocator(9, integer=True))
    axes.set_title(title, fontsize=9)
    return figure


def _cosine(array: NDArray[np.float64]) -> NDArray[np.float64]:
    """C_kl / sqrt(C_kk C_ll) of matrices (replicates, layers, layers)."""
    size = np.sqrt(np.diagonal(array, axis1=1, axis2=2))
    scale = size[:, :, None] * size[:, None, :]
    return np.divide(array, scale, out=np.zeros_like(array), where=scale > 0)
