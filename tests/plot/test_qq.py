"""QQ plots: sorted values against the quantiles of their law, the coverage of the band, and its power."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats as distributions

from varprop import plot
from varprop.compare import check
from varprop.errors import ArgumentError
from varprop.plot.qq import expected_quantiles

from .datasets import N_LAYERS, drawn, simulation, theory


def shown(figure: Any, index: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """x and y of a series of points."""
    line = figure.axes[0].get_lines()[index]
    return np.asarray(line.get_xdata()), np.asarray(line.get_ydata())


def test_p_values_against_the_uniform_law():
    p = np.random.default_rng(0).random(50)
    figure = plot.plot_qq(p)
    assert len(drawn(figure)) > 1000
    x, y = shown(figure)
    np.testing.assert_allclose(y, -np.log10(np.sort(p)))
    np.testing.assert_allclose(x, -np.log10(np.arange(1, 51) / 51))


def test_statistics_against_t():
    values = np.random.default_rng(0).standard_t(7, 50)
    x, y = shown(plot.plot_qq(values, law="t", dof=7))
    np.testing.assert_array_equal(y, np.sort(values))
    np.testing.assert_allclose(x, distributions.t.ppf(np.arange(1, 51) / 51, 7))


@pytest.mark.parametrize("law, dof", [("uniform", None), ("normal", None), ("t", 5)])
def test_each_order_statistic_is_in_the_band_as_often_as_it_says(law: str, dof: int | None):
    """2,000 samples of 40: share within 0.95 +- 5 binomial errors (0.024) at each of the ranks; false-fail 2e-5."""
    rng = np.random.default_rng(2)
    draw = {"uniform": rng.random, "normal": rng.standard_normal, "t": lambda size: rng.standard_t(5, size)}[law]
    values = np.sort(draw((2000, 40)), axis=1)
    _, low, high = expected_quantiles(40, law, dof)
    share = ((values >= low) & (values <= high)).mean(axis=0)
    assert np.abs(share - 0.95).max() < 5 * np.sqrt(0.95 * 0.05 / 2000)


def test_values_of_another_law_leave_the_band_and_are_filled():
    rng = np.random.default_rng(1)
    figure = plot.plot_qq({"right": rng.random(200), "too small": rng.random(200) ** 2})
    legend = figure.axes[0].get_legend()
    assert legend is not None
    texts = [text.get_text() for text in legend.get_texts()]
    p_values = [float(text.split("p = ")[1]) for text in texts[:2]]
    assert p_values[0] > 0.01 > 1e-6 > p_values[1]
    assert len(shown(figure, 3)[0]) > 100  # filled points of the second series
    assert texts[2] == "95 % band (pointwise)"


def test_conservative_p_values_are_no_alarm():
    figure = plot.plot_qq(np.minimum(1.0, 2 * np.random.default_rng(1).random(200)))
    legend = figure.axes[0].get_legend()
    assert legend is not None
    assert float(legend.get_texts()[0].get_text().split("p = ")[1]) > 0.5


def test_one_cell_of_each_check():
    checks = [check(theory(g), simulation(g)) for g in (1.1, 1.2, 1.3)]
    _, y = shown(plot.plot_qq(checks, site="attn_out"))
    cells = [c.dataset.sel(layer=N_LAYERS, site="attn_out") for c in checks]
    np.testing.assert_allclose(y, -np.log10(np.sort([float(c.p_value) for c in cells])))
    x, y = shown(plot.plot_qq([c.dataset for c in checks], law="t", layer=1, site="attn_out"))
    cells = [c.dataset.sel(layer=1, site="attn_out") for c in checks]
    np.testing.assert_allclose(y, np.sort([float(c.deviation / c.deviation_stderr) for c in cells]))
    np.testing.assert_allclose(x, distributions.t.ppf([0.25, 0.5, 0.75], 7))  # 8 networks
    assert len(shown(plot.plot_qq(checks[0]))[0]) == 1


def test_a_p_value_of_zero_is_drawn():
    _, y = shown(plot.plot_qq([0.0, 0.5]))
    assert np.isfinite(y).all()


@pytest.mark.parametrize(
    "values, arguments, message",
    [
        ([0.5], {"law": "beta"}, "law='beta' is unknown; expected one of uniform, normal, t"),
        ([0.5], {"law": "t"}, "dof=None is missing"),
        ([0.5, 1.5], {}, "values='2 numbers' is outside the domain"),
        ([float("nan")], {"law": "normal"}, "values='1 numbers' is outside the domain"),
        ([], {}, r"values=\[\] is empty"),
        ({}, {}, "values={} is empty"),
        ([theory()], {}, "values hold Dataset; expected numbers or outcomes of check"),
        ([check(theory(), simulation())], {"layer": 9}, "layer=9, site='resid_post' is not in a check"),
        ([check(theory(), simulation())], {"layer": 0, "site": "attn_out"}, "is outside the domain"),
        (["a"], {}, "values hold str; expected numbers"),
        ([[0.1, 0.2]], {}, "values hold list"),
    ],
)
def test_bad_values_raise_one_line(values: Any, arguments: dict[str, Any], message: str):
    with pytest.raises(ArgumentError, match=message) as caught:
        plot.plot_qq(values, **arguments)
    assert "\n" not in str(caught.value)
