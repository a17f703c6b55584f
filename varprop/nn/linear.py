"""Matrices and vectors of a layer, by name, shared or one per network.

Weights are (out, in), or (*lead, out, in) with the leading axes of x of shape (*lead, T, in): the same code then runs
a batch with shared weights (training) and a stack of networks with their own (simulation).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class LinearMap(Protocol):
    """What stands for a matrix that is never formed (`varprop.simulate.gram`)."""

    def apply(self, x: Tensor) -> Tensor:
        """The image (*lead, T, out) of x (*lead, T, in)."""
        ...


Weights = Mapping[str, Any]
"""Effective (already masked) weights of a layer by their name in `varprop.spec.layer_table`: vectors are tensors,
matrices are tensors or `LinearMap`s."""


def multiply(x: Tensor, matrix: Tensor | LinearMap) -> Tensor:
    """x W^T, (*lead, T, out)."""
    return x @ matrix.mT if isinstance(matrix, Tensor) else matrix.apply(x)


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    """x W^T plus the bias `<name>_bias` where the layer has one."""
    y = multiply(x, weights[name])
    bias = f"{name}_bias"
    return y + per_token(weights[bias]) if bias in weights else y


def packed_linear(x: Tensor, weights: Weights, names: Sequence[str]) -> Tensor:
    """`linear` of several plain matrices (out, in) that read the same x, side by side: one product."""
    y = x @ torch.cat([weights[name] for name in names]).mT
    biased = f"{names[0]}_bias" in weights
    return y + torch.cat([weights[f"{name}_bias"] for name in names]) if biased else y


def per_token(vector: Tensor) -> Tensor:
    """A vector (D) or (*lead, D) as (1, D) or (*lead, 1, D): the same for every token."""
    return vector.unsqueeze(-2)
