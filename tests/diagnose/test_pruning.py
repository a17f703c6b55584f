"""Pruning consequence against forward passes of models whose layers are really gone, or replaced."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from varprop import results
from varprop.diagnose import Batch, Replay, Session
from varprop.diagnose.bootstrap import stderr
from varprop.diagnose.pruning import greedy_order, pruning
from varprop.diagnose.wavefront import Affine
from varprop.errors import ArgumentError

from . import zoo
from .test_permutation import losses_of


def session_of(model: nn.Module, tokens: Tensor, **options: Any) -> Session:
    return Session(Replay(model), Batch.causal(tokens), options=options)


def without(model: Any, layers: Sequence[int]) -> nn.Module:
    """A copy of the model that lacks some layers (0..L-1)."""
    model = copy.deepcopy(model)
    first = Replay(model).layers[0]
    members = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) and m[0] is first)
    types = getattr(model.config, "layer_types", None)
    for layer in sorted(layers, reverse=True):
        del members[layer]
        if types is not None:
            del types[layer]
    model.config.num_hidden_layers = len(members)
    return model


def by_name(variables: dict[str, Any]) -> dict[str, Any]:
    return {name: values for name, (_, values) in variables.items()}


@zoo.each_family(*zoo.FEW)
def test_loss_without_layers_is_that_of_the_model_without_them(family: str) -> None:
    """Sums of float32 terms: 1e-5 of the loss."""
    model, tokens = zoo.make(family, n_layers=4), zoo.tokens(2, 8)
    found = by_name(pruning(session_of(model, tokens, most_removed=3), {"score": np.array([np.nan, 3, 1, 4, 2])}))
    count = tokens[:, 1:].numel()
    assert found["removed_by"].tolist() == ["score", "random_1", "random_2", "random_3", "greedy"]
    assert found["pruning_order"][0].tolist() == [2, 4, 1]
    assert found["pruning_base_loss"] == pytest.approx(losses_of(model, tokens).sum() / count, rel=1e-5)
    for row in (0, 1, 4):
        gone = found["pruning_order"][row] - 1
        expected = [losses_of(without(model, gone[: k + 1]), tokens).sum() / count for k in range(3)]
        assert found["pruning_loss"][row, 0] == pytest.approx(expected, rel=1e-5)


def test_linear_replacement_is_that_of_the_model_with_replaced_layers() -> None:
    model, tokens = zoo.make("llama", n_layers=4), zoo.tokens(3, 8)
    generator = torch.Generator().manual_seed(0)
    matrices, shifts = torch.randn(4, 32, 32, generator=generator) / 5, torch.randn(4, 32, generator=generator)
    maps = [Affine(matrix, shift) for matrix, shift in zip(matrices, shifts, strict=True)]
    ranking = np.array([0, 1, 4, 2, 3])
    found = by_name(pruning(session_of(model, tokens), {"score": ranking}, maps, evaluate=slice(1, None)))
    assert found["removal"].tolist() == ["skip", "linear"]

    def replaced(layer: int) -> Any:
        return lambda module, args, output: args[0] + args[0] @ matrices[layer] + shifts[layer]

    for n_removed, gone in ((1, [0]), (2, [0, 2])):
        changed: Any = copy.deepcopy(model)
        for layer in gone:
            changed.model.layers[layer].register_forward_hook(replaced(layer))
        expected = losses_of(changed, tokens[1:]).sum() / tokens[1:, 1:].numel()
        assert found["pruning_loss"][0, 1, n_removed - 1] == pytest.approx(expected, rel=1e-5)


def test_greedy_order_takes_the_best_next_layer_each_time() -> None:
    model, tokens = zoo.make("gpt2", n_layers=4), zoo.tokens(4, 8)
    session = session_of(model, tokens, pruning_tokens=16)
    expected: list[int] = []
    for _ in range(3):
        left = [layer for layer in range(4) if layer not in expected]
        losses = [losses_of(without(model, [*expected, layer]), tokens[:2]).sum() for layer in left]
        expected.append(left[int(np.argmin(losses))])
    assert greedy_order(session, 3, 0) == expected


def test_greedy_order_sees_no_sequence_that_it_is_judged_on() -> None:
    model = zoo.make("llama", n_layers=4)
    tokens, other = zoo.tokens(4, 8), zoo.tokens(4, 8, seed=1)
    mixed = torch.cat([tokens[:1], other[1:]])
    first, second = (greedy_order(session_of(model, t, pruning_tokens=32), 4, 1) for t in (tokens, mixed))
    assert first == second


def test_errors_and_summary_are_of_paired_differences() -> None:
    model, tokens = zoo.make("llama", n_layers=4), zoo.tokens(12, 8)
    rankings = {"a": np.array([0, 1, 2, 3, 4]), "b": np.array([0, 4, 3, 2, 1])}
    found = by_name(pruning(session_of(model, tokens), rankings))
    base = losses_of(model, tokens)
    losses = {
        name: np.stack([losses_of(without(model, order[: k + 1] - 1), tokens) for k in range(2)], axis=1)
        for name, order in zip("ab", found["pruning_order"], strict=False)
    }
    changes = {name: (loss - base[:, None]) / 7 for name, loss in losses.items()}
    for row, name in enumerate("ab"):
        expected = stderr(lambda mean: mean, changes[name])
        assert found["pruning_loss_stderr"][row, 0] == pytest.approx(expected, rel=1e-3)
        assert found["pruning_mean_increase"][row, 0] == pytest.approx(changes[name].mean(), abs=1e-5)
    increases = found["pruning_mean_increase"][:, 0]
    assert found["pruning_rank"][:, 0].tolist() == (1 + np.argsort(np.argsort(increases, kind="stable"))).tolist()
    best = int(np.argmin(increases))
    assert found["pruning_behind_best"][best, 0] == found["pruning_behind_best_stderr"][best, 0] == 0
    assert found["pruning_behind_best"][:, 0] == pytest.approx(increases - increases[best])
    if best < 2:
        gap = (changes["ab"[1 - best]] - changes["ab"[best]]).mean(axis=1)
        expected = float(stderr(lambda mean: mean, gap))
        assert found["pruning_behind_best_stderr"][1 - best, 0] == pytest.approx(expected, rel=1e-3)


def test_equal_values_go_in_the_order_of_the_layers_and_result_is_valid(tmp_path: Path) -> None:
    session = session_of(zoo.make("llama", n_layers=5), zoo.tokens(2, 6), most_removed=4)
    variables = pruning(session, {"flat": np.ones(6)})
    assert variables["pruning_order"][1][0].tolist() == [1, 2, 3, 4]
    labels = {name: variables.pop(name)[1] for name in ("removed_by", "removal", "n_removed")}
    found = results.new(variables, source="checkpoint", spec_json="", spec_id="", n_tokens=6, coords=labels)
    assert found.pruning_loss.dims == ("removed_by", "removal", "n_removed")
    assert float(found.pruning_loss.sel(removed_by="greedy", removal="skip", n_removed=4)) > 0
    results.save(found, tmp_path / "pruning.nc")
    assert results.load(tmp_path / "pruning.nc").identical(found)


def test_a_session_serves_several_rankings() -> None:
    """What is kept of one is not taken for another."""
    model, tokens = zoo.make("llama", n_layers=4), zoo.tokens(2, 6)
    session = session_of(model, tokens)
    first, second = np.array([0, 1, 2, 3, 4]), np.array([0, 4, 3, 2, 1])
    pruning(session, {"score": first})
    again = by_name(pruning(session, {"score": second}))
    alone = by_name(pruning(session_of(model, tokens), {"score": second}))
    np.testing.assert_array_equal(again["pruning_loss"], alone["pruning_loss"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    """Float32 as on the CPU, to the rounding of its matrix products; bfloat16 runs and gives numbers."""
    tokens, rankings = zoo.tokens(3, 10), {"score": np.array([0, 1, 2, 3])}
    here = by_name(pruning(session_of(zoo.make("llama"), tokens), rankings))["pruning_loss"][:4]
    there = by_name(pruning(session_of(zoo.make("llama").cuda(), tokens), rankings))["pruning_loss"][:4]
    np.testing.assert_allclose(there, here, rtol=0.01)
    low = by_name(pruning(session_of(zoo.make("llama", torch.bfloat16).cuda(), tokens), rankings))
    assert np.isfinite(low["pruning_loss"]).all()


@pytest.mark.parametrize(
    "ranking, options, message",
    [
        ([1.0, 2.0], {}, r"rankings\['score'\]=\[1.0, 2.0\] is no ranking"),
        ([0.0, 1.0, np.nan, 2.0], {}, r"rankings\['score'\]=.* is no ranking"),
        ([0.0, 1.0, 2.0, 3.0], {"most_removed": 4}, "most_removed=4 is out of range; expected 0 to 3"),
    ],
)
def test_bad_rankings_are_refused(ranking: list[float], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        pruning(session_of(zoo.make("llama"), zoo.tokens(), **options), {"score": np.array(ranking)})
