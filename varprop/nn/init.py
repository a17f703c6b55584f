"""Initial weights and weight masks, drawn from the tensor table of a spec.

Numbers are drawn in float32 on the generator's device and then converted, so that a network has the same weights in
every type and on every device that takes a CPU generator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from varprop.errors import SpecError, require
from varprop.spec import MaskSpec, ModelSpec, TensorRow, layer_table


def make_generator(entropy: int | Sequence[int], *key: int) -> torch.Generator:
    """A CPU generator seeded through numpy's SeedSequence: independent streams for distinct (entropy, key)."""
    state = np.random.SeedSequence(entropy, spawn_key=key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def draw_layer(
    spec: ModelSpec,
    layer: int,
    generator: torch.Generator,
    lead: tuple[int, ...] = (),
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    keep: slice = slice(None),
) -> dict[str, Tensor]:
    """Effective weights (masked and rescaled) of a layer, (*lead, *shape), by their name in `layer_table`.

    keep: the part of the first leading axis that is wanted; the numbers of all of it are drawn.
    """
    weights = {}
    for name, row in layer_table(spec, layer).items():
        weight, mask = draw_tensor(row, generator, lead)
        if mask is not None and row.mask is not None:
            weight.mul_(mask)
            if row.mask.factor != 1:
                weight.mul_(row.mask.factor)
        part = weight if keep == slice(None) or keep == slice(0, weight.shape[0]) else weight[keep].clone()
        weights[name] = part.to(device, dtype)
    return weights


def draw_tensors(rows: Mapping[str, TensorRow], generator: torch.Generator) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Raw weight and mask of each row, in the order of the table."""
    return {name: draw_tensor(row, generator) for name, row in rows.items()}


def draw_tensor(row: TensorRow, generator: torch.Generator, lead: tuple[int, ...] = ()) -> tuple[Tensor, Tensor | None]:
    """Raw weight (*lead, *shape) and its boolean mask, None where dense.

    Matrices are N(0, init_std^2), vectors start at `init_mean`.
    """
    shape = (*lead, *row.shape)
    if row.init_std == 0:
        return torch.full(shape, row.init_mean, device=generator.device), None
    weight = torch.empty(shape, device=generator.device).normal_(row.init_mean, row.init_std, generator=generator)
    return weight, None if row.mask is None else draw_mask(row.mask, weight, generator)


def draw_mask(mask: MaskSpec, weight: Tensor, generator: torch.Generator) -> Tensor:
    """Boolean mask of a weight (*lead, out, in); each network and each expert has its own.

    `magnitude` keeps round(density out in) entries, at least one. Raises `SpecError` where `n_of_m` groups do not
    divide the inputs.
    """
    if mask.kind == "bernoulli":
        return torch.rand(weight.shape, generator=generator, device=weight.device) < mask.density
    if mask.kind == "block":
        side, (n_out, n_in) = mask.block_size, weight.shape[-2:]
        grid = (*weight.shape[:-2], -(-n_out // side), -(-n_in // side))
        kept = torch.rand(grid, generator=generator, device=weight.device) < mask.density
        return kept.repeat_interleave(side, -2).repeat_interleave(side, -1)[..., :n_out, :n_in]
    if mask.kind == "magnitude":
        size = weight.abs().flatten(-2)
        return _largest(size, max(1, round(mask.density * size.shape[-1]))).view_as(weight)
    n_in = weight.shape[-1]
    require(n_in % mask.group == 0, SpecError, "group", mask.group, f"not a divisor of {n_in} inputs", "a divisor")
    groups = weight.abs().unflatten(-1, (-1, mask.group))
    return _largest(groups, round(mask.density * mask.group)).flatten(-2)


def _largest(size: Tensor, count: int) -> Tensor:
    """True at the `count` largest entries of the last axis."""
    kept = torch.zeros_like(size, dtype=torch.bool)
    return kept.scatter_(-1, size.topk(count, dim=-1, sorted=False).indices, True)
