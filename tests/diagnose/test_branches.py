"""Branches: in every family, what attention and the feed-forward part add to the stream is seen, and can be changed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from varprop.diagnose.branches import Branches
from varprop.diagnose.replay import Batch, Captured, Replay
from varprop.errors import ArgumentError

from ..reference.specs import SPECS
from . import zoo

WITHOUT_TWO = ("opt",)
"""Families that reshape their stream inside the layer, so that its additions are not seen."""
PARTS = tuple(
    name
    for name, spec in SPECS.items()
    if spec.attention is not None and (spec.feed_forward or spec.moe) and not name.startswith("key_mask")
)
FLOAT32_NORMS = 2e-6
FAMILIES = tuple(name for name in zoo.FAMILIES if name not in WITHOUT_TWO)


def taken_apart(model: nn.Module, vocab_size: int = zoo.VOCABULARY) -> tuple[Replay, Captured]:
    replay = Replay(model)
    return replay, replay.capture(Batch.causal(zoo.tokens() % vocab_size))


def seen(replay: Replay, captured: Captured, place: int) -> tuple[list[tuple[str, Tensor]], Tensor]:
    """What the branches of a layer add, and the stream after it."""
    found: list[tuple[str, Tensor]] = []

    def edit(name: str, added: Tensor) -> Tensor:
        found.append((name, added.clone()))
        return added

    after = replay.layer(place, captured.streams[place][None], captured, edit)
    return found, after[0]


@zoo.each_family(*FAMILIES)
def test_branches_add_up_and_watching_changes_nothing(family: str) -> None:
    replay, captured = taken_apart(zoo.make(family, torch.float64))
    for place in range(replay.n_layers):
        (attn, mlp), after = seen(replay, captured, place)
        x, y = captured.streams[place], captured.streams[place + 1]
        assert (attn[0], mlp[0]) == ("attn", "mlp")
        torch.testing.assert_close(after, y, rtol=0, atol=FLOAT32_NORMS)
        if family not in zoo.POST_LN:
            torch.testing.assert_close(x + attn[1] + mlp[1], y, rtol=0, atol=FLOAT32_NORMS)
        assert min(float(attn[1].abs().max()), float(mlp[1].abs().max())) > 1e-3


@zoo.each_family(*FAMILIES)
def test_a_branch_set_to_zero_is_its_module_set_to_zero(family: str) -> None:
    model = zoo.make(family, torch.float64)
    replay, captured = taken_apart(model)
    layer = zoo.layers_of(model)[1]
    for name, module in zip(("attn", "mlp"), zoo.branch_modules(family, layer), strict=True):
        expected = zoo.logits(model, captured.batch.tokens, {module: lambda x, y: torch.zeros_like(y)})
        x = captured.streams[1].expand(2, -1, -1, -1)
        x = replay.layer(1, x, captured, lambda n, added, name=name: added * (n != name))
        x = replay.layer(2, x, captured)
        assert not torch.allclose(x[0], captured.streams[-1], atol=1e-3)
        for variant in x:
            torch.testing.assert_close(replay.logits(variant), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", PARTS)
def test_our_own_branches_are_those_that_the_model_records(name: str) -> None:
    model, recorded = zoo.make_own(name), {}
    replay, captured = taken_apart(model, SPECS[name].vocab_size)
    with torch.no_grad():
        model(captured.batch.tokens, lambda layer, site, x: recorded.__setitem__((layer, site), x))
    for place in range(replay.n_layers):
        found, after = seen(replay, captured, place)
        assert [n for n, _ in found] == ["attn", "mlp"]
        for branch, added in found:
            torch.testing.assert_close(added, recorded[place + 1, f"{branch}_out"], rtol=0, atol=1e-12)
        torch.testing.assert_close(after, captured.streams[place + 1], rtol=0, atol=1e-12)


@zoo.each_family("llama", "gpt_neox", "gemma3")
def test_the_stream_after_attention(family: str) -> None:
    """Where attention and feed-forward are parallel it is the stream plus attention, as in our own blocks."""
    replay, captured = taken_apart(zoo.make(family))
    x, added = captured.streams[1], {}

    def edit(name: str, branch: Tensor) -> Tensor:
        added[name] = branch
        return branch

    call = captured.calls[1]
    with Branches(x, edit) as branches:
        replay.layers[1](x, *call.args, **call.kwargs)
    assert branches.middle is not None
    torch.testing.assert_close(branches.middle, x + added["attn"])


@pytest.mark.parametrize("name,found", [("attention_only", "attn"), ("feed_forward_only", "mlp")])
def test_a_layer_with_one_branch_is_refused(name: str, found: str) -> None:
    replay, captured = taken_apart(zoo.make_own(name), SPECS[name].vocab_size)
    with pytest.raises(ArgumentError) as error:
        seen(replay, captured, 0)
    expected = f"architecture='Transformer' adds {found} to the stream in layer 1; expected a layer that adds attention"
    assert str(error.value).startswith(expected)
    assert "the hook on the branches is missing" in str(error.value)
    assert "\n" not in str(error.value)


@zoo.each_family(*WITHOUT_TWO)
def test_additions_that_are_not_seen_are_said_to_be_missing(family: str) -> None:
    replay, captured = taken_apart(zoo.make(family))
    with pytest.raises(ArgumentError, match="the hook on the branches is missing"):
        seen(replay, captured, 0)


class ByHand(nn.Module):
    """A layer with its sums written in an unusual way."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        a = functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]
        if self.way == "in place":
            x = x.clone() if x.requires_grad else x
            y = a + x
            y += y.tanh()
            return y
        if self.way == "with a factor":
            y = torch.add(x, a, alpha=0.5)
            return y + y.tanh()
        y = functional.dropout(x, 0.0, training=False) + a
        return torch.add(y.tanh(), y)


@pytest.mark.parametrize("way", ["in place", "with dropout"])
def test_ways_of_writing_a_sum(way: str) -> None:
    layer, x = ByHand(way), torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    plain = layer(x.clone())
    with Branches(x, lambda name, added: added) as branches:
        assert torch.equal(layer(x), plain)
    assert branches.found == ["attn", "mlp"]
    with Branches(x, lambda name, added: torch.zeros_like(added)):
        assert torch.equal(layer(x), x)


def test_a_weighted_sum_is_not_taken_for_a_residual_one() -> None:
    layer, x = ByHand("with a factor"), torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    plain = layer(x)
    with Branches(x, lambda name, added: added) as branches:
        torch.testing.assert_close(layer(x), plain)
    assert branches.found != ["attn", "mlp"]
