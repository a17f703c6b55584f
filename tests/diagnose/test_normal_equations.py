"""Streaming affine least squares against lstsq on all tokens at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from varprop.diagnose.normal_equations import Fit, NormalEquations
from varprop.errors import ArgumentError

N, D = 300, 12


def draw(n_tokens: int = N, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_tokens, D, generator=generator, dtype=torch.float64) @ torch.randn(
        D, D, generator=generator, dtype=torch.float64
    )
    u = 0.1 * torch.tanh(x @ torch.randn(D, D, generator=generator, dtype=torch.float64)) + 0.3
    return (x + 2).to(dtype), u.to(dtype)


def fit(x: Tensor, u: Tensor, n_parts: int = 1) -> Fit:
    sums = NormalEquations.empty(x.shape[1])
    for a, b in zip(x.tensor_split(n_parts), u.tensor_split(n_parts), strict=True):
        sums.add(a, b)
    return sums.solve()


def least_squares(x: Tensor, u: Tensor) -> tuple[np.ndarray, np.ndarray]:
    ones = np.concatenate([x.double().numpy(), np.ones((len(x), 1))], axis=1)
    found = np.linalg.lstsq(ones, u.double().numpy(), rcond=None)[0]
    return found[:-1], found[-1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_parts", [1, 7])
def test_solution_is_that_of_lstsq(dtype: torch.dtype, n_parts: int) -> None:
    x, u = draw(dtype=dtype)
    found = fit(x, u, n_parts)
    matrix, shift = least_squares(x, u)
    np.testing.assert_allclose(found.matrix.numpy(), matrix, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.shift.numpy(), shift, rtol=1e-9, atol=1e-12)
    assert np.isfinite(found.condition)


def test_r_squared_and_rank_are_those_of_the_fitted_update() -> None:
    x, u = draw()
    found = fit(x, u, 3)
    predicted = (x @ found.matrix + found.shift).numpy()
    rest = u.numpy() - predicted
    expected = 1 - (rest**2).sum() / ((u.numpy() - u.numpy().mean(axis=0)) ** 2).sum()
    assert found.r_squared == pytest.approx(expected, rel=1e-10)
    values = np.linalg.eigvalsh(np.cov(predicted.T))
    assert found.rank == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=1e-9)


def test_parts_merge_exactly() -> None:
    x, u = draw()
    whole, left, right = (NormalEquations.empty(D) for _ in range(3))
    whole.add(x, u)
    left.add(x[:100], u[:100])
    right.add(x[100:], u[100:])
    left.merge(right)
    left.merge(NormalEquations.empty(D))
    assert left.count == whole.count == N
    for name in ("mean_x", "mean_u", "gram", "cross", "power"):
        torch.testing.assert_close(getattr(left, name), getattr(whole, name), rtol=1e-11, atol=1e-9)


def test_offset_far_above_the_spread_costs_no_digits() -> None:
    x, u = draw()
    matrix, _ = least_squares(x, u)
    shifted = x.clone()
    shifted[:, 3] += 1e6  # uncentred sums of squares would lose 12 of 16 digits
    np.testing.assert_allclose(fit(shifted, u, 5).matrix.numpy(), matrix, rtol=1e-7, atol=1e-10)


def test_massive_token_and_massive_neuron() -> None:
    x, u = draw()
    x[17] *= 1000
    x[:, 5] *= 1e5
    found = fit(x, u, 4)
    matrix, shift = least_squares(x, u)
    assert found.condition < 1e10
    predicted = x @ found.matrix + found.shift
    expected = x.numpy() @ matrix + shift
    np.testing.assert_allclose(predicted.numpy(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("case", ["fewer tokens than neurons", "repeated neuron", "constant neuron"])
def test_singular_inputs_leave_the_residual_of_lstsq(case: str) -> None:
    x, u = draw(8 if case.startswith("fewer") else N)
    if case == "repeated neuron":
        x[:, 4] = x[:, 2]
    if case == "constant neuron":
        x[:, 4] = 1e4 / 3  # whose mean is rounded
    found = fit(x, u, 2)
    matrix, shift = least_squares(x, u)
    assert found.condition > 1e10
    rest = u - (x @ found.matrix + found.shift)
    expected = u.numpy() - (x.numpy() @ matrix + shift)
    np.testing.assert_allclose(rest.numpy(), expected, atol=1e-8)
    if case == "repeated neuron":  # the smallest of equally good maps shares the weight
        torch.testing.assert_close(found.matrix[4], found.matrix[2], rtol=1e-6, atol=1e-9)
    if case == "constant neuron":
        assert not found.matrix[4].any()


def test_update_that_does_not_vary() -> None:
    x, _ = draw()
    found = fit(x, torch.ones_like(x))
    assert found.r_squared == 1.0
    assert found.rank == 0.0
    assert not found.matrix.any()


def test_residual_on_other_tokens_grows_as_stated() -> None:
    """Of Gaussian x and noise it is (1 + 1/n) (n - 2) / (n - d - 2) times the noise: 1 / (1 - d / n) for large n."""
    generator = torch.Generator().manual_seed(0)
    d_model, n_tokens = 20, 80
    found = []
    for _ in range(200):
        x, u = torch.randn(2, n_tokens + 1000, d_model, generator=generator, dtype=torch.float64)
        solution = fit(x[:n_tokens], u[:n_tokens])
        found.append((u - x @ solution.matrix - solution.shift)[n_tokens:].square().mean())
    expected = (1 + 1 / n_tokens) * (n_tokens - 2) / (n_tokens - d_model - 2)
    error = torch.stack(found).std() / 200**0.5
    assert abs(torch.stack(found).mean() - expected) < 4 * error  # false alarm 6e-5
    assert expected == pytest.approx(1 / (1 - d_model / n_tokens), rel=0.03)


def test_no_tokens_are_refused() -> None:
    with pytest.raises(ArgumentError, match="tokens=0 is too few"):
        NormalEquations.empty(D).solve()


@pytest.mark.gpu
def test_accelerator_gives_the_solution_of_lstsq() -> None:
    x, u = (values.cuda() for values in draw(dtype=torch.bfloat16))
    sums = NormalEquations.empty(D, "cuda")
    for a, b in zip(x.tensor_split(7), u.tensor_split(7), strict=True):
        sums.add(a, b)
    found = sums.solve()
    matrix, shift = least_squares(x.cpu(), u.cpu())
    np.testing.assert_allclose(found.matrix.cpu().numpy(), matrix, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.shift.cpu().numpy(), shift, rtol=1e-9, atol=1e-12)
