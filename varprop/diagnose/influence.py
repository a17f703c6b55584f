"""How much layers change the stream: block influence, angular distances, relative updates.

Shape suffixes: `S` sequences, `B` those of one pass, `T` tokens, `D` d_model, `L` layers.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from varprop.diagnose.bootstrap import Array, mean_itself, ratio, with_stderr
from varprop.diagnose.layers import PAIRS
from varprop.diagnose.replay import Captured, Replay
from varprop.diagnose.session import Session, Variables
from varprop.diagnose.sites import branches_apart, each_layer, few_rows
from varprop.results import BRANCHES

LAYERS = ("layer",)
OF_BRANCHES = ("layer", "branch")
ENDS = {"attn": ("resid_pre", "attn_out", "resid_mid"), "mlp": ("resid_mid", "mlp_out", "resid_post")}
"""Branch -> the stream before it, what it adds and the stream after it."""
OF_LAYERS = ("block_influence", "relative_update", "update_cosine", "relative_update_l1", "update_norm")
OF_ONE_BRANCH = ("branch_influence", "branch_relative_update", "branch_cosine")
"""Of a branch what the first three are of a layer."""


def influence(session: Session) -> Variables:
    """How much every layer changes the stream x_l, with standard errors over sequences; delta_l = x_l - x_(l-1).

    Means over all tokens, (layer), NaN at layer 0: block_influence = 1 - cos(x_(l-1), x_l) (ShortGPT, arXiv
    2403.03853); relative_update = |delta_l| / |x_(l-1)|, and relative_update_median its median over tokens;
    relative_update_l1 the same with sums of absolute values; update_cosine = cos(delta_l, x_(l-1)); update_norm =
    |delta_l|. stream_norm = |x_l|, layer 0 too. A cosine or ratio with a zero stream is 0.
    Of branches, (layer, branch), where they can be told apart: branch_relative_update and branch_cosine of what a
    branch adds, against the stream that it is added to; branch_influence = 1 - cos of the streams before and after it,
    feed-forward's from `resid_mid` in parallel layers too.
    angular_distance (source_layer, target_layer) = mean over tokens of arccos(cos(x_k, x_l)) / pi between the streams
    after layers 0..L, symmetric (arXiv 2403.17887, arXiv 2502.05795); angular_distance_last: of the last token of each
    sequence. layer_similarity: cosine between the means over all tokens of x_k and x_l, the paper's (arXiv 2603.15389).
    Scalars. effective_layers_block_influence = (sum_l b_l)^2 / sum_l b_l^2, the participation ratio of the block
    influences b_l, 1..L. effective_depth_update_cosine: the last layer l < L whose mean update_cosine is negative
    while that of layer l + 1 is not, 0 if there is none (layers count from 1, so no layer is meant);
    effective_depth_cosine: the same of the mean of update_cosine and the branch_cosine of attention and feed-forward
    (Hu et al. 2025, "What Affects the Effective Depth of Large Language Models?", who count layers from 0). Every one
    has <name>_stderr but for the median. Norms and cosines in float64 of streams in the model's type.
    Checked by: tests/diagnose/test_influence.py, float64 numpy definitions.
    """
    seed, branches = session.seed, branches_apart(session)
    arrays = session.each_batch("influence", lambda captured: _of_batch(session, captured, branches))
    for name in (*OF_LAYERS, *OF_ONE_BRANCH, "relative_updates"):
        arrays[name][:, 0] = np.nan
    dims = dict.fromkeys(("stream_norm", *OF_LAYERS), LAYERS)
    dims |= dict.fromkeys(OF_ONE_BRANCH, OF_BRANCHES) if branches else {}
    dims |= dict.fromkeys(("angular_distance", "angular_distance_last"), PAIRS)
    variables: Variables = {}
    for name, along in dims.items():
        variables |= with_stderr(name, along, mean_itself, arrays[name], seed=seed)
    ratios = np.moveaxis(arrays["relative_updates"], 0, -2)  # (L + 1, S, T)
    variables["relative_update_median"] = (LAYERS, np.median(ratios.reshape(len(ratios), -1), axis=-1))
    variables |= with_stderr("layer_similarity", PAIRS, _similarity, arrays["mean_stream"], seed=seed)
    variables |= with_stderr(
        "effective_layers_block_influence", (), _participation, arrays["block_influence"][:, 1:], seed=seed
    )
    cosines = {"effective_depth_update_cosine": arrays["update_cosine"][:, 1:]}
    if branches:
        three = [arrays["update_cosine"], *np.moveaxis(arrays["branch_cosine"], -1, 0)]
        cosines["effective_depth_cosine"] = np.mean(three, axis=0)[:, 1:]
    for name, cosine_of_layers in cosines.items():
        variables |= with_stderr(name, (), _last_change, cosine_of_layers, seed=seed)
    return variables


@torch.no_grad()
def _of_batch(session: Session, captured: Captured, branches: bool) -> dict[str, Tensor]:
    """Means over the tokens of each sequence, (B, L + 1, ...), and of every token `relative_updates`, (B, L + 1, T).

    Zeros at layer 0 where it has none.
    """
    replay = session.replay
    n_sequences, n_layers = captured.n_sequences, replay.n_layers
    nothing = torch.zeros((), dtype=torch.float64, device=replay.device)
    found = {name: nothing.repeat(n_sequences, n_layers + 1) for name in ("stream_norm", *OF_LAYERS)}
    found |= {name: nothing.repeat(n_sequences, n_layers + 1, len(BRANCHES)) for name in OF_ONE_BRANCH}
    found["relative_updates"] = nothing.repeat(n_sequences, n_layers + 1, captured.n_tokens)
    found["mean_stream"] = nothing.repeat(n_sequences, n_layers + 1, replay.d_model)
    streams: list[Tensor] = []
    for layer, sites in each_layer(replay, captured, branches):
        streams.append(sites["resid_post"])
        for rows in few_rows(replay, captured):
            after = sites["resid_post"][rows].double()
            found["stream_norm"][rows, layer] = _norm(after).mean(dim=-1)
            found["mean_stream"][rows, layer] = after.mean(dim=-2)
            if layer == 0:
                continue
            before = sites["resid_pre"][rows].double()
            of_layer = _change(before, after - before, after)
            of_layer["relative_update_l1"] = _quotient(_norm(after - before, 1), _norm(before, 1))
            of_layer["update_norm"] = _norm(after - before)
            found["relative_updates"][rows, layer] = of_layer["relative_update"]
            for name, values in of_layer.items():
                found[name][rows, layer] = values.mean(dim=-1)
            for branch, ends in enumerate(ENDS.values()) if branches else ():
                of_branch = _change(*(sites[site][rows].double() for site in ends))
                for name, values in zip(OF_ONE_BRANCH, of_branch.values(), strict=True):
                    found[name][rows, layer, branch] = values.mean(dim=-1)
    return found | _angular_distances(replay, streams)


def _change(before: Tensor, added: Tensor, after: Tensor) -> dict[str, Tensor]:
    """What a token's stream is changed by, of tensors (B, T, D): (B, T) each."""
    return {
        "block_influence": 1 - _cosine(before, after),
        "relative_update": _quotient(_norm(added), _norm(before)),
        "update_cosine": _cosine(added, before),
    }


def _angular_distances(replay: Replay, streams: list[Tensor]) -> dict[str, Tensor]:
    """Means over tokens, and of the last token, (B, L + 1, L + 1) each, some tokens at a time."""
    n_sequences, n_tokens, d_model = streams[0].shape
    size = max(1, replay.limits.call_tokens(4 * 8 * len(streams) * d_model) // n_sequences)
    total, last = torch.zeros((), dtype=torch.float64, device=replay.device), None
    for start in range(0, n_tokens, size):
        x = torch.stack([stream[:, start : start + size] for stream in streams], dim=-2).double()
        unit = x / _norm(x).clamp(min=torch.finfo(x.dtype).tiny)[..., None]  # (B, tokens, L + 1, D)
        cosines = (unit @ unit.mT).clamp(-1, 1)
        angles = cosines.arccos() / math.pi
        angles.diagonal(dim1=-2, dim2=-1).zero_()
        total, last = total + angles.sum(dim=1), angles[:, -1]
    assert last is not None
    return {"angular_distance": total / n_tokens, "angular_distance_last": last}


def _norm(x: Tensor, order: int = 2) -> Tensor:
    return torch.linalg.vector_norm(x, order, dim=-1)


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    return _quotient(torch.linalg.vecdot(x, y), _norm(x) * _norm(y))


def _quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / denominator, 0.0)


def _similarity(mean_streams: Array) -> Array:
    """Cosines between the mean streams of all layers, from (R, L + 1, D)."""
    norms = np.linalg.norm(mean_streams, axis=-1)
    products = mean_streams @ np.swapaxes(mean_streams, -1, -2)
    return ratio(products, norms[..., :, None] * norms[..., None, :])


def _participation(influences: Array) -> Array:
    """(sum)^2 / sum of squares, from (R, L)."""
    return ratio(influences.sum(axis=-1) ** 2, (influences**2).sum(axis=-1))


def _last_change(cosines: Array) -> Array:
    """The last layer (1..L - 1) whose cosine is negative while the next one's is not, 0 = none, from (R, L)."""
    changes = (cosines[:, :-1] < 0) & (cosines[:, 1:] >= 0)
    return (changes * np.arange(1, cosines.shape[-1])).max(axis=-1, initial=0).astype(float)
