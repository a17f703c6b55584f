"""What the networks of a simulation read: Gaussian tokens, given vectors, or token ids.

Legend: S sequences, T tokens, D d_model.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from varprop.errors import ArgumentError, AssumptionError, require
from varprop.results import sha256_of_array
from varprop.spec import ModelSpec
from varprop.theory.depth import checked_correlation

MAX_TOKENS = 10**9
LARGEST_NETWORK = 10**15
"""Labels of networks are exact below."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """Embedding outputs for stacks of networks.

    token_correlation: of Gaussian tokens, a number or a matrix (T, T). values: vectors (S, T, d_model) or ids (S, T),
    None for Gaussian tokens.
    """

    spec: ModelSpec
    n_tokens: int
    token_correlation: float | np.ndarray
    values: np.ndarray | None = None

    @property
    def attributes(self) -> dict[str, Any]:
        """What a result says of them: `inputs` is `gaussian` or the SHA-256 of the array as float64 or int64 (S, ...).

        `token_correlation` is the number or the SHA-256 of the matrix, `n_sequences` is empty for Gaussian tokens.
        """
        correlation = self.token_correlation
        return {
            "inputs": "gaussian" if self.values is None else sha256_of_array(self.values),
            "n_sequences": "" if self.values is None else len(self.values),
            "token_correlation": sha256_of_array(correlation) if isinstance(correlation, np.ndarray) else correlation,
        }

    def draw(self, n_networks: int, generator: torch.Generator, first: int = 0) -> Tensor:
        """The stream at layer 0 of the networks first, first + 1, ...: (n_networks, T, D).

        Gaussian tokens: sqrt(q_0) (sqrt(c) z + sqrt(1 - c) z_t), or sqrt(q_0) C^(1/2) z for a matrix C, fresh for each
        network, q_0 = (embedding std * embedding_scale)^2. Given sequences: network i reads sequence i mod S, either
        as it is or through its own embedding rows of that second moment.
        """
        d_model, device = self.spec.d_model, generator.device
        scale = self.spec.tensor_table()[0].init_std * self.spec.embedding_scale

        def normal(n_rows: int) -> Tensor:
            return torch.randn(n_networks, n_rows, d_model, generator=generator, device=device)

        if self.values is not None:
            sequence = torch.arange(first, first + n_networks) % len(self.values)
            if self.values.dtype.kind == "f":
                return torch.from_numpy(self.values)[sequence].to(device)
            rows, n_rows = self._rows
            return scale * torch.take_along_dim(normal(n_rows), rows[sequence][:, :, None].to(device), dim=1)
        if isinstance(self.token_correlation, np.ndarray):
            return scale * (self._root.to(device) @ normal(self.n_tokens).double()).float()
        c = self.token_correlation
        return scale * (c**0.5 * normal(1) + (1 - c) ** 0.5 * normal(self.n_tokens))

    @functools.cached_property
    def _rows(self) -> tuple[Tensor, int]:
        """Which of its embedding rows a network puts at each position, (S, T), and how many rows are drawn."""
        assert self.values is not None
        rows = np.stack([np.unique(ids, return_inverse=True)[1] for ids in self.values])
        return torch.from_numpy(rows), int(rows.max()) + 1

    @functools.cached_property
    def _root(self) -> Tensor:
        """A matrix R (T, T) with R R^T = C, for singular C too."""
        eigenvalues, vectors = torch.linalg.eigh(torch.from_numpy(np.asarray(self.token_correlation)))
        return vectors * eigenvalues.clamp(min=0.0).sqrt()


def read_inputs(spec: ModelSpec, n_tokens: int | None, token_correlation: Any, inputs: Any) -> Inputs:
    """Checked inputs: exactly one of `n_tokens` and `inputs`; `ArgumentError` otherwise."""
    if inputs is None:
        require(n_tokens is not None, ArgumentError, "n_tokens", None, "missing", "n_tokens or inputs")
        n_tokens = positive_integer("n_tokens", n_tokens, maximum=MAX_TOKENS)
        return Inputs(spec, n_tokens, _correlation(token_correlation, n_tokens))
    require(n_tokens is None, ArgumentError, "n_tokens", n_tokens, "given with inputs", "n_tokens or inputs, not both")
    wrong, zero = "given with inputs", isinstance(token_correlation, (int, float)) and token_correlation == 0
    require(zero, ArgumentError, "token_correlation", token_correlation, wrong, "n_tokens, or 0")
    try:
        array = np.ascontiguousarray(inputs)
    except ValueError:
        raise ArgumentError("inputs=array is ragged; expected rows of one length") from None
    kind = f"an array of {array.dtype} with shape {array.shape}"
    domain = f"floats ([n_sequences,] n_tokens, {spec.d_model}) or token ids ([n_sequences,] n_tokens)"
    floating = array.dtype.kind == "f" and array.ndim in (2, 3) and array.shape[-1] == spec.d_model
    ids = array.dtype.kind in "iu" and array.ndim in (1, 2)
    if not array.size or not (floating or ids):
        raise ArgumentError(f"inputs=array is {kind}; expected {domain}")
    if floating:
        if not np.isfinite(array).all():
            raise ArgumentError("inputs=array is not finite; expected finite numbers")
        array = array.astype(np.float64).reshape(-1, *array.shape[-2:])
        return Inputs(spec, array.shape[1], 0.0, array)
    if array.min() < 0 or array.max() >= spec.vocab_size:
        raise ArgumentError(f"inputs=array has ids outside the vocabulary; expected ids in 0..{spec.vocab_size - 1}")
    array = array.astype(np.int64).reshape(-1, array.shape[-1])
    return Inputs(spec, array.shape[1], 0.0, array)


def load_array(path: str | Path) -> np.ndarray:
    """The array of a .npy file; `ArgumentError` for a missing, damaged or pickled one."""
    try:
        with Path(path).open("rb") as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ArgumentError(f"inputs={str(path)!r} cannot be read ({reason}); expected a .npy file") from None
    except (ValueError, EOFError):
        raise ArgumentError(f"inputs={str(path)!r} is no whole array of numbers; expected a .npy file") from None


def _correlation(value: Any, n_tokens: int) -> float | np.ndarray:
    """The domain of the theory; a matrix as contiguous float64."""
    try:
        checked = checked_correlation(value, n_tokens)
    except AssumptionError as error:
        raise ArgumentError(str(error)) from None
    except ValueError:
        raise ArgumentError("token_correlation=array is ragged; expected a square matrix") from None
    return checked if isinstance(checked, float) else np.ascontiguousarray(checked, dtype=np.float64)


def positive_integer(name: str, value: Any, minimum: int = 1, maximum: int | None = None) -> int:
    """`value` as an int, or `ArgumentError` unless it is an integer in minimum..maximum."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    inside = whole and int(value) >= minimum and (maximum is None or int(value) <= maximum)
    above = whole and int(value) > minimum
    domain = f"an integer up to {maximum}" if above else f"an integer >= {minimum}"
    require(inside, ArgumentError, name, value, "outside the domain", domain)
    return int(value)
