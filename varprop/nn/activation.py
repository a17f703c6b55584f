"""Elementwise activations by the names of `varprop.spec.parts.Activation`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional


def _relu2(x: Tensor) -> Tensor:
    return functional.relu(x).square()


def _gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


def _identity(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "relu2": _relu2,
    "gelu": functional.gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": functional.silu,
    "identity": _identity,
}
