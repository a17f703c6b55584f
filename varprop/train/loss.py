"""Next-token cross-entropy that never holds the logits of all tokens, nor their gradients.

With z = W h the logits of a token and y its target, loss = log sum exp z - z_y, and its gradient by z is softmax z
minus the one at y: both are formed together for a chunk of tokens in the forward pass, so nothing is computed twice.
Legend: N tokens of all sequences, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LOGITS_HELD = {"cpu": 2**21, "cuda": 2**27}
"""Logits that are held at a time, by device: 8 MiB in float32 stay in the caches of a CPU, 256 MiB in bfloat16 keep a
GPU busy."""

LossAndGradient = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]


def chunk_loss(logits: Tensor, targets: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Sum over tokens of -log softmax(logits)[target], float32, and `weight` times its gradient in the logits' type.

    logits: (n, V); targets: (n). Softmax and sums are in float32; exact to rounding.

    >>> loss, gradient = chunk_loss(torch.zeros(1, 4), torch.tensor([2]), 1.0)
    >>> round(loss.exp().item(), 5), gradient.tolist()
    (4.0, [[0.25, 0.25, -0.75, 0.25]])
    """
    wide = logits.float()
    log_sum = wide.logsumexp(dim=-1, keepdim=True)
    picked = wide.gather(-1, targets[:, None])
    is_target = torch.arange(logits.shape[-1], device=logits.device) == targets[:, None]
    gradient = ((wide - log_sum).exp() - is_target.float()) * weight
    return (log_sum - picked).sum(), gradient.to(logits.dtype)


class _ChunkedLoss(torch.autograd.Function):
    """Mean loss whose gradients are formed chunk by chunk in the forward pass, the table's in float32."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, table: Tensor, targets: Tensor, chunk: int, chunk_loss: LossAndGradient
    ) -> Tensor:
        used = table.to(hidden.dtype)
        total = torch.zeros((), device=hidden.device)
        of_hidden, of_table = torch.empty_like(hidden), torch.zeros_like(table, dtype=torch.float32)
        for start in range(0, len(targets), chunk):
            rows = slice(start, start + chunk)
            loss, of_logits = chunk_loss(hidden[rows] @ used.mT, targets[rows], 1 / len(targets))
            total += loss
            torch.mm(of_logits, used, out=of_hidden[rows])
            of_table += of_logits.mT @ hidden[rows]
        ctx.save_for_backward(of_hidden, of_table)
        return total / len(targets)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Any, ...]:
        of_hidden, of_table = ctx.saved_tensors
        return (outputs[0] * of_hidden).to(of_hidden.dtype), outputs[0] * of_table, None, None, None


def chunk_size(device: str, vocab_size: int) -> int:
    """Tokens whose logits are held at a time on a type of device.

    >>> chunk_size("cpu", 8192)
    256
    """
    return max(1, LOGITS_HELD.get(device, LOGITS_HELD["cpu"]) // vocab_size)


def chunked_mean_loss(
    hidden: Tensor, table: Tensor, targets: Tensor, chunk: int, chunk_loss: LossAndGradient = chunk_loss
) -> Tensor:
    """Mean cross-entropy over all tokens in nats, float32; gradients for `hidden` and `table` where they are wanted.

    hidden: (..., D), what the unembedding reads; table: (V, D); targets: (...); chunk: tokens whose logits are held at
    a time. Products are in the type of `hidden`. Value and gradients are those of one chunk, up to the order of sums.
    Checked by: tests/train/test_loss.py, torch's cross_entropy on all logits.
    """
    rows, labels = hidden.flatten(0, -2), targets.flatten()
    if torch.is_grad_enabled():
        return _ChunkedLoss.apply(rows, table, labels, chunk, chunk_loss)  # type: ignore[return-value]
    pairs = zip(rows.split(chunk), labels.split(chunk), strict=True)
    losses = [
        torch.nn.functional.cross_entropy((r @ table.to(r.dtype).mT).float(), t, reduction="sum") for r, t in pairs
    ]
    return torch.stack(losses).sum() / len(labels)
