"""What is recorded of a block of networks: sums stay on the device until the block is done.

Legend: B networks, L layers.
"""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from varprop.measure import (
    BRANCH_STREAM,
    PowerSums,
    attention_concentration,
    attention_entropy,
    cosine,
    expert_load_concentration,
    gate_second_moment,
)
from varprop.results import BRANCHES, SITES
from varprop.spec import ModelSpec

AT_SITES = ("second_moment", "variance", "token_correlation", "fourth_moment")
SUMS = tuple(field.name for field in fields(PowerSums))[2:]
OBSERVED = {
    "attention": {"attention_concentration": attention_concentration, "attention_entropy": attention_entropy},
    "gates": {"gate_second_moment": gate_second_moment, "expert_load_concentration": expert_load_concentration},
}


class Recorder:
    """Collects the statistics of every layer and site: pass it as `record` and its `observe` as `observe`.

    A layer without a mixture counts as one expert with gate 1.
    """

    def __init__(self, spec: ModelSpec, n_tokens: int, n_networks: int, device: str | torch.device) -> None:
        def empty(*shape: int) -> Tensor:
            return torch.full((n_networks, spec.n_layers + 1, *shape), torch.nan, dtype=torch.float64, device=device)

        self._shape = n_tokens, spec.d_model
        self._sums, self._products = empty(len(SITES), len(SUMS)), empty(len(BRANCHES))
        present = [spec.attention is not None, spec.moe is not None]
        names = [name for found, kind in zip(present, OBSERVED.values(), strict=True) if found for name in kind]
        self._observed = {name: empty() for name in names}
        for layer in range(1, spec.n_layers + 1):
            if spec.moe is not None and not spec.is_moe(layer):
                for name in OBSERVED["gates"]:
                    self._observed[name][:, layer] = 1.0
        self._streams: dict[str, Tensor] = {}

    def __call__(self, layer: int, site: str, x: Tensor) -> None:
        """Record one site of all networks."""
        if site == "resid_pre":  # the resid_post of the layer before
            self._sums[:, layer, SITES.index(site)] = self._sums[:, layer - 1, SITES.index("resid_post")]
        else:
            sums = PowerSums.of(x)
            self._sums[:, layer, SITES.index(site)] = torch.stack([getattr(sums, name) for name in SUMS], dim=-1)
        if site in BRANCH_STREAM:
            product = (self._streams[BRANCH_STREAM[site]] * x).sum(dim=-1).double().sum(dim=-1)
            self._products[:, layer, list(BRANCH_STREAM).index(site)] = product
        else:
            self._streams[site] = x

    def observe(self, layer: int, what: str, values: Tensor) -> None:
        """Record the attention probabilities or the gates of a layer."""
        for name, statistic in OBSERVED.get(what, {}).items():
            self._observed[name][:, layer] = statistic(values)

    def arrays(self) -> dict[str, np.ndarray]:
        """By name, (B, L + 1, site), (B, L + 1, branch) or (B, L + 1)."""
        sums = PowerSums(*self._shape, *self._sums.unbind(dim=-1))
        found = {name: getattr(sums, name)() for name in AT_SITES}
        # Layer 0 has only a stream: a comparison would turn its missing sums into numbers.
        found["token_correlation"][sums.squares.isnan()] = torch.nan
        pairs = [(SITES.index(stream), SITES.index(branch)) for branch, stream in BRANCH_STREAM.items()]
        power = torch.stack([sums.squares[..., i] * sums.squares[..., j] for i, j in pairs], dim=-1)
        found["branch_correlation"] = cosine(self._products, power)
        found["branch_correlation"][:, 0] = torch.nan
        return {name: values.cpu().numpy() for name, values in {**found, **self._observed}.items()}
