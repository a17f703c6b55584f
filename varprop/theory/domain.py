"""One check of the numbers that a closed form takes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from varprop.errors import AssumptionError, require


def check_number(
    name: str, value: Any, low: float, high: float = math.inf, *, above: bool = False, integer: bool = False
) -> None:
    """Raise `AssumptionError` unless value (a real number or an array of them) is finite and in [low, high].

    above: low itself is outside. integer: whole numbers only. Strings, booleans, None and NaN are outside.

    >>> check_number("density", 0.5, 0, 1, above=True)
    >>> check_number("density", 0.0, 0, 1, above=True)
    Traceback (most recent call last):
    varprop.errors.AssumptionError: density=0.0 is outside the domain; expected a number in (0, 1]
    """
    kind = "an integer" if integer else "a number"
    bracket = "(" if above else "["
    interval = f" in {bracket}{low:g}, {high:g}]" if math.isfinite(high) else f" {'>' if above else '>='} {low:g}"
    array = np.asarray(value)
    good = array.dtype.kind in ("iu" if integer else "iuf") and bool(np.isfinite(array).all())
    good = good and bool(((array > low) if above else (array >= low)).all() and (array <= high).all())
    require(good, AssumptionError, name, value, "outside the domain", kind + (interval if low > -math.inf else ""))
