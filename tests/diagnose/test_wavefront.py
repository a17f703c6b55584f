"""The wavefront against one ordinary pass for each program, of a copy of the model that is really changed."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from varprop.diagnose.limits import Limits
from varprop.diagnose.replay import Batch, Captured, Replay
from varprop.diagnose.wavefront import BASE, Affine, Program, ReplaceBranch, Run, Skip, walk
from varprop.errors import LessMemoryWarning

from . import zoo

ROUNDING = 1e-5
"""Of losses of order ten in float64 models whose norms are computed in float32."""
RANDOM = torch.Generator().manual_seed(3)
MATRIX = 0.3 * torch.randn(zoo.WIDTH, zoo.WIDTH, generator=RANDOM).double() / zoo.WIDTH**0.5
SHIFT = 0.3 * torch.randn(zoo.WIDTH, generator=RANDOM).double()


def double(replay: Replay, captured: Captured, place: int, streams: Tensor) -> Tensor:
    """An operation of the caller's own."""
    return 2 * streams - replay.layer(place, streams, captured)


PROGRAMS: list[Program] = [
    {1: Skip()},
    {0: Skip()},
    {0: Run(2), 2: Run(0)},
    {1: Affine(MATRIX, SHIFT)},
    {2: Affine(None, SHIFT)},
    {0: ReplaceBranch("attn"), 2: ReplaceBranch("mlp", SHIFT)},
    {2: double},
    {0: Skip(), 1: Skip(), 2: Skip()},
    {},
    {1: Run(1)},
]


def changed(family: str, model: nn.Module, number: int) -> Tensor:
    """Logits of the model that program `number` describes, its modules exchanged or their outputs replaced."""
    model = copy.deepcopy(model)
    layers = zoo.layers_of(model)
    rows = zoo.tokens()

    def skip(x: Tensor, y: Tensor) -> Tensor:
        return x

    if number == 2:
        layers[0], layers[2] = layers[2], layers[0]
        return zoo.logits(model, rows)
    attn = zoo.branch_modules(family, layers[0])[0]
    mlp = zoo.branch_modules(family, layers[2])[1]
    scale = getattr(model.config, "residual_multiplier", 1.0)  # Granite's, between the module and the stream
    branches = {attn: lambda x, y: torch.zeros_like(y), mlp: lambda x, y: (SHIFT / scale).expand_as(y).clone()}
    changes = {
        0: {layers[1]: skip},
        1: {layers[0]: skip},
        3: {layers[1]: lambda x, y: x + x @ MATRIX + SHIFT},
        4: {layers[2]: lambda x, y: x + SHIFT},
        5: branches,
        6: {layers[2]: lambda x, y: 2 * x - y},
        7: {layer: skip for layer in layers},
        8: {},
        9: {},
    }
    return zoo.logits(model, rows, changes[number])


def expected_losses(family: str, model: nn.Module) -> Tensor:
    targets = Batch.causal(zoo.tokens()).targets
    changed_logits = [changed(family, model, number) for number in range(len(PROGRAMS))]
    return torch.stack([zoo.loss_per_sequence(x, targets) for x in (*changed_logits, zoo.logits(model, zoo.tokens()))])


def agrees_with_changed_models(family: str) -> None:
    model = zoo.make(family, torch.float64)
    expected = expected_losses(family, model)
    replay = Replay(model)
    found = walk(replay, replay.capture(Batch.causal(zoo.tokens())), PROGRAMS)
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)
    assert len({round(float(loss), 4) for loss in expected[:8, 0]}) == 8  # no two programs are alike


@zoo.each_family(*zoo.FEW)
def test_programs_are_changed_models(family: str) -> None:
    agrees_with_changed_models(family)


@pytest.mark.long
@zoo.each_family(*(name for name in zoo.FAMILIES if name not in (*zoo.FEW, "opt")))
def test_programs_are_changed_models_in_every_family(family: str) -> None:
    agrees_with_changed_models(family)


def observed(replay: Replay, captured: Captured, programs: Sequence[Program]) -> dict[tuple[int, int], Tensor]:
    """What an observer is shown: (place, program) -> streams before, after, and the model's contribution, joined."""
    found: dict[tuple[int, int], Tensor] = {}

    def observe(place: int, numbers: Sequence[int], before: Tensor, after: Tensor, contribution: Tensor) -> None:
        for i, number in enumerate(numbers):
            found[place, number] = torch.stack([before[i], after[i], contribution])

    walk(replay, captured, programs, observe=observe, losses=False)
    return found


def test_observers_see_every_program_after_its_first_change() -> None:
    model = zoo.make("llama", torch.float64)
    replay = Replay(model)
    captured = replay.capture(Batch.causal(zoo.tokens()))
    x, layer = captured.streams, lambda place, y: replay.layer(place, y[None], captured)[0]
    found = observed(replay, captured, [{0: Skip()}, {1: Skip()}, {0: Run(0), 2: Skip()}])
    base = {(place, BASE): (x[place], x[place + 1]) for place in (1, 2)}
    skipped = {
        (1, 0): (x[0], layer(1, x[0])),
        (2, 0): (layer(1, x[0]), layer(2, layer(1, x[0]))),
        (2, 1): (x[1], layer(2, x[1])),
        (1, 2): (x[1], x[2]),
    }
    expected = base | skipped
    assert set(found) == set(expected)
    for (place, number), (before, after) in expected.items():
        want = torch.stack([before, after, x[place + 1] - x[place]])
        torch.testing.assert_close(found[place, number], want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("variants,tokens_per_call", [(2, 10**9), (10**9, 30), (3, 60), (1, 1)])
def test_groups_and_chunks_change_nothing(variants: int, tokens_per_call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.make("gemma2", torch.float64)
    replay = Replay(model)
    captured = replay.capture(Batch.causal(zoo.tokens()))
    whole, seen = walk(replay, captured, PROGRAMS), observed(replay, captured, PROGRAMS)
    monkeypatch.setattr(Limits, "stack_variants", lambda self, size: variants)
    monkeypatch.setattr(Limits, "call_tokens", lambda self, size: tokens_per_call)
    torch.testing.assert_close(walk(replay, captured, PROGRAMS), whole, rtol=0, atol=ROUNDING)
    again = observed(replay, captured, PROGRAMS)
    assert {key for key in again if key[1] != BASE} == {key for key in seen if key[1] != BASE}
    for key, value in again.items():
        torch.testing.assert_close(value, seen[key], rtol=0, atol=1e-6)


@pytest.mark.parametrize("fails_at", [0, 3, 7])
def test_after_the_memory_ran_out_the_same_is_computed(fails_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    replay = Replay(zoo.make("gpt2", torch.float64), Limits(4e6))
    captured = replay.capture(Batch.causal(zoo.tokens()))
    whole, seen = walk(replay, captured, PROGRAMS), observed(replay, captured, PROGRAMS)
    layer, calls = replay.layer, []

    def failing(*args: object, **kwargs: object) -> Tensor:
        calls.append(args)
        if len(calls) == fails_at + 1:
            raise torch.OutOfMemoryError("out of memory")
        return layer(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(replay, "layer", failing)
    with pytest.warns(LessMemoryWarning):
        found = walk(replay, captured, PROGRAMS)
    torch.testing.assert_close(found, whole, rtol=0, atol=ROUNDING)
    calls.clear()
    with pytest.warns(LessMemoryWarning):
        again = observed(replay, captured, PROGRAMS)
    assert set(again) >= set(seen)
    for key, value in seen.items():
        torch.testing.assert_close(again[key], value, rtol=0, atol=1e-6)


def test_without_programs_there_is_the_model() -> None:
    model = zoo.make("llama", torch.float64)
    replay = Replay(model)
    given = Batch.causal(zoo.tokens())
    found = walk(replay, replay.capture(given), [])
    expected = zoo.loss_per_sequence(zoo.logits(model, given.tokens), given.targets)
    torch.testing.assert_close(found, expected[None], rtol=0, atol=ROUNDING)


def test_our_own_models() -> None:
    model = zoo.make_own("moe_shared")
    rows = zoo.tokens() % model.spec.vocab_size
    replay, given = Replay(model), Batch.causal(rows)
    found = walk(replay, replay.capture(given), [{1: Skip()}, {0: Run(1), 1: Run(0)}])
    skipped = zoo.logits(model, rows, {model.layers[1]: lambda x, y: x})
    swapped = copy.deepcopy(model)
    swapped.layers[0], swapped.layers[1] = swapped.layers[1], swapped.layers[0]
    losses = [zoo.loss_per_sequence(x, given.targets) for x in (skipped, swapped(rows), model(rows))]
    torch.testing.assert_close(found, torch.stack(losses).detach(), rtol=0, atol=1e-10)
