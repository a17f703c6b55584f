"""Moments against their definitions written with loops over token pairs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from varprop.measure import branch_correlation, second_moment, token_correlation, variance


def stream(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) + torch.randn(
        shape[-1], generator=generator, dtype=torch.float64
    )


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(1, 9))
def test_moments_equal_their_definitions(seed: int, n_tokens: int, width: int) -> None:
    x, f = stream(seed, n_tokens, width), stream(seed + 1, n_tokens, width)
    rows = x.numpy()
    assert second_moment(x).item() == pytest.approx(float(np.mean(rows**2)), rel=1e-12)
    assert variance(x).item() == pytest.approx(float(np.mean([np.var(row) for row in rows])), rel=1e-12, abs=1e-14)
    pairs = [rows[i] @ rows[j] for i in range(n_tokens) for j in range(n_tokens) if i != j]
    power = [row @ row for row in rows]
    # absolute: the pair sum is a difference of sums of the size of the power
    assert token_correlation(x).item() == pytest.approx(float(np.mean(pairs) / np.mean(power)), abs=1e-12)
    dots = sum(float(a @ b) for a, b in zip(rows, f.numpy(), strict=True))
    scale = math.sqrt(sum(power)) * math.sqrt(sum(float(b @ b) for b in f.numpy()))
    assert branch_correlation(x, f).item() == pytest.approx(dots / scale, abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(2, 6), st.floats(0.01, 100.0))
def test_bounds_and_scaling(seed: int, n_tokens: int, factor: float) -> None:
    x = stream(seed, n_tokens, 5)
    assert -1 / (n_tokens - 1) - 1e-12 <= token_correlation(x).item() <= 1 + 1e-12
    assert second_moment(factor * x).item() == pytest.approx(factor**2 * second_moment(x).item(), rel=1e-12)
    assert token_correlation(factor * x).item() == pytest.approx(token_correlation(x).item(), abs=1e-12)
    assert variance(x).item() <= second_moment(x).item() * (1 + 1e-12)
    assert branch_correlation(x, factor * x).item() == pytest.approx(1.0, rel=1e-12)
    assert branch_correlation(x, -x).item() == pytest.approx(-1.0, rel=1e-12)


def test_leading_axes_are_kept() -> None:
    x, f = stream(1, 2, 3, 4, 5), stream(2, 2, 3, 4, 5)
    for function in (second_moment, variance, token_correlation):
        assert function(x).shape == (2, 3)
        assert function(x)[1, 2].item() == pytest.approx(function(x[1, 2]).item(), rel=1e-12)
    assert branch_correlation(x, f).shape == (2, 3)


def test_degenerate_streams() -> None:
    one, none = torch.ones(1, 4), torch.zeros(3, 4)
    assert token_correlation(one).item() == 1.0
    assert token_correlation(none).item() == 0.0
    assert branch_correlation(torch.ones(3, 4), none).item() == 0.0
    assert token_correlation(torch.ones(3, 4)).item() == pytest.approx(1.0, rel=1e-15)


def test_accumulation_is_float64() -> None:
    """(1 + 2^-12)^2 has 24 binary places, one more than float32 keeps."""
    x = torch.full((1024, 128), 1.0 + 2**-12)
    assert second_moment(x).item() == (1.0 + 2**-12) ** 2
    assert second_moment(x.bfloat16()).dtype == torch.float64
