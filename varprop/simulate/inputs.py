"""What the networks of a simulation read: Gaussian tokens, given vectors, or token ids."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from varprop.errors import ArgumentError, require
from varprop.spec import ModelSpec


@dataclass(frozen=True)
class Inputs:
    """Embedding outputs for stacks of networks. `values` is None for Gaussian tokens."""

    spec: ModelSpec
    n_tokens: int
    token_correlation: float
    values: np.ndarray | None = None

    @property
    def label(self) -> str:
        """`gaussian`, or the SHA-256 of the array given, as float64 or int64."""
        if self.values is None:
            return "gaussian"
        header = f"{self.values.dtype.str}{self.values.shape}".encode()
        return "sha256:" + hashlib.sha256(header + self.values.tobytes()).hexdigest()

    def draw(self, n_networks: int, generator: torch.Generator) -> Tensor:
        """The stream at layer 0, (n_networks, T, D): float32 and fresh for each network, or the vectors given.

        Gaussian tokens: sqrt(q_0) (sqrt(c) z + sqrt(1 - c) z_t), q_0 = (embedding std * embedding_scale)^2.
        """
        d_model = self.spec.d_model
        scale = self.spec.tensor_table()[0].init_std * self.spec.embedding_scale

        def normal(n_rows: int) -> Tensor:
            return torch.randn(n_networks, n_rows, d_model, generator=generator, device=generator.device)

        if self.values is None:
            c = self.token_correlation
            return scale * (c**0.5 * normal(1) + (1 - c) ** 0.5 * normal(self.n_tokens))
        if self.values.dtype.kind == "f":
            return torch.tensor(self.values, device=generator.device).expand(n_networks, -1, -1)
        distinct, row = np.unique(self.values, return_inverse=True)
        return scale * normal(len(distinct))[:, torch.from_numpy(row).to(generator.device)]


def read_inputs(spec: ModelSpec, n_tokens: int | None, token_correlation: float, inputs: Any) -> Inputs:
    """Checked inputs: exactly one of `n_tokens` and `inputs`; `ArgumentError` otherwise."""
    number = isinstance(token_correlation, (int, float, np.number)) and 0 <= float(token_correlation) <= 1
    outside, domain = "outside the domain", "a number in [0, 1]"
    require(number, ArgumentError, "token_correlation", token_correlation, outside, domain)
    correlation = float(token_correlation)
    if inputs is None:
        require(n_tokens is not None, ArgumentError, "n_tokens", None, "missing", "n_tokens or inputs")
        return Inputs(spec, positive_integer("n_tokens", n_tokens), correlation)
    require(n_tokens is None, ArgumentError, "n_tokens", n_tokens, "given with inputs", "n_tokens or inputs, not both")
    wrong = "given with inputs"
    require(correlation == 0, ArgumentError, "token_correlation", token_correlation, wrong, "n_tokens, or 0")
    try:
        array = np.ascontiguousarray(inputs)
    except ValueError:
        raise ArgumentError("inputs=array is ragged; expected rows of one length") from None
    kind = f"an array of {array.dtype} with shape {array.shape}"
    domain = f"floats (n_tokens, {spec.d_model}) or token ids (n_tokens,)"
    if array.dtype.kind == "f" and array.ndim == 2 and array.shape[0] and array.shape[1] == spec.d_model:
        if not np.isfinite(array).all():
            raise ArgumentError("inputs=array is not finite; expected finite numbers")
        return Inputs(spec, array.shape[0], 0.0, array.astype(np.float64))
    if array.dtype.kind not in "iu" or array.ndim != 1 or not array.size:
        raise ArgumentError(f"inputs=array is {kind}; expected {domain}")
    if array.min() < 0 or array.max() >= spec.vocab_size:
        raise ArgumentError(f"inputs=array has ids outside the vocabulary; expected ids in 0..{spec.vocab_size - 1}")
    return Inputs(spec, len(array), 0.0, array.astype(np.int64))


def positive_integer(name: str, value: Any, minimum: int = 1) -> int:
    """`value` as an int, or `ArgumentError` unless it is an integer >= minimum."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    inside = whole and int(value) >= minimum
    require(inside, ArgumentError, name, value, "outside the domain", f"an integer >= {minimum}")
    return int(value)
