"""FLOP of a token and updates of a budget, against counts made by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from varprop import presets
from varprop.errors import ArgumentError
from varprop.nn import Transformer
from varprop.spec import ModelSpec, MoESpec
from varprop.train import TrainConfig
from varprop.train.budget import attention_flops_per_token, flops_per_token, mfu, n_steps, peak_flops


def test_the_formula_of_the_issue() -> None:
    """6 N_matmul + 6 L d T, written out for the paper's dense 1B model."""
    n_matmul = 16 * (4 * 2048**2 + 3 * 2048 * 8192) + 50_304 * 2048
    assert flops_per_token(presets.paper_dense_1b(), 1024) == 6 * n_matmul + 6 * 16 * 2048 * 1024


def test_grouped_keys_and_tied_tables() -> None:
    spec = presets.d512()
    saved = 6 * 12 * 2 * 512 * (512 - 128)  # keys and values of one head of four
    assert flops_per_token(spec, 64) - flops_per_token(spec.with_fields(n_kv_heads=1), 64) == saved
    assert flops_per_token(spec.with_fields(tied_embeddings=True), 64) == flops_per_token(spec, 64)


def test_experts_count_by_their_share() -> None:
    spec = presets.paper_moe_2b_400m()
    layer = 4 * 768**2 + 768 * 32 + (4 + 1) * 3 * 768 * 1536
    assert flops_per_token(spec, 4096) == 6 * (16 * layer + 50_304 * 768) + 6 * 16 * 768 * 4096


@pytest.mark.parametrize("window, n_sinks", [(1, 0), (5, 0), (5, 3), (20, 40), (64, 0), (100, 2)])
def test_window_against_counted_keys(window: int, n_sinks: int) -> None:
    """The mean over positions of the keys seen, less the half key that T / 2 leaves out too."""
    n_tokens = 64
    spec = presets.tiny().with_fields({"attention.pattern": "window", "window": window, "n_sink_tokens": n_sinks})
    seen = [sum(t - w < window or w < n_sinks for w in range(t + 1)) for t in range(n_tokens)]
    expected = 12 * 128 * 8 * sum(seen) / n_tokens
    # Summed over positions, the continuous triangle differs by half a key for each position that still gains one.
    gaining = min(n_tokens, window + n_sinks)
    assert attention_flops_per_token(spec, n_tokens) == pytest.approx(expected - 12 * 128 * 8 * gaining / 2 / n_tokens)


def test_patterns() -> None:
    spec = presets.tiny()
    full = spec.with_fields({"attention.pattern": "full"})
    assert attention_flops_per_token(full, 64) == 2 * attention_flops_per_token(spec, 64)
    mixed = spec.with_fields({"attention.pattern": "window", "window_pattern": [16, 0]})
    every = spec.with_fields({"attention.pattern": "window", "window_pattern": [16]})
    halves = (attention_flops_per_token(every, 64) + attention_flops_per_token(spec, 64)) / 2
    assert attention_flops_per_token(mixed, 64) == halves
    no_attention = spec.with_fields(attention=None)
    assert attention_flops_per_token(no_attention, 64) == 0


def flops_of_linear(rows: Any, weight: Any, *_: Any, **__: Any) -> int:
    """Of the products of each row with the matrix (E, out, in) of its expert, from the shapes."""
    return 2 * rows[0] * weight[1] * weight[2]


def flops_of_outer(left: Any, right: Any, *_: Any, **__: Any) -> int:
    """Of the sums of outer products of rows, from the shapes."""
    return 2 * left[0] * left[1] * right[1]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_kv_heads": 1},
        {"tied_embeddings": True},
        {"feed_forward": None, "moe": MoESpec(n_experts=4, top_k=2, d_expert=16, n_shared_experts=1)},
    ],
)
def test_against_the_flop_counter_of_torch(spec: ModelSpec, changes: dict[str, Any]) -> None:
    """Forward and backward of the real network; torch counts attention in full, and does not know grouped products."""
    spec = spec.with_fields({**changes, "attention.pattern": "full"})
    model = Transformer(spec)
    experts = {torch.ops.varprop.looped_linear: flops_of_linear, torch.ops.varprop.looped_outer: flops_of_outer}
    # flash is not counted on a CPU
    with FlopCounterMode(display=False, custom_mapping=experts) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(2, 8, dtype=torch.long)).sum().backward()
    assert counter.get_total_flops() / 16 == flops_per_token(spec, 8)


def test_updates_of_the_budgets(spec: ModelSpec) -> None:
    base: dict[str, Any] = {"batch_size": 4, "n_tokens": 16, "warmup_steps": 0}
    assert n_steps(TrainConfig(n_steps=7, **base), spec) == 7
    assert [n_steps(TrainConfig(total_tokens=n, **base), spec) for n in (1, 64, 65, 640)] == [1, 1, 2, 10]
    flops = flops_per_token(spec, 16) * 64
    budgets = (flops / 1e9, flops, 3 * flops, 3.001 * flops, 1e6 * flops / 7 * 7)
    assert [n_steps(TrainConfig(total_flops=f, **base), spec) for f in budgets] == [1, 1, 3, 4, 10**6]


def test_equal_budgets_over_depth(spec: ModelSpec) -> None:
    """Equal tokens: as many updates at any depth. Equal FLOP: updates in inverse proportion, to one update."""
    deep = spec.with_fields(n_layers=8)
    tokens = TrainConfig(total_tokens=10_000, batch_size=4, n_tokens=16)
    assert n_steps(tokens, spec) == n_steps(tokens, deep)
    flops = TrainConfig(total_flops=1e10, batch_size=4, n_tokens=16)
    for one in (spec, deep):
        spent = n_steps(flops, one) * flops_per_token(one, 16) * 64
        assert 1e10 <= spent < 1e10 + flops_per_token(one, 16) * 64


def test_refusals(spec: ModelSpec) -> None:
    with pytest.raises(ArgumentError, match=r"^warmup_steps=20 is too large; expected at most the 1 updates of"):
        n_steps(TrainConfig(total_tokens=5), spec)
    with pytest.raises(ArgumentError, match=r"^total_flops=1e\+300 is too large; expected fewer than 2\^63 updates$"):
        n_steps(TrainConfig(total_flops=1e300), spec)


def test_share_of_the_peak() -> None:
    spec = presets.d512_deep()
    assert peak_flops("NVIDIA H200") == peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    one = mfu(spec, 1024, 480_000, "NVIDIA H200")
    assert one == pytest.approx(0.379, abs=5e-4)  # harness measurements: 480 k tokens/s is 37.9 %
    assert mfu(spec, 1024, 960_000, "NVIDIA H200", 2) == one
    assert mfu(spec, 1024, 1.0, "a toaster") is None
