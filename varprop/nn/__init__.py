"""The finite network in torch: one readable transformer that any `ModelSpec` builds, for simulation and training."""

from varprop.nn.block import Block, Record, block_forward
from varprop.nn.init import draw_layer
from varprop.nn.transformer import Transformer

__all__ = ["Block", "Record", "Transformer", "block_forward", "draw_layer"]
