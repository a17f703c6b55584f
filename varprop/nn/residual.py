"""The residual sum around a branch, for every norm placement of `NormSpec`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from varprop.nn.linear import Weights
from varprop.nn.norm import norm
from varprop.spec import ModelSpec

DEPTH_FACTOR = "depth_factor"
"""Name among the weights of 1 / sqrt(layer), where it is given as a tensor."""


def added(
    x: Tensor, weights: Weights, spec: ModelSpec, layer: int, name: str, branch: Callable[[Tensor], Tensor]
) -> Tensor:
    """What a branch adds to the stream x: norms inside the branch and the branch multiplier included.

    name: `attention` or `mlp`; its norms are `<name>_norm` and, for `peri`, `<name>_out_norm`.
    """
    placement = spec.norm_placement(layer)
    y = branch(branch_input(x, weights, spec, layer, name))
    if placement == "peri":
        y = norm(y, weights, spec, f"{name}_out_norm")
    if placement == "reordered":
        y = norm(y, weights, spec, f"{name}_norm")
    return scaled(spec.branch_scale, y)


def branch_input(x: Tensor, weights: Weights, spec: ModelSpec, layer: int, name: str) -> Tensor:
    """What a branch reads of the stream x: its norm where one stands before the branch, else x itself."""
    placement = spec.norm_placement(layer)
    if placement not in ("pre", "peri", "lns"):
        return x
    y = norm(x, weights, spec, f"{name}_norm")
    # A tensor where layers share one compiled block: a number would be compiled into it.
    return y * weights.get(DEPTH_FACTOR, layer**-0.5) if placement == "lns" else y


def scaled(factor: float, x: Tensor) -> Tensor:
    """factor * x, without a pass over x where the factor is 1."""
    return x if factor == 1 else factor * x


def close(total: Tensor, weights: Weights, spec: ModelSpec, layer: int, name: str) -> Tensor:
    """The stream after a residual sum: the sum itself, or its norm where the placement is `post`."""
    return norm(total, weights, spec, f"{name}_norm") if spec.norm_placement(layer) == "post" else total
