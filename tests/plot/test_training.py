"""Training figures and maps of pairs of layers show the numbers of their Datasets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from varprop import plot
from varprop.errors import ArgumentError

from .datasets import N_LAYERS, PROBED, STEPS, drawn, probed, simulation, training


@pytest.mark.parametrize("n_seeds, loss, panels", [(1, True, 2), (3, True, 2), (2, False, 1)])
def test_losses_and_layers(n_seeds: int, loss: bool, panels: int) -> None:
    dataset = training(n_seeds, loss=loss)
    figure = plot.plot_training(dataset)
    assert len(drawn(figure)) > 1000
    assert len(figure.axes) == panels + 1  # the colour bar
    lines = figure.axes[panels - 1].get_lines()
    assert len(lines) == N_LAYERS + 1
    expected = dataset.variance.sel(site="resid_post", layer=N_LAYERS).mean("seed")
    np.testing.assert_allclose(lines[-1].get_ydata(), expected)
    np.testing.assert_array_equal(lines[-1].get_xdata(), STEPS)
    if loss:
        names = ["train", "validation, fixed length", "validation, training length"]
        assert figure.axes[0].get_legend_handles_labels()[1] == names
        fixed = dataset.validation_loss.sel(evaluation="fixed_length").mean("seed")
        np.testing.assert_allclose(figure.axes[0].get_lines()[1].get_ydata(), fixed)


def test_what_the_probe_read() -> None:
    dataset = probed()
    figure = plot.plot_training(dataset)
    assert len(drawn(figure)) > 1000
    by_label = {axes.get_ylabel().splitlines()[0]: axes for axes in figure.axes if axes.get_ylabel() != "layer"}
    tokens = next(axes for axes in figure.axes if axes.get_title() == "step 1,000, sinks left out")
    expected = dataset.variance_quantile.isel(probe_step=-1, quantile=2).sel(site="resid_post").mean("seed")
    np.testing.assert_allclose(tokens.get_lines()[-1].get_ydata(), expected)
    assert len(tokens.collections) == 2
    attention = by_label["attention concentration"].get_lines()
    assert [line.get_ydata()[0] for line in attention] == pytest.approx([0.2, 0.3, 0.4, 0.5])  # type: ignore[index]
    (load,) = by_label["load of the busiest expert"].get_lines()  # one layer is a mixture
    np.testing.assert_allclose(load.get_ydata(), 4 * 0.5)
    np.testing.assert_array_equal(load.get_xdata(), PROBED)


def test_training_refuses_a_result_without_steps() -> None:
    with pytest.raises(ArgumentError, match="is without step; expected a training result"):
        plot.plot_training(simulation())


@pytest.mark.parametrize(
    "arguments, off_diagonal", [({}, 0.5), ({"variable": "branch_overlap", "branch": "mlp"}, -0.25)]
)
def test_depth_map_of_cosines(arguments: dict[str, Any], off_diagonal: float) -> None:
    figure = plot.plot_depth_map(probed(), step=600, **arguments)
    assert len(drawn(figure)) > 1000
    (image,) = figure.axes[0].get_images()
    shown = np.asarray(image.get_array())
    first = 1 if arguments else 0  # a branch has no layer 0
    assert shown.shape == (N_LAYERS + 1 - first,) * 2
    assert shown[0, 1] == pytest.approx(off_diagonal)
    assert image.get_extent()[0] == first - 0.5
    assert figure.axes[0].get_title().endswith("step 500")


def test_depth_map_of_values_has_the_source_across() -> None:
    dataset = probed().isel(seed=[0])
    dataset.block_overlap[:, :, 1, 2] = 77.0
    figure = plot.plot_depth_map(dataset, normalised=False)
    image = figure.axes[0].get_images()[0]
    shown = np.asarray(image.get_array())
    np.testing.assert_allclose(shown, dataset.block_overlap[0, -1].values.T)
    assert shown[2, 1] == 77.0
    assert image.get_clim() == (-77.0, 77.0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"variable": "nothing"}, "variable='nothing' is missing"),
        ({"variable": "variance"}, "branch='attn'|site='attn' is unknown"),
        ({"variable": "attention_concentration"}, "variable='attention_concentration' is without pairs of layers"),
        ({"variable": "branch_overlap", "branch": "both"}, "branch='both' is unknown"),
    ],
)
def test_depth_map_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        plot.plot_depth_map(probed(), **arguments)
