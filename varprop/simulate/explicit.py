"""Networks with explicit weight matrices, in blocks: layer by layer, so that memory does not grow with depth.

A block is a stack of networks along one leading tensor axis. Its random numbers depend on the entropy and the number of
the block alone, and a block is always computed whole, so that a network is bitwise the same in every run that has it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from varprop.measure import BRANCH_STREAM, branch_correlation, second_moment, token_correlation, variance
from varprop.nn.block import block_forward
from varprop.nn.init import draw_layer, make_generator
from varprop.results import BRANCHES, SITES
from varprop.simulate.inputs import Inputs
from varprop.spec import ModelSpec, layer_table

SITE_STATISTICS = {"second_moment": second_moment, "variance": variance, "token_correlation": token_correlation}
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
        if site in BRANCH_STREAM:
            value = branch_correlation(self._streams[BRANCH_STREAM[site]], x)
            self.arrays["branch_correlation"][:, layer, list(BRANCH_STREAM).index(site)] = value.cpu()
        else:
            self._streams[site] = x


def stream_generator(entropy: Sequence[int], block: int, stream: int, draw_device: str) -> torch.Generator:
    """The generator of one stream of a block: the seed is that of the CPU, the numbers are those of `draw_device`."""
    on_cpu = make_generator(entropy, block, stream)
    return on_cpu if draw_device == "cpu" else torch.Generator(draw_device).manual_seed(on_cpu.initial_seed())


@torch.inference_mode()
def explicit_block(
    spec: ModelSpec,
    inputs: Inputs,
    entropy: Sequence[int],
    block: int,
    device: str,
    dtype: torch.dtype,
    draw_device: str = "cpu",
) -> dict[str, np.ndarray]:
    """Statistics of the networks of one block, name -> (networks, layer, site or branch), float64.

    Weights and key masks are drawn on `draw_device`, the tokens (few numbers) always on the CPU.
    """
    size = networks_per_block(spec, inputs.n_tokens)
    weight_stream = stream_generator(entropy, block, 0, draw_device)
    input_stream = make_generator(entropy, block, 1)
    key_stream = stream_generator(entropy, block, 2, draw_device)
    recorder = Recorder(size, spec.n_layers)
    x = inputs.draw(size, input_stream).to(device, dtype)
    recorder(0, "resid_post", x)
    for layer in range(1, spec.n_layers + 1):
        weights = draw_layer(spec, layer, weight_stream, (size,), device, dtype)
        x = block_forward(x, weights, spec, layer, recorder, key_stream)
    return recorder.arrays
