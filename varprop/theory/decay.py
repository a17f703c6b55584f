"""The scale of weights under AdamW: decoupled decay pulls it down, noise-like updates push it up.

w <- (1 - eta lambda) w - eta u per step, eta the learning rate, lambda the decay. Assumption: the update u of an entry
is stationary noise, uncorrelated with w. Gradients that are white noise of one sign law make u an average of them over
1 / (1 - beta_1) steps: small (rms sqrt((1 - beta_1) / (1 + beta_1))) but correlated, and the two effects cancel: over
many steps u acts like white noise of unit variance.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from varprop.theory.domain import check_number


def weight_equilibrium(learning_rate: Any, weight_decay: Any, beta1: Any = 0, xp: Any = np) -> Any:
    """Stationary E w^2 of a weight under AdamW with white-noise gradients of unit second-moment estimate.

    eta^2 (1 - b) (1 + k b) / ((1 + b) (1 - k b) (1 - k^2)),   k = 1 - eta lambda, b = beta_1,

    which is eta / (2 lambda) up to relative O(eta lambda / (1 - beta_1)). learning_rate: eta > 0; weight_decay:
    lambda > 0, eta lambda < 1; beta1: in [0, 1). Exact for beta_2 -> 1; `normalizer_factor` is the correction.
    Raises `AssumptionError` outside the domain. Source: derived in proofs/prove_decay.py.
    Checked by: tests/theory/test_decay.py.

    >>> round(weight_equilibrium(1e-3, 0.1), 6), round(weight_equilibrium(1e-3, 0.1, beta1=0.9), 6)
    (0.005, 0.004996)
    """
    if xp is np:
        check_number("learning_rate", learning_rate, 0, above=True)
        check_number("weight_decay", weight_decay, 0, above=True)
        check_number("1 - learning_rate * weight_decay", 1 - np.asarray(learning_rate) * weight_decay, 0, 1, above=True)
        check_number("beta1", beta1, 0)
        check_number("1 - beta1", 1 - np.asarray(beta1), 0, above=True)
    product = learning_rate * weight_decay
    keep = 1 - product
    momentum = (1 - beta1) * (1 + keep * beta1) / ((1 + beta1) * (1 - keep * beta1))
    return learning_rate * momentum / (weight_decay * (2 - product))


def equilibrium_steps(learning_rate: Any, weight_decay: Any, xp: Any = np) -> Any:
    """Steps in which E w^2 comes nearer to its equilibrium by the factor e: -1 / (2 ln(1 - eta lambda)).

    1 / (2 eta lambda) for small eta lambda. Infinity without decay. Exact. Raises `AssumptionError` outside the domain.
    Source: derived in proofs/prove_decay.py.

    >>> round(equilibrium_steps(1e-3, 0.1), 1)
    4999.7
    """
    if xp is not np:
        return -1 / (2 * xp.log(1 - learning_rate * weight_decay))
    check_number("learning_rate", learning_rate, 0, above=True)
    check_number("weight_decay", weight_decay, 0)
    product = np.asarray(learning_rate, dtype=float) * weight_decay
    check_number("1 - learning_rate * weight_decay", 1 - product, 0, 1, above=True)
    rate = -2 * np.log1p(-product)
    steps = np.divide(1.0, rate, out=np.full(rate.shape, np.inf), where=rate > 0)
    return float(steps) if steps.ndim == 0 else steps


def normalizer_factor(beta1: Any, beta2: Any, xp: Any = np) -> Any:
    """Factor on E w^2 from the noise of Adam's second-moment estimate, Gaussian gradients, first order in 1 - beta_2.

    1 - 2 A (1 - b_1) / (1 - b_1 b_2) + (S / 4) (3 + (1 - b_1)(1 + b_1 b_2) / ((1 + b_1)(1 - b_1 b_2))),

    A = 1 - b_2 (a gradient enters its own normaliser), S = 2 (1 - b_2) / (1 + b_2) (variance of the estimate).
    beta1, beta2: in [0, 1). Error O((1 - beta_2)^2): 2e-3 at 0.95. Raises `AssumptionError` outside the domain.
    Source: derived in proofs/prove_decay.py. Checked by: tests/theory/test_decay.py.

    >>> round(normalizer_factor(0.9, 0.95), 3), round(normalizer_factor(0.9, 0.999), 4)
    (0.978, 0.999)
    """
    if xp is np:
        for name, value in (("beta1", beta1), ("beta2", beta2)):
            check_number(name, value, 0)
            check_number(f"1 - {name}", 1 - np.asarray(value), 0, above=True)
    own = 2 * (1 - beta2) * (1 - beta1) / (1 - beta1 * beta2)
    variance = 2 * (1 - beta2) / (1 + beta2)
    overlap = (1 - beta1) * (1 + beta1 * beta2) / ((1 + beta1) * (1 - beta1 * beta2))
    return 1 - own + variance * (3 + overlap) / 4


def weight_second_moment(step: Any, start: Any, learning_rate: Any, weight_decay: Any, xp: Any = np) -> Any:
    """E w^2 after `step` steps at a constant learning rate: w_inf + (w_0^2 - w_inf) (1 - eta lambda)^(2 step).

    start: w_0^2 >= 0; w_inf = `weight_equilibrium`; weight_decay > 0. White updates of unit variance; exact.
    Raises `AssumptionError` outside the domain. Source: derived in proofs/prove_decay.py.

    >>> round(float(weight_second_moment(5000, 4e-4, 1e-3, 0.1)), 6)
    0.003308
    """
    if xp is np:
        check_number("step", step, 0)
        check_number("start", start, 0)
    limit = weight_equilibrium(learning_rate, weight_decay, xp=xp)
    return limit + (start - limit) * (1 - learning_rate * weight_decay) ** (2 * step)


def weight_trajectory(start: float, learning_rates: np.ndarray, weight_decay: float) -> np.ndarray:
    """E w^2 before and after every step of a schedule, (n_steps + 1,): w^2 <- (1 - eta lambda)^2 w^2 + eta^2.

    start: w_0^2 >= 0; learning_rates: (n_steps,), >= 0; weight_decay: lambda >= 0. White updates of unit variance;
    exact. Raises `AssumptionError` outside the domain. Checked by: tests/theory/test_decay.py.

    >>> weight_trajectory(1.0, np.array([0.5, 0.0]), 1.0).tolist()
    [1.0, 0.5, 0.5]
    """
    check_number("start", start, 0)
    check_number("learning_rates", learning_rates, 0)
    check_number("weight_decay", weight_decay, 0)
    rates = np.atleast_1d(np.asarray(learning_rates, dtype=float))
    check_number("1 - learning_rates * weight_decay", 1 - rates * weight_decay, 0, 1)
    values = [float(start)]
    for keep, push in zip((1 - rates * weight_decay) ** 2, rates**2, strict=True):
        values.append(float(keep * values[-1] + push))
    return np.array(values)


def cosine_learning_rates(n_steps: int, peak: float, n_warmup: int = 0, final_fraction: float = 0.1) -> np.ndarray:
    """Learning rates (n_steps,): linear warm-up to `peak`, then half a cosine down to final_fraction * peak.

    Raises `AssumptionError` outside the domain.

    >>> cosine_learning_rates(5, 1.0, n_warmup=2).round(3).tolist()
    [0.5, 1.0, 1.0, 0.55, 0.1]
    """
    check_number("n_steps", n_steps, 1, integer=True)
    check_number("peak", peak, 0, above=True)
    check_number("n_warmup", n_warmup, 0, n_steps, integer=True)
    check_number("final_fraction", final_fraction, 0, 1)
    step = np.arange(n_steps)
    phase = np.clip((step - n_warmup) / max(1, n_steps - 1 - n_warmup), 0, 1)
    low = final_fraction * peak
    cosine = low + (peak - low) * (1 + np.cos(math.pi * phase)) / 2
    return np.where(step < n_warmup, peak * (step + 1) / max(1, n_warmup), cosine)
