"""plot: every figure draws, shows the numbers of its Dataset, and refuses what it cannot draw."""

from __future__ import annotations

import io
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure

from varprop import plot, results
from varprop.compare import check
from varprop.errors import ArgumentError

N_LAYERS = 4
ABOUT = {"spec_json": "{}", "spec_id": "0" * 12, "n_tokens": 8}
STEPS = [0, 100, 1000]


def cells(growth: float = 1.0) -> np.ndarray:
    array = (growth ** np.arange(N_LAYERS + 1.0))[:, None] * np.ones(5)
    array[0, :4] = np.nan
    return array


def theory(growth: float = 1.2, **about) -> xr.Dataset:
    names = ("second_moment", "variance", "token_correlation")
    variables: dict[str, Any] = {name: (("layer", "site"), cells(growth)) for name in names}
    variables["theory_error"] = (("layer", "site"), 0.1 * cells())
    return results.new(variables, source="theory", **{**ABOUT, **about})


def simulation(growth: float = 1.2, n: int = 8, **about) -> xr.Dataset:
    values = cells(growth) * np.exp(0.05 * np.random.default_rng(0).standard_normal((n, N_LAYERS + 1, 5)))
    variables = {name: (("network", "layer", "site"), values) for name in ("second_moment", "token_correlation")}
    return results.new(variables, source="simulation", **{**ABOUT, **about})


def training(n_seeds: int = 3, growth: float = 1.5, loss: bool = True, **about) -> xr.Dataset:
    rng = np.random.default_rng(1)
    values = np.stack([cells(growth ** (1 + i / 2)) for i in range(len(STEPS))])
    values = values * np.exp(0.05 * rng.standard_normal((n_seeds, 1, 1, 1)))
    variables: dict[str, Any] = {n: (("seed", "step", "layer", "site"), values) for n in ("second_moment", "variance")}
    correlation = np.full((n_seeds, len(STEPS), N_LAYERS + 1, 2), 0.1)
    correlation[:, :, 0] = np.nan
    variables["branch_correlation"] = (("seed", "step", "layer", "branch"), correlation)
    if loss:
        for name in ("train_loss", "validation_loss"):
            variables[name] = (("seed", "step"), 3 + rng.random((n_seeds, len(STEPS))))
    return results.new(variables, source="training", coords={"step": STEPS}, **{**ABOUT, **about})


def drawn(figure: Figure) -> bytes:
    """The figure as PNG: laying it out is part of what is tested."""
    assert plt.get_fignums() == []  # no state of pyplot is touched
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=40)
    return buffer.getvalue()


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


@pytest.mark.parametrize("n_seeds, loss, panels", [(1, True, 2), (3, True, 2), (2, False, 1)])
def test_training(n_seeds, loss, panels):
    figure = plot.plot_training(training(n_seeds, loss=loss))
    assert len(drawn(figure)) > 1000
    assert len(figure.axes) == panels + 1  # the colour bar
    assert len(figure.axes[panels - 1].get_lines()) == N_LAYERS + 1


def test_training_refuses_a_result_without_steps():
    with pytest.raises(ArgumentError, match="is without step; expected a training result"):
        plot.plot_training(simulation())


def test_growth_shows_first_and_last_step():
    figure = plot.plot_growth({"dense": training(), "masked": training(growth=1.1)})
    assert len(drawn(figure)) > 1000
    assert [len(axes.get_lines()) for axes in figure.axes] == [2, 2]
    first, last = (axes.get_lines()[0].get_ydata()[-1] for axes in figure.axes)  # type: ignore[index]
    expected = training().variance.sel(site="resid_post", layer=N_LAYERS).mean("seed").values
    assert (first, last) == pytest.approx((expected[0], expected[-1]))
