"""Zero and mean ablation: what a layer, its attention or its feed-forward part is worth in loss.

Shape suffixes: `B` sequences, `T` tokens, `D` d_model, `L` layers, `I` interventions, `P` programs.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from varprop.diagnose.bootstrap import stderr
from varprop.diagnose.layers import from_1
from varprop.diagnose.replay import Captured, Replay
from varprop.diagnose.session import Arrays, Session, Variables
from varprop.diagnose.sites import branches_apart
from varprop.diagnose.usefulness import loss_ratio
from varprop.diagnose.wavefront import Affine, Op, Program, ReplaceBranch, Run, Skip, walk

WHOLE = ("skip", "mean", "null")
BRANCHES = ("zero_attn", "mean_attn", "zero_mlp", "mean_mlp")
"""Interventions on whole layers, and on the branches of layers whose branches can be told apart."""


def ablation(session: Session) -> Variables:
    """Loss of the model with one layer, or a branch of it, taken away, over the loss of the model.

    ablation_loss_ratio (layer, intervention), both losses summed over all sequences. skip: the layer adds nothing.
    mean: it adds its mean contribution over all tokens of all sequences, the same ones. zero_attn, zero_mlp: the branch
    adds nothing, and the rest of the layer is computed from the stream without it; mean_attn, mean_mlp: it adds its own
    mean. null: the layer itself is put in its place by the same route, which is what rounding alone does. What a branch
    adds is taken after its norm and multiplier, before a norm of the sum (Post-LN). Models whose branches cannot be
    told apart have no interventions on them, and a `BranchesWarning` says so. Standard errors: over sequences, the same
    ones in both losses; the means are taken as given. Layers count from 1; entries of layer 0 are NaN. Raises
    `UnsuitedError` for a model without logits.
    Checked by: tests/diagnose/test_ablation.py, the model with hooks on its own modules.
    """
    replay = session.replay
    replay.require_loss("ablation")
    names = WHOLE + (BRANCHES if branches_apart(session) else ())
    means = session.once("ablation-means", lambda: _means(session, branches=len(names) > len(WHOLE)))
    layers = range(replay.n_layers)
    programs: list[Program] = [{layer: op} for layer in layers for op in _ops(names, means, layer, replay)]

    def of_batch(captured: Captured) -> dict[str, Tensor]:
        return {"loss": walk(replay, captured, programs).mT, "count": replay.count(captured.batch)}

    arrays = session.each_batch("ablation", of_batch)

    def ratios(loss: np.ndarray, count: np.ndarray) -> np.ndarray:
        found = loss_ratio(loss, count)
        return found.reshape(*found.shape[:-1], replay.n_layers, len(names))

    dims, losses = ("layer", "intervention"), (arrays["loss"], arrays["count"])
    error = stderr(ratios, *losses, seed=session.seed)
    return {
        "intervention": (("intervention",), list(names)),
        "ablation_loss_ratio": (dims, from_1(ratios(*(values.mean(axis=0) for values in losses)))),
        "ablation_loss_ratio_stderr": (dims, from_1(error)),
    }


def _ops(names: tuple[str, ...], means: Arrays, layer: int, replay: Replay) -> list[Op]:
    constant = {
        name: torch.from_numpy(values[layer]).to(replay.device, torch.promote_types(replay.dtype, torch.float32))
        for name, values in means.items()
    }
    every: dict[str, Op] = {"skip": Skip(), "mean": Affine(None, constant["layer"]), "null": Run(layer)}
    for branch in constant.keys() - {"layer"}:
        every |= {f"zero_{branch}": ReplaceBranch(branch), f"mean_{branch}": ReplaceBranch(branch, constant[branch])}
    return [every[name] for name in names]


@torch.no_grad()
def _means(session: Session, *, branches: bool) -> dict[str, Tensor]:
    """Mean over all tokens of all sequences of what each layer adds, `layer`, and each branch, (L, D) float64."""
    replay = session.replay
    kinds = ("layer", "attn", "mlp") if branches else ("layer",)
    sums = {
        name: torch.zeros(replay.n_layers, replay.d_model, dtype=torch.float64, device=replay.device) for name in kinds
    }
    size = session.batch_size()
    for start in range(0, session.n_sequences, size):
        captured = session.capture(slice(start, min(session.n_sequences, start + size)))
        for layer, (before, after) in enumerate(zip(captured.streams, captured.streams[1:], strict=False)):
            sums["layer"][layer] += (after.double() - before.double()).sum(dim=(0, 1))
            if branches:
                _add_branches(replay, captured, layer, sums)
    return {name: total / (session.n_sequences * session.n_tokens) for name, total in sums.items()}


def _add_branches(replay: Replay, captured: Captured, layer: int, sums: dict[str, Tensor]) -> None:
    def watch(name: str, added: Tensor) -> Tensor:
        sums[name][layer] += added.double().sum(dim=(0, 1))
        return added

    replay.layer(layer, captured.streams[layer][None], captured, watch)
