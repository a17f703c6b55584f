"""Tables of verdicts by factor, the disagreements with their causes, and the page VERDICT.md: no number is typed."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.theory_vs_simulation.points import FACTORS
from experiments.theory_vs_simulation.simulation import FALSE_FAIL_RATE, RESOLUTION

Table = Any
"""A pandas DataFrame or Series: their types say less than nothing to a checker."""
HERE = Path(__file__).resolve().parent
BY = ("depth", "n_tokens", "pattern", *FACTORS)
VERDICTS = ("agrees", "disagrees", "underpowered")
PLACE = ["group", "component", *FACTORS, "pattern", "n_tokens", "depth"]
"""What names a cell: a point at a depth."""
STREAM = ("resid_mid", "resid_post")
SHOWN = 12


def summary(
    rows: Sequence[Mapping[str, Any]], missing: Sequence[Mapping[str, Any]], refused: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Everything that VERDICT.md says, as plain numbers and text."""
    table: Table = pd.DataFrame(list(rows))
    grid, alone = (table[table.group == name] for name in ("grid", "component"))
    causes = read_causes(HERE / "causes.toml")
    wrong = table[table.verdict == "disagrees"].copy()
    wrong["cause"] = [cause_of(row, causes) for row in wrong.to_dict("records")]
    by_factor = [
        {"factor": name, "level": level, **_counts(chosen)}
        for name in BY
        for level, chosen in (grid.groupby(name, sort=False) if len(grid) else ())
    ]
    each = table.groupby([*PLACE[:-1], "n_layers"], sort=False)
    moments, correlations = (table[table.variable == v] for v in ("second_moment", "token_correlation"))
    return {
        "false_fail_rate": FALSE_FAIL_RATE,
        "resolution": RESOLUTION,
        "n_networks": int(each.n_networks.first().sum()),
        "n_points": each.ngroups,
        "n_missing": len(missing),
        "n_tests": len(table),
        "all": {"grid": _counts(grid), "components alone": _counts(alone)},
        "by_factor": by_factor,
        "by_site": [
            {"variable": variable, "site": site, **_of(chosen.verdict), **_spread(chosen)}
            for (variable, site), chosen in table.groupby(["variable", "site"])
        ],
        "components": [
            {"component": name, **_counts(chosen), **_extremes(chosen)}
            for name, chosen in (alone.groupby("component", sort=False) if len(alone) else ())
        ],
        "extremes": {"second_moment": _worst(moments), "token_correlation": _worst(correlations)},
        "disagreements": _plain(wrong),
        "causes": [
            {"cause": cause or "not explained", "tests": len(chosen), **_extremes(chosen)}
            for cause, chosen in (wrong.groupby("cause", sort=False) if len(wrong) else ())
        ],
        "refused": list(refused),
    }


def _counts(table: Table) -> dict[str, Any]:
    """Cells by their worst verdict: of the stream, and of all sites."""
    return {
        "cells": table.groupby(PLACE, sort=False).ngroups if len(table) else 0,
        "stream": _of(_cells(table[table.site.isin(STREAM)])) if len(table) else {},
        "all_sites": _of(_cells(table)) if len(table) else {},
    }


def _cells(table: Table) -> Table:
    severity = table.verdict.map({"agrees": 0, "underpowered": 1, "disagrees": 2})
    worst = severity.groupby([table[name] for name in PLACE], sort=False).max()
    return worst.map({0: "agrees", 1: "underpowered", 2: "disagrees"})


def _of(verdicts: Table) -> dict[str, int]:
    return {name: int((verdicts == name).sum()) for name in VERDICTS}


def _spread(table: Table) -> dict[str, float]:
    """Size of the deviations, and what the tests would have seen."""
    size = table.deviation.abs()
    return {
        "median_deviation": float(size.median()),
        "quantile_95": float(size.quantile(0.95)),
        "median_stderr": float(table.deviation_stderr.median()),
        "median_detectable": float(table.detectable.median()),
    }


def _extremes(table: Table) -> dict[str, float]:
    """Largest deviation that is not noise: beyond two standard errors; 0 where there is none."""
    sure = (table.deviation.abs() - 2 * table.deviation_stderr).clip(lower=0)
    kinds = table.variable == "second_moment"
    return {
        "second_moment_deviation": float(sure[kinds].max()) if kinds.any() else 0.0,
        "token_correlation_deviation": float(sure[~kinds].max()) if (~kinds).any() else 0.0,
    }


def _worst(table: Table) -> list[dict[str, Any]]:
    """The rows furthest from the prediction, noise taken off."""
    sure = table.deviation.abs() - 2 * table.deviation_stderr
    return _plain(table.loc[sure.nlargest(SHOWN).index])


def _plain(table: Table) -> list[dict[str, Any]]:
    rows = table.to_dict("records")
    return [{str(k): None if isinstance(v, float) and v != v else v for k, v in row.items()} for row in rows]


def read_causes(path: Path) -> list[dict[str, Any]]:
    """Causes of disagreements, first match wins: `text` and `where`, a table of a column to its values."""
    return tomllib.loads(path.read_text()).get("cause", []) if path.is_file() else []


def cause_of(row: Mapping[str, Any], causes: Sequence[Mapping[str, Any]]) -> str:
    """The text of the first cause whose `where` holds for the row; empty where none does."""
    for cause in causes:
        if all(row[name] in values for name, values in cause["where"].items()):
            return str(cause["text"])
    return ""


# The page -------------------------------------------------------------------------------------------------------------


def page(found: Mapping[str, Any], explanations: str) -> str:
    """VERDICT.md: counts, extremes and disagreements from `summary`, then the explanations written by hand."""
    lines = [
        "# Theory against simulation",
        "",
        "Written by `python -m experiments.theory_vs_simulation --stage page` from `results/rows.csv.gz`.",
        "",
        f"{found['n_points']} points, {found['n_networks']:,} networks, {found['n_tests']:,} tests;"
        f" false-fail rate {found['false_fail_rate']:g} for all of them together. A test agrees if it is within the"
        f" claimed error and would have seen {found['resolution']:.0%} beyond it with power 0.9 (token correlation:"
        f" {found['resolution']:g}). A cell is a point at one depth, as bad as its worst test.",
        f"Not simulated: {found['n_missing']} points. Not covered by `predict`: {len(found['refused'])}.",
        "",
        "| cells | number | stream: agrees / disagrees / underpowered | all sites: agrees / disagrees / underpowered |",
        "|---|---|---|---|",
    ]
    lines += [_line(name, counts) for name, counts in found["all"].items()]
    lines += [_line(f"{row['factor']} = {row['level']}", row) for row in found["by_factor"]]
    lines += [
        "",
        "| tests | agrees / disagrees / underpowered | deviation: median, 95 % | stderr | would see |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['variable']}, {row['site']} | {_three(row)} | {row['median_deviation']:.4f}, {row['quantile_95']:.4f}"
        f" | {row['median_stderr']:.4f} | {row['median_detectable']:.4f} |"
        for row in found["by_site"]
    ]
    lines += ["", "## Furthest from the prediction (two standard errors taken off)", ""]
    for variable, rows in found["extremes"].items():
        shown = "; ".join(_place(row) for row in rows[:3])
        lines.append(f"- {variable}: {shown}")
    worst = sorted(found["components"], key=lambda row: -row["second_moment_deviation"])[:6]
    parts = (f"{row['component']} {row['second_moment_deviation']:.1%}" for row in worst)
    lines.append("- components alone, second moment: " + "; ".join(parts))
    lines += ["", f"## Disagreements ({len(found['disagreements'])} tests)", ""]
    lines += [
        f"- {row['cause']}: {row['tests']} tests, second moment up to {row['second_moment_deviation']:.1%}, token"
        f" correlation up to {row['token_correlation_deviation']:.3f}"
        for row in found["causes"]
    ]
    return "\n".join([*lines, "", explanations.strip(), ""])


def _line(name: str, counts: Mapping[str, Any]) -> str:
    return f"| {name} | {counts['cells']} | {_three(counts['stream'])} | {_three(counts['all_sites'])} |"


def _three(counts: Mapping[str, int]) -> str:
    return " / ".join(str(counts.get(name, 0)) for name in VERDICTS)


def _place(row: Mapping[str, Any]) -> str:
    names = [row["component"]] if row["component"] else [str(row[name]) for name in FACTORS]
    where = " ".join([*names, str(row["pattern"]), f"T={row['n_tokens']} layer {row['depth']} {row['site']}"])
    return f"{where}: {row['deviation']:+.3f} ± {row['deviation_stderr']:.3f}, claimed {row['theory_error']:.3f}"
