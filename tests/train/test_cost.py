"""Estimates of a run, against counts made by hand and against what a compiled block saves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from varprop import presets
from varprop.errors import ArgumentError
from varprop.nn import Transformer
from varprop.nn.attention import Shared, rotation
from varprop.nn.block import block_forward, effective_weights
from varprop.spec import AttentionSpec, FeedForwardSpec, ModelSpec, MoESpec
from varprop.train import TrainConfig
from varprop.train.cost import GIB, H200_MEMORY, Cost, assumed_mfu, estimate, saved_bytes_per_token
from varprop.train.model import TrainingModel

N_TOKENS = 41  # divides no size of a weight below, so that tokens are told from weights


SHARED = MoESpec(n_experts=16, top_k=4, d_expert=24, n_shared_experts=1, shared_mixing="mean")


def saved_bytes(spec: ModelSpec) -> tuple[int, int]:
    """Bytes that torch's partitioner keeps of a compiled block: of tokens, and in bfloat16 copies of weights.

    Left out are the weights themselves and the shared rotation.
    """
    block = Transformer(spec).layers[0]
    parameters: dict[str, torch.Tensor] = dict(block.named_parameters())
    shared = Shared(rotation=rotation(spec, N_TOKENS, torch.device("cpu")))

    def forward(x: torch.Tensor, parameters: dict[str, torch.Tensor], shared: Shared) -> torch.Tensor:
        weights = effective_weights(spec, 1, parameters, {}, torch.bfloat16)
        return block_forward(x, weights, spec, 1, shared=shared)

    run = torch.compile(forward, backend="aot_eager_decomp_partition", dynamic=False, fullgraph=True)
    x = torch.randn(1, N_TOKENS, spec.d_model, dtype=torch.bfloat16, requires_grad=True)
    saved: dict[int, int] = {}
    copies: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        of_tokens = storage.nbytes() % N_TOKENS == 0
        rotary = shared.rotation is not None and tensor.shape == shared.rotation[0].shape
        if of_tokens and not rotary:
            saved[storage.data_ptr()] = storage.nbytes()
        elif tensor.dtype == torch.bfloat16:
            copies[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(x, parameters, shared)
    return sum(saved.values()), sum(copies.values())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"n_kv_heads": 1}, marks=pytest.mark.long),
        pytest.param({"feed_forward.gated": False}, marks=pytest.mark.long),
        pytest.param({"attention.head_dim": 32}, marks=pytest.mark.long),
        {"feed_forward": None, "moe": MoESpec(n_experts=8, top_k=2, d_expert=48)},
        pytest.param({"feed_forward": None, "moe": SHARED}, marks=pytest.mark.long),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_saved_tensors_of_a_compiled_block(changes: dict[str, Any]) -> None:
    spec = ModelSpec(
        d_model=64,
        n_layers=1,
        vocab_size=32,
        attention=AttentionSpec(n_heads=4),
        feed_forward=FeedForwardSpec(d_ff=192),
    ).with_fields(changes)
    of_tokens, copies = saved_bytes(spec)
    assert of_tokens == N_TOKENS * saved_bytes_per_token(spec, 1)
    rows = [row for row in spec.tensor_table() if row.layer and len(row.shape) >= 2 and row.matrix != "router"]
    assert copies == 2 * sum(row.n_parameters for row in rows)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointing_keeps_no_copy_of_a_matrix(checkpointing: bool) -> None:
    spec = presets.tiny()
    config = TrainConfig(n_steps=1, warmup_steps=0, activation_checkpointing=checkpointing, compile=False)
    model = TrainingModel(spec, config, device=torch.device("cpu"), compute_dtype=torch.bfloat16)
    shapes = {row.shape for row in spec.tensor_table() if row.layer and len(row.shape) == 2}
    found: set[tuple[int, ...]] = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype == torch.bfloat16:
            found.update((tuple(tensor.shape), tuple(tensor.shape[::-1])))
        return tensor

    tokens = torch.zeros(1, N_TOKENS, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens, tokens)
    assert bool(shapes & found) != checkpointing


def test_memory_by_hand() -> None:
    """The dense 1B model: 16 bytes a parameter, 86.1 kB a token and layer, bfloat16 copies of the blocks' matrices."""
    spec = presets.paper_dense_1b()
    cost = estimate(spec, TrainConfig(n_steps=50, batch_size=16, n_tokens=1024))
    assert cost.states == 16 * 1_279_854_592
    per_layer = 2 * (9 * 2048 + 3 * 8192) + 4 * (2 + 16)
    matrices = 16 * (4 * 2048**2 + 3 * 2048 * 8192)
    assert cost.activations == 16_384 * (16 * per_layer + 3 * 2 * 2048) + 2 * matrices
    assert cost.working == 16_384 * per_layer + 4 * (2**27 // 50_304) * 50_304 + 4 * 50_304 * 2048
    assert cost.memory == cost.states + cost.activations + cost.working


def test_how_it_is_computed_changes_memory_alone() -> None:
    spec = presets.paper_dense_1b()
    base: dict[str, Any] = {"n_steps": 50, "batch_size": 64, "n_tokens": 1024}
    one = estimate(spec, TrainConfig(**base))
    small = estimate(spec, TrainConfig(**base, micro_batch_size=8))
    checkpointed = estimate(spec, TrainConfig(**base, activation_checkpointing=True))
    wide = estimate(spec, TrainConfig(**base, precision="float32"))
    sharded = estimate(spec, TrainConfig(**base, parallel="fsdp"), 8)
    assert {c.flops for c in (one, small, checkpointed, wide, sharded)} == {one.flops}
    assert small.activations < one.activations / 6
    assert checkpointed.activations < one.activations / 10
    assert wide.activations > 1.8 * one.activations
    block = 4 * 2048**2 + 3 * 2048 * 8192
    gathered = 4 * (2 * block + 2 * 50_304 * 2048)
    assert sharded.states == 2 * 1_279_854_592 + gathered + 4 * 2 * block
    assert sharded.activations == estimate(spec, TrainConfig(**base), 8).activations  # the copies too
    assert sharded.micro_batch_size == 8
    several = estimate(spec, TrainConfig(**base, parallel="fsdp", micro_batch_size=4), 8)
    assert several.states == sharded.states + 4 * 1_279_854_592  # gradients wait for the last micro-batch unreduced
    assert estimate(spec, TrainConfig(**base, parallel="fsdp")).states == one.states  # one GPU shares with nobody


def test_hours() -> None:
    spec = presets.d512()
    config = TrainConfig(total_tokens=10**9, batch_size=64, n_tokens=1024)
    one, eight = estimate(spec, config, 1, 0.5), estimate(spec, config, 8, 0.5)
    assert one.tokens == 15_259 * 65_536
    assert one.hours == pytest.approx(308_281_344.0 * one.tokens / (0.5 * 989e12) / 3600)
    assert one.hours == pytest.approx(8 * eight.hours)


def test_assumed_share_of_the_peak() -> None:
    values = [assumed_mfu(presets.d256().with_fields(d_model=d)) for d in (64, 256, 512, 768, 1024, 2048, 4096)]
    assert values[:3] == [0.256, 0.256, 0.379]
    assert values[2] < values[3] < values[4] == pytest.approx(0.464)
    assert values[5:] == pytest.approx([0.562, 0.562])
    assert assumed_mfu(presets.d512_moe()) == 0.75 * 0.379


def test_the_1b_model_trains_with_64k_tokens_at_once() -> None:
    cost = estimate(presets.paper_dense_1b(), TrainConfig(n_steps=50, batch_size=64, n_tokens=1024))
    assert 100 * GIB < cost.memory < H200_MEMORY


@pytest.mark.parametrize("sizes, peak", [((512, 32, 1536), 38.2), ((1024, 32, 2816), 75.0), ((2048, 16, 8192), 99.9)])
def test_estimates_are_a_little_above_measured_peaks(sizes: tuple[int, int, int], peak: float) -> None:
    """Peaks of one H200 by `python -m experiments.benchmarks.train_speed`."""
    d_model, n_layers, d_ff = sizes
    spec = ModelSpec(
        d_model=d_model,
        n_layers=n_layers,
        vocab_size=8192,
        tied_embeddings=False,
        attention=AttentionSpec(n_heads=d_model // 128),
        feed_forward=FeedForwardSpec(d_ff=d_ff),
    )
    cost = estimate(spec, TrainConfig(n_steps=50, batch_size=64, n_tokens=1024))
    assert 1.04 < cost.memory / (peak * GIB) < 1.1


def test_text() -> None:
    cost = estimate(presets.d512(), TrainConfig(n_steps=100, batch_size=64, n_tokens=1024), 2, 0.4)
    assert str(cost).startswith("2 GPUs: 0.0426 min at 40% MFU; ")
    large = Cost(**{**vars(cost), "states": 200 * GIB})
    assert "more than an H200 has" in str(large)
    assert "more than" not in str(cost)


def test_refusals() -> None:
    spec = presets.d512()
    config = TrainConfig(n_steps=100, batch_size=4)
    for n_gpus in (0, 5):
        with pytest.raises(
            ArgumentError, match=rf"^n_gpus={n_gpus} is outside the domain; expected an integer in 1..4"
        ):
            estimate(spec, config, n_gpus)
    for mfu in (0, 1.1, float("nan")):
        with pytest.raises(ArgumentError, match=r"^mfu=.* is outside the domain; expected a number in \(0, 1\]$"):
            estimate(spec, config, mfu=mfu)
