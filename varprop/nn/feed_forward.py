"""The feed-forward part: `down(phi(up x))`, or gated `down(phi(gate x) * up x)`."""

from __future__ import annotations

from torch import Tensor

from varprop.nn import kernels
from varprop.nn.activation import ACTIVATIONS
from varprop.nn.linear import Weights, linear, packed_linear
from varprop.spec import ModelSpec


def feed_forward(x: Tensor, weights: Weights, spec: ModelSpec, layer: int) -> Tensor:
    """Output of the dense feed-forward of a layer, (*lead, T, D)."""
    assert spec.feed_forward is not None
    return two_layers(x, weights, "mlp", spec.feed_forward.activation)


def two_layers(x: Tensor, weights: Weights, prefix: str, activation: str) -> Tensor:
    """The feed-forward whose weights are `<prefix>.up`, `<prefix>.down` and, where present, `<prefix>.gate`."""
    phi = ACTIVATIONS[activation]
    if f"{prefix}.gate" not in weights:
        inner = phi(linear(x, weights, f"{prefix}.up"))
    elif activation == "silu" and kernels.serves(x, weights[f"{prefix}.gate"]):
        inner = kernels.swiglu(packed_linear(x, weights, (f"{prefix}.gate", f"{prefix}.up")))
    else:
        inner = phi(linear(x, weights, f"{prefix}.gate")) * linear(x, weights, f"{prefix}.up")
    return linear(inner, weights, f"{prefix}.down")
