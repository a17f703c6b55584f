"""Memory: chunks from a stated amount, and half as much after it ran out."""

from __future__ import annotations

import pytest
import torch

from varprop.diagnose.limits import GIBIBYTE, HALVINGS, Limits
from varprop.errors import ArgumentError, LessMemoryWarning


def test_chunks_are_a_quarter_of_the_memory_and_logits_a_half() -> None:
    limits = Limits(1000.0)
    assert limits.stack_variants(25) == limits.batch_sequences(25) == limits.call_tokens(25) == 10
    assert Limits(2.0 * 12 * 50 * 20).head_tokens(50) == 20


def test_something_is_always_done() -> None:
    limits = Limits(1.0)
    assert limits.stack_variants(10**9) == limits.batch_sequences(10**9) == limits.call_tokens(10**9) == 1
    assert limits.head_tokens(50_000) == 16


@pytest.mark.parametrize("device,gib", [("cpu", 2.0), ("cuda", 4.0)])
def test_memory_of_a_device(device: str, gib: float) -> None:
    assert Limits.of(device).memory == gib * GIBIBYTE
    assert Limits.of(device, 0.5).memory == 0.5 * GIBIBYTE


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_half_as_much_after_it_ran_out(error: Exception) -> None:
    limits, seen = Limits(float(GIBIBYTE)), []

    def compute() -> str:
        seen.append(limits.memory / GIBIBYTE)
        if len(seen) < 3:
            raise error
        return "done"

    with pytest.warns(LessMemoryWarning, match="out of memory: going on with 0.5 GiB beside the model"):
        assert limits.retried(compute) == "done"
    assert seen == [1, 0.5, 0.25]


def test_it_ends() -> None:
    calls = []

    def compute() -> None:
        calls.append(1)
        raise torch.OutOfMemoryError("out of memory")

    with pytest.warns(LessMemoryWarning), pytest.raises(ArgumentError) as error:
        Limits(64.0 * GIBIBYTE).retried(compute)
    assert str(error.value) == "memory=1 GiB is still too much; expected fewer or shorter sequences at a time"
    assert len(calls) == HALVINGS


def test_other_errors_are_not_hidden() -> None:
    def compute() -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        Limits(1.0).retried(compute)
