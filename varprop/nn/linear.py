"""Matrices and vectors of a layer, by name, shared or one per network.

Weights are (out, in), or (*lead, out, in) with the leading axes of x of shape (*lead, T, in): the same code then runs
a batch with shared weights (training) and a stack of networks with their own (simulation).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

Weights = Mapping[str, Tensor]
"""Effective (already masked) weights of a layer by their name in `varprop.spec.layer_table`."""


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    """x W^T plus the bias `<name>_bias` where the layer has one."""
    y = x @ weights[name].mT
    bias = f"{name}_bias"
    return y + per_token(weights[bias]) if bias in weights else y


def per_token(vector: Tensor) -> Tensor:
    """A vector (D) or (*lead, D) as (1, D) or (*lead, 1, D): the same for every token."""
    return vector.unsqueeze(-2)
