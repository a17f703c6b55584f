"""The loss change of every swap of two layers to first order: cheap enough to look at all pairs.

Letters: `V` variants, `B` sequences, `T` tokens, `D` d_model, `L` layers.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from varprop.diagnose.bootstrap import ratio, stderr
from varprop.diagnose.layers import PAIRS, from_1
from varprop.diagnose.replay import IGNORED, Captured, Replay
from varprop.diagnose.session import Session, Variables


def screening(session: Session) -> Variables:
    """What swapping two layers does to the loss, to first order, for all pairs.

    With f_j(x) what layer j adds to a stream x, x_i the stream before layer i and g_i the gradient of the summed loss
    with respect to the stream after layer i: a_ij = sum_t g_i . f_j(x_i) is the effect of layer j in place i, and
    permutation_screening (i, j) = (a_ij - a_ii + a_ji - a_jj) / loss, signed and symmetric. A swap's relative change of
    the loss is this and terms of second order, which vanish beside it where a single layer is a small step of all.
    Where all layers together are a small step they do not: with x_i = x_j the first order cancels too. On large
    changes it is no estimate (the loss is bounded below, this is not), at best a ranking. Costs L^2 layers and one
    pass back, of all swaps L^3 / 3 layers and L^2 / 2 heads. On the first `permutation_tokens` tokens. Empty for a
    model of one layer. Standard errors over sequences. Raises `ArgumentError` for a model without logits. Source:
    first order of permutation_log_change. Checked by: tests/diagnose/test_screening.py, automatic differentiation
    along a path from the model to the swapped one.
    """
    session.replay.require_loss("screening")
    if session.replay.n_layers == 1:
        return {}
    rows = session.first_sequences(session.option("permutation_tokens"))
    size = max(1, session.batch_size() // 2)  # the gradients are held beside the streams
    arrays = session.each_batch("screening", lambda captured: of_batch(session.replay, captured), rows, size)

    def change(table: np.ndarray, loss: np.ndarray) -> np.ndarray:
        moved = table - np.diagonal(table, axis1=-2, axis2=-1)[..., :, None]
        return ratio(moved + np.swapaxes(moved, -1, -2), loss[..., None, None])

    sums = arrays["table"], arrays["loss"]
    matrix, error = change(*(values.mean(axis=0) for values in sums)), stderr(change, *sums, seed=session.seed)
    padded = (from_1(values, 2) for values in (matrix, error))
    return dict(
        zip(("permutation_screening", "permutation_screening_stderr"), ((PAIRS, v) for v in padded), strict=True)
    )


def of_batch(replay: Replay, captured: Captured) -> dict[str, Tensor]:
    """a_ij of each sequence (B, L, L) and its summed loss (B)."""

    def compute() -> dict[str, Tensor]:
        loss, gradients = loss_gradients(replay, captured)
        return {"table": _table(replay, captured, gradients), "loss": loss}

    return replay.limits.retried(compute)


def loss_gradients(replay: Replay, captured: Captured) -> tuple[Tensor, list[Tensor]]:
    """Summed loss of each sequence (B) and its gradient with respect to the stream after each layer, (B, T, D) each.

    Backwards one layer at a time, each run again from its stream: the memory is that of one layer.
    """
    last = captured.streams[-1].detach().requires_grad_()
    kept = captured.batch.targets != IGNORED
    which, places = torch.where(kept)
    loss = torch.zeros(captured.n_sequences, dtype=torch.float64, device=replay.device)
    size = replay.limits.head_tokens(replay.vocab_size)
    for start in range(0, len(which), size):
        part = which[start : start + size], places[start : start + size]
        with torch.enable_grad():
            logits = replay.logits(last[part][None])[0]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            losses = functional.cross_entropy(logits, captured.batch.targets[part], reduction="none")
            losses.sum().backward()
        loss.index_add_(0, part[0], losses.detach().double())
    assert last.grad is not None
    gradients = [last.grad]
    for layer in range(replay.n_layers - 1, 0, -1):
        with torch.enable_grad():
            stream = captured.streams[layer].detach().requires_grad_()
            after = replay.layer(layer, stream[None], captured)[0]
            gradients.append(torch.autograd.grad(after, stream, gradients[-1])[0])
    return loss, gradients[::-1]


@torch.no_grad()
def _table(replay: Replay, captured: Captured, gradients: list[Tensor]) -> Tensor:
    n_layers = replay.n_layers
    table = torch.zeros(captured.n_sequences, n_layers, n_layers, dtype=torch.float64, device=replay.device)
    wide = torch.promote_types(replay.dtype, torch.float32)
    tokens = captured.n_sequences * captured.n_tokens
    size = max(1, replay.limits.call_tokens(replay.call_bytes) // tokens)
    for start in range(0, n_layers, size):
        places = slice(start, min(n_layers, start + size))
        streams, g = torch.stack(captured.streams[places]), torch.stack(gradients[places]).to(wide)
        for layer in range(n_layers):
            added = replay.layer(layer, streams, captured) - streams
            products = torch.linalg.vecdot(g, added.to(wide))  # (V, B, T)
            table[:, places, layer] = products.double().sum(dim=-1).T
    return table
