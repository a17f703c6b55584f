"""The chunked loss equals one cross-entropy over all tokens, value and gradients."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn import functional

from varprop.train.loss import chunked_mean_loss, sum_of_losses


@pytest.mark.parametrize("chunk", [1, 5, 12, 100])
def test_value_and_gradients(chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 4, 8, generator=generator, requires_grad=True)
    table = torch.randn(11, 8, generator=generator, requires_grad=True)
    targets = torch.randint(11, (3, 4), generator=generator)
    plain = functional.cross_entropy((hidden @ table.mT).flatten(0, 1), targets.flatten())
    expected = torch.autograd.grad(2 * plain, (hidden, table))
    of_rows = functools.partial(sum_of_losses, lambda rows: rows @ table.mT)
    loss = chunked_mean_loss(of_rows, [table], hidden, targets, chunk)
    # float32 sums of a dozen terms of order one in another order: a few units of 6e-8
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.autograd.grad(2 * loss, (hidden, table)), expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert chunked_mean_loss(of_rows, [table], hidden, targets, chunk) == loss


def test_bfloat16_autocast() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 8, generator=generator, requires_grad=True)
    table = torch.randn(11, 8, generator=generator, requires_grad=True)
    targets = torch.arange(6)
    of_rows = functools.partial(sum_of_losses, lambda rows: rows @ table.mT)
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_mean_loss(of_rows, [table], hidden, targets, 2)
    loss.backward()
    assert loss.dtype == torch.float32
    assert table.grad is not None
    assert table.grad.dtype == torch.float32
    plain = functional.cross_entropy(hidden @ table.mT, targets)
    # bfloat16 rounds each logit (about 10 at most) by up to 2^-9 of itself, inputs included: 3 * 10 * 2^-9 = 0.06
    torch.testing.assert_close(loss, plain, rtol=0, atol=0.06)
