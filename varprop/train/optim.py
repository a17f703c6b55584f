"""The optimiser: AdamW in groups by role, learning-rate schedules, transfer of rates over width and depth, clipping.

Transfer follows CompleteP (arXiv 2505.01618, table 1): with m_N = d_model / base_d_model, m_L = n_layers /
base_n_layers (1 where no base is given) and branches scaled by m_L^-alpha (its eq. 1),

    group         tensors                             rate                     weight decay  eps
    matrices      q k v o gate up down router ...     m_N^-1 m_L^(alpha - 1)   m_N           m_N^-1 m_L^-alpha
    vectors       gains, biases, sinks of blocks      m_L^(alpha - 1)          1             m_N^-1 m_L^-alpha
    embedding     embed                               1                        1             m_N^-1
    final_norm    its gain and bias                   1                        1             m_N^-1
    unembedding   unembed                             m_N^-1                   m_N           1

Why, derived again. An entry of Adam's update has the size of the rate, whatever the gradient's. A matrix sums its
update coherently over a fan-in proportional to m_N, a vector does not: the factors m_N^-1. The 2 L branches add their
updates coherently, each through L^-alpha: L L^-alpha rate is of order one for m_L^(alpha - 1). A decayed weight shrinks
by rate * decay a step, which m_N leaves as it is. eps follows the gradient: of an entry of the stream m_N^-1, of a
branch another m_L^-alpha. Not so for router, shared_gate, sink and the gains of queries and keys by head: their
gradient is a sum over the width (over heads, for the gains) and falls more slowly, so that their eps is up to m_N^-1
too small.

What is ours. alpha is 1 for the residual rule `inverse_L` (CompleteP) and 1/2 for `inverse_sqrt_L` and
`inverse_sqrt_2L` (depth-muP). The rule `one` is, for a Pre-LN stack, the network of `inverse_sqrt_L` whose embedding
is L^-1/2 as large, since norms do not see the scale of the stream: it takes alpha = 1/2 too. The paper multiplies
logits by m_N^-1 and keeps the unembedding's rate; we have no multiplier, and m_N^-1 W is our matrix: rate m_N^-1, decay
m_N, eps 1. Its initial size is the spec's (fan-in: logits start at order one, not m_N^-1/2 as there). Initial variances
are the spec's as well: rule `fan_in` is the paper's sigma^2 / m_N. All widths (d_ff, d_expert, n_heads) grow as
d_model; the logits of attention keep the spec's scale, which is the paper's if head_dim is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor

from varprop.errors import ArgumentError, require
from varprop.spec import ModelSpec, TensorRow
from varprop.train.config import TrainConfig
from varprop.train.distributed import global_norm

EMBEDDINGS = ("embed", "unembed")
ALPHA = {"inverse_L": 1.0, "inverse_sqrt_L": 0.5, "inverse_sqrt_2L": 0.5, "one": 0.5}
"""Depth exponent of the branches by `residual.rule`."""


def learning_rate(config: TrainConfig, n_steps: int, step: int) -> float:
    """Learning rate of the update made after `step` of `n_steps` updates, before the factor of a group.

    For step < warmup_steps: peak (step + 1) / warmup_steps. Then, with f = final_lr_fraction, by schedule:
    `cosine` peak (f + (1 - f) (1 + cos(pi u)) / 2), u = (step - warmup_steps) / (n_steps - warmup_steps);
    `wsd` peak until the last s = decay_fraction n_steps updates (or the end of the warm-up, if that is later), then
    linearly to peak f; `constant` peak. The floor is reached at step = n_steps, after the last update.

    >>> config = TrainConfig(n_steps=10, warmup_steps=4, learning_rate=1.0, final_lr_fraction=0.5)
    >>> [learning_rate(config, 10, step) for step in (0, 3, 4, 7, 10)]
    [0.25, 1.0, 1.0, 0.75, 0.5]
    >>> config = TrainConfig(n_steps=10, warmup_steps=0, learning_rate=1.0, schedule="wsd", final_lr_fraction=0)
    >>> [learning_rate(config, 10, step) for step in (0, 8, 9, 10)]
    [1.0, 1.0, 0.5, 0.0]
    """
    peak, floor = config.learning_rate, config.final_lr_fraction
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    start = float(config.warmup_steps)
    if config.schedule == "wsd":
        start = max(start, n_steps - config.decay_fraction * n_steps)
    u = min(1.0, max(0.0, (step - start) / (n_steps - start))) if n_steps > start else 0.0
    share = {"cosine": (1 + math.cos(math.pi * u)) / 2, "wsd": 1 - u, "constant": 1.0}[config.schedule]
    return peak * (floor + (1 - floor) * share)


@dataclass(frozen=True)
class Group:
    """Tensors of one role with the factor on their learning rate, their weight decay and their eps."""

    name: str
    tensors: tuple[str, ...]
    factor: float
    weight_decay: float
    eps: float


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


def parameter_groups(spec: ModelSpec, config: TrainConfig) -> tuple[Group, ...]:
    """The groups of the table above that the spec has, each tensor in exactly one.

    Raises `ArgumentError` for base_n_layers with the residual rule `deepnorm` or a block that is not Pre-LN with the
    rule `one`, and for a base_d_model other than d_model where embedding and unembedding are one table: no rule covers
    them. Checked by: tests/train/test_optim.py, tensor by tensor, by the two equivalences of "What is ours", and by the
    movement of the stream over depth and width.

    >>> from varprop import presets
    >>> spec = presets.d256().with_fields({"residual.rule": "inverse_L"})
    >>> for group in parameter_groups(spec, TrainConfig(base_d_model=128, base_n_layers=3)):
    ...     print(group.name, group.factor, group.weight_decay)
    embedding 1.0 0.0
    vectors 1.0 0.0
    matrices 0.5 0.2
    final_norm 1.0 0.0
    unembedding 0.5 0.0
    """
    width = spec.d_model / (config.base_d_model or spec.d_model)
    depth = spec.n_layers / (config.base_n_layers or spec.n_layers)
    if width != 1:
        wrong, domain = "given where the unembedding is the embedding", "tied_embeddings=false"
        require(not spec.tied_embeddings, ArgumentError, "base_d_model", config.base_d_model, wrong, domain)
    alpha = 0.0 if depth == 1 else _alpha(spec, config)
    branch = depth ** (alpha - 1)
    factors = {  # rate, decay, eps
        "matrices": (branch / width, width, depth**-alpha / width),
        "vectors": (branch, 1.0, depth**-alpha / width),
        "embedding": (1.0, 1.0, 1 / width),
        "final_norm": (1.0, 1.0, 1 / width),
        "unembedding": (1 / width, width, 1.0),
    }
    members: dict[str, list[str]] = {}
    for row in spec.tensor_table():
        members.setdefault(_role(row), []).append(row.name)
    decayed = decayed_tensors(spec, config.decay)
    groups = []
    for name, tensors in members.items():
        rate, decay, eps = factors[name]
        weight_decay = config.weight_decay * decay if tensors[0] in decayed else 0.0
        groups.append(Group(name, tuple(tensors), rate, weight_decay, config.eps * eps))
    return tuple(groups)


def _alpha(spec: ModelSpec, config: TrainConfig) -> float:
    rule = spec.residual.rule
    wrong = f"given with residual.rule={rule!r} and norm.placement={spec.norm.placement!r}"
    good = rule in ALPHA and (rule != "one" or spec.norm.placement == "pre")
    domain = "a rule inverse_L, inverse_sqrt_L or inverse_sqrt_2L, or one with norms before the branches"
    require(good, ArgumentError, "base_n_layers", config.base_n_layers, wrong, domain)
    return ALPHA[rule]


def _role(row: TensorRow) -> str:
    if row.matrix in EMBEDDINGS:
        return "embedding" if row.matrix == "embed" else "unembedding"
    if row.layer is None:
        return "final_norm"
    return "matrices" if len(row.shape) >= 2 else "vectors"


def adamw(model: torch.nn.Module, spec: ModelSpec, config: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW over the parameters of a `Transformer`, sharded or not, in the groups of `parameter_groups`.

    Each group of the optimiser has its `name` and the `factor` that `set_learning_rate` applies.
    """
    parameters = dict(model.named_parameters())
    groups = [
        {
            "params": [parameters.pop(name) for name in group.tensors],
            "name": group.name,
            "factor": group.factor,
            "lr": config.learning_rate * group.factor,
            "weight_decay": group.weight_decay,
            "eps": group.eps,
        }
        for group in parameter_groups(spec, config)
    ]
    assert not parameters, f"parameters outside the tensor table: {', '.join(parameters)}"
    optimizer = torch.optim.AdamW(groups, betas=config.betas, fused=True)
    if next(model.parameters()).is_cuda:  # on the device, where a recorded step reads it
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"], device="cuda")
            group["capturable"] = True
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group to `rate` times its factor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate * group["factor"])
        else:
            group["lr"] = rate * group["factor"]


def gradient_norm(optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """The global norm of the gradients of all parameters, a plain scalar on the device, the same on every rank."""
    return _norm(_with_gradient(optimizer))


def clipped_step(optimizer: torch.optim.Optimizer, clip_norm: float | None) -> torch.Tensor:
    """Make an update with gradients scaled down to the norm `clip_norm`; their global norm before that.

    The fused optimiser divides by a scale on the device and leaves out an update whose norm is not finite, as it does
    for a gradient scaler: no pass over the gradients, nothing waits. Of sharded parameters, which it cannot scale, the
    gradients are scaled in place, and a norm that is not finite spoils the weights.
    """
    present = _with_gradient(optimizer)
    norm = _norm(present)
    if any(isinstance(parameter, DTensor) for parameter in present):
        if clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(present, clip_norm, norm)
        optimizer.step()
        return norm
    scale = torch.ones_like(norm) if clip_norm is None else (norm / clip_norm).clamp(min=1.0)
    optimizer.grad_scale, optimizer.found_inf = scale, (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
    optimizer.step()
    return norm


def _norm(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    return global_norm(parameter.grad for parameter in parameters if parameter.grad is not None)


def _with_gradient(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return [parameter for parameter in parameters if parameter.grad is not None]
