"""Heat maps show the mean of each cell, its ratio to the theory, and which cells have wide intervals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from varprop import plot
from varprop.errors import ArgumentError

from .datasets import N_LAYERS, drawn, simulation, theory

AXES = {"density": [1.0, 0.5, 0.25], "d_ff": [64, 256]}


def over(make: Any, **arguments: Any) -> xr.Dataset:
    """A grid whose points are `make` with a growth that differs from point to point."""
    rows = []
    for i, _ in enumerate(AXES["density"]):
        points = [make(1.1 + 0.1 * i + 0.05 * j, **arguments) for j, _ in enumerate(AXES["d_ff"])]
        rows.append(xr.concat(points, dim=xr.DataArray(AXES["d_ff"], dims="d_ff", name="d_ff")))
    return xr.concat(rows, dim=xr.DataArray(AXES["density"], dims="density", name="density"))


def image(figure: Figure) -> np.ndarray:
    return np.ma.filled(figure.axes[0].get_images()[0].get_array(), np.nan)


def texts(figure: Figure) -> np.ndarray:
    return np.array([text.get_text() for text in figure.axes[0].texts])


def hatched(figure: Figure) -> set[tuple[float, float]]:
    """(column, row) of the hatched cells."""
    boxes = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    return {(box.get_x() + 0.5, box.get_y() + 0.5) for box in boxes}


def test_cells_hold_the_means_over_networks_and_say_them():
    grid = over(simulation)
    figure = plot.plot_heat_map(grid, x="density", y="d_ff", layer=2, site="attn_out")
    assert len(drawn(figure)) > 1000
    expected = grid.second_moment.sel(layer=2, site="attn_out").mean("network").transpose("d_ff", "density").values
    np.testing.assert_allclose(image(figure), expected)
    assert texts(figure).tolist() == [f"{value:.2f}" for value in expected.ravel()]
    axes, bar = figure.axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "0.5", "0.25"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["64", "256"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("density", "d_ff")
    assert bar.get_ylabel() == "second moment (per neuron)"
    assert axes.get_title() == "second moment, layer 2, attn_out"


def test_a_statistic_of_the_layer_has_no_site():
    grid = over(simulation)
    grid["attention_entropy"] = grid.second_moment.isel(site=4, drop=True)
    figure = plot.plot_heat_map(grid, "attention_entropy", x="density", y="d_ff", layer=1)
    np.testing.assert_array_equal(image(figure), image(plot.plot_heat_map(grid, x="density", y="d_ff", layer=1)))
    assert figure.axes[0].get_title() == "attention entropy, layer 1"
    point = grid.isel(density=0, d_ff=0)
    assert plot.plot_profiles({"a": point}, "attention_entropy").axes[0].get_ylabel() == "attention entropy (nats)"


def test_ratios_to_the_theory_have_colours_that_part_at_one():
    grid, predicted = over(simulation), over(theory)
    figure = plot.plot_heat_map(grid, x="d_ff", y="density", theory=predicted)
    ratio = (grid.second_moment.mean("network") / predicted.second_moment).isel(layer=-1).sel(site="resid_post")
    np.testing.assert_allclose(image(figure), ratio.transpose("density", "d_ff").values)
    low, high = figure.axes[0].get_images()[0].get_clim()
    assert low * high == pytest.approx(1)
    assert high >= np.exp(0.05)
    assert figure.axes[1].get_ylabel() == "measured / predicted"


def test_correlations_are_compared_by_their_difference():
    grid, predicted = over(simulation), over(theory)
    figure = plot.plot_heat_map(grid, "token_correlation", x="density", y="d_ff", theory=predicted, layer=1)
    difference = (grid.token_correlation.mean("network") - predicted.token_correlation).sel(layer=1, site="resid_post")
    np.testing.assert_allclose(image(figure), difference.transpose("d_ff", "density").values)
    assert sum(figure.axes[0].get_images()[0].get_clim()) == pytest.approx(0)


def test_a_point_with_fewer_networks_and_layers_is_compared_at_its_own_last_layer():
    grid, predicted = over(simulation, n=40), over(theory)
    grid.second_moment[0, 1, 5:] = np.nan  # 5 networks: a wide interval
    grid.second_moment[1, 0, :, 3:] = np.nan  # 2 layers
    grid.second_moment[2, 0] = np.nan  # not run
    figure = plot.plot_heat_map(grid, x="density", y="d_ff", theory=predicted)
    assert len(drawn(figure)) > 1000
    found = image(figure)
    own = grid.second_moment[1, 0].sel(layer=2, site="resid_post").mean().item()
    assert found[0, 1] == pytest.approx(own / predicted.second_moment[1, 0].sel(layer=2, site="resid_post").item())
    five = grid.second_moment[0, 1, :5].sel(layer=N_LAYERS, site="resid_post").mean().item()
    assert found[1, 0] == pytest.approx(five / predicted.second_moment[0, 1, N_LAYERS, 4].item())
    assert np.isnan(found[0, 2])
    assert texts(figure)[2] == "–"
    assert hatched(figure) == {(0.0, 1.0)}  # 5 % spread: 0.062 at 5 networks, 0.016 at 40


def test_one_network_is_a_wide_interval_and_no_verdict():
    figure = plot.plot_heat_map(over(simulation, n=1), x="density", y="d_ff", theory=over(theory))
    assert len(hatched(figure)) == 6
    assert figure.legends[0].get_texts()[0].get_text() == "wide interval (beyond ±0.05)"


def test_scale_is_logarithmic_beyond_a_decade():
    grid = over(theory)
    grid.second_moment[0] *= 100
    figure = plot.plot_heat_map(grid, x="density", y="d_ff")
    assert type(figure.axes[0].get_images()[0].norm).__name__ == "LogNorm"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"x": "depth", "y": "d_ff"}, r"axis='depth' is no axis of the grid; expected one of \['density', 'd_ff'\]"),
        ({"x": "d_ff", "y": "d_ff"}, "axis='d_ff' is given for both x and y"),
        ({"x": "density", "y": "d_ff", "layer": 9}, "layer=9 is unknown"),
        ({"x": "density", "y": "d_ff", "site": "nowhere"}, "site='nowhere' is unknown"),
        ({"x": "density", "y": "d_ff", "variable": "nothing"}, "variable='nothing' is missing"),
        ({"x": "density", "y": "d_ff", "resolution": 0}, "resolution=0 is outside"),
        ({"x": "density", "y": "d_ff", "layer": 0, "site": "attn_out"}, "hold no number"),
        ({"x": "density", "y": "d_ff", "theory": theory()}, "theory has no axis 'density'"),
        ({"x": "density", "y": "d_ff", "theory": over(theory).isel(d_ff=[1, 0])}, "theory d_ff=.* is another axis"),
    ],
)
def test_bad_arguments_raise_one_line(arguments: dict[str, Any], message: str):
    with pytest.raises(ArgumentError, match=message) as caught:
        plot.plot_heat_map(over(simulation), **arguments)
    assert "\n" not in str(caught.value)


def test_axes_that_are_left_are_named():
    grid = over(simulation).expand_dims(n_heads=[1, 2])
    with pytest.raises(ArgumentError, match=r"axes=\['n_heads'\] are left; expected two: select"):
        plot.plot_heat_map(grid, x="density", y="d_ff")
