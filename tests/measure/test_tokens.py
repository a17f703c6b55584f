"""Statistics of tokens, sinks, overlaps and chunked attention, each against its definition in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kurtosis, skew

from varprop.measure import (
    QUANTILES,
    attention_concentration,
    attention_entropy,
    attention_statistics,
    overlap_sums,
    second_moment,
    sink_positions,
    token_moments,
    token_quantiles,
    variance,
)
from varprop.nn.init import make_generator


def stream(seed: int, *shape: int) -> torch.Tensor:
    """Exponential neurons: skewed and heavy-tailed."""
    return torch.empty(shape, dtype=torch.float64).exponential_(generator=make_generator(seed)) - 0.5


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(2, 9))
def test_token_moments_equal_those_of_scipy(seed: int, n_tokens: int, width: int) -> None:
    x = stream(seed, 2, n_tokens, width)
    found, rows = token_moments(x), x.numpy()
    np.testing.assert_allclose(found.second_moment, (rows**2).mean(axis=-1), rtol=1e-12)
    np.testing.assert_allclose(found.variance, rows.var(axis=-1), rtol=1e-12)
    np.testing.assert_allclose(found.skewness, skew(rows, axis=-1), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.excess_kurtosis, kurtosis(rows, axis=-1), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.second_moment.mean(dim=-1), second_moment(x), rtol=1e-12)
    np.testing.assert_allclose(found.variance.mean(dim=-1), variance(x), rtol=1e-12)


def test_equal_neurons_have_no_shape() -> None:
    found = token_moments(torch.tensor([[0.0, 0.0], [2.0, 2.0]]))
    assert [value.tolist() for value in found] == [[0.0, 4.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]


def test_quantiles_are_those_of_numpy() -> None:
    values, kept = stream(1, 3, 2, 40), torch.rand(2, 40, generator=make_generator(2)) < 0.7
    found = token_quantiles(values, kept)
    assert found.shape == (3, len(QUANTILES))
    np.testing.assert_allclose(found.T, np.quantile(values.numpy()[:, kept.numpy()], QUANTILES, axis=-1), rtol=1e-12)


def test_a_sink_is_one_at_any_layer() -> None:
    moments = torch.ones(3, 2, 6)
    moments[1, 0, 3], moments[2, 1, 5], moments[0, 1, 2] = 100.5, 1e6, 99.5
    assert sink_positions(moments).nonzero().tolist() == [[0, 0], [0, 3], [1, 0], [1, 5]]


@pytest.mark.parametrize("numbers", [1, 3 * 4 * 2, 10**6])
def test_overlaps(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("varprop.measure.overlap.CHUNK_NUMBERS", numbers)
    parts = [stream(seed, 2, 5, 4).float() for seed in range(3)]
    rows = np.stack([part.double().numpy().ravel() for part in parts])
    np.testing.assert_allclose(overlap_sums(parts), rows @ rows.T, rtol=1e-12)


@pytest.mark.parametrize("numbers", [1, 2 * 3 * 2 * 7, 10**6])
def test_attention_in_chunks_of_queries(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two networks of three heads and seven tokens, against all probabilities at once."""
    monkeypatch.setattr("varprop.measure.attention.CHUNK_NUMBERS", numbers)
    p = stream(1, 2, 3, 7, 7).softmax(dim=-1)
    asked: list[slice] = []
    found = attention_statistics(lambda queries: (asked.append(queries), p[:, :, queries])[1], 7, 2 * 3 * 7)
    assert len(asked) == {1: 7, 84: 4, 10**6: 1}[numbers]
    np.testing.assert_allclose(found.concentration.mean(dim=-1), attention_concentration(p), rtol=1e-12)
    np.testing.assert_allclose(found.entropy.mean(dim=-1), attention_entropy(p), rtol=1e-12)
    np.testing.assert_allclose(found.concentration, (p**2).sum(dim=-1).mean(dim=-1), rtol=1e-12)
    np.testing.assert_allclose(found.first_key_mass, p[..., 0].mean(dim=-1), rtol=1e-12)
