"""Networks with random weights: what the closed forms predict, measured."""

from varprop.simulate.collect import Status, assemble, status
from varprop.simulate.grid import grid, help_with, run_plan
from varprop.simulate.grid_file import describe as describe_grid_file
from varprop.simulate.grid_file import read_grid
from varprop.simulate.inputs import load_array
from varprop.simulate.plan import Plan, make_plan
from varprop.simulate.required import required_networks
from varprop.simulate.sampling import sample
from varprop.simulate.stop import StopRule
from varprop.simulate.text import repetition, same_token, text_tokens

__all__ = [
    "Plan",
    "Status",
    "StopRule",
    "assemble",
    "describe_grid_file",
    "grid",
    "help_with",
    "load_array",
    "make_plan",
    "read_grid",
    "repetition",
    "required_networks",
    "run_plan",
    "same_token",
    "sample",
    "status",
    "text_tokens",
]
