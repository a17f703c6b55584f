"""Networks with random weights: what the closed forms predict, measured."""

from varprop.simulate.grid import grid
from varprop.simulate.inputs import load_array
from varprop.simulate.sampling import sample
from varprop.simulate.text import repetition, same_token, text_tokens

__all__ = ["grid", "load_array", "repetition", "same_token", "sample", "text_tokens"]
