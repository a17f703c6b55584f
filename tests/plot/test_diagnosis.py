"""One page of layer scores: a panel for what is there, with the numbers of the Dataset."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr

from varprop import plot, results
from varprop.errors import ArgumentError
from varprop.results import SITES

from .datasets import drawn

L = 4
PAIRS = ("source_layer", "target_layer")
KEYS = "attention_effective_keys"


def diagnosis(scale: float = 1.0, keep: tuple[str, ...] | None = None) -> xr.Dataset:
    """A checkpoint with every variable that is drawn, or those that begin as `keep` says."""
    rng = np.random.default_rng(0)
    layers = np.concatenate([[np.nan], scale * rng.uniform(0.1, 0.5, L)])
    sites = np.full((L + 1, len(SITES)), np.nan)
    sites[1:], sites[0, -1] = 1.0, 1.0
    matrix = np.full((L + 1, L + 1), np.nan)
    matrix[1:, 1:] = np.triu(rng.uniform(0.1, 1, (L, L)), 1)
    swapped = matrix + matrix.T
    measured = np.zeros((L + 1, L + 1), dtype=bool)
    measured[1, 2] = measured[2, 1] = True
    rise = np.array([[3.1, 3.2, 3.8], [3.0, 3.1, 3.3]])
    variables: dict[str, Any] = {
        **{name: (("layer", "site"), k * sites) for k, name in enumerate(("variance", "sink_variance"), 1)},
        "variance_quantile": (("layer", "site", "quantile"), sites[..., None] * [0.5, 0.9, 2.0]),
        **{name: (("layer",), layers) for name in ("block_influence", "block_influence_stderr", KEYS)},
        "usefulness_loss_ratio": (("layer",), 1 + layers),
        "usefulness_loss_ratio_stderr": (("layer",), layers / 10),
        "causal_effect": (PAIRS, matrix),
        "causal_effect_at_initialisation": (PAIRS, matrix / 2),
        "causal_layer_score": (("layer",), layers),
        "causal_layer_score_at_initialisation": (("layer",), layers / 2),
        "variance_stderr": (("layer", "site"), sites / 10),
        "jacobian_norm": (("layer",), layers),
        "permutation_score": (PAIRS, swapped),
        "permutation_measured": (PAIRS, measured),
        "jacobian_deviation": (("layer", "definition"), layers[:, None] * [1.0, 2.0]),
        "pruning_loss": (("removed_by", "removal", "n_removed"), np.stack([rise, rise + 1, rise + 2])),
        "pruning_base_loss": ((), 3.0),
        "block_influence_at_initialisation": (("layer",), 0.5 + 0 * layers),
        "jacobian_deviation_at_initialisation": (("layer", "definition"), layers[:, None] * [0.5, 0.6]),
    }
    if keep is not None:
        variables = {name: value for name, value in variables.items() if name.startswith(keep)}
    coords = {
        "quantile": [0.25, 0.5, 0.75],
        "definition": ["token_mean", "own_token"],
        "removed_by": ["causal", "random_1", "random_2"],
        "removal": ["skip", "linear"],
        "n_removed": [1, 2, 3],
    }
    used = {dim for dims, _ in variables.values() for dim in dims}
    coords = {dim: labels for dim, labels in coords.items() if dim in used}
    about: dict[str, Any] = {"source": "checkpoint", "spec_json": "", "spec_id": "", "n_tokens": 8, "coords": coords}
    return results.new(variables, **about)


def rise_of(dataset: xr.Dataset, removal: str) -> np.ndarray:
    """The mean of the two random orders."""
    return dataset.pruning_loss.sel(removed_by=["random_1", "random_2"], removal=removal).mean("removed_by").values


def titles(figure: Any) -> list[str]:
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def test_every_panel_holds_the_numbers() -> None:
    dataset = diagnosis()
    figure = plot.plot_diagnosis({"model": dataset})
    assert len(drawn(figure)) > 1000
    panels = {axes.get_title(): axes for axes in figure.axes}
    assert titles(figure) == [
        "variance of the stream",
        "block influence",
        "layer replaced by a linear map",
        "causal matrix",
        "causal matrix at initialisation, theory",
        "mean effect on later layers",
        "swapped layers (grey: not swapped)",
        "Jacobian",
        "Jacobian, as the paper draws it",
        "attention",
        "least useful layers skipped",
        "least useful layers made linear",
    ]
    legend = panels["variance of the stream"].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["mean", "mean of sinks", "median of tokens"]
    (mean, _, (bars,)), *_, median = panels["variance of the stream"].containers
    np.testing.assert_allclose(median[0].get_ydata(), 0.9)
    low, high = np.array([segment[:, 1] for segment in bars.get_segments()]).T
    np.testing.assert_allclose((high - low) / 2, 1.96 * 0.1)
    assert mean.get_label() != median.get_label()
    assert legend.get_window_extent().y1 < panels["variance of the stream"].get_window_extent().y0
    influence = panels["block influence"]
    expected = influence.get_lines()[-1]
    assert expected.get_label() == "theory at initialisation"
    np.testing.assert_array_equal(expected.get_ydata()[1:], 0.5)  # type: ignore[index]
    np.testing.assert_array_equal(influence.containers[0][0].get_xdata(), [1, 2, 3, 4])
    rows = panels["mean effect on later layers"].get_lines()[-1]
    np.testing.assert_array_equal(rows.get_ydata()[1:], dataset.causal_layer_score[1:] / 2)  # type: ignore[index]
    names = [text.get_text() for text in panels["Jacobian"].get_legend().get_texts()]  # type: ignore[union-attr]
    assert sorted(names) == ["own token", "theory at initialisation", "token mean"]
    (_, _, (bars,)) = influence.containers[0]
    low, high = np.array([segment[:, 1] for segment in bars.get_segments()]).T
    np.testing.assert_allclose((high - low) / 2, 1.96 * dataset.block_influence[1:])
    causal = np.ma.filled(panels["causal matrix"].get_images()[0].get_array(), np.nan)
    np.testing.assert_array_equal(
        causal[np.tri(L, k=-1) > 0], dataset.causal_effect.values[1:, 1:].T[np.tri(L, k=-1) > 0]
    )
    assert np.isnan(causal[np.triu_indices(L)]).all()
    swapped = np.ma.filled(panels["swapped layers (grey: not swapped)"].get_images()[0].get_array(), np.nan)
    assert np.isfinite(swapped).sum() == 2  # one pair was swapped
    assert swapped[1, 0] == dataset.permutation_score[1, 2]
    assert panels["swapped layers (grey: not swapped)"].get_facecolor()[:3] == (0.82, 0.82, 0.82)
    assert panels["causal matrix"].get_facecolor()[:3] == (1, 1, 1)
    removed = panels["least useful layers made linear"]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(names) == ["causal", "random: mean, range"]
    line = next(line for line in removed.get_lines() if str(line.get_label()).startswith("random"))
    np.testing.assert_allclose(line.get_xdata(), [0, 1, 2, 3])
    np.testing.assert_allclose(line.get_ydata(), [3, *rise_of(dataset, "linear")])


def test_layers_that_were_only_skipped() -> None:
    figure = plot.plot_diagnosis({"model": diagnosis(keep=("pruning",)).sel(removal=["skip"])})
    assert titles(figure) == ["least useful layers skipped"]


def test_panels_without_variables_are_left_out() -> None:
    figure = plot.plot_diagnosis({"model": diagnosis(keep=("causal", "jacobian"))})
    assert titles(figure) == [
        "causal matrix",
        "causal matrix at initialisation, theory",
        "mean effect on later layers",
        "Jacobian",
        "Jacobian, as the paper draws it",
    ]
    assert len(drawn(figure)) > 1000


def test_results_side_by_side_have_one_scale() -> None:
    both = {"a": diagnosis(), "b": diagnosis(3.0), "c": diagnosis(keep=("causal",))}
    figure = plot.plot_diagnosis(both)
    assert len(drawn(figure)) > 1000
    panels = {axes.get_title(): axes for axes in figure.axes}
    for title in ("block influence", "Jacobian", "least useful layers skipped"):
        assert panels[f"a\n{title}"].get_ylim() == panels[f"b\n{title}"].get_ylim()
        assert f"c\n{title}" not in panels
    assert {f"{name}\ncausal matrix" for name in both} <= set(panels)
    low, high = panels["a\nblock influence"].get_ylim()
    assert high >= 3 * 0.1 > low


def test_every_cell_of_the_page_is_used_in_order() -> None:
    """Panels that not every result has come last, so that no half of a row is empty."""
    one, other = diagnosis(keep=("causal_effect", "causal_layer_score", "jacobian_norm")), diagnosis(keep=("causal",))
    figure = plot.plot_diagnosis({"a": one, "b": other})
    assert [title.split("\n")[0] for title in titles(figure)] == ["a", "b"] * 3 + ["a"]
    assert titles(figure)[-1] == "a\nJacobian, as the paper draws it"


def test_the_heading_and_the_legend_say_what_is_shown() -> None:
    dataset = diagnosis(keep=("usefulness",)).assign_attrs(data="a/novel.txt", n_sequences=3, definition="paper")
    figure = plot.plot_diagnosis({"model": dataset})
    assert figure.get_suptitle().startswith("model: novel.txt, 3 × 8 tokens, float64\nbars: 95 % intervals")
    assert legend_of(figure) == ["held out"]
    released = plot.plot_diagnosis({"model": dataset.assign_attrs(definition="released")})
    assert "8 tokens, float64, as the released code\n" in released.get_suptitle()
    assert legend_of(released) == ["in sample, released"]


def legend_of(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_the_norm_of_the_released_code_is_drawn() -> None:
    figure = plot.plot_diagnosis({"model": diagnosis(keep=("jacobian_norm",))})
    assert titles(figure) == ["Jacobian, as the paper draws it"]
    assert not plot.has_panels(diagnosis(keep=("pruning_base_loss",)))


@pytest.mark.parametrize("high, expected", [(30.0, ["1", "10", "2", "5", "20"]), (1e6, ["1", "100", "$10^{4}$"])])
def test_ticks_of_logarithmic_panels(high: float, expected: list[str]) -> None:
    dataset = diagnosis(keep=("block_influence",)).drop_vars("block_influence_stderr")
    values = np.geomspace(1.0, high, L)
    dataset["block_influence"] = ("layer", np.append(np.nan, values))
    axes = plot.plot_diagnosis({"model": dataset}).axes[0]
    axes.figure.canvas.draw()
    found = [tick.label1 for ticks in (axes.yaxis.get_major_ticks(), axes.yaxis.get_minor_ticks()) for tick in ticks]
    assert set(expected) <= {text.get_text() for text in found}
    assert not any("times" in text.get_text() for text in found)


def test_rows_whose_scales_differ_are_linear() -> None:
    one, other = diagnosis(keep=("block_influence",)), diagnosis(keep=("block_influence",))
    one["block_influence"] = 10.0**one.layer
    other["block_influence"] = 0.0 * other.layer
    figure = plot.plot_diagnosis({"a": one, "b": other})
    assert [axes.get_yscale() for axes in figure.axes] == ["linear", "linear"]


def test_a_variance_that_grows_is_drawn_on_a_logarithmic_scale() -> None:
    dataset = diagnosis()
    dataset["variance"] = dataset.variance * 10.0**dataset.layer
    figure = plot.plot_diagnosis({"model": dataset})
    assert figure.axes[0].get_yscale() == "log"
    assert figure.axes[1].get_yscale() == "linear"


def test_nothing_to_draw_is_one_line() -> None:
    about: dict[str, Any] = {"source": "checkpoint", "spec_json": "", "spec_id": "", "n_tokens": 8}
    with pytest.raises(ArgumentError, match=r"datasets=\['x'\] hold no score of layers"):
        plot.plot_diagnosis({"x": results.new({"loss_mean": ((), 3.0)}, **about)})
    with pytest.raises(ArgumentError, match=r"datasets=\[\] hold no score"):
        plot.plot_diagnosis({})
