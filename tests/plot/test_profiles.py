"""Profiles show the numbers of their Datasets, and refuse what they cannot draw."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure

from varprop import plot, stats
from varprop.errors import ArgumentError

from .datasets import N_LAYERS, drawn, probed, simulation, theory, training


def labels(figure: Figure) -> list[str]:
    return figure.axes[0].get_legend_handles_labels()[1]


def test_profiles_of_all_kinds():
    figure = plot.plot_profiles({"theory": theory(), "simulated": simulation(), "trained": training()})
    assert drawn(figure).startswith(b"\x89PNG")
    assert sorted(labels(figure)) == ["simulated", "theory", "trained, step 0", "trained, step 1,000"]
    line = figure.axes[0].get_lines()[0]
    np.testing.assert_array_equal(line.get_xdata(), np.arange(N_LAYERS + 1))
    np.testing.assert_array_equal(line.get_ydata(), theory().second_moment.sel(site="resid_post").values)


def test_profiles_at_a_branch_site_leave_out_the_embedding():
    line = plot.plot_profiles({"theory": theory()}, site="attn_out").axes[0].get_lines()[0]
    np.testing.assert_array_equal(line.get_xdata(), np.arange(1, N_LAYERS + 1))


def test_profiles_take_the_nearest_recorded_steps():
    figure = plot.plot_profiles({"run": training()}, steps=[90, 5000])
    assert labels(figure) == ["run, step 100", "run, step 1,000"]


def test_profiles_of_what_the_probe_read():
    figure = plot.plot_profiles({"run": probed()}, "attention_concentration", steps=[400])
    assert labels(figure) == ["run, step 500"]
    np.testing.assert_array_equal(figure.axes[0].get_lines()[0].get_xdata(), np.arange(1, N_LAYERS + 1))


def test_profiles_of_branch_correlation():
    figure = plot.plot_profiles({"run": training()}, "branch_correlation", site="mlp")
    assert len(drawn(figure)) > 1000


def test_results_of_one_spec_share_a_colour_where_there_are_several_specs():
    other = {"spec_id": "f" * 12}
    data = {"a": theory(), "b": theory(1.5, **other), "c": theory(1.3)}
    colours = [line.get_color() for line in plot.plot_profiles(data).axes[0].get_lines()]
    assert colours[0] == colours[2] != colours[1]


@pytest.mark.parametrize("growth, scale", [(1.1, "linear"), (3.0, "log")])
def test_axis_is_logarithmic_beyond_a_decade(growth, scale):
    assert plot.plot_profiles({"theory": theory(growth)}).axes[0].get_yscale() == scale


@pytest.mark.parametrize("arguments", [{"site": "nowhere"}, {"variable": "nothing"}])
def test_unknown_names_are_refused(arguments):
    with pytest.raises(ArgumentError, match=r"(site|variable)='no\w+' is (unknown|missing); expected one of"):
        plot.plot_profiles({"theory": theory()}, **arguments)


def test_growth_shows_first_and_last_step():
    figure = plot.plot_growth({"dense": training(), "masked": training(growth=1.1)})
    assert len(drawn(figure)) > 1000
    assert [len(axes.get_lines()) for axes in figure.axes] == [2, 2]
    first, last = (axes.get_lines()[0].get_ydata()[-1] for axes in figure.axes)  # type: ignore[index]
    expected = training().variance.sel(site="resid_post", layer=N_LAYERS).mean("seed").values
    assert (first, last) == pytest.approx((expected[0], expected[-1]))


def band_of(figure: Figure) -> np.ndarray:
    """The corners of the only band."""
    (band,) = figure.axes[0].collections
    return band.get_paths()[0].vertices


@pytest.mark.parametrize("band", ["interval", "quantiles"])
def test_networks_as_a_line_with_a_band(band: str):
    dataset = simulation(n=20)
    values = dataset.second_moment.sel(site="resid_post").values
    ends = stats.t_interval(values) if band == "interval" else np.quantile(values, [0.05, 0.95], axis=0)
    figure = plot.plot_profiles({"simulated": dataset}, band=band)
    assert len(drawn(figure)) > 1000
    np.testing.assert_allclose(figure.axes[0].get_lines()[0].get_ydata(), values.mean(axis=0))
    corners = band_of(figure)
    for layer in range(N_LAYERS + 1):
        found = corners[corners[:, 0] == layer, 1]
        np.testing.assert_allclose([found.min(), found.max()], [ends[0][layer], ends[1][layer]])
    assert labels(figure)[0].startswith("simulated (")


def test_networks_and_layers_that_a_grid_point_lacks_are_left_out():
    dataset = simulation(n=8)
    padded = dataset.copy(deep=True)
    padded.second_moment[5:] = np.nan
    padded.second_moment[:, 4:] = np.nan
    line, expected = (
        plot.plot_profiles({"simulated": d}).axes[0].get_lines()[0]
        for d in (padded, dataset.isel(network=slice(5), layer=slice(4)))
    )
    np.testing.assert_array_equal(line.get_xdata(), np.arange(4))
    np.testing.assert_array_equal(line.get_ydata(), expected.get_ydata())
    padded.second_moment[:] = np.nan
    with pytest.raises(ArgumentError, match="second_moment is nowhere a number"):
        plot.plot_profiles({"simulated": padded})


def test_an_unknown_band_is_refused():
    with pytest.raises(ArgumentError, match="band='stderr' is unknown; expected None, interval or quantiles"):
        plot.plot_profiles({"simulated": simulation()}, band="stderr")
