"""How a mixture uses its experts: load, gates, entropy of the router.

Shape suffixes: `B` sequences, `T` tokens, `D` d_model, `E` experts, `K` active experts of a token, `L` layers.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from varprop.diagnose.bootstrap import ratio, stderr
from varprop.diagnose.replay import Captured, Replay
from varprop.diagnose.session import Session, Variables
from varprop.errors import ArgumentError, UnsuitedError, require
from varprop.measure import expert_load, expert_load_concentration, gate_second_moment, router_entropy
from varprop.nn.block import Block

OF_DENSE = {"gate_sum": 1.0, "gate_second_moment": 1.0, "expert_load_concentration": 1.0, "router_entropy": 0.0}
"""Values of a layer without a mixture: one expert with gate 1."""
INPUTS = 3
"""What the experts of a mixture are called with: the tokens, the experts of each, their gates."""


def experts(session: Session) -> Variables:
    """Load of the experts and statistics of the gates, with standard errors over sequences.

    expert_load (layer, expert): share of the expert in all assignments of a token to an expert, NaN in layers without
    a mixture. The others are means over sequences of what `varprop.measure` defines for one: gate_second_moment,
    expert_load_concentration (1/E when balanced; of T tokens it is larger by about (1 - 1/E) / (K T) than of all text),
    router_entropy (nats, over all experts; absent where the router is not found), and gate_sum, the mean over tokens of
    the sum of a token's gates. A layer without a mixture counts as one expert with gate 1. Nothing for a model
    without a mixture. Raises `UnsuitedError` where experts are kept as single modules (`is_mixture`).
    Checked by: tests/diagnose/test_experts.py, the routers and gates written as loops.
    """
    replay = session.replay
    mixtures = [index for index, layer in enumerate(replay.layers) if is_mixture(layer)]
    if not mixtures:
        return {}
    arrays = session.each_batch("experts", lambda captured: _of_batch(replay, mixtures, captured))
    load = arrays.pop("load")  # (S, mixtures, E)

    def share(load: np.ndarray) -> np.ndarray:
        return ratio(load, load.sum(axis=-1, keepdims=True))

    def of_layers(values: np.ndarray, elsewhere: float) -> np.ndarray:
        table = np.full((replay.n_layers + 1, *values.shape[1:]), elsewhere)
        table[0], table[[index + 1 for index in mixtures]] = np.nan, values
        return table

    dims = ("layer", "expert")
    variables: Variables = {
        "expert_load": (dims, of_layers(share(load.mean(axis=0)), np.nan)),
        "expert_load_stderr": (dims, of_layers(stderr(share, load, seed=session.seed), np.nan)),
    }
    for name, values in arrays.items():
        variables[name] = (("layer",), of_layers(values.mean(axis=0), OF_DENSE[name]))
        error = stderr(lambda mean: mean, values, seed=session.seed)
        variables[f"{name}_stderr"] = (("layer",), of_layers(error, 0.0))
    return variables


def experts_modules(layer: nn.Module) -> list[nn.Module]:
    """The modules of a layer of transformers that are called with tokens, the experts of each and their gates.

    They hold the experts' weights as stacks (E, ., .) and are called as (hidden_states, index (B T, K), gates (B T,
    K)), by position or by names that families differ in; a row is a token, sequence by sequence. Empty for a layer
    without a mixture.
    """
    return [module for module in layer.modules() if _stacks(module) and _n_inputs(module) == INPUTS]


def n_experts(module: nn.Module) -> int:
    """E of one of the `experts_modules`.

    >>> stack = nn.Module()
    >>> stack.up = nn.Parameter(torch.zeros(4, 3, 2))
    >>> n_experts(stack)
    4
    """
    return _stacks(module)[0].shape[0]


def routing_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The experts of each token and their gates, (B T, K) both, of a call of one of the `experts_modules`."""
    _, index, gates = (*args, *kwargs.values())[:INPUTS]
    return index, gates


def is_mixture(layer: nn.Module) -> bool:
    """Whether a layer has routed experts, of ours or of transformers.

    Raises `UnsuitedError` for experts that are kept as single modules beside a router, as transformers 4 kept them.
    """
    if isinstance(layer, Block):
        return layer.spec.is_moe(layer.layer)
    name = _single_experts(layer)
    require(not name, UnsuitedError, "experts", name, "single modules", "stacked weights, as transformers 5 keeps them")
    return bool(experts_modules(layer))


def _single_experts(layer: nn.Module) -> str:
    """The class of a module with a list of equal modules and a router of as many rows; empty if there is none."""
    for module in layer.modules():
        weights = [part._parameters.get("weight") for part in module.children()]
        rows = {len(weight) for weight in weights if weight is not None and weight.ndim == 2}
        for part in module.children():
            if isinstance(part, nn.ModuleList) and len(part) in rows - {1} and len({type(each) for each in part}) == 1:
                return type(module).__name__
    return ""


class Routing(NamedTuple):
    """Of one layer. gates: (B, T, E), zero where an expert does not act. logits: (B, T, E), None = no router found."""

    gates: Tensor
    logits: Tensor | None
    router: str
    """What the gates are made of: softmax or sigmoid of the logits."""


def routing(replay: Replay, index: int, captured: Captured) -> Routing:
    """Gates and logits of layer `index` (0..L-1), a mixture, on the sequences that were captured."""
    layer = replay.layers[index]
    if isinstance(layer, Block):
        return _of_block(layer, captured, index)
    found: list[Routing] = []
    stream = captured.streams[index]
    with _watched(layer, index, stream, found):
        replay.layer(index, stream[None], captured)
    return found[0]


def _of_block(block: Block, captured: Captured, index: int) -> Routing:
    seen: dict[str, Tensor] = {}

    def observe(layer: int, what: str, values: Tensor) -> None:
        seen[what] = values

    call = captured.calls[index]
    record, generator, *_ = (*call.args, None, None)
    block(captured.streams[index], record, generator, observe, **call.kwargs)
    assert block.spec.moe is not None
    return Routing(seen["gates"], seen["router_logits"], block.spec.moe.router)


@contextlib.contextmanager
def _watched(layer: nn.Module, index: int, stream: Tensor, found: list[Routing]) -> Iterator[None]:
    """Appends the routing of the layer, called on the stream (B, T, D), to `found`."""
    modules = experts_modules(layer)
    require(len(modules) == 1, ArgumentError, "layer", index + 1, f"of {len(modules)} mixtures", "one mixture")
    size, routers = n_experts(modules[0]), []
    shape = *stream.shape[:2], -1

    def route(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = next(iter((*args, *kwargs.values())))
        bias = module._parameters.get("bias")
        weight = module._parameters["weight"]
        assert weight is not None
        # From the weights: what a router returns as logits has been through a softmax in some families.
        logits = functional.linear(tokens.float(), weight.float(), None if bias is None else bias.float())
        routers.append(logits.reshape(*shape))

    def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        chosen, given = (values.reshape(*shape) for values in routing_of(args, kwargs))
        wide = torch.promote_types(given.dtype, torch.float32)
        gates = torch.zeros(*shape[:2], size, dtype=wide, device=given.device).scatter(-1, chosen, given.to(wide))
        logits = routers[-1] if routers else None  # the last one before the experts
        found.append(Routing(gates, logits, "softmax" if logits is None else _router(logits, chosen, given)))

    hooks = [modules[0].register_forward_pre_hook(take, with_kwargs=True)]
    for module in layer.modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.shape == (size, stream.shape[-1]):
            hooks.append(module.register_forward_pre_hook(route, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _router(logits: Tensor, chosen: Tensor, gates: Tensor) -> str:
    """softmax or sigmoid: to whose values of the chosen experts the gates are proportional, the better of the two."""
    wanted = gates.double().clamp(min=1e-30).log()
    logits = logits.gather(-1, chosen).double()
    errors = []
    for scores in (logits, functional.logsigmoid(logits)):
        gap = wanted - scores
        errors.append((gap - gap.mean(dim=-1, keepdim=True)).square().sum())
    return "softmax" if errors[0] <= errors[1] else "sigmoid"


@torch.no_grad()
def _of_batch(replay: Replay, mixtures: list[int], captured: Captured) -> dict[str, Tensor]:
    """Per sequence and mixture: tokens of each expert (B, mixtures, E), and the statistics of `OF_DENSE`."""
    columns: dict[str, list[Tensor]] = {name: [] for name in ("load", *OF_DENSE)}
    for index in mixtures:
        gates, logits, router = routing(replay, index, captured)
        columns["load"].append(expert_load(gates).double())
        columns["gate_sum"].append(gates.sum(dim=-1).double().mean(dim=-1))
        columns["gate_second_moment"].append(gate_second_moment(gates))
        columns["expert_load_concentration"].append(expert_load_concentration(gates))
        if logits is not None:
            columns["router_entropy"].append(router_entropy(logits, router))
    return {name: torch.stack(values, dim=1) for name, values in columns.items() if len(values) == len(mixtures)}


def _stacks(module: nn.Module) -> list[nn.Parameter]:
    """The module's own weights that are stacks of as many matrices."""
    stacks = [p for p in module.parameters(recurse=False) if p.ndim == 3]
    return stacks if len({len(p) for p in stacks}) == 1 else []


def _n_inputs(module: nn.Module) -> int:
    return len(inspect.signature(module.forward).parameters)
