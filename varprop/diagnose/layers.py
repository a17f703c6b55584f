"""How scores of layers 1..L are laid out in a result, whose layer 0 is the embedding."""

from __future__ import annotations

import numpy as np

PAIRS = ("source_layer", "target_layer")
"""Dimensions of a matrix over pairs of layers."""


def from_1(values: np.ndarray, n_axes: int = 1) -> np.ndarray:
    """Values whose first `n_axes` axes are layers 1..L as those of layers 0..L, NaN at layer 0.

    >>> from_1(np.array([0.5, 0.25]))
    array([ nan, 0.5 , 0.25])
    >>> from_1(np.ones((1, 1)), 2)
    array([[nan, nan],
           [nan,  1.]])
    """
    widths = [(1, 0)] * n_axes + [(0, 0)] * (values.ndim - n_axes)
    return np.pad(values, widths, constant_values=np.nan)
