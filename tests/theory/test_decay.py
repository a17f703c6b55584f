"""varprop.theory.decay: simulated AdamW under noise gradients; the weight is the replicate."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from varprop.errors import AssumptionError
from varprop.theory.decay import (
    cosine_learning_rates,
    equilibrium_steps,
    normalizer_factor,
    weight_equilibrium,
    weight_second_moment,
    weight_trajectory,
)


def simulate(rates, weight_decay, beta1, beta2, start, n_weights, seed=0):
    """w^2 of every weight after the schedule; Gaussian gradients of unit variance, AdamW without eps."""
    rng = np.random.default_rng(seed)
    w, m, n = start * rng.standard_normal(n_weights), np.zeros(n_weights), np.ones(n_weights)
    for rate in rates:
        gradient = rng.standard_normal(n_weights)
        m = beta1 * m + (1 - beta1) * gradient
        n = beta2 * n + (1 - beta2) * gradient**2
        w = (1 - rate * weight_decay) * w - rate * m / np.sqrt(n)
    return w**2


@pytest.mark.parametrize("beta1,beta2,second_order", [(0.9, 0.95, 0.002), (0.9, 0.99, 0.0), (0.0, 0.95, 0.0025)])
def test_equilibrium_of_simulated_adamw(beta1, beta2, second_order):
    """40,000 weights over 6 time constants: z below 4.5, beyond the neglected terms of order (1 - beta_2)^2."""
    rate, decay = 1e-2, 0.5
    expected = weight_equilibrium(rate, decay, beta1) * normalizer_factor(beta1, beta2)
    square = simulate(np.full(600, rate), decay, beta1, beta2, expected**0.5, 40_000)
    error = abs(square.mean() / expected - 1) - second_order
    assert error < 4.5 * square.std(ddof=1) / 200 / expected  # 0.7 % each: leaving out the factor at 0.95 fails


def test_leaving_out_the_normaliser_would_be_seen():
    assert abs(normalizer_factor(0.0, 0.95) - 1) > 4.5 * 2**0.5 / 200 + 0.0025


def test_time_constant_and_trajectory():
    rate, decay = 1e-3, 0.1
    steps = equilibrium_steps(rate, decay)
    limit = weight_equilibrium(rate, decay)
    assert steps == pytest.approx(5000, rel=1e-3)
    assert weight_second_moment(steps, 0.0, rate, decay) == pytest.approx(limit * (1 - np.exp(-1)))
    path = weight_trajectory(4e-4, np.full(300, rate), decay)
    np.testing.assert_allclose(path, weight_second_moment(np.arange(301), 4e-4, rate, decay), rtol=1e-9)
    assert equilibrium_steps(rate, 0.0) == np.inf


def test_cosine_schedule_against_simulated_weights():
    """Plain noise updates (beta_1 = 0, beta_2 -> 1), 40,000 weights: 4.5 standard errors of 0.7 %."""
    rates = cosine_learning_rates(400, 0.02, n_warmup=40)
    square = simulate(rates, 0.5, 0.0, 1.0, 0.1, 40_000)
    expected = weight_trajectory(0.01, rates, 0.5)[-1]
    assert abs(square.mean() - expected) < 4.5 * square.std(ddof=1) / 200
    assert abs(expected / weight_trajectory(0.01, np.full(400, 0.02), 0.5)[-1] - 1) > 0.1  # the schedule matters


def test_published_decays_order_by_the_time_constant():
    """9,500 steps at learning rate 4e-4: no effect at 0.01, part at 0.1, full decay at 1 and 3."""
    left = [weight_trajectory(1.0, cosine_learning_rates(9500, 4e-4, 1000), x)[-1] for x in (0.0, 0.01, 0.1, 1.0, 3.0)]
    assert all(a > b for a, b in itertools.pairwise(left))
    assert left[1] > 0.9
    assert 0.3 < left[2] < 0.8
    assert left[3] < 0.03


@pytest.mark.parametrize("bad", ["x", None, float("nan"), float("inf"), -1.0, 0.0, True])
def test_bad_input_is_one_line(bad):
    for call in (
        lambda: weight_equilibrium(bad, 0.1),
        lambda: weight_equilibrium(1e-3, bad),
        lambda: weight_equilibrium(2.0, 1.0),
        lambda: equilibrium_steps(bad, 0.1),
        lambda: normalizer_factor(1.0, 0.9),
        lambda: cosine_learning_rates(10, bad),
        lambda: weight_trajectory(1.0, np.array([2.0]), 1.0),
    ):
        with pytest.raises(AssumptionError, match=r"^[\w .*-]+=.* expected [^\n]*$"):
            call()
