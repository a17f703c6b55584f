"""Next-token cross-entropy in float32 that never holds the logits of all tokens, gradients included.

Legend: N tokens of all sequences, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

Unembed = Callable[[torch.Tensor], torch.Tensor]


class _ChunkedLoss(torch.autograd.Function):
    """Mean cross-entropy whose gradients are formed chunk by chunk in the forward pass, so nothing is computed twice."""

    @staticmethod
    def forward(
        ctx: Any, unembed: Unembed, chunk: int, targets: torch.Tensor, hidden: torch.Tensor, *weights: torch.Tensor
    ) -> torch.Tensor:
        total = torch.zeros((), device=hidden.device)
        hidden_gradients: list[torch.Tensor] = []
        weight_gradients: list[torch.Tensor] = []
        for rows, labels in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            with torch.enable_grad():
                leaf = rows.detach().requires_grad_()
                loss = _sum_of_losses(unembed, leaf, labels) / len(targets)
                of_leaf, *of_weights = torch.autograd.grad(loss, (leaf, *weights))
            total += loss.detach()
            hidden_gradients.append(of_leaf)
            if weight_gradients:
                torch._foreach_add_(weight_gradients, of_weights)
            else:
                weight_gradients = of_weights
        ctx.save_for_backward(torch.cat(hidden_gradients), *weight_gradients)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[Any, ...]:
        return (None, None, None, *(outputs[0] * gradient for gradient in ctx.saved_tensors))


def _sum_of_losses(unembed: Unembed, rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(unembed(rows[None])[0].float(), labels, reduction="sum")


def chunked_cross_entropy(
    unembed: Unembed,
    weights: Sequence[torch.Tensor],
    hidden: torch.Tensor,
    targets: torch.Tensor,
    chunk: int,
) -> torch.Tensor:
    """Mean over tokens of -log softmax(unembed(hidden))[target], in nats.

    unembed: (1, n, D) -> logits (1, n, V). weights: the parameters that `unembed` uses, all of which get gradients.
    hidden: (..., D); targets: (...), int64; chunk: tokens whose float32 logits are held at a time. The value and the
    gradients are those of one cross-entropy over all tokens, up to the order of the sums.
    """
    rows, labels = hidden.flatten(0, -2), targets.flatten()
    if torch.is_grad_enabled():
        return _ChunkedLoss.apply(unembed, chunk, labels, rows, *weights)  # type: ignore[return-value]
    pairs = zip(rows.split(chunk), labels.split(chunk), strict=True)
    return torch.stack([_sum_of_losses(unembed, r, t) for r, t in pairs]).sum() / len(labels)
