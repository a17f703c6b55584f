"""What is read off weights and gradients: per layer and matrix, as (L + 1, matrices) tables with NaN where none is.

Matrices are those of the blocks, by the labels of `matrix_labels`; a stack of experts is one matrix. Tables are float64
on the device of the model. Masked entries are zeros. Of sharded tensors one matrix at a time is gathered, so all ranks
have to call these functions; they get the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from varprop.errors import ArgumentError
from varprop.measure import (
    effective_density_participation,
    effective_density_threshold_tenth_rms,
    rms,
    stable_rank,
)
from varprop.nn.parameters import MASK_SUFFIX
from varprop.spec import ModelSpec
from varprop.spec.tensors import TensorRow
from varprop.train.distributed import full

STATISTICS = (
    *("weight_norm", "weight_rms", "effective_density_participation", "effective_density_threshold_tenth_rms"),
    "stable_rank",
)
DIMENSIONS: dict[str, tuple[str, ...]] = dict.fromkeys(
    (*STATISTICS, "matrix_gradient_norm", "update_ratio"), ("layer", "matrix")
)
"""Variable -> the dimensions of its tensor."""
GROUP_NUMBERS = 2**26
"""Weights that are worked on at a time, or one matrix: 256 MiB in float32, twice that in float64."""


def matrix_labels(spec: ModelSpec) -> list[str]:
    """Labels of the matrices of the blocks of `spec`, in the order in which a forward pass first reads them.

    q k v o, gate up down of a dense feed-forward, router, experts.up and so on, shared.up and so on, shared_gate.

    >>> from varprop import presets
    >>> matrix_labels(presets.tiny())
    ['q', 'k', 'v', 'o', 'gate', 'up', 'down']
    """
    return list(dict.fromkeys(_label(row) for row in _matrices(spec)))


@torch.no_grad()
def weight_statistics(model: nn.Module, spec: ModelSpec) -> dict[str, Tensor]:
    """Norm, rms, effective densities and stable rank of every matrix: by name a table (L + 1, matrices).

    weight_norm: Frobenius norm. weight_rms, effective_density_participation, effective_density_threshold_tenth_rms,
    stable_rank: as in `measure.weights`. Of a stack of experts the norm is that of the stack, the rms that over all
    entries, the others means over the experts. model: parameters and masks by the names of `spec.tensor_table()`.
    Memory: `GROUP_NUMBERS` in float64, a few times: layers are worked on together, as many as that allows.
    Checked by: tests/train/test_weights.py, numpy and SVD.
    """
    tables = {name: _table(model, spec) for name in STATISTICS}
    parameters = dict(model.named_parameters())
    for rows, layers, column in _groups(spec):
        stack = torch.stack([_effective(parameters[row.name], row, model) for row in rows])
        w = stack.reshape(len(rows), -1, *stack.shape[-2:])  # (layers, 1 or experts, out, in)
        mean_square = rms(w).square().mean(dim=1)
        found = {
            "weight_norm": (mean_square * w[0].numel()).sqrt(),
            "weight_rms": mean_square.sqrt(),
            "effective_density_participation": effective_density_participation(w).mean(dim=1),
            "effective_density_threshold_tenth_rms": effective_density_threshold_tenth_rms(w).mean(dim=1),
            "stable_rank": stable_rank(w).mean(dim=1),
        }
        for name, values in found.items():
            tables[name][layers, column] = values
    return tables


@torch.no_grad()
def gradient_norms(model: nn.Module, spec: ModelSpec) -> dict[str, Tensor]:
    """matrix_gradient_norm: the Frobenius norm of the gradient of every matrix, (L + 1, matrices).

    Call it between the backward pass and the update; before clipping it is the gradient of the loss. Their squares
    and those of the other tensors sum to the square of the global norm. Raises `ArgumentError` where there is none.
    """
    table = _table(model, spec)
    parameters = dict(model.named_parameters())
    for row, place in _places(spec):
        gradient = parameters[row.name].grad
        if gradient is None:
            raise ArgumentError(f"gradient={row.name!r} is missing; expected one: call it after the backward pass")
        table[place] = torch.linalg.vector_norm(full(gradient), dtype=torch.float64)
    return {"matrix_gradient_norm": table}


class WeightSnapshot:
    """The matrices of a model as they were, to compare with: memory of one copy of them (of this rank's shards)."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, spec: ModelSpec) -> None:
        self._spec = spec
        parameters = dict(model.named_parameters())
        self._before = {row.name: parameters[row.name].detach().clone() for row, _ in _places(spec)}

    @torch.no_grad()
    def update_ratios(self, model: nn.Module) -> dict[str, Tensor]:
        """update_ratio: |w_now - w_before| / |w_before| of every matrix, (L + 1, matrices), masked entries left out.

        0 where a matrix was and is zero, infinite where it was zero and is not.
        """
        table = _table(model, self._spec)
        parameters = dict(model.named_parameters())
        for row, place in _places(self._spec):
            before = self._before[row.name]
            change = _effective(parameters[row.name].detach() - before, row, model)
            moved, size = (
                torch.linalg.vector_norm(w, dtype=torch.float64) for w in (change, _effective(before, row, model))
            )
            table[place] = torch.where(moved > 0, moved / size, 0.0)
        return {"update_ratio": table}


def _matrices(spec: ModelSpec) -> list[TensorRow]:
    return [row for row in spec.tensor_table() if row.layer is not None and len(row.shape) >= 2]


def _label(row: TensorRow) -> str:
    part, name = row.name.split(".", 3)[2:]
    assert part in ("attention", "mlp", "moe")
    return name


def _places(spec: ModelSpec) -> Iterator[tuple[TensorRow, tuple[int, int]]]:
    """Every matrix with its layer and column."""
    labels = matrix_labels(spec)
    for row in _matrices(spec):
        assert row.layer is not None
        yield row, (row.layer, labels.index(_label(row)))


def _groups(spec: ModelSpec) -> Iterator[tuple[list[TensorRow], list[int], int]]:
    """The rows of one matrix in as many layers as are worked on together, those layers, and the column."""
    by_column: dict[int, list[tuple[TensorRow, int]]] = {}
    for row, (layer, column) in _places(spec):
        by_column.setdefault(column, []).append((row, layer))
    for column, members in by_column.items():
        n_together = max(1, GROUP_NUMBERS // members[0][0].n_parameters)
        for start in range(0, len(members), n_together):
            rows, layers = zip(*members[start : start + n_together], strict=True)
            yield list(rows), list(layers), column


def _table(model: nn.Module, spec: ModelSpec) -> Tensor:
    device = next(model.parameters()).device
    shape = spec.n_layers + 1, len(matrix_labels(spec))
    return torch.full(shape, torch.nan, dtype=torch.float64, device=device)


def _effective(tensor: Tensor, row: TensorRow, model: nn.Module) -> Tensor:
    """The whole tensor, times its mask and the factor on kept entries."""
    w = full(tensor)
    return w if row.mask is None else w * model.get_buffer(row.name + MASK_SUFFIX) * row.mask.factor
