"""Figures of the grid: ratios by factor, deviations in units of their error, profiles of a few points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from scipy.stats import norm

from experiments.theory_vs_simulation.points import DEPTHS, FACTORS, LONG

Table = Any
"""A pandas DataFrame."""
LIMIT = 0.1
"""Deviation at which the colours end."""
COLOURS = {"second_moment": "#0072B2", "token_correlation": "#D55E00"}


def heat_maps(table: Table, site: str) -> Figure:
    """log(measured / predicted) of the second moment: a panel per depth and number of tokens, all factors in it."""
    chosen = table[(table.group == "grid") & (table.variable == "second_moment") & (table.site == site)]
    chosen = chosen[(chosen.pattern == "full") == (chosen.n_tokens == LONG)]
    depths = [depth for depth in DEPTHS if (chosen.depth == depth).any()]
    tokens = sorted(chosen.n_tokens.unique())
    figure = Figure(figsize=(4.6 * max(1, len(tokens)), 2.5 * max(1, len(depths)) + 1), layout="constrained")
    panels = figure.subplots(max(1, len(depths)), max(1, len(tokens)), squeeze=False)
    rows = [(heads, density) for heads in FACTORS["heads"] for density in FACTORS["density"]]
    columns = [(placement, mixture) for placement in FACTORS["placement"] for mixture in FACTORS["mixture"]]
    image = None
    for i, depth in enumerate(depths):
        for j, n_tokens in enumerate(tokens):
            values = np.full((len(rows), len(columns)), np.nan)
            here = chosen[(chosen.depth == depth) & (chosen.n_tokens == n_tokens)]
            for row in here.itertuples():
                place = rows.index((row.heads, row.density)), columns.index((row.placement, row.mixture))
                values[place] = row.deviation
            axes = panels[i, j]
            image = axes.imshow(values, cmap="RdBu_r", norm=TwoSlopeNorm(0, -LIMIT, LIMIT), aspect="auto")
            axes.set_title(f"depth {depth}, {n_tokens} tokens", fontsize=8)
            step, width = len(FACTORS["density"]), len(FACTORS["mixture"])
            axes.set_yticks(np.arange(len(FACTORS["heads"])) * step + (step - 1) / 2, FACTORS["heads"], fontsize=7)
            centres = np.arange(len(FACTORS["placement"])) * width + (width - 1) / 2
            axes.set_xticks(centres, FACTORS["placement"], fontsize=7)
            for k in range(1, len(FACTORS["placement"])):
                axes.axvline(k * width - 0.5, color="0.5", lw=0.5)
            for k in range(1, len(FACTORS["heads"])):
                axes.axhline(k * step - 0.5, color="0.5", lw=0.5)
    if image is not None:
        figure.colorbar(image, ax=panels, label=f"log(measured / predicted) second moment at {site}", shrink=0.6)
    figure.suptitle("within a box: densities 1, .5, .25, .1 downwards; dense, 8/2, 8/2 n., 64/8, 64/8 n. to the right")
    return figure


def deviations(table: Table) -> Figure:
    """Deviations over their standard errors against the normal law, of all tests and of those of the first layer."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, (title, chosen) in zip(
        panels, (("all depths", table), ("depth 1", table[table.depth == 1])), strict=True
    ):
        for variable, colour in COLOURS.items():
            of = chosen[(chosen.variable == variable) & (chosen.deviation_stderr > 0)]
            z = np.sort(of.deviation / of.deviation_stderr)
            excess = np.sign(of.deviation) * (of.deviation.abs() - of.theory_error).clip(lower=0) / of.deviation_stderr
            if len(z):
                x = norm.ppf((np.arange(len(z)) + 0.5) / len(z))
                axes.plot(x, z, ".", ms=2, color=colour, label=f"{variable}: deviation")
                axes.plot(x, np.sort(excess), "-", lw=1, color=colour, label=f"{variable}: beyond the claimed error")
        axes.plot([-4, 4], [-4, 4], color="0.3", lw=0.8)
        axes.set(title=title, xlabel="normal quantile", ylabel="standard errors", ylim=(-12, 12))
        axes.legend(frameon=False, fontsize=7)
    return figure


def profiles(table: Table, cases: Sequence[tuple[str, dict[str, object]]]) -> Figure:
    """Ratio of measured and predicted second moment of the stream over depth, with 95 % bars and the claimed band."""
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    panels = figure.subplots(2, 4).ravel()
    chosen = table[(table.group == "grid") & (table.variable == "second_moment") & (table.site == "resid_post")]
    for axes, (title, where) in zip(panels, cases, strict=False):
        here = chosen
        for name, value in where.items():
            here = here[here[name] == value]
        if here.empty:
            continue
        here = here.sort_values("depth")
        axes.fill_between(here.depth, -here.theory_error, here.theory_error, color="0.88")
        axes.errorbar(here.depth, here.deviation, 1.96 * here.deviation_stderr, fmt="o", ms=3, color="#0072B2")
        axes.axhline(0, color="0.3", lw=0.8)
        axes.set_xscale("log", base=2)
        axes.set_title(title, fontsize=8)
        axes.tick_params(labelsize=8)  # each panel has a scale of its own
    figure.supxlabel("layer")
    figure.supylabel("log(measured / predicted)")
    return figure


USUAL = {name: levels[0] for name, levels in FACTORS.items()}
CASES: tuple[tuple[str, dict[str, object]], ...] = tuple(
    (title, {**USUAL, "n_tokens": 128, "pattern": "causal", **changes})
    for title, changes in (
        ("dense", {}),
        ("density 0.25", {"density": 0.25}),
        ("one key/value head", {"heads": "mqa"}),
        ("2 of 8 experts", {"mixture": "8/2"}),
        ("8 of 64 experts", {"mixture": "64/8"}),
        ("post", {"placement": "post"}),
        ("peri", {"placement": "peri"}),
        ("mix", {"placement": "mix"}),
    )
)
"""Points whose profiles are drawn."""
