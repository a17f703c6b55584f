"""The optimiser: AdamW with explicit decay groups, the learning-rate schedule, and the global gradient norm."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from varprop.spec import ModelSpec
from varprop.train.config import TrainConfig
from varprop.train.distributed import global_norm

EMBEDDINGS = ("embed", "unembed")


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of the update made after `step` updates.

    For step < warmup_steps: peak (step + 1) / warmup_steps. Then, with u = (step - warmup_steps) /
    (n_steps - warmup_steps), peak (f + (1 - f) (1 + cos(pi u)) / 2), f = final_lr_fraction: the floor is reached at
    step = n_steps, after the last update.

    >>> config = TrainConfig(n_steps=10, warmup_steps=4, learning_rate=1.0, final_lr_fraction=0.5)
    >>> [learning_rate(config, step) for step in (0, 3, 4, 7, 10)]
    [0.25, 1.0, 1.0, 0.75, 0.5]
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    u = (step - config.warmup_steps) / max(1, (config.n_steps or 0) - config.warmup_steps)
    floor = config.final_lr_fraction
    return config.learning_rate * (floor + (1 - floor) * (1 + math.cos(math.pi * min(u, 1.0))) / 2)


def decayed_tensors(spec: ModelSpec, decay: str) -> frozenset[str]:
    """Names of the tensors under weight decay.

    `matrices`: every tensor with two or more dimensions except the embedding and the unembedding, so q k v o gate up
    down router shared_gate; gains, biases and sink logits do not decay. `everything`: every tensor. Entries that a mask
    removes decay as the others do, without effect on the network.
    """
    rows = spec.tensor_table()
    if decay == "matrices":
        rows = tuple(row for row in rows if len(row.shape) >= 2 and row.matrix not in EMBEDDINGS)
    return frozenset(row.name for row in rows)


def adamw(model: torch.nn.Module, spec: ModelSpec, config: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW over the parameters of `model`, in two groups: with and without weight decay."""
    names = decayed_tensors(spec, config.decay)
    decayed = [parameter for name, parameter in model.named_parameters() if name in names]
    others = [parameter for name, parameter in model.named_parameters() if name not in names]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_gradients(parameters: Iterable[torch.nn.Parameter], clip_norm: float | None) -> torch.Tensor:
    """The global gradient norm before clipping, a tensor on the device; gradients are scaled down to `clip_norm`."""
    present = [parameter for parameter in parameters if parameter.grad is not None]
    norm = global_norm(p.grad for p in present if p.grad is not None)
    if clip_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(present, clip_norm, norm)
    return norm
