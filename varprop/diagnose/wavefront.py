"""Many changed networks through the layers side by side.

A program says where a network departs from the model: at some places something else is done than to run the layer. Up
to its first change a program is the model, whose streams are known; from there on it goes with all others that
have departed, so that a place costs one call for all of them. The model itself goes along, so that the same kernels
on the same batch give what a program is compared with.

Shape suffixes: `V` variants, `B` sequences, `T` tokens, `D` d_model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from varprop.diagnose.replay import Captured, Replay


class Op(Protocol):
    """What is done at a place instead of running its layer: streams (V, B, T, D) before it to streams after it."""

    def __call__(self, replay: Replay, captured: Captured, place: int, streams: Tensor) -> Tensor:
        """The streams after the place."""
        ...


Program = Mapping[int, Op]
"""Place (0..L-1) -> what is done there."""
CPU_TOKENS = 4096
"""Tokens of a call on a CPU: of more the activations leave its caches, which costs a tenth of the speed."""
BASE = -1
"""Number of the unchanged model among the programs."""


@dataclass(frozen=True)
class Skip:
    """Nothing: the layer's contribution is zero."""

    def __call__(self, replay: Replay, captured: Captured, place: int, streams: Tensor) -> Tensor:
        return streams


@dataclass(frozen=True)
class Run:
    """Another layer, `layer` (0..L-1), with its own arguments; the layer of the place itself is the null change."""

    layer: int

    def __call__(self, replay: Replay, captured: Captured, place: int, streams: Tensor) -> Tensor:
        return replay.layer(self.layer, streams, captured)


@dataclass(frozen=True, eq=False)
class Affine:
    """x + x @ matrix + shift: an affine map in place of the layer. matrix: (D, D), None = 0; shift: (D)."""

    matrix: Tensor | None
    shift: Tensor

    def __call__(self, replay: Replay, captured: Captured, place: int, streams: Tensor) -> Tensor:
        update = self.shift if self.matrix is None else streams.to(self.matrix.dtype) @ self.matrix + self.shift
        return (streams.to(update.dtype) + update).to(streams.dtype)


@dataclass(frozen=True, eq=False)
class ReplaceBranch:
    """The layer with `constant` (D) in place of what `branch` (attn, mlp) adds; None = zero."""

    branch: str
    constant: Tensor | None = None

    def __call__(self, replay: Replay, captured: Captured, place: int, streams: Tensor) -> Tensor:
        def edit(name: str, added: Tensor) -> Tensor:
            if name != self.branch:
                return added
            zero = torch.zeros_like(added)
            return zero if self.constant is None else zero + self.constant.to(added.dtype)

        return replay.layer(place, streams, captured, edit)


Observe = Callable[[int, Sequence[int], Tensor, Tensor, Tensor], None]
"""Called with the place, the numbers of some programs, their streams before and after it (V, B, T, D), and the model's
contribution there (B, T, D)."""


@torch.no_grad()
def walk(
    replay: Replay,
    captured: Captured,
    programs: Sequence[Program],
    *,
    observe: Observe | None = None,
    losses: bool = True,
) -> Tensor:
    """Summed losses in nats of every program and, last, of the model, (P + 1, B) float64; zeros without `losses`.

    observe: sees every program at every place after its first change where the layer itself is run. It may be called
    again for the same program and place, from the start, after the memory ran out: it sets and does not add. The
    programs are cut into groups, and calls into chunks, by `replay.limits`.
    """
    return replay.limits.retried(lambda: _walk(replay, captured, programs, observe, losses))


def _walk(
    replay: Replay, captured: Captured, programs: Sequence[Program], observe: Observe | None, losses: bool
) -> Tensor:
    found = torch.zeros(len(programs) + 1, captured.n_sequences, dtype=torch.float64, device=replay.device)
    order = sorted(range(len(programs)), key=lambda i: min(programs[i], default=replay.n_layers))
    size = max(1, replay.limits.stack_variants(captured.start.nbytes) - 1)
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    for group in groups or [[]]:
        stack = _walk_group(replay, captured, [programs[i] for i in group], group, observe)
        if losses:
            found[[*group, len(programs)]] = replay.losses(stack, captured.batch).roll(-1, 0)
    return found


def _walk_group(
    replay: Replay, captured: Captured, programs: Sequence[Program], numbers: Sequence[int], observe: Observe | None
) -> Tensor:
    """Streams after the last layer of the model and of programs that are sorted by their first change."""
    starts = [min(program, default=replay.n_layers) for program in programs]
    first = min(starts, default=replay.n_layers)
    base = captured.start if first == 0 else captured.streams[first]
    stack = base.new_empty(len(programs) + 1, *base.shape)
    stack[0] = base
    for place in range(first, replay.n_layers):
        live = 1 + sum(start < place for start in starts)  # departed before this place, and the model
        special = [i for i, program in enumerate(programs, start=1) if place in program]
        for i in special:
            source = stack[i : i + 1] if i < live else stack[:1]
            stack[i] = programs[i - 1][place](replay, captured, place, source)[0]
        normal = [i for i in range(live) if i not in set(special)]
        contribution: Tensor | None = None
        for chunk in _chunks(replay, captured, normal):
            which = slice(chunk[0], chunk[-1] + 1) if chunk[-1] - chunk[0] + 1 == len(chunk) else chunk
            before = stack[which]
            after = replay.layer(place, before, captured)
            if contribution is None:
                contribution = after[0] - before[0]
            if observe is not None and len(normal) > 1:
                observe(place, [BASE if i == 0 else numbers[i - 1] for i in chunk], before, after, contribution)
            stack[which] = after
    for i, start in enumerate(starts, start=1):
        if start == replay.n_layers:  # nothing is changed
            stack[i] = stack[0]
    return stack


def _chunks(replay: Replay, captured: Captured, which: Sequence[int]) -> Iterator[list[int]]:
    tokens = captured.n_sequences * captured.n_tokens
    most = replay.limits.call_tokens(replay.call_bytes)
    if replay.device.type == "cpu":
        most = min(most, CPU_TOKENS)
    size = max(1, most // tokens)
    for start in range(0, len(which), size):
        yield list(which[start : start + size])
