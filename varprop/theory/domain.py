"""The check of a closed form's arguments, with the text of the interval made from its ends."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from varprop.errors import AssumptionError, require
from varprop.theory.namespace import checked


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
    domain = f" in {bracket}{low:g}, {high:g}]" if math.isfinite(high) else f" {'>' if above else '>='} {low:g}"
    array = np.asarray(checked(name, value, kind + domain, math.nextafter(low, math.inf) if above else low, high))
    require(not integer or array.dtype.kind in "iu", AssumptionError, name, value, "not an integer", kind + domain)
