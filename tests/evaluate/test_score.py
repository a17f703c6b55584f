"""Scores against one sequence at a time through the plain logits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from varprop import presets
from varprop.errors import ArgumentError
from varprop.evaluate import score
from varprop.nn import Transformer

SPEC = presets.tiny().with_fields(d_model=32, n_layers=2, d_ff=48, vocab_size=50)
MOE = SPEC.with_fields({"feed_forward": None, "n_experts": 4, "top_k": 2, "d_expert": 16})


def _sequences(n: int = 40, largest: int = 30) -> tuple[list[list[int]], list[int]]:
    rng = np.random.default_rng(0)
    sequences = [rng.integers(50, size=rng.integers(2, largest)).tolist() for _ in range(n)]
    return sequences, [int(rng.integers(1, len(sequence))) for sequence in sequences]


@torch.no_grad()
def _alone(model: Transformer, sequence: list[int], n: int) -> tuple[float, bool]:
    log_p = model(torch.tensor([sequence]))[0].double().log_softmax(dim=-1)
    places = range(len(sequence) - n, len(sequence))
    total = sum(log_p[i - 1, sequence[i]].item() for i in places)
    return total, all(int(log_p[i - 1].argmax()) == sequence[i] for i in places)


@pytest.mark.parametrize("spec", [SPEC, MOE], ids=["dense", "mixture"])
@pytest.mark.parametrize("batch_tokens", [1, 64, 4096])
def test_batches_change_nothing(spec: presets.ModelSpec, batch_tokens: int) -> None:
    model = Transformer(spec, seed=1)
    sequences, n_scored = _sequences()
    sums, greedy = score(model, sequences, n_scored, batch_tokens=batch_tokens)
    expected = [_alone(model, s, n) for s, n in zip(sequences, n_scored, strict=True)]
    np.testing.assert_allclose(sums, [e[0] for e in expected], rtol=2e-6)
    assert greedy.tolist() == [e[1] for e in expected]


def test_likeliest_tokens_are_seen_as_such() -> None:
    model = Transformer(SPEC, seed=1)
    sequence = [3]
    with torch.no_grad():
        for _ in range(6):
            sequence.append(int(model(torch.tensor([sequence]))[0, -1].argmax()))
    other = [*sequence[:-1], (sequence[-1] + 1) % 50]
    sums, greedy = score(model, [sequence, other, other], [6, 6, 1])
    assert greedy.tolist() == [True, False, False]
    assert sums[0] > sums[1]


def test_a_network_that_knows_nothing_has_the_uniform_loss() -> None:
    model = Transformer(SPEC, seed=1)
    torch.nn.init.zeros_(dict(model.named_parameters())["unembed"])
    sums, _ = score(model, [[1, 2, 3, 4]], [3])
    assert sums[0] == pytest.approx(-3 * math.log(50), rel=1e-6)


def test_bfloat16_is_near_and_is_another() -> None:
    model = Transformer(SPEC, seed=1)
    sequences, n_scored = _sequences()
    exact, _ = score(model, sequences, n_scored)
    rounded, _ = score(Transformer(SPEC, seed=1, compute_dtype=torch.bfloat16), sequences, n_scored)
    assert 1e-5 < np.abs(rounded / exact - 1).max() < 0.1


def test_bad_input() -> None:
    model = Transformer(SPEC, seed=1)
    for sequences, n_scored, message in (
        ([], [], "sequences=0 is unfit in number"),
        ([[1, 2]], [1, 1], "sequences=1 is unfit in number"),
        ([[1, 2]], [2], r"n_scored=2 is outside the domain; expected an integer in 1\.\.1"),
        ([[1, 2], [1]], [1, 0], "n_scored=0 is outside the domain"),
        ([[1, 50]], [1], "token id=50 is beyond the vocabulary of the model; expected ids below 50"),
    ):
        with pytest.raises(ArgumentError, match=message):
            score(model, sequences, n_scored)
    with torch.no_grad():
        model.get_parameter("embed")[7] = torch.nan
    with pytest.raises(ArgumentError, match="log-probability of sequence 1 is nan; expected a finite one"):
        score(model, [[1, 2], [7, 2]], [1, 1])
    with pytest.raises(ArgumentError, match=r"attention\.pattern='full' is not causal"):
        score(Transformer(SPEC.with_fields({"attention.pattern": "full"})), [[1, 2]], [1])
    with pytest.raises(ArgumentError, match=r"moe\.routing='expert_choice' is not causal"):
        score(Transformer(MOE.with_fields(routing="expert_choice")), [[1, 2]], [1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_scores_the_same() -> None:
    sequences, n_scored = _sequences()
    expected, _ = score(Transformer(SPEC, seed=1), sequences, n_scored)
    sums, _ = score(Transformer(SPEC, seed=1, device="cuda"), sequences, n_scored)
    np.testing.assert_allclose(sums, expected, rtol=1e-4)
