"""Networks with random weights: what the closed forms predict, measured."""

from varprop.simulate.sampling import sample

__all__ = ["sample"]
