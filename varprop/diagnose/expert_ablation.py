"""Ablation of single experts: what each expert of each mixture is worth in loss.

Shape suffixes: `B` sequences, `T` tokens, `D` d_model, `E` experts, `K` active experts of a token, `L` layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from varprop.diagnose.bootstrap import stderr
from varprop.diagnose.experts import INPUTS, experts_modules, is_mixture, n_experts, routing_of
from varprop.diagnose.replay import Captured, Replay
from varprop.diagnose.session import Session, Variables
from varprop.diagnose.usefulness import loss_ratio, with_targets
from varprop.diagnose.wavefront import Program, Run, walk
from varprop.errors import ArgumentError, UnsuitedError, require
from varprop.nn.block import Block


def expert_ablation(session: Session) -> Variables:
    """Loss of the model without one expert over the loss of the model.

    expert_ablation_loss_ratio (layer, expert), both losses summed over the first sequences, as many as have about the
    tokens of the option expert_tokens. The gate of the expert is zero for every token that chose it: the router chooses
    as before, no other expert steps in and the other gates are not renormalised. Shared experts stay. NaN in layers
    without a mixture. expert_ablation_null: how far from 1 the ratio is where the first mixture itself is put in its
    place by the same route, which is what rounding alone does. Cost: a network for each expert of each mixture.
    Standard errors: over the sequences with targets, the same ones in both losses; zero where there is only one.
    Raises `UnsuitedError` for a model without logits or without experts that are stacked in one module, as those of
    transformers 5 and ours are, `ArgumentError` where mixtures have different numbers of experts.
    Checked by: tests/diagnose/test_expert_ablation.py, the model with that expert's output matrix set to zero.
    """
    replay = session.replay
    replay.require_loss("expert_ablation")
    sizes = {place: _size(layer) for place, layer in enumerate(replay.layers) if is_mixture(layer)}
    missing, expected = "without experts stacked in one module", "a mixture of transformers 5, or ours"
    require(bool(sizes), UnsuitedError, "architecture", replay.architecture, missing, expected)
    numbers = sorted(set(sizes.values()))
    require(len(numbers) == 1, ArgumentError, "n_experts", numbers, "different in different layers", "one number")
    places, size = list(sizes), numbers[0]
    programs: list[Program] = [{place: WithoutExpert(expert)} for place in places for expert in range(size)]
    programs.append({places[0]: Run(places[0])})

    def of_batch(captured: Captured) -> dict[str, Tensor]:
        return {"loss": walk(replay, captured, programs).mT, "count": replay.count(captured.batch)}

    sequences = session.first_sequences(session.option("expert_tokens"))
    arrays = with_targets(session.each_batch("expert-ablation", of_batch, sequences))

    def table(ratios: np.ndarray) -> np.ndarray:
        found = np.full((replay.n_layers + 1, size), np.nan)
        found[np.array(places) + 1] = ratios[:-1].reshape(len(places), size)
        return found

    losses, dims = (arrays["loss"], arrays["count"]), ("layer", "expert")
    ratios = loss_ratio(*(values.mean(axis=0) for values in losses))
    return {
        "expert_ablation_loss_ratio": (dims, table(ratios)),
        "expert_ablation_loss_ratio_stderr": (dims, table(stderr(loss_ratio, *losses, seed=session.seed))),
        "expert_ablation_null": ((), abs(ratios[-1] - 1)),
    }


def _size(layer: nn.Module) -> int:
    """E of a mixture."""
    if isinstance(layer, Block):
        assert layer.spec.moe is not None
        return layer.spec.moe.n_experts
    return n_experts(experts_modules(layer)[0])


@dataclass(frozen=True)
class WithoutExpert:
    """The layer of the place with the gate of one expert (0..E-1) set to zero; no other expert steps in."""

    expert: int

    def __call__(self, replay: Replay, captured: Captured, place: int, streams: Tensor) -> Tensor:
        layer = replay.layers[place]
        without = _silent(layer, self.expert) if isinstance(layer, Block) else _closed(layer, self.expert)
        with without:
            return replay.layer(place, streams, captured)


@contextlib.contextmanager
def _closed(layer: nn.Module, expert: int) -> Iterator[None]:
    """While inside, a layer of transformers calls its experts with the gates of one of them set to zero."""

    def close(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        index, gates = routing_of(args, kwargs)
        given: list[Any] = [*args, *kwargs.values()]
        given[INPUTS - 1] = gates.masked_fill(index == expert, 0.0)
        return tuple(given[: len(args)]), dict(zip(kwargs, given[len(args) :], strict=True))

    hooks = [module.register_forward_pre_hook(close, with_kwargs=True) for module in experts_modules(layer)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _silent(block: Block, expert: int) -> Iterator[None]:
    """While inside, the output matrix of one expert is zero, which is as if its gates were: outputs have no bias."""
    matrix = block.get_parameter("moe.experts.down").data[expert]
    kept = matrix.clone()
    try:
        matrix.zero_()
        yield
    finally:
        matrix.copy_(kept)
