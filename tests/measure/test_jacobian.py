"""Norms of the block Jacobian: exact ones against the whole matrix, probes against their mean over all signs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from varprop.measure import jacobian_deviation, probe_jacobian_deviation, random_signs
from varprop.measure.jacobian import DEFINITIONS
from varprop.nn.init import make_generator
from varprop.theory import jacobian as theory

N_TOKENS, D_MODEL = 3, 2


def linear_map(lead: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """y = M x for one random M, J (T, D, T, D), and its x: the same for each leading index."""
    size = N_TOKENS * D_MODEL
    matrix = torch.randn(size, size, generator=make_generator(1), dtype=torch.float64)
    x = torch.zeros(lead, N_TOKENS, D_MODEL, dtype=torch.float64, requires_grad=True)
    y = (x.flatten(-2) @ matrix.T).view(x.shape)
    return matrix.view(N_TOKENS, D_MODEL, N_TOKENS, D_MODEL), y, x


def definitions(jacobian: Tensor) -> Tensor:
    """As the module's first lines write them."""
    pieces = jacobian.permute(0, 2, 1, 3)  # (T, T, D, D)
    identity = torch.eye(D_MODEL, dtype=jacobian.dtype)
    all_sources = sum(
        (pieces[t, s] - identity * (t == s)).square().sum() for t in range(N_TOKENS) for s in range(N_TOKENS)
    )
    own = sum((pieces[t, t] - identity).square().sum() for t in range(N_TOKENS))
    mean = (pieces.sum(dim=(0, 1)) / N_TOKENS - identity).square().sum()
    return torch.stack([torch.as_tensor(v) for v in (all_sources / N_TOKENS, own / N_TOKENS, mean)]) / D_MODEL


def test_names_are_those_of_the_theory() -> None:
    assert DEFINITIONS == theory.DEFINITIONS


def test_exact_values_equal_the_definitions() -> None:
    jacobian, y, x = linear_map(lead=2)
    torch.testing.assert_close(jacobian_deviation(y, x), definitions(jacobian).expand(2, 3), rtol=1e-12, atol=0.0)


def test_networks_of_a_stack_are_kept_apart() -> None:
    """y = tanh(x)^2 a for a factor a of each network, (2, 3) of them, against each alone."""
    x = torch.randn(2, 3, N_TOKENS, D_MODEL, generator=make_generator(2), dtype=torch.float64, requires_grad=True)
    factor = torch.arange(1.0, 7.0, dtype=torch.float64).view(2, 3, 1, 1)
    found = jacobian_deviation(x.tanh().square().cumsum(dim=-2) * factor, x)
    for index in np.ndindex(2, 3):
        alone = x.detach()[index].requires_grad_()
        expected = jacobian_deviation(alone.tanh().square().cumsum(dim=-2) * factor[index], alone)
        torch.testing.assert_close(found[index], expected, rtol=1e-12, atol=0.0)


def test_probes_are_unbiased() -> None:
    """The mean over all 2^14 equally likely draws of a probe is the exact value, to rounding."""
    counts = {(N_TOKENS, 1): N_TOKENS, (N_TOKENS, D_MODEL): N_TOKENS * D_MODEL, (1, D_MODEL): D_MODEL}
    order = [(N_TOKENS, 1), (N_TOKENS, 1), (N_TOKENS, D_MODEL), (1, D_MODEL)]
    table = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=sum(counts[shape] for shape in order))))
    columns = table.double().split([counts[shape] for shape in order], dim=-1)
    shown = iter([*order, *order])
    draws = iter([*columns, *columns])

    def draw(*shape: int) -> Tensor:
        assert shape == next(shown)
        return next(draws).reshape(-1, *shape)

    jacobian, y, x = linear_map(lead=len(table))
    estimate, stderr = probe_jacobian_deviation(y, x, 2, draw)  # two equal probes
    torch.testing.assert_close(estimate.mean(dim=0), definitions(jacobian), rtol=1e-10, atol=0.0)
    assert float(stderr.abs().max()) < 1e-12


def test_standard_error_is_that_of_the_estimate() -> None:
    """4,000 estimates of 8 probes: mean squared standard error over variance, 1 within 15 % (5 standard errors)."""
    generator, lead = make_generator(3), 4000
    _, y, x = linear_map(lead)
    estimate, stderr = probe_jacobian_deviation(
        y, x, 8, lambda *shape: random_signs((lead, *shape), generator).double()
    )
    np.testing.assert_allclose(stderr.square().mean(dim=0) / estimate.var(dim=0), 1.0, atol=0.15)


def test_signs() -> None:
    """A million: mean and product of neighbours within 5 standard errors of 0 (false-fail rate 1e-6)."""
    signs = random_signs((10**6,), make_generator(4))
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert max(abs(float(signs.mean())), abs(float((signs[1:] * signs[:-1]).mean()))) < 5e-3


@pytest.mark.parametrize("factor", [1.0, 1.0 - 2.0**-20])
def test_a_small_deviation_keeps_its_digits(factor: float) -> None:
    """J = factor I in float32: (1 - factor)^2, with no cancellation of squares."""
    x = torch.ones(1, N_TOKENS, D_MODEL, requires_grad=True)
    expected = torch.full((1, 3), (1 - factor) ** 2, dtype=torch.float64)
    torch.testing.assert_close(jacobian_deviation(factor * x, x), expected, rtol=1e-12, atol=0.0)
    generator = make_generator(5)
    estimate, stderr = probe_jacobian_deviation(factor * x, x, 2, lambda *shape: random_signs((1, *shape), generator))
    torch.testing.assert_close(estimate, expected, rtol=1e-6, atol=0.0)
    assert float(stderr.abs().max()) < 1e-18
