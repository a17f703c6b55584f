"""How sparse the weights are: shares above thresholds, participation ratio, ranks, what a magnitude mask keeps.

Shape suffixes: `E` experts, `L` layers.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from varprop.diagnose.session import Session, Variables
from varprop.measure import (
    effective_density_participation,
    effective_density_threshold_tenth_rms,
    magnitude_mask_retained_variance,
    rms,
    share_above,
    spectral_norm,
)
from varprop.nn.block import Block

ABSOLUTE = (1e-4, 1e-3, 1e-2, 1e-1)
"""Thresholds on |w|."""
RELATIVE = (0.01, 0.1, 0.5, 1.0)
"""Thresholds on |w| in units of the rms of the matrix."""
DENSITIES = (0.5, 0.3, 0.1)
"""Shares of the entries that a magnitude mask keeps."""
PLACE = ("layer", "matrix")
DIMENSIONS = {
    **dict.fromkeys(("weight_norm", "weight_rms", "weight_zero_share", "spectral_norm", "stable_rank"), PLACE),
    **dict.fromkeys(("effective_density_participation", "effective_density_threshold_tenth_rms"), PLACE),
    "weight_share_above_absolute": (*PLACE, "weight_threshold"),
    "weight_share_above_relative": (*PLACE, "relative_threshold"),
    "magnitude_mask_retained_variance": (*PLACE, "mask_density"),
}
NUMBER_BYTES = 48
"""Memory for each weight that is worked on: a few copies in float32 and float64."""


def weights(session: Session) -> Variables:
    """Sparsity of every weight matrix of every layer; no error bars, as nothing is sampled.

    matrix: name of the parameter inside its layer, without a last ".weight"; fused matrices are one, as they are
    stored. Of a stack of experts (E, ., .) the numbers are those of one expert, averaged over them, but weight_norm
    is that of the stack and weight_rms that over all entries. NaN where a layer lacks the matrix. Of our own models
    masked entries are zeros.
    weight_norm: Frobenius norm. weight_rms: of the entries. weight_zero_share: share of exact zeros. spectral_norm,
    stable_rank = |w|_F^2 / |w|_2^2, effective_density_participation = 3 (mean w^2)^2 / mean w^4 (1 for Gaussian
    entries), effective_density_threshold_tenth_rms: as in `varprop.measure`. weight_share_above_absolute: share of the
    entries with |w| > weight_threshold. weight_share_above_relative: with |w| > relative_threshold times the rms.
    magnitude_mask_retained_variance: share of sum w^2 that the share mask_density of the entries keeps, the largest.
    Exact to rounding, but spectral_norm and stable_rank, as `varprop.measure.spectral_norm` says.
    Memory: 48 bytes for each weight of a matrix, of as many experts at a time as `replay.limits` allow.
    Checked by: tests/diagnose/test_weights.py, numpy and its SVD.
    """
    layers = [matrices(layer) for layer in session.replay.layers]
    labels = list(dict.fromkeys(name for layer in layers for name in layer))
    shape = session.replay.n_layers + 1, len(labels)
    coordinates = {"weight_threshold": ABSOLUTE, "relative_threshold": RELATIVE, "mask_density": DENSITIES}
    variables: Variables = {name: ((name,), np.array(values)) for name, values in coordinates.items()}
    variables["matrix"] = (("matrix",), np.array(labels))
    for name, dims in DIMENSIONS.items():
        sizes = [len(coordinates[dim]) for dim in dims[len(PLACE) :]]
        variables[name] = (dims, np.full((*shape, *sizes), np.nan))
    for number, layer in enumerate(layers, start=1):
        found = session.once(f"weights-{number}", lambda layer=layer: _of_layer(session, layer))
        for name in DIMENSIONS:
            variables[name][1][number, [labels.index(label) for label in layer]] = found[name]
        if session.progress is not None:
            session.progress("weights", number, len(layers))
    return variables


def matrices(layer: nn.Module) -> dict[str, Tensor]:
    """The weight matrices (out, in) of a layer and its stacks of them (E, out, in), by the labels of `weights`.

    >>> [name for name in matrices(nn.TransformerEncoderLayer(4, 1, 8))]
    ['self_attn.in_proj', 'self_attn.out_proj', 'linear1', 'linear2']
    """
    if isinstance(layer, Block):  # named as varprop.train.weights names them
        return {name.split(".", 1)[1]: w for name, w in layer.weights().items() if w.ndim in (2, 3)}
    return {
        name.removesuffix(".weight").removesuffix("_weight"): w
        for name, w in layer.named_parameters()
        if w.ndim in (2, 3) and not name.endswith("bias")  # of stacks of experts they have two dimensions too
    }


@torch.no_grad()
def _of_layer(session: Session, layer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every statistic of the matrices of a layer, (matrices, ...)."""
    limits = session.replay.limits
    found = [limits.retried(lambda w=w: _of_matrix(w, limits.memory)) for w in layer.values()]
    return {name: torch.stack([statistics[name] for statistics in found]) for name in DIMENSIONS}


def _of_matrix(w: Tensor, memory: float) -> dict[str, Tensor]:
    """Every statistic of a matrix or a stack of them."""
    stack = w.reshape(-1, *w.shape[-2:])
    size = max(1, int(memory / NUMBER_BYTES / stack[0].numel()))
    chunks = [_of_stack(chunk) for chunk in stack.split(size)]
    by_expert = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
    found = {name: values.mean(dim=0) for name, values in by_expert.items()}
    mean_square = by_expert["weight_rms"].square().mean()
    return found | {"weight_norm": (mean_square * stack.numel()).sqrt(), "weight_rms": mean_square.sqrt()}


def _of_stack(w: Tensor) -> dict[str, Tensor]:
    """Every statistic of each matrix of a stack (E, out, in), but for the norm."""
    w = w.to(torch.promote_types(w.dtype, torch.float32))
    scale, largest = rms(w), spectral_norm(w)
    square = scale.square() * w[0].numel()
    return {
        "weight_rms": scale,
        "weight_zero_share": 1 - share_above(w, 0.0),
        "spectral_norm": largest,
        "stable_rank": torch.where(largest > 0, square / largest.square(), 0.0),
        "effective_density_participation": effective_density_participation(w),
        "effective_density_threshold_tenth_rms": effective_density_threshold_tenth_rms(w),
        "weight_share_above_absolute": torch.stack([share_above(w, t) for t in ABSOLUTE], dim=-1),
        "weight_share_above_relative": torch.stack([share_above(w, t * scale) for t in RELATIVE], dim=-1),
        "magnitude_mask_retained_variance": magnitude_mask_retained_variance(w, DENSITIES),
    }
