"""The plain programs that `diagnose_speed` compares with: the same definitions, one full forward pass for each variant.

`plain_*` keep everything on the device and take as many sequences at a time as they are given: what one writes in an
afternoon and tunes in another. `released_causal` follows the description of the released procedure: micro-batches of 4,
all hidden states copied to the host after each and joined there, norms taken on the host in the model's type.
Models are Hugging Face's Llama: `model.model.layers`, layers that take and give a stream.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

MICRO_BATCH = 4
"""Sequences of a pass of the released procedure."""


@contextlib.contextmanager
def replaced(layer: nn.Module, forward: Any) -> Iterator[None]:
    """The layer computes something else."""
    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward


@contextlib.contextmanager
def contributions(layers: Sequence[nn.Module]) -> Iterator[dict[int, Tensor]]:
    """What each of the layers adds to the stream in the passes made inside."""
    found: dict[int, Tensor] = {}

    def keep(index: int) -> Any:
        return lambda _, args, output: found.__setitem__(index, output - args[0])

    hooks = [layer.register_forward_hook(keep(index)) for index, layer in enumerate(layers)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def plain_causal(model: Any, tokens: Tensor, batch: int) -> Tensor:
    """The causal matrix (L, L), ratio of means; L + 1 full forward passes."""
    layers = model.model.layers
    n_layers = len(layers)
    change = torch.zeros(n_layers, n_layers, dtype=torch.float64, device=tokens.device)
    size = torch.zeros(n_layers, dtype=torch.float64, device=tokens.device)
    for rows in tokens.split(batch):
        with contributions(layers) as found:
            model(rows, use_cache=False)
        base = dict(found)
        for index in range(n_layers):
            size[index] += base[index].float().norm(dim=-1).double().sum()
        for skipped in range(n_layers):
            with replaced(layers[skipped], lambda x, *_, **__: x), contributions(layers[skipped + 1 :]) as found:
                model(rows, use_cache=False)
            for index, contribution in found.items():
                later = skipped + 1 + index
                change[skipped, later] += (contribution - base[later]).float().norm(dim=-1).double().sum()
    return change / size


@torch.no_grad()
def released_causal(model: Any, tokens: Tensor) -> Tensor:
    """The same matrix by the released procedure, its misalignment left out."""
    layers = model.model.layers
    n_layers = len(layers)
    base = _host_states(model, tokens)
    change = torch.zeros(n_layers, n_layers)
    for skipped in range(n_layers):
        with replaced(layers[skipped], lambda x, *_, **__: x):
            states = _host_states(model, tokens)
        for later in range(skipped + 1, n_layers):
            own = base[later + 1] - base[later]
            gap = (states[later + 1] - states[later]) - own
            change[skipped, later] = gap.norm(dim=-1).mean() / own.norm(dim=-1).mean()
    return change


def _host_states(model: Any, tokens: Tensor) -> list[Tensor]:
    """The stream before each layer and after the last, on the host, grown by one micro-batch after the other."""
    states: list[Tensor] = []
    for rows in tokens.split(MICRO_BATCH):
        host = [state.cpu() for state in _states(model, rows)]
        states = [torch.cat([old, new]) for old, new in zip(states, host, strict=True)] if states else host
    return states


def _states(model: Any, rows: Tensor) -> list[Tensor]:
    """The stream before the first layer and after each."""
    captured: list[Tensor] = []
    layers = model.model.layers
    hooks = [layer.register_forward_hook(lambda _, args, output: captured.append(output)) for layer in layers]
    hooks.append(layers[0].register_forward_pre_hook(lambda _, args: captured.append(args[0])))
    model(rows, use_cache=False)
    for hook in hooks:
        hook.remove()
    return captured


@torch.no_grad()
def plain_loss(model: Any, tokens: Tensor, batch: int) -> float:
    """Mean next-token loss."""
    total = 0.0
    for rows in tokens.split(batch):
        logits = model(rows, use_cache=False).logits[:, :-1]
        total += float(functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"))
    return total / (tokens.shape[0] * (tokens.shape[1] - 1))


@torch.no_grad()
def plain_usefulness(model: Any, fit: Tensor, held_out: Tensor, batch: int) -> Tensor:
    """Loss of the model with a layer replaced over its loss, (L): for each layer a pass to fit and one to evaluate."""
    layers = model.model.layers
    base = plain_loss(model, held_out, batch)
    ratios = []
    for layer in layers:
        kept: list[tuple[Tensor, Tensor]] = []
        hook = layer.register_forward_hook(lambda _, args, output, kept=kept: kept.append((args[0], output)))
        for rows in fit.split(batch):
            model(rows, use_cache=False)
        hook.remove()
        x = torch.cat([pair[0] for pair in kept]).flatten(0, 1).float()
        y = torch.cat([pair[1] for pair in kept]).flatten(0, 1).float()
        inputs = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        solution = torch.linalg.lstsq(inputs, y).solution
        matrix, shift = solution[:-1], solution[-1]
        with replaced(layer, lambda h, *_, m=matrix, s=shift, **__: (h.float() @ m + s).to(h.dtype)):
            ratios.append(plain_loss(model, held_out, batch) / base)
    return torch.tensor(ratios)


@torch.no_grad()
def plain_permutation(model: Any, tokens: Tensor, pairs: Sequence[tuple[int, int]], batch: int) -> Tensor:
    """|loss with two layers exchanged - loss| / loss for each pair, each by passes of its own."""
    layers = model.model.layers
    base = plain_loss(model, tokens, batch)
    scores = []
    for i, j in pairs:
        layers[i], layers[j] = layers[j], layers[i]
        scores.append(abs(plain_loss(model, tokens, batch) - base) / base)
        layers[i], layers[j] = layers[j], layers[i]
    return torch.tensor(scores)


def plain_jacobian(model: Any, tokens: Tensor, which: Sequence[int]) -> Tensor:
    """|J - I|_F^2 / d of some layers, J summed over source and averaged over target tokens; d products a layer."""
    layers = model.model.layers
    calls: dict[int, tuple[Any, Any]] = {}

    def keep(index: int) -> Any:
        return lambda _, args, kwargs: calls.__setitem__(index, (args, kwargs))

    hooks = [layer.register_forward_pre_hook(keep(i), with_kwargs=True) for i, layer in enumerate(layers)]
    with torch.no_grad():
        model.model(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    values = []
    for index in which:
        (x, *args), kwargs = calls[index]
        x = x.detach().requires_grad_()
        y = layers[index](x, *args, **kwargs)
        d_model, n_tokens = x.shape[-1], x.shape[0] * x.shape[1]
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        for i in range(d_model):
            cotangent = torch.zeros_like(y)
            cotangent[..., i] = 1
            row = torch.autograd.grad(y, x, cotangent, retain_graph=True)[0].sum(dim=(0, 1), dtype=torch.float32)
            row = row / n_tokens
            row[i] -= 1
            total += row.double().square().sum()
        values.append(total / d_model)
    return torch.stack(values)
