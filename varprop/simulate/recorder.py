"""What is recorded of a block of networks: everything stays on the device until the block is done.

Legend: B networks, L layers.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from varprop.measure import (
    BRANCH_STREAM,
    PowerSums,
    attention_concentration,
    attention_entropy,
    branch_correlation,
    expert_load_concentration,
    gate_second_moment,
)
from varprop.results import BRANCHES, SITES
from varprop.spec import ModelSpec

AT_SITES = ("second_moment", "variance", "token_correlation", "fourth_moment")
OBSERVED = {
    "attention": {"attention_concentration": attention_concentration, "attention_entropy": attention_entropy},
    "gates": {"gate_second_moment": gate_second_moment, "expert_load_concentration": expert_load_concentration},
}


class Recorder:
    """Collects the statistics of every layer and site: pass it as `record` and its `observe` as `observe`.

    A layer without a mixture counts as one expert with gate 1.
    """

    def __init__(self, spec: ModelSpec, n_networks: int, device: str | torch.device) -> None:
        shape, options = (n_networks, spec.n_layers + 1), {"dtype": torch.float64, "device": device}
        self._sites = torch.full((*shape, len(SITES), len(AT_SITES)), torch.nan, **options)
        self._branches = torch.full((*shape, len(BRANCHES)), torch.nan, **options)
        present = [spec.attention is not None, spec.moe is not None]
        names = [name for found, kind in zip(present, OBSERVED.values(), strict=True) if found for name in kind]
        self._observed = {name: torch.full(shape, torch.nan, **options) for name in names}
        for layer in range(1, spec.n_layers + 1):
            if spec.moe is not None and not spec.is_moe(layer):
                for name in OBSERVED["gates"]:
                    self._observed[name][:, layer] = 1.0
        self._streams: dict[str, Tensor] = {}
        self._last: tuple[Tensor | None, Tensor | None] = None, None

    def __call__(self, layer: int, site: str, x: Tensor) -> None:
        """Record one site of all networks."""
        known, values = self._last
        if x is not known or values is None:  # resid_pre is the resid_post of the layer before
            sums = PowerSums.of(x)
            values = torch.stack([getattr(sums, name)() for name in AT_SITES], dim=-1)
        self._sites[:, layer, SITES.index(site)] = values
        if site == "resid_post":
            self._last = x, values
        if site in BRANCH_STREAM:
            stream = self._streams[BRANCH_STREAM[site]]
            self._branches[:, layer, list(BRANCH_STREAM).index(site)] = branch_correlation(stream, x)
        else:
            self._streams[site] = x

    def observe(self, layer: int, what: str, values: Tensor) -> None:
        """Record the attention probabilities or the gates of a layer."""
        for name, statistic in OBSERVED[what].items():
            self._observed[name][:, layer] = statistic(values)

    def arrays(self) -> dict[str, np.ndarray]:
        """Name -> (B, L + 1, site), (B, L + 1, branch) or (B, L + 1)."""
        sites = self._sites.cpu().numpy()
        found = {name: sites[..., i] for i, name in enumerate(AT_SITES)}
        found["branch_correlation"] = self._branches.cpu().numpy()
        return found | {name: values.cpu().numpy() for name, values in self._observed.items()}
