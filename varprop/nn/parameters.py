"""Parameters of a module under the dotted names of the tensor table, with their masks as persistent buffers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

MASK_SUFFIX = "_mask"


class NamedParameters(nn.Module):
    """A module whose state dict has the names given; the mask of `a.b` is the buffer `a.b_mask`."""

    def add_tensors(
        self,
        tensors: Mapping[str, tuple[Tensor, Tensor | None]],
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        """Register each weight, and its mask where it has one."""
        for name, (weight, mask) in tensors.items():
            *path, leaf = name.split(".")
            owner: nn.Module = self
            for step in path:
                if step not in owner._modules:
                    owner.add_module(step, nn.Module())
                owner = owner.get_submodule(step)
            owner.register_parameter(leaf, nn.Parameter(weight.to(device, dtype)))
            if mask is not None:
                owner.register_buffer(f"{leaf}{MASK_SUFFIX}", mask.to(device))
