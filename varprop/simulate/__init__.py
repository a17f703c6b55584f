"""Networks with random weights: what the closed forms predict, measured."""

from varprop.simulate.grid import grid
from varprop.simulate.sampling import sample
from varprop.simulate.stop import StopRule

__all__ = ["StopRule", "grid", "sample"]
