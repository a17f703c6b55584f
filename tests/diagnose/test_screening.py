"""The first-order swap against the derivative of the loss along a path from the model to the swapped one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from varprop.diagnose import Batch, Replay, Session, measure
from varprop.diagnose.permutation import permutation
from varprop.diagnose.screening import screening

from . import zoo
from .test_permutation import Steps


def session_of(model: nn.Module, tokens: Tensor, **options: Any) -> Session:
    return Session(Replay(model), Batch.causal(tokens), options={"permutation_tokens": 10**6} | options)


def slope(replay: Replay, batch: Batch, i: int, j: int) -> float:
    """d loss / d e at e = 0, where place i adds (1 - e) f_i + e f_j and place j the reverse, over the loss."""
    captured = replay.capture(batch)
    e = torch.zeros((), dtype=torch.float64, requires_grad=True)
    x = captured.start[None]
    for place in range(replay.n_layers):
        other = {i: j, j: i}.get(place, place)
        x = (1 - e) * replay.layer(place, x, captured) + e * replay.layer(other, x, captured)
    logits = replay.logits(x[0])[:, :-1]
    loss = functional.cross_entropy(logits.flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="sum")
    return float(torch.autograd.grad(loss, e)[0] / loss.detach())


@zoo.each_family("llama", "gpt2", "gemma3", "bert")
def test_screening_is_the_derivative_towards_the_swap(family: str) -> None:
    """Float64, but for norms that some families compute in float32: 1e-5 of the largest."""
    session = session_of(zoo.make(family, torch.float64), zoo.tokens(2, 8))
    found = screening(session)["permutation_screening"][1][1:, 1:]
    expected = np.zeros((3, 3))
    for i, j in ((0, 1), (0, 2), (1, 2)):
        expected[i, j] = expected[j, i] = slope(session.replay, session.batch, i, j)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_chunks_and_batches_change_nothing() -> None:
    model, tokens = zoo.make("llama"), zoo.tokens(4, 8)
    first = screening(session_of(model, tokens))["permutation_screening"][1]
    session = session_of(model, tokens)
    session.replay.limits.memory = 1.0
    second = screening(session)["permutation_screening"][1]
    np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-6)


def test_swaps_of_finer_steps_are_of_first_order() -> None:
    """A swap of two of k L layers, each 1 / k of a step, is of second order beyond the screening: three times finer
    steps, a third of the relative difference."""
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(3, 6, 6, generator=generator, dtype=torch.float64) / 2
    differences = []
    for k in (4, 12):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = Steps([matrix for matrix in matrices for _ in range(k)], k).double()
        session = session_of(model, torch.randint(20, (2, 8), generator=generator), permutation_pairs=0)
        exact = np.expm1(permutation(session)["permutation_log_change"][1][1:, 1:])
        first = screening(session)["permutation_screening"][1][1:, 1:]
        differences.append(np.abs(exact - first).max() / np.abs(exact).max())
    assert differences[1] < 0.5 * differences[0]


def test_measure_gives_a_valid_result() -> None:
    found = measure(zoo.make("llama"), zoo.tokens(3, 6), scores="screening")
    assert found.permutation_screening.dims == ("source_layer", "target_layer")
    assert float(found.permutation_screening_stderr.max()) > 0


def test_one_layer_has_no_pairs() -> None:
    assert screening(session_of(zoo.make("llama", n_layers=1), zoo.tokens())) == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_an_accelerator() -> None:
    tokens = zoo.tokens(2, 8)
    here = screening(session_of(zoo.make("llama"), tokens))["permutation_screening"][1]
    there = screening(session_of(zoo.make("llama").cuda(), tokens))["permutation_screening"][1]
    np.testing.assert_allclose(there, here, rtol=0, atol=0.01 * np.nanmax(np.abs(here)))
