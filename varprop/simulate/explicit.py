"""Networks with explicit weight matrices, in blocks: layer by layer, so that memory does not grow with depth.

A block is a stack of networks along one leading tensor axis. Its random numbers depend on the entropy and the number of
the block alone, and a block is always computed whole, so that a network is bitwise the same in every run that has it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from varprop.measure import branch_correlation, second_moment, token_correlation, variance
from varprop.nn.block import block_forward
from varprop.nn.init import draw_layer, make_generator
from varprop.results import BRANCHES, SITES
from varprop.simulate.inputs import Inputs
from varprop.spec import ModelSpec, layer_table

SITE_STATISTICS = {"second_moment": second_moment, "variance": variance, "token_correlation": token_correlation}
STREAM_OF = {"attn_out": "resid_pre", "mlp_out": "resid_mid"}
"""The stream that a branch is added to."""
MAX_NETWORKS = 8
BLOCK_NUMBERS = 2**26
"""Most float numbers of one layer's weights and attention matrices that a block holds, if it has several networks."""


def networks_per_block(spec: ModelSpec, n_tokens: int) -> int:
    """Networks that are computed together: 8, fewer where layers are large; a function of the task alone."""
    weights = max(sum(row.n_parameters for row in layer_table(spec, n + 1).values()) for n in range(spec.n_layers))
    n_heads = spec.attention.n_heads if spec.attention else 0
    return max(1, min(MAX_NETWORKS, BLOCK_NUMBERS // (weights + n_heads * n_tokens**2)))


class Recorder:
    """Collects the statistics of every site: arrays (networks of the block, layer, site or branch)."""

    def __init__(self, n_networks: int, n_layers: int) -> None:
        shape = (n_networks, n_layers + 1)
        self.arrays = {name: np.full((*shape, len(SITES)), np.nan) for name in SITE_STATISTICS}
        self.arrays["branch_correlation"] = np.full((*shape, len(BRANCHES)), np.nan)
        self._streams: dict[str, Tensor] = {}

    def __call__(self, layer: int, site: str, x: Tensor) -> None:
        """Record one site of all networks of the block."""
        x = x.double()
        for name, statistic in SITE_STATISTICS.items():
            self.arrays[name][:, layer, SITES.index(site)] = statistic(x).cpu()
        if site in STREAM_OF:
            value = branch_correlation(self._streams[STREAM_OF[site]], x)
            self.arrays["branch_correlation"][:, layer, list(STREAM_OF).index(site)] = value.cpu()
        else:
            self._streams[site] = x


@torch.inference_mode()
def explicit_block(
    spec: ModelSpec, inputs: Inputs, entropy: Sequence[int], block: int, device: str, dtype: torch.dtype
) -> dict[str, np.ndarray]:
    """Statistics of the networks of one block, name -> (networks, layer, site or branch), float64."""
    size = networks_per_block(spec, inputs.n_tokens)
    weight_stream, input_stream, key_stream = (make_generator(entropy, block, stream) for stream in range(3))
    recorder = Recorder(size, spec.n_layers)
    x = inputs.draw(size, input_stream).to(device, dtype)
    recorder(0, "resid_post", x)
    for layer in range(1, spec.n_layers + 1):
        weights = draw_layer(spec, layer, weight_stream, (size,), device, dtype)
        x = block_forward(x, weights, spec, layer, recorder, key_stream)
    return recorder.arrays
