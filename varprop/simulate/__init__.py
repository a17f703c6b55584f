"""Networks with random weights: what the closed forms predict, measured."""

from varprop.simulate.collect import Status, assemble, status
from varprop.simulate.grid import grid, help_with, run_plan
from varprop.simulate.grid_file import read_grid
from varprop.simulate.plan import Plan, make_plan
from varprop.simulate.sampling import sample
from varprop.simulate.stop import StopRule

__all__ = [
    "Plan",
    "Status",
    "StopRule",
    "assemble",
    "grid",
    "help_with",
    "make_plan",
    "read_grid",
    "run_plan",
    "sample",
    "status",
]
