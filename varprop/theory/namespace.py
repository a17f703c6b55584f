"""Functions that numpy lacks, for closed forms written over an array namespace `xp` (numpy or sympy).

numpy 2 and sympy share `sqrt exp log pi asin acos`; a closed form takes those from `xp` and the rest from here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.special


def erf(x: Any, xp: Any = np) -> Any:
    """The error function."""
    return scipy.special.erf(x) if xp is np else xp.erf(x)


def erfinv(x: Any, xp: Any = np) -> Any:
    """The inverse error function."""
    return scipy.special.erfinv(x) if xp is np else xp.erfinv(x)


def normal_density(x: Any, xp: Any = np) -> Any:
    """The standard normal density."""
    return xp.exp(-(x**2) / 2) / xp.sqrt(2 * xp.pi)


def clip_correlation(x: Any, xp: Any = np) -> Any:
    """A correlation put back into [-1, 1] after rounding; symbols pass through."""
    return np.clip(x, -1.0, 1.0) if xp is np else x
