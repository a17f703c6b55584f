"""Networks with random weights: what the closed forms predict, measured."""

from varprop.simulate.grid import grid
from varprop.simulate.sampling import sample

__all__ = ["grid", "sample"]
