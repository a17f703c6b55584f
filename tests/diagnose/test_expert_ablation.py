"""Ablation of experts against full passes of models whose expert is silent by another way."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.diagnose import zoo
from varprop import presets
from varprop.diagnose import Batch, Replay, Session, measure
from varprop.diagnose.expert_ablation import expert_ablation
from varprop.errors import UnsuitedError
from varprop.nn import Transformer
from varprop.nn import moe as moe_module
from varprop.spec import MoESpec

N_EXPERTS = 4


def loss(model: nn.Module, tokens: Tensor) -> float:
    out = model(tokens)
    logits = getattr(out, "logits", out)[:, :-1].mT
    return functional.cross_entropy(logits.double(), tokens[:, 1:], reduction="sum").item()


def down_matrices(model: nn.Module) -> dict[int, list[str]]:
    """By layer, counted from 1, the names of the parameters that make the output of the experts."""
    names: dict[int, list[str]] = {}
    for name, _ in model.named_parameters():
        if ".experts." in name and "down_proj" in name:
            names.setdefault(int(name.split(".layers.")[1].split(".")[0]) + 1, []).append(name)
    return names


def check(model: nn.Module, tolerance: float) -> None:
    tokens = zoo.tokens(3, 10)
    variables = expert_ablation(Session(Replay(model), Batch.causal(tokens)))
    expected = np.full((zoo.N_LAYERS + 1, N_EXPERTS), np.nan)
    with torch.no_grad():
        for layer, names in down_matrices(model).items():
            for expert in range(N_EXPERTS):
                changed = copy.deepcopy(model)
                for name in names:
                    changed.get_parameter(name)[expert] = 0.0
                expected[layer, expert] = loss(changed, tokens) / loss(model, tokens)
    found = variables["expert_ablation_loss_ratio"][1]
    np.testing.assert_allclose(found, expected, rtol=tolerance)
    assert np.nanmax(np.abs(found - 1)) > 100 * tolerance
    assert variables["expert_ablation_null"][1] < tolerance


@zoo.each_family(*zoo.MIXTURES)
def test_is_the_loss_without_the_experts_output_matrix(family: str) -> None:
    check(zoo.make(family, torch.float64), 1e-7)  # routers compute in float32


@zoo.each_family("olmoe", "gpt_oss")
def test_is_the_same_through_grouped_products(family: str) -> None:
    check(zoo.make(family), 1e-5)


@pytest.mark.parametrize("routing", ["token_choice", "expert_choice"])
def test_our_own_mixture_is_the_loss_without_the_experts_gates(routing: str, monkeypatch) -> None:
    moe = MoESpec(n_experts=N_EXPERTS, top_k=2, d_expert=24, routing=routing)  # type: ignore[arg-type]
    spec = presets.tiny().with_fields(
        d_model=32, n_layers=3, n_heads=2, head_dim=16, vocab_size=96, feed_forward=None, moe=moe
    )
    model, tokens = Transformer(spec, dtype=torch.float64), zoo.tokens(3, 10)
    before = [p.clone() for p in model.parameters()]
    found = expert_ablation(Session(Replay(model), Batch.causal(tokens)))["expert_ablation_loss_ratio"][1]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    route = moe_module.route
    with torch.no_grad():
        base = loss(model, tokens)
        for layer, expert in itertools.product(range(3), range(N_EXPERTS)):
            calls = itertools.count()

            def closed(x, weights, part, layer=layer, expert=expert, calls=calls):
                routing = route(x, weights, part)
                if next(calls) != layer:
                    return routing
                chosen = routing.chosen if part.routing == "token_choice" else torch.arange(N_EXPERTS)
                return routing._replace(gates=routing.gates * (chosen != expert))

            monkeypatch.setattr(moe_module, "route", closed)
            assert found[layer + 1, expert] == pytest.approx(loss(model, tokens) / base, rel=1e-10)
            monkeypatch.setattr(moe_module, "route", route)


def test_result_has_no_values_where_there_is_no_mixture() -> None:
    result = measure(zoo.make("deepseek_v3"), zoo.tokens(3, 8), scores="expert_ablation", options={"expert_tokens": 16})
    ratio = result.expert_ablation_loss_ratio
    assert ratio.isnull().all("expert").values.tolist() == [True, True, False, False]


def test_dense_model_is_refused() -> None:
    model, tokens = zoo.make("llama"), zoo.tokens(2, 8)
    with pytest.raises(UnsuitedError, match="'LlamaForCausalLM' is without experts stacked in one module"):
        measure(model, tokens, scores="expert_ablation")


@pytest.mark.gpu
@zoo.each_family("olmoe", "gpt_oss")
def test_accelerator_gives_what_the_processor_gives(family: str) -> None:
    found = []
    for device in ("cpu", "cuda"):
        session = Session(Replay(zoo.make(family).to(device)), Batch.causal(zoo.tokens(3, 10)))
        found.append(np.asarray(expert_ablation(session)["expert_ablation_loss_ratio"][1]))
    np.testing.assert_allclose(*found, rtol=1e-3)
