"""The chunked loss equals one cross-entropy over all tokens, value and gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from varprop.train.loss import chunk_loss, chunked_mean_loss


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("chunk", [1, 5, 12, 100])
def test_value_and_gradients(chunk: int) -> None:
    hidden, table = draw(3, 4, 8).requires_grad_(), draw(11, 8, seed=1).requires_grad_()
    targets = torch.randint(11, (3, 4), generator=torch.Generator().manual_seed(2))
    plain = functional.cross_entropy((hidden @ table.mT).flatten(0, 1), targets.flatten())
    expected = torch.autograd.grad(2 * plain, (hidden, table))
    loss = chunked_mean_loss(hidden, table, targets, chunk)
    # float32 sums of a dozen terms of order one in another order: a few units of 6e-8
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.autograd.grad(2 * loss, (hidden, table)), expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(chunked_mean_loss(hidden, table, targets, chunk), plain, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
def test_large_logits(shift: float) -> None:
    """A constant on all logits changes nothing; an impossible target costs its distance."""
    logits = torch.tensor([[0.0, 200.0, 0.0], [0.0, 0.0, 0.0]]) + shift
    loss, gradient = chunk_loss(logits, torch.tensor([0, 2]), 0.5)
    assert loss.item() == pytest.approx(200 + 1.0986123, rel=1e-6)
    third = 1 / 6
    expected = torch.tensor([[-0.5, 0.5, 0.0], [third, third, third - 0.5]])
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-3 if shift else 1e-6)  # 1e4 has steps of 1e-3


def test_bfloat16() -> None:
    """Loss and the gradient of the table are float32; products are rounded to bfloat16."""
    hidden, table, targets = draw(6, 8), draw(11, 8, seed=1), torch.arange(6)
    narrow = hidden.bfloat16().requires_grad_()
    master = table.clone().requires_grad_()
    loss = chunked_mean_loss(narrow, master, targets, 2)
    loss.backward()
    assert loss.dtype == torch.float32
    assert master.grad is not None
    assert narrow.grad is not None
    assert (master.grad.dtype, narrow.grad.dtype) == (torch.float32, torch.bfloat16)
    wide, exact = hidden.clone().requires_grad_(), table.clone().requires_grad_()
    plain = functional.cross_entropy(wide @ exact.mT, targets)
    plain.backward()
    # bfloat16 rounds each logit (about 10 at most) by up to 2^-9 of itself, inputs included: 3 * 10 * 2^-9 = 0.06;
    # a probability is off by as much of itself, over 6 tokens
    torch.testing.assert_close(loss, plain, rtol=0, atol=0.06)
    for one, other in ((master.grad, exact.grad), (narrow.grad.float(), wide.grad)):
        assert other is not None
        torch.testing.assert_close(one, other, rtol=0, atol=0.06 * float(other.abs().max()))


def test_no_more_than_a_chunk_of_logits() -> None:
    """The largest tensor of forward and backward pass is a chunk of logits, not those of all tokens."""
    n, vocab, width, chunk = 64, 50, 4, 8
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                largest = max(largest, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
            return out

    hidden, table = draw(n, width).requires_grad_(), draw(vocab, width).requires_grad_()
    with Largest():
        chunked_mean_loss(hidden, table, torch.zeros(n, dtype=torch.long), chunk).backward()
    assert largest == chunk * vocab
