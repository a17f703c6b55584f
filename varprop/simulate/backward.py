"""The way back of a block of networks: gradients of the stream and the Jacobian of every layer.

The forward pass has left the stream before every layer, T x D numbers a network and layer. A layer's weights are drawn
again and the layer is computed again under autograd, so that the weights of one layer live at a time. An observer that
does nothing keeps attention on the explicit softmax: the layer is then bitwise that of the forward pass, and its
gradient is free of the fused kernels' atomic additions.

Legend: B networks, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from varprop.measure import jacobian_deviation, probe_jacobian_deviation, random_signs, second_moment
from varprop.measure.jacobian import DEFINITIONS
from varprop.nn.block import block_forward
from varprop.results import SITES

if TYPE_CHECKING:
    from varprop.simulate.block import Run

PROBES, COTANGENT = 2, 3
"""Keys of the random signs of a layer's Jacobian, and of the cotangent at the last layer."""
MAX_EXACT = 512
"""Largest n_tokens * d_model for which the whole Jacobian is computed unless a number of probes is given."""
N_PROBES = 16
"""Probes beyond it. The relative error of `token_mean` is about 2 / sqrt(n_probes d_model), that of the other two less:
6 %, 4 % and 3 % with 8 probes at d_model 128 and 8 tokens, where networks differ by 12 %."""


def backward_statistics(run: Run, block: int, keep: slice, streams: Sequence[Tensor]) -> dict[str, np.ndarray]:
    """`grad_second_moment` (B, L + 1, site) and `jacobian_deviation` (B, L + 1, definition), float64.

    With probes also `jacobian_deviation_stderr`. streams: (B, T, D) before every layer and after the last.
    """
    n_networks, n_layers = keep.stop - keep.start, run.spec.n_layers
    options = {"dtype": torch.float64, "device": run.device}
    names = ("jacobian_deviation", "jacobian_deviation_stderr")[: 2 if run.n_probes else 1]
    deviations = torch.full((len(names), n_networks, n_layers + 1, len(DEFINITIONS)), torch.nan, **options)
    gradients = torch.full((n_networks, n_layers + 1, len(SITES)), torch.nan, **options)
    gradient = _cotangent(run, block, keep, streams[-1])
    unit = second_moment(gradient)
    for layer in range(n_layers, 0, -1):
        at_sites, deviations[:, :, layer] = _layer(run, block, layer, keep, streams[layer - 1], gradient)
        gradients[:, layer] = torch.stack([second_moment(g) for g in at_sites], dim=-1)
        gradient = at_sites[0]
        run.passed(keep, 2 * n_layers + 1 - layer)
    gradients[:, 0, SITES.index("resid_post")] = second_moment(gradient)
    found = {"grad_second_moment": (gradients / unit[:, None, None]).cpu().numpy()}
    return found | dict(zip(names, deviations.cpu().numpy(), strict=True))


def _cotangent(run: Run, block: int, keep: slice, last: Tensor) -> Tensor:
    """Independent standard Gaussians at the last stream."""
    generator = run.generator(block, run.spec.n_layers, COTANGENT)
    shape = (run.block_size, *last.shape[1:])
    return torch.randn(shape, generator=generator, device=generator.device)[keep].to(last)


def _layer(
    run: Run, block: int, layer: int, keep: slice, stream: Tensor, gradient: Tensor
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Gradients at `SITES` and `_deviation` of a layer; its graph and weights end here."""
    x = stream.clone().requires_grad_()  # a copy: the forward pass leaves inference tensors
    y, sites = _computed_again(run, block, layer, keep, x)
    return torch.autograd.grad(y, sites, gradient, retain_graph=True), _deviation(run, block, layer, keep, y, x)


def _computed_again(run: Run, block: int, layer: int, keep: slice, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The stream after a layer, and the tensors at `SITES` in its graph.

    The gradient of what an absent branch adds is that of the stream to which it would be added.
    """
    sites: dict[str, Tensor] = {}

    def record(_: int, site: str, value: Tensor) -> None:
        sites[site] = value

    weights, keys = run.weights(block, layer, keep), run.key_numbers(block, layer, keep)
    y = block_forward(x, weights, run.spec, layer, record, keys, observe=lambda *_: None)
    for branch, stream in (("attn_out", "resid_mid"), ("mlp_out", "resid_post")):
        if not sites[branch].requires_grad:
            sites[branch] = sites[stream]
    return y, [sites[site] for site in SITES]


def _deviation(run: Run, block: int, layer: int, keep: slice, y: Tensor, x: Tensor) -> Tensor:
    """(1, B, definition), or with probes (2, B, definition): estimate and standard error."""
    if not run.n_probes:
        return jacobian_deviation(y, x).unsqueeze(0)
    generator = run.generator(block, layer, PROBES)

    def draw(*shape: int) -> Tensor:
        return random_signs((run.block_size, *shape), generator)[keep].to(x)

    return torch.stack(probe_jacobian_deviation(y, x, run.n_probes, draw))
