"""The sites of a pass: the streams of the layers themselves, and sums that hold between them."""

from __future__ import annotations

import pytest
import torch

from tests.diagnose import zoo
from varprop.diagnose import Batch, Replay, Session
from varprop.diagnose.sites import branches_apart, each_layer
from varprop.errors import BranchesWarning
from varprop.results import SITES

TOLD = [family for family in zoo.FAMILIES if family != "opt"]
"""Families whose branches are told apart."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@zoo.each_family(*TOLD)
def test_streams_are_those_of_the_layers_bitwise(family: str, dtype: torch.dtype) -> None:
    replay = Replay(zoo.make(family, dtype))
    captured = replay.capture(Batch.causal(zoo.tokens()))
    for layer, sites in each_layer(replay, captured, branches=True):
        assert torch.equal(sites["resid_post"], captured.streams[layer])
        assert tuple(sites) == (SITES if layer else ("resid_post",))
        if layer:
            assert torch.equal(sites["resid_pre"], captured.streams[layer - 1])


@zoo.each_family(*TOLD)
def test_branches_add_up_to_the_layer(family: str) -> None:
    """In float32, to the rounding of three terms; where a norm follows the sum only its input is the sum."""
    if family in zoo.POST_LN:
        pytest.skip("a norm follows the sums")
    replay = Replay(zoo.make(family))
    for layer, sites in each_layer(replay, replay.capture(Batch.causal(zoo.tokens())), branches=True):
        if layer:
            atol = 1e-5 * float(sites["resid_post"].abs().max())
            middle = sites["resid_pre"] + sites["attn_out"]
            torch.testing.assert_close(middle, sites["resid_mid"], rtol=1e-5, atol=atol)
            torch.testing.assert_close(middle + sites["mlp_out"], sites["resid_post"], rtol=1e-5, atol=atol)


@pytest.mark.filterwarnings("error")
def test_what_is_told_apart_gives_no_warning() -> None:
    assert branches_apart(Session(Replay(zoo.make("llama")), Batch.causal(zoo.tokens())))


def test_a_warning_says_which_layer_is_in_the_way() -> None:
    session = Session(Replay(zoo.make("opt")), Batch.causal(zoo.tokens()))
    with pytest.warns(BranchesWarning, match=r"OPTForCausalLM.*layer 1"):
        assert not branches_apart(session)
