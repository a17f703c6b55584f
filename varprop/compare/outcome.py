"""The outcome of `check`, and how it is printed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

VERDICTS = ("disagrees", "underpowered", "agrees", "absent")
SHOWN_ROWS = 12


@dataclass(frozen=True)
class Check:
    """The outcome of `check`. `dataset` holds all of it, so that `Check(results.load(path))` is the saved outcome."""

    dataset: xr.Dataset

    @property
    def verdict(self) -> str:
        """`disagrees` if any cell does, else `underpowered` if any cell is, else `agrees`."""
        return str(self.dataset.attrs["verdict"])

    @property
    def detectable(self) -> float:
        """The error that every cell would have shown with probability 0.9: the largest over the cells."""
        return float(self.dataset.attrs["detectable"])

    @property
    def false_fail_rate(self) -> float:
        """The chance that a correct prediction gets the verdict `disagrees`."""
        return float(self.dataset.attrs["false_fail_rate"])

    @property
    def resolution(self) -> float:
        """The error beyond the claimed one that the check was asked to resolve."""
        return float(self.dataset.attrs["resolution"])

    @property
    def n_networks(self) -> int:
        """Independent networks (or trainings) measured."""
        return int(self.dataset.attrs["n_networks"])

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary per cell that exists: layer, site and every variable of `dataset`."""
        names = [str(name) for name in self.dataset.data_vars]
        columns = {name: self.dataset[name].transpose("layer", "site").values for name in names}
        layers, sites = self.dataset.layer.values, self.dataset.site.values
        return [
            {"layer": int(layers[i]), "site": str(sites[j]), **{name: columns[name][i, j] for name in names}}
            for i, j in np.argwhere(columns["verdict"] != "absent")
        ]

    def headline(self) -> str:
        """The verdict, with what it rests on, in one line."""
        counts = [str(row["verdict"]) for row in self.rows()]
        parts = ", ".join(f"{counts.count(name)} {name}" for name in VERDICTS if name in counts)
        excess = max((row["detectable"] - row["theory_error"] for row in self.rows()), default=np.nan)
        neglected = float(self.dataset.attrs.get("method_error", 0.0))
        method = f", of which {_percent(neglected)} of the sampling method" if neglected else ""
        return (
            f"{self.dataset.attrs['variable']}: {self.verdict} ({parts}; {self.n_networks} networks, false-fail rate"
            f" {self.false_fail_rate:.3g}, would see an error of {_percent(excess)} beyond the"
            f" claimed one{method} in every cell, asked for {_percent(self.resolution)})"
        )

    def table(self) -> str:
        """Every cell as a text table."""
        return "\n".join(_lines(self.rows()))

    def telling_rows(self) -> list[dict[str, Any]]:
        """The `SHOWN_ROWS` rows nearest to trouble, in the order of the layers."""
        return sorted(sorted(self.rows(), key=_urgency)[:SHOWN_ROWS], key=lambda row: row["layer"])

    def __str__(self) -> str:
        shown, total = self.telling_rows(), len(self.rows())
        lines = [self.headline(), *_lines(shown)]
        if total > len(shown):
            lines.append(f"... and {total - len(shown)} cells less telling than these; table() has all")
        return "\n".join(lines)


def _urgency(row: dict[str, Any]) -> tuple[int, float, float]:
    """Disagreeing cells first by p-value, then underpowered by what they would miss, then those nearest the edge."""
    verdict = row["verdict"]
    room = row["theory_error"] - abs(row["deviation"])
    return VERDICTS.index(verdict), -row["detectable"] if verdict == "underpowered" else row["p_value"], room


def _percent(error: float) -> str:
    return f"{100 * error:.2g} %" if error < 1 else f"{100 * error:,.0f} %"


def _lines(rows: list[dict[str, Any]]) -> list[str]:
    """Aligned columns; ratio where there is one, else the difference."""
    head = f"{'layer':>5} {'site':<10} {'prediction':>11} {'estimate':>11} {'stderr':>9} "
    head += f"{'ratio' if rows and 'ratio' in rows[0] else 'difference':>10} {'claimed':>8} {'p-value':>8} "
    lines = [head + f"{'detectable':>10}  verdict"]
    for row in rows:
        compared = row["ratio"] if "ratio" in row else row["deviation"]
        line = f"{row['layer']:>5} {row['site']:<10} {row['prediction']:>11.5g} {row['estimate']:>11.5g} "
        line += f"{row['stderr']:>9.2g} {compared:>10.4g} {_percent(row['theory_error']):>8} {row['p_value']:>8.2g} "
        lines.append(line + f"{_percent(row['detectable']):>10}  {row['verdict']}")
    return lines
