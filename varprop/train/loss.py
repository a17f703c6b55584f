"""Next-token cross-entropy in float32 that never holds the logits of all tokens, gradients included.

Legend: N tokens of all sequences, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

SumOfLosses = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Hidden states (n, D) and targets (n) to the sum of their losses."""
LOGITS_HELD = {"cpu": 2**21, "cuda": 2**27}
"""Logits that are held at a time, by device: 8 MiB in float32 stay in the caches of a CPU, 512 MiB keep a GPU busy."""


class _ChunkedLoss(torch.autograd.Function):
    """Mean loss whose gradients are formed chunk by chunk in the forward pass, so nothing is computed twice."""

    @staticmethod
    def forward(
        ctx: Any,
        sum_of_losses: SumOfLosses,
        chunk: int,
        targets: torch.Tensor,
        hidden: torch.Tensor,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        total = torch.zeros((), device=hidden.device)
        hidden_gradients: list[torch.Tensor] = []
        weight_gradients: list[torch.Tensor] = []
        for rows, labels in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            with torch.enable_grad():
                leaf = rows.detach().requires_grad_()
                loss = sum_of_losses(leaf, labels) / len(targets)
                of_leaf, *of_weights = torch.autograd.grad(loss, (leaf, *weights))
            total += loss.detach()
            hidden_gradients.append(of_leaf)
            for held, new in zip(weight_gradients, of_weights, strict=False):  # none are held at the first chunk
                held += new
            weight_gradients = weight_gradients or list(of_weights)
        ctx.save_for_backward(torch.cat(hidden_gradients), *weight_gradients)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[Any, ...]:
        return (None, None, None, *(outputs[0] * gradient for gradient in ctx.saved_tensors))


def sum_of_losses(
    unembed: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Sum over tokens of -log softmax(unembed(rows))[target], in float32. rows: (n, D); `unembed` takes (1, n, D)."""
    return functional.cross_entropy(unembed(rows[None]).squeeze(0).float(), targets, reduction="sum")


def chunk_size(device: str, vocab_size: int) -> int:
    """Tokens whose logits are held at a time on a type of device.

    >>> chunk_size("cpu", 8192)
    256
    """
    return max(1, LOGITS_HELD.get(device, LOGITS_HELD["cpu"]) // vocab_size)


def chunked_mean_loss(
    sum_of_losses: SumOfLosses,
    weights: Sequence[torch.Tensor],
    hidden: torch.Tensor,
    targets: torch.Tensor,
    chunk: int,
) -> torch.Tensor:
    """Mean over all tokens of a loss that is given for a few of them, float32.

    weights: the parameters that `sum_of_losses` uses, all of which get gradients. hidden: (..., D); targets: (...);
    chunk: tokens in a call of `sum_of_losses`. Value and gradients are those of one call, up to the order of the sums.
    """
    rows, labels = hidden.flatten(0, -2), targets.flatten()
    if torch.is_grad_enabled():
        return _ChunkedLoss.apply(sum_of_losses, chunk, labels, rows, *weights)  # type: ignore[return-value]
    pairs = zip(rows.split(chunk), labels.split(chunk), strict=True)
    return torch.stack([sum_of_losses(r, t) for r, t in pairs]).sum() / len(labels)
