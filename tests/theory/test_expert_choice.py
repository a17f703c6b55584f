"""varprop.theory.expert_choice: proofs, drawn sequences, load of experts, bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.special

from proofs.check import ProofError
from proofs.prove_expert_choice import PROOFS, prove_load, prove_two_tokens
from varprop.errors import AssumptionError
from varprop.theory.expert_choice import expert_capacity, expert_choice_gates, experts_per_token, load_variance


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.statement)
def test_proofs(proof) -> None:
    proof.function()


def test_a_wrong_constant_is_caught() -> None:
    def wrong(*args, **options):
        right = expert_choice_gates(*args, **options)
        return right._replace(second_moment=right.second_moment * (1 + 1e-8))

    with pytest.raises(ProofError):
        prove_two_tokens(wrong)
    with pytest.raises(ProofError):
        prove_load(lambda *args: 1.001 * load_variance(*args))


def drawn_sequences(
    router: str, order: str, normalize: bool, correlation: float, n_networks: int
) -> tuple[np.ndarray, ...]:
    """Second moment, overlap and unchosen share of E = 8, k = 2, T = 32, s = 1, one value per network."""
    n_experts, n_tokens, capacity = 8, 32, 8
    rng, rows = np.random.default_rng(11), []
    for _ in range(n_networks):
        z = math.sqrt(1 - correlation) * rng.standard_normal((n_tokens, n_experts))
        z += math.sqrt(correlation) * rng.standard_normal(n_experts)
        score = scipy.special.softmax(z, axis=1) if router == "softmax" else scipy.special.expit(z)
        selection = score if order == "score_then_top_k" else z
        active = selection >= np.sort(selection, axis=0)[-capacity]
        if router == "softmax" and order == "top_k_then_score":
            score = np.exp(z) / np.maximum((np.exp(z) * active).sum(axis=1, keepdims=True), 1e-9)
        g = score * active
        if normalize:
            g = g / np.maximum(g.sum(axis=1, keepdims=True), 1e-300)
        gram = g @ g.T
        pairs = (gram.sum() - np.trace(gram)) / (n_tokens * (n_tokens - 1))
        rows.append((np.trace(gram) / n_tokens, pairs, np.mean(~active.any(axis=1))))
    return tuple(np.array(rows).T)


@pytest.mark.parametrize(
    "router, order, normalize, bias",
    [
        ("sigmoid", "score_then_top_k", False, 0.0),
        ("sigmoid", "score_then_top_k", True, 0.01),
        ("softmax", "top_k_then_score", False, 0.015),
        ("softmax", "score_then_top_k", False, 0.01),
        ("softmax", "score_then_top_k", True, 0.01),
    ],
)
@pytest.mark.parametrize("correlation", [0.0, 0.7])
def test_against_drawn_sequences(router: str, order: str, normalize: bool, bias: float, correlation: float) -> None:
    """1,500 networks, five standard errors; overlap may be off by `bias`, drawn moments by 1 %: detects 3 %."""
    options = {"normalize": normalize, "router": router, "gate_order": order}
    choice = expert_choice_gates(8, 2, 1.0, 32, correlation, **options)
    second, pairs, unchosen = drawn_sequences(router, order, normalize, correlation, 1500)
    drawn = 0.01 if (router, order) == ("softmax", "score_then_top_k") else 0.0
    for values, predicted, error in (
        (second, choice.second_moment, drawn),
        (pairs, choice.overlap, bias),
        (unchosen, choice.unchosen, 10 * drawn),
    ):
        assert abs(values.mean() - predicted) < 5 * values.std() / len(values) ** 0.5 + error * predicted


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.95])
def test_load_of_an_expert(correlation: float) -> None:
    """4,000 networks of 32 tokens, E = 8, k = 2; five standard errors plus 1 % of P(c): detects 12 %."""
    rng, n_tokens = np.random.default_rng(2), 32
    logits = math.sqrt(1 - correlation) * rng.standard_normal((4000, n_tokens, 8))
    logits += math.sqrt(correlation) * rng.standard_normal((4000, 1, 8))
    load = (logits >= np.partition(logits, 6, axis=-1)[..., 6, None]).mean(axis=1)
    squares = ((load - 0.25) ** 2).mean(axis=1)
    predicted = load_variance(8, 2, correlation, n_tokens)
    assert load.mean() == pytest.approx(0.25, abs=1e-12)
    assert abs(squares.mean() - predicted) < 5 * squares.std() / 4000**0.5 + 0.01 * 0.0625


def test_extremes() -> None:
    for n_tokens in (1, 2, 10**7):
        for std in (0.0, 1.0, 16.0):
            for order in ("score_then_top_k", "top_k_then_score"):
                choice = expert_choice_gates(4, 1, std, n_tokens, 0.5, normalize=False, gate_order=order)
                assert all(math.isfinite(x) for x in choice)
                assert 0 <= choice.overlap <= choice.second_moment * (1 + 1e-9)
    assert expert_capacity(64, 1, 8) == 1
    assert experts_per_token(4096, 8, 10**7).sum() == pytest.approx(1.0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n_tokens": 0}, "n_tokens=0 is outside the domain; expected an integer >= 1"),
        ({"n_tokens": 2.5}, "n_tokens="),
        ({"logit_std": math.nan}, "logit_std="),
        ({"correlation": -0.5}, "correlation="),
        ({"top_k": 9}, "top_k=9"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    arguments = {"n_experts": 8, "top_k": 2, "logit_std": 1.0, "n_tokens": 8, "correlation": 0.0, **change}
    with pytest.raises(AssumptionError, match=message):
        expert_choice_gates(**arguments, normalize=True)
