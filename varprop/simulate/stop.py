"""When a point of a grid has networks enough: a target standard error, and budgets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from varprop.errors import ArgumentError, require
from varprop.results import SITES
from varprop.simulate.recorder import AT_SITES

ABSOLUTE = ("token_correlation",)
"""Variables whose target is absolute: they may be 0."""


@dataclass(frozen=True)
class StopRule:
    """Draw networks at every point until the standard error of a mean over them is at most `stderr`.

    stderr: of the mean over networks of `variable` at `site` of the last layer, relative to that mean (absolute for
    `token_correlation`). It is looked at after each round from `min_networks` on; a point also ends at the grid's
    `n_networks`. The decisions depend on the numbers alone, so that an interrupted run ends like an undisturbed one.
    max_networks: of all points together; each may use an equal share. max_seconds: no round begins later; what is
    finished by then depends on the machine.

    Exactness: the number of networks looks at the data, so that a 95 % t interval of the mean of log-normal values
    (spread of the logarithm 0.1 to 1, targets 2 to 5 %) misses in 5 to 7 % of cases; in 10 % with spread 1 and a target
    of 10 %, where few networks are drawn. There the interval on the log scale (`summarise`) misses in 4 %, and the
    mean itself is low by 1.6 % (0.16 standard errors), as the rule stops early at low values. Checked by:
    tests/simulate/test_stop.py.

    >>> round(StopRule(stderr=0.01).error(np.array([1.0, 1.1, 0.9, 1.0])), 4)
    0.0408
    """

    stderr: float
    min_networks: int = 16
    variable: str = "second_moment"
    site: str = "resid_post"
    max_networks: int | None = None
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        whole = "an integer >= {}"
        self._check("stderr", self.stderr, _is_number(self.stderr) and self.stderr > 0, "a number > 0")
        self._check("min_networks", self.min_networks, _is_integer(self.min_networks, 2), whole.format(2))
        self._check("variable", self.variable, self.variable in AT_SITES, "one of " + ", ".join(AT_SITES))
        self._check("site", self.site, self.site in SITES, "one of " + ", ".join(SITES))
        networks, seconds = self.max_networks, self.max_seconds
        self._check("max_networks", networks, networks is None or _is_integer(networks, 1), whole.format(1))
        for name in ("min_networks", "max_networks"):  # JSON has no integers of numpy
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else int(value))
        self._check("max_seconds", seconds, seconds is None or (_is_number(seconds) and seconds > 0), "a number > 0")

    def _check(self, name: str, value: Any, good: bool, expected: str) -> None:
        require(good, ArgumentError, f"stop.{name}", value, "outside the domain", expected)

    def error(self, values: NDArray[np.float64]) -> float:
        """Standard error of the mean of one value per network, as the rule measures it; 0 where all are 0."""
        stderr = float(values.std(ddof=1)) / len(values) ** 0.5
        if self.variable in ABSOLUTE or stderr == 0:
            return stderr
        return stderr / abs(float(values.mean()))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_integer(value: Any, least: int) -> bool:
    return bool(isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value >= least)
