"""Networks with random weights: what the closed forms predict, measured."""

from varprop.simulate.grid import grid
from varprop.simulate.required import required_networks
from varprop.simulate.sampling import sample

__all__ = ["grid", "required_networks", "sample"]
