"""What a model is: `ModelSpec`, its parts, and the table of its tensors. Standard library only."""

from varprop.spec.model import ModelSpec
from varprop.spec.parts import (
    AttentionSpec,
    FeedForwardSpec,
    InitSpec,
    MaskSpec,
    MoESpec,
    NormSpec,
    ResidualSpec,
    WeightMasks,
)
from varprop.spec.tensors import TensorRow, layer_table

__all__ = [
    "AttentionSpec",
    "FeedForwardSpec",
    "InitSpec",
    "MaskSpec",
    "MoESpec",
    "ModelSpec",
    "NormSpec",
    "ResidualSpec",
    "TensorRow",
    "WeightMasks",
    "layer_table",
]
