"""Load of experts and the losses on a router: against loops, over splits of a batch, at every depth."""

from __future__ import annotations

import math

import pytest
import torch

from varprop.measure import balance_bias, expert_load, load_balance_loss, router_z_loss
from varprop.nn import Transformer
from varprop.nn.block import Block, block_forward
from varprop.nn.init import make_generator

from ..reference.specs import SPECS

N_EXPERTS, TOP_K = 5, 2


def draws(n_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and top-2 gates, (n_tokens, 5), float64."""
    logits = torch.randn(n_tokens, N_EXPERTS, generator=make_generator(4), dtype=torch.float64)
    scores = logits.softmax(dim=-1)
    chosen = scores.topk(TOP_K, dim=-1).indices
    return logits, torch.zeros_like(scores).scatter(-1, chosen, scores.gather(-1, chosen))


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_load_balance_loss_is_the_double_sum(router: str) -> None:
    logits, gates = draws(12)
    expected = 0.0
    for e in range(N_EXPERTS):
        tokens = sum(float(gates[t, e]) > 0 for t in range(12)) / 12
        probability = 0.0
        for row in logits.tolist():
            scores = [math.exp(z) if router == "softmax" else 1 / (1 + math.exp(-z)) for z in row]
            probability += scores[e] / sum(scores) / 12
        expected += N_EXPERTS / TOP_K * tokens * probability
    loss = load_balance_loss(logits.view(3, 4, -1), expert_load(gates), router)
    torch.testing.assert_close(loss.item(), expected, rtol=1e-14, atol=0)


def test_load_balance_loss_from_balance_to_collapse() -> None:
    balanced = torch.eye(4) * 50.0  # each token sure of another expert
    torch.testing.assert_close(load_balance_loss(balanced, torch.ones(4)).item(), 1.0)
    collapsed = balanced[:1].expand(4, 4)
    torch.testing.assert_close(load_balance_loss(collapsed, torch.tensor([4, 0, 0, 0])).item(), 4.0)


def test_no_token_at_all_is_no_loss() -> None:
    assert load_balance_loss(torch.zeros(2, 4), torch.zeros(4, dtype=torch.int64)).item() == 0.0


def test_a_split_batch_with_the_summed_load_has_the_whole_gradient() -> None:
    logits, gates = draws(12)
    halves = [half.clone().requires_grad_() for half in logits.split(6)]
    load = sum(expert_load(half) for half in gates.split(6))
    assert isinstance(load, torch.Tensor)
    assert load.tolist() == expert_load(gates).tolist()
    parts = [load_balance_loss(half, load) + router_z_loss(half) for half in halves]
    whole = logits.clone().requires_grad_()
    loss = load_balance_loss(whole, expert_load(gates)) + router_z_loss(whole)
    torch.testing.assert_close(sum(parts) / 2, loss, rtol=1e-14, atol=0)
    split = torch.cat(torch.autograd.grad(sum(parts) / 2, halves))  # type: ignore[arg-type]
    torch.testing.assert_close(split, torch.autograd.grad(loss, whole)[0], rtol=1e-12, atol=1e-17)


def test_router_z_loss_is_the_loop() -> None:
    logits, _ = draws(12)
    expected = sum(math.log(sum(math.exp(z) for z in row)) ** 2 for row in logits.tolist()) / 12
    torch.testing.assert_close(router_z_loss(logits).item(), expected, rtol=1e-14, atol=0)


def test_bias_balances_a_skewed_router() -> None:
    logits, _ = draws(2000)
    logits += torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0], dtype=torch.float64)
    scores, bias = torch.sigmoid(logits), torch.zeros(N_EXPERTS, dtype=torch.float64)
    for _ in range(400):
        chosen = (scores + bias).topk(TOP_K, dim=-1).indices
        load = torch.bincount(chosen.flatten(), minlength=N_EXPERTS)
        bias = balance_bias(bias, load, 0.005)
    assert (load / load.double().mean() - 1).abs().max() < 0.1


def test_every_router_has_the_same_gradient_at_every_depth() -> None:
    """The gradient of a layer's own losses on its router does not depend on how many layers follow."""
    found: dict[int, list[list[torch.Tensor]]] = {}
    for n_layers in (1, 2, 4):
        spec = SPECS["moe"].with_fields({"n_layers": n_layers})
        model = Transformer(spec, seed=3, dtype=torch.float64)
        x = torch.randn(2, 9, spec.d_model, generator=make_generator(5), dtype=torch.float64)
        for layer, block in enumerate(model.layers, start=1):
            assert isinstance(block, Block)
            seen: dict[str, torch.Tensor] = {}
            x = block_forward(
                x, block.weights(), spec, layer, observe=lambda _, what, values, seen=seen: seen.update({what: values})
            )
            logits, load = seen["router_logits"], expert_load(seen["gates"]).sum(dim=0)
            router = block.get_parameter("moe.router")
            losses = (load_balance_loss(logits, load), router_z_loss(logits))
            gradients = [torch.autograd.grad(loss, router, retain_graph=True)[0] for loss in losses]
            assert all(gradient.norm() > 1e-3 for gradient in gradients)
            found.setdefault(layer, []).append(gradients)
    for same in found.values():
        for other in same[1:]:
            torch.testing.assert_close(other, same[0], rtol=0, atol=0)
