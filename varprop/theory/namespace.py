"""Functions that numpy lacks, for closed forms written over an array namespace `xp` (numpy or sympy), and the check of
a formula's arguments.

numpy 2 and sympy share `sqrt exp log pi acos atan`; a closed form takes those from `xp` and the rest from here.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np
import scipy.special

from varprop.errors import AssumptionError, require


def erf(x: Any, xp: Any = np) -> Any:
    """The error function."""
    return scipy.special.erf(x) if xp is np else xp.erf(x)


def erfcinv(x: Any, xp: Any = np) -> Any:
    """The inverse of 1 - erf, accurate for tiny x."""
    return scipy.special.erfcinv(x) if xp is np else xp.erfinv(1 - x)


def harmonic(n: Any, xp: Any = np) -> Any:
    """1 + 1/2 + ... + 1/n."""
    return scipy.special.digamma(np.asarray(n) + 1.0) + np.euler_gamma if xp is np else xp.harmonic(n)


def normal_density(x: Any, xp: Any = np) -> Any:
    """The standard normal density."""
    return xp.exp(-(x**2) / 2) / xp.sqrt(2 * xp.pi)


def clip_correlation(x: Any, xp: Any = np) -> Any:
    """A correlation put back into [-1, 1] after rounding; symbols pass through."""
    return np.clip(x, -1.0, 1.0) if xp is np else x


def checked(name: str, value: Any, expected: str, low: float = -math.inf, high: float = math.inf) -> Any:
    """`value`, a finite number or array of numbers in [low, high] (sequences as arrays); symbols pass through.

    Raises `AssumptionError` with `expected` as the domain; an array is named by its first entry outside.

    >>> checked("density", 0.5, "a number in (0, 1]", 1e-300, 1.0)
    0.5
    """
    if hasattr(value, "free_symbols"):
        return value
    if isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_)):
        number: Any = value
        good = -math.inf < number < math.inf and low <= number <= high
        require(good, AssumptionError, name, value, "outside the domain", expected)
        return value
    try:
        array = np.asarray(value)
    except ValueError:  # a ragged sequence
        array = np.asarray(None)
    numeric = array.dtype.kind in "fiu" and not isinstance(value, (str, bool))
    require(numeric, AssumptionError, name, value, "not a number or an array of numbers", expected)
    bad = ~(np.isfinite(array) & (array >= low) & (array <= high))
    if bad.any():
        require(False, AssumptionError, name, array[bad].ravel()[0].item(), "outside the domain", expected)
    return array
