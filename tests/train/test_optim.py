"""Schedules, parameter groups and their transfer over width and depth, clipping."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard

from varprop import presets
from varprop.errors import ArgumentError
from varprop.nn import Transformer
from varprop.spec import AttentionSpec, FeedForwardSpec, ModelSpec, NormSpec
from varprop.train import TrainConfig
from varprop.train.optim import (
    Group,
    adamw,
    clipped_step,
    decayed_tensors,
    gradient_norm,
    learning_rate,
    parameter_groups,
    set_learning_rate,
)


def test_cosine() -> None:
    config = TrainConfig(n_steps=110, warmup_steps=10, learning_rate=2.0, final_lr_fraction=0.1)
    assert [learning_rate(config, 110, step) for step in (0, 4, 9)] == [0.2, 1.0, 2.0]
    assert learning_rate(config, 110, 10) == 2.0
    assert learning_rate(config, 110, 60) == pytest.approx(2.0 * 0.55, rel=1e-15)
    assert learning_rate(config, 110, 35) == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2), rel=1e-15)
    assert learning_rate(config, 110, 110) == pytest.approx(0.2, rel=1e-15)
    assert learning_rate(TrainConfig(n_steps=5, warmup_steps=0, learning_rate=1.0), 5, 0) == 1.0
    assert learning_rate(TrainConfig(n_steps=5, warmup_steps=5, learning_rate=1.0), 5, 5) == 1.0


def test_the_number_of_updates_is_that_of_the_budget() -> None:
    config = TrainConfig(total_tokens=110 * 1024, warmup_steps=10, learning_rate=2.0)
    assert learning_rate(config, 110, 110) == pytest.approx(0.2, rel=1e-15)


def test_warm_up_stable_decay() -> None:
    config = TrainConfig(
        n_steps=100, warmup_steps=10, learning_rate=2.0, schedule="wsd", decay_fraction=0.2, final_lr_fraction=0.1
    )
    assert [learning_rate(config, 100, step) for step in (4, 10, 50, 80)] == [1.0, 2.0, 2.0, 2.0]
    falling = [learning_rate(config, 100, step) for step in (85, 90, 100)]
    assert falling == pytest.approx([2.0 * (0.1 + 0.9 * share) for share in (0.75, 0.5, 0.0)], rel=1e-12)
    # A stable stage can be continued: until the decay begins, the rates are those of a longer run.
    assert [learning_rate(config, 1000, step) for step in range(80)] == [
        learning_rate(config, 100, step) for step in range(80)
    ]


def test_ends_of_the_decay_fraction() -> None:
    whole = TrainConfig(n_steps=10, warmup_steps=4, learning_rate=1.0, schedule="wsd", decay_fraction=1.0)
    assert [learning_rate(whole, 10, step) for step in (3, 4, 7)] == pytest.approx([1.0, 1.0, 0.55])
    none = TrainConfig(n_steps=10, warmup_steps=4, learning_rate=1.0, schedule="wsd", decay_fraction=0.0)
    constant = TrainConfig(n_steps=10, warmup_steps=4, learning_rate=1.0, schedule="constant")
    for step in range(11):
        assert learning_rate(none, 10, step) == learning_rate(constant, 10, step) == min(1.0, (step + 1) / 4)


def test_which_tensors_decay() -> None:
    spec = presets.tiny_moe().with_fields(n_layers=1, tied_embeddings=False)
    assert decayed_tensors(spec, "matrices") == {
        *(f"layers.0.attention.{name}" for name in "qkvo"),
        "layers.0.moe.router",
        *(f"layers.0.moe.experts.{name}" for name in ("gate", "up", "down")),
    }
    assert decayed_tensors(spec, "everything") == {row.name for row in spec.tensor_table()}


@pytest.mark.parametrize("decay", ["matrices", "everything"])
def test_decay_shrinks_exactly_its_group(spec: ModelSpec, decay: str) -> None:
    """With zero gradients AdamW multiplies what decays by 1 - rate * weight_decay and leaves the rest alone."""
    model = Transformer(spec)
    config = TrainConfig(learning_rate=0.5, weight_decay=0.5, decay=decay)  # type: ignore[arg-type]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = adamw(model, spec, config)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    decayed = decayed_tensors(spec, decay)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name] * (0.75 if name in decayed else 1.0)), name


# Transfer -------------------------------------------------------------------------------------------------------------

EVERY_TENSOR: dict[str, Any] = {
    "attention": AttentionSpec(n_heads=2, qkv_bias=True, sink_logit=True),
    "feed_forward": FeedForwardSpec(d_ff=64, bias=True),
}


def by_tensor(spec: ModelSpec, config: TrainConfig) -> dict[str, Group]:
    groups = parameter_groups(spec, config)
    names = [name for group in groups for name in group.tensors]
    assert sorted(names) == sorted(row.name for row in spec.tensor_table())  # each once
    return {name: group for group in groups for name in group.tensors}


@pytest.mark.parametrize("rule, alpha", [("inverse_L", 1), ("inverse_sqrt_L", 0.5), ("inverse_sqrt_2L", 0.5)])
def test_factors_of_a_dense_spec(rule: str, alpha: float) -> None:
    """Table 1 of arXiv 2505.01618 at m_N = 4, m_L = 8; the unembedding with its multiplier 1/4 put into the matrix."""
    spec = ModelSpec(d_model=32, n_layers=16, tied_embeddings=False, **EVERY_TENSOR).with_fields(
        {"residual.rule": rule}
    )
    config = TrainConfig(base_d_model=8, base_n_layers=2, weight_decay=0.1, eps=1e-8)
    table = by_tensor(spec, config)
    branch = 8 ** (alpha - 1)
    for name in ("attention.q", "attention.k", "attention.v", "attention.o", "mlp.gate", "mlp.up", "mlp.down"):
        group = table[f"layers.15.{name}"]
        assert (group.factor, group.weight_decay) == pytest.approx((branch / 4, 0.4))
        assert group.eps == pytest.approx(1e-8 / 4 / 8**alpha)
    for name in ("attention_norm.gain", "attention.q_bias", "attention.sink", "mlp_norm.gain", "mlp.down_bias"):
        group = table[f"layers.0.{name}"]
        assert (group.factor, group.weight_decay) == pytest.approx((branch, 0.0))
        assert group.eps == pytest.approx(1e-8 / 4 / 8**alpha)
    for name, factor, eps in (("embed", 1, 0.25), ("final_norm.gain", 1, 0.25), ("unembed", 0.25, 1)):
        assert (table[name].factor, table[name].weight_decay) == (factor, 0.0)
        assert table[name].eps == pytest.approx(1e-8 * eps)


def test_factors_of_a_mixture_and_decay_of_everything() -> None:
    spec = presets.d256_moe().with_fields({"residual.rule": "inverse_sqrt_L", "moe.n_shared_experts": 1})
    config = TrainConfig(base_d_model=128, base_n_layers=3, weight_decay=0.1, decay="everything")
    table = by_tensor(spec, config)
    for name in ("router", "experts.gate", "experts.up", "experts.down", "shared.up", "shared.down"):
        assert (table[f"layers.3.moe.{name}"].factor, table[f"layers.3.moe.{name}"].weight_decay) == (0.25, 0.2)
    assert table["layers.3.mlp_norm.gain"].factor == 0.5
    decays = {name: table[name].weight_decay for name in ("embed", "unembed", "final_norm.gain")}
    assert decays == {"embed": 0.1, "unembed": 0.2, "final_norm.gain": 0.1}


def test_one_base_alone_and_none() -> None:
    spec = presets.d256().with_fields({"residual.rule": "inverse_L"})
    assert {group.factor for group in parameter_groups(spec, TrainConfig())} == {1.0}
    assert {group.factor for group in parameter_groups(spec, TrainConfig(base_d_model=64))} == {1.0, 0.25}
    assert {group.factor for group in parameter_groups(spec, TrainConfig(base_n_layers=3))} == {1.0}
    assert {group.eps for group in parameter_groups(spec, TrainConfig(base_n_layers=3))} == {1e-8, 0.25e-8}


def test_no_rule_no_transfer() -> None:
    spec = presets.d256()
    config = TrainConfig(base_n_layers=2)
    for changes in (
        {"norm.placement": "post"},
        {"norm.placement": "peri"},
        {"norm.placement": "post", "residual.rule": "deepnorm"},
    ):
        with pytest.raises(ArgumentError, match=r"^base_n_layers=2 is given with residual.rule=.*; expected a rule"):
            parameter_groups(spec.with_fields(changes), config)
        parameter_groups(spec.with_fields(changes), TrainConfig(base_n_layers=12))  # nothing to transfer
    tied = spec.with_fields(tied_embeddings=True)
    with pytest.raises(ArgumentError, match=r"^base_d_model=64 is given where the unembedding is the embedding; "):
        parameter_groups(tied, TrainConfig(base_d_model=64))


def test_rates_follow_the_factors(spec: ModelSpec) -> None:
    spec = spec.with_fields(tied_embeddings=False)
    optimizer = adamw(Transformer(spec), spec, TrainConfig(base_d_model=8))
    set_learning_rate(optimizer, 0.5)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {"embedding": 0.5, "vectors": 0.5, "matrices": 0.25, "final_norm": 0.5, "unembedding": 0.25}


def test_the_unembedding_is_the_papers_with_its_multiplier_inside() -> None:
    """Theirs: logits x W^T / m, rate eta, decay lambda, eps / m. Ours: x V^T, eta / m, m lambda, eps, V = W / m."""
    m, generator = 4.0, torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(5, 8, generator=generator, dtype=torch.float64))
    ours = torch.nn.Parameter(weight.detach() / m)
    x = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    targets = torch.arange(6) % 5
    theirs = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.3, eps=0.01 / m)
    optimizer = torch.optim.AdamW([ours], lr=0.1 / m, weight_decay=0.3 * m, eps=0.01)
    for _ in range(5):
        for step, logits in ((theirs, x @ weight.T / m), (optimizer, x @ ours.T)):
            step.zero_grad()
            torch.nn.functional.cross_entropy(logits, targets).backward()
            step.step()
        torch.testing.assert_close(ours.detach(), weight.detach() / m, rtol=1e-12, atol=0)


def test_the_rule_one_is_inverse_sqrt_with_a_smaller_embedding() -> None:
    """Logits and the gradients of every block are the same: Pre-LN does not see the scale of the stream."""
    part = {"attention": AttentionSpec(n_heads=2), "feed_forward": FeedForwardSpec(d_ff=32)}
    one = ModelSpec(d_model=16, n_layers=9, vocab_size=32, tied_embeddings=False, norm=NormSpec(eps=0.0), **part)
    scaled = one.with_fields({"residual.rule": "inverse_sqrt_L"})
    found = []
    for spec, factor in ((one, 1.0), (scaled, 9**-0.5)):
        model = Transformer(spec, dtype=torch.float64)
        with torch.no_grad():
            model.get_parameter("embed").mul_(factor)
        logits = model(torch.arange(12).view(2, 6))
        logits.square().mean().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if name.startswith("layers.")}
        found.append((logits.detach(), gradients))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


def moved(rule: str, n_layers: int, d_model: int = 64, **base: Any) -> tuple[float, float]:
    """Change of the last stream by four updates, over its size, and of the logits; both mean squares, of two seeds."""
    parts = {"attention": AttentionSpec(n_heads=2), "feed_forward": FeedForwardSpec(d_ff=2 * d_model)}
    spec = ModelSpec(d_model=d_model, n_layers=n_layers, vocab_size=64, tied_embeddings=False, **parts)
    spec = spec.with_fields({"residual.rule": rule})
    config = TrainConfig(learning_rate=4e-3, eps=1e-12, **base)
    changes = []
    for seed in range(2):
        model = Transformer(spec, seed=seed)
        optimizer = adamw(model, spec, config)
        tokens = torch.randint(64, (4, 33), generator=torch.Generator().manual_seed(seed))
        states = []
        for step in range(5):
            stream: dict[tuple[int, str], torch.Tensor] = {}
            logits = model(tokens[:, :-1], lambda *item, stream=stream: stream.update({item[:2]: item[2].detach()}))
            states.append((stream[n_layers, "resid_post"], logits.detach()))
            if step < 4:
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
                optimizer.step()
        (stream_0, logits_0), (stream_4, logits_4) = states[0], states[-1]
        change = (stream_4 - stream_0).square().mean() / stream_0.square().mean()
        changes.append((float(change), float((logits_4 - logits_0).square().mean())))
    return sum(c[0] for c in changes) / 2, sum(c[1] for c in changes) / 2


@pytest.mark.parametrize("rule, with_rule, without", [("inverse_sqrt_L", (0.7, 1.3), 1.5), ("one", (0.8, 1.6), 1.8)])
def test_stream_moves_as_much_at_any_depth(rule: str, with_rule: tuple[float, float], without: float) -> None:
    """Coordinate check: from 2 to 12 layers the change by four updates stays with the transfer and grows without it.

    `moved` over 2 to 32 layers: `inverse_sqrt_L` 0.49 to 0.43 with, to 1.43 without; `one` 0.70 to 1.09 and 2.44 (with
    m_L^-1 in place of m_L^-1/2 it falls to 0.55). `inverse_L`, which has no factor on rates: 0.30 to 0.22.
    """
    shallow = moved(rule, 2)[0]
    assert with_rule[0] < moved(rule, 12, base_n_layers=2)[0] / shallow < with_rule[1]
    assert moved(rule, 12)[0] / shallow > without


@pytest.mark.long
def test_stream_moves_as_much_at_32_layers_and_8_times_the_width() -> None:
    """Width 32 to 256 at rates tuned at 32: the stream changes by 0.10 at both with the transfer, 1.65 without."""
    shallow = moved("inverse_sqrt_L", 2)
    deep, plain = moved("inverse_sqrt_L", 32, base_n_layers=2), moved("inverse_sqrt_L", 32)
    assert 0.7 < deep[0] / shallow[0] < 1.3
    assert 0.8 < deep[1] / shallow[1] < 1.25
    assert plain[0] / shallow[0] > 2.5
    narrow = moved("inverse_L", 2, d_model=32)
    wide, unscaled = moved("inverse_L", 2, d_model=256, base_d_model=32), moved("inverse_L", 2, d_model=256)
    assert 0.6 < wide[0] / narrow[0] < 1.4
    assert unscaled[0] / narrow[0] > 4


# Clipping -------------------------------------------------------------------------------------------------------------


def test_clipping_by_global_norm() -> None:
    """An update of clipped gradients is torch's own of scaled ones; parameters without a gradient are left out."""
    for clip, scale in ((None, 1.0), (10.0, 1.0), (1.0, 0.2)):
        start = [torch.ones(1), torch.full((1,), 2.0), torch.full((1,), 3.0)]
        clipped, scaled = ([torch.nn.Parameter(t.clone()) for t in start] for _ in range(2))
        ours, theirs = (torch.optim.AdamW(p, lr=0.1, eps=1.0, fused=True) for p in (clipped, scaled))
        for parameters, factor in ((clipped, 1.0), (scaled, scale)):
            parameters[0].grad, parameters[1].grad = torch.tensor([3.0 * factor]), torch.tensor([4.0 * factor])
        assert float(gradient_norm(ours)) == 5.0
        assert float(clipped_step(ours, clip)) == 5.0
        theirs.step()
        for one, other, before in zip(clipped, scaled, start, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
            assert (one.grad is None) == torch.equal(one.detach(), before)
        assert ours.state[clipped[0]]["exp_avg"].item() == pytest.approx(0.3 * scale, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float, clip: float | None) -> None:
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=True)

    def step(value: float) -> float:
        parameters[0].grad, parameters[1].grad = torch.tensor([0.5, value]), torch.ones(2)
        return float(clipped_step(optimizer, clip))

    def held() -> list[torch.Tensor]:
        state = [tensor for p in parameters for tensor in optimizer.state[p].values()]
        return [tensor.detach().clone() for tensor in (*parameters, *state)]

    step(1.0)
    before = held()
    assert not math.isfinite(step(bad))
    assert all(torch.equal(one, other) for one, other in zip(before, held(), strict=True))
    step(1.0)  # and the next one counts
    assert not any(torch.equal(one, other) for one, other in zip(before, held(), strict=True))


@pytest.fixture
def one_rank() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def updates(spec: ModelSpec, config: TrainConfig, sharded: bool) -> tuple[list[float], list[torch.Tensor]]:
    """Gradient norms and weights of three updates."""
    model = Transformer(spec)
    if sharded:
        for block in model.layers:
            fully_shard(block)
        fully_shard(model)
    optimizer = adamw(model, spec, config)
    norms = []
    for step in range(3):
        optimizer.zero_grad()
        tokens = torch.randint(spec.vocab_size, (4, 9), generator=torch.Generator().manual_seed(step))
        torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        norms.append(float(clipped_step(optimizer, config.clip_norm)))
    full = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]  # type: ignore[operator]
    return norms, [tensor.detach() for tensor in full]


@pytest.mark.usefixtures("one_rank")
def test_sharded_parameters(spec: ModelSpec) -> None:
    config = TrainConfig(clip_norm=0.1, base_n_layers=1)
    plain, sharded = (updates(spec, config, flag) for flag in (False, True))
    assert sharded[0] == pytest.approx(plain[0], rel=1e-6)
    assert min(plain[0]) > 0.1  # every update is clipped
    for one, other in zip(plain[1], sharded[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def _on_two_ranks(rank: int, store: str, spec_json: str, out: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    norms, weights = updates(ModelSpec.from_json(spec_json), TrainConfig(clip_norm=0.1), True)
    torch.testing.assert_close(torch.tensor(norms), _same_everywhere(norms), rtol=0, atol=0)
    if rank == 0:
        Path(out).write_text(json.dumps([norms, [float(w.double().square().sum()) for w in weights]]))
    distributed.destroy_process_group()


def _same_everywhere(norms: list[float]) -> torch.Tensor:
    """The values of rank 0."""
    values = torch.tensor(norms)
    distributed.broadcast(values, 0)
    return values


@pytest.mark.long
def test_norm_and_updates_on_two_ranks(spec: ModelSpec, tmp_path: Path) -> None:
    """Both ranks read the same batch, so gradients, norms and weights are those of one process."""
    out = tmp_path / "out"
    arguments = (str(tmp_path / "store"), spec.to_json(), str(out))
    torch.multiprocessing.spawn(_on_two_ranks, arguments, nprocs=2)  # type: ignore[attr-defined]
    norms, squares = json.loads(out.read_text())
    expected_norms, weights = updates(spec, TrainConfig(clip_norm=0.1), False)
    assert norms == pytest.approx(expected_norms, rel=1e-6)
    assert squares == pytest.approx([float(w.double().square().sum()) for w in weights], rel=1e-6)
