"""Ratio plots show the deviations of a check in the colour of their verdict, for one comparison and for a grid."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from varprop import plot, results
from varprop.compare import check
from varprop.errors import ArgumentError

from .datasets import drawn, simulation, theory


def test_ratio_takes_a_check_or_its_dataset():
    outcome = check(theory(), simulation())
    assert drawn(plot.plot_ratio(outcome)) == drawn(plot.plot_ratio(outcome.dataset))
    assert [axes.get_title() for axes in plot.plot_ratio(outcome).axes] == list(plot_sites())


def plot_sites() -> tuple[str, ...]:
    return tuple(site for site in results.SITES if site != "resid_pre")


def test_ratio_shows_the_ratios_in_the_colour_of_their_verdict():
    outcome = check(theory(1.5), simulation(1.2, n=64))
    axes = plot.plot_ratio(outcome, sites=["resid_post"]).axes[0]
    cells = outcome.dataset.sel(site="resid_post")
    for container in axes.containers:
        points = container[0]  # type: ignore[index]
        verdict = next(n for n, (colour, _) in plot.VERDICT_STYLE.items() if colour == points.get_color())
        np.testing.assert_allclose(points.get_ydata(), cells.ratio.values[cells.verdict.values == verdict])
    assert len(axes.containers) == len(set(cells.verdict.values)) > 1


def test_ratio_of_a_difference():
    outcome = check(theory(), simulation(), variable="token_correlation")
    assert plot.plot_ratio(outcome).axes[0].get_ylabel() == "measured − predicted"


def test_a_mapping_of_checks_is_drawn_as_small_multiples():
    checks = {"a": check(theory(), simulation()), "b": check(theory(1.5), simulation(n=64))}
    figure = plot.plot_ratio(checks)
    assert len(drawn(figure)) > 1000
    assert [axes.get_title() for axes in figure.axes] == ["a", "b"]
    for axes, one in zip(figure.axes, checks.values(), strict=True):
        shown = np.concatenate([np.asarray(c[0].get_ydata()) for c in axes.containers])  # type: ignore[index]
        np.testing.assert_allclose(np.sort(shown), np.sort(one.dataset.ratio.sel(site="resid_post").values))
    assert figure.get_suptitle() == f"second moment: 1 {checks['a'].verdict}, 1 {checks['b'].verdict}"


def test_a_dataset_over_grid_axes_gives_the_same_and_leaves_absent_layers_out():
    parts = [check(theory(g), simulation(g)).dataset for g in (1.1, 1.3)]
    grid = xr.concat(parts, dim=xr.DataArray([1.0, 0.5], dims="density", name="density"), combine_attrs="override")
    grid.verdict[0, 3:] = "absent"  # a shallower network
    figure = plot.plot_ratio(grid, sites=["attn_out", "resid_post"])
    titles = ["density=1.0, attn_out", "density=1.0, resid_post", "density=0.5, attn_out", "density=0.5, resid_post"]
    assert [axes.get_title() for axes in figure.axes] == titles
    counts = [sum(len(c[0].get_xdata()) for c in axes.containers) for axes in figure.axes]  # type: ignore[index]
    assert counts == [2, 3, 4, 5]


def test_what_is_no_comparison_is_refused():
    with pytest.raises(ArgumentError, match="has no verdict; expected the outcome of check"):
        plot.plot_ratio(theory())
    with pytest.raises(ArgumentError, match="site='nowhere' is unknown"):
        plot.plot_ratio(check(theory(), simulation()), sites=["nowhere"])
    with pytest.raises(ArgumentError, match="comparison is empty"):
        plot.plot_ratio({})
