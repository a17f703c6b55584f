"""The network as it is trained equals `nn.Transformer` and torch's cross-entropy, however it is computed."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn import functional

from varprop import measure
from varprop.nn import Transformer
from varprop.nn.init import make_generator
from varprop.results import SITES
from varprop.spec import ModelSpec
from varprop.train import TrainConfig
from varprop.train.model import SUMS, Forward, TrainingModel
from varprop.train.track import batch_statistics

from ..reference.specs import SPECS

CPU = torch.device("cpu")
OUTER = 4
"""Compiled functions besides those of the layers: embedding, final norm, loss, statistics."""


def training_model(spec: ModelSpec, **fields: Any) -> TrainingModel:
    given: dict[str, Any] = {"load_balance_weight": 0.0, "router_z_weight": 0.0, **fields}
    config = TrainConfig(n_steps=1, warmup_steps=0, seed=1, **given)
    return TrainingModel(spec, config, device=CPU, compute_dtype=torch.float32)


def some_tokens(spec: ModelSpec, n_sequences: int = 3, n_tokens: int = 8) -> tuple[Tensor, Tensor]:
    ids = torch.randint(spec.vocab_size, (n_sequences, n_tokens + 1), generator=make_generator(0))
    return ids[:, :-1], ids[:, 1:]


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """By name, zeros where a parameter has none."""
    named = model.named_parameters()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named}


def differentiated(model: TrainingModel, *inputs: Any) -> tuple[Forward, dict[str, Tensor]]:
    model.zero_grad()
    found = model(*inputs)
    found.loss.backward()
    return found, gradients(model.transformer)


def token_sums(model: TrainingModel, *inputs: Any) -> tuple[Tensor, Tensor, Forward]:
    """What the statistics of an uncompiled pass are made from, (2, B, T) and (L, len(SUMS), B, T), and its result."""
    seen: list[Tensor] = []
    own = model._compiled

    def keep(embedded: Tensor, sums: list[Tensor], d_model: int) -> dict[str, Tensor]:
        seen.extend((embedded, torch.cat(sums)))
        return own.stream_statistics(embedded, sums, d_model)

    model._compiled = own._replace(stream_statistics=keep)
    found = model(*inputs)
    model._compiled = own
    return seen[0], seen[1], found


def same_statistics(found: Forward, expected: Forward) -> None:
    """Means of float32 sums over 16 neurons."""
    assert found.stream.keys() == expected.stream.keys()
    for name, value in expected.stream.items():
        torch.testing.assert_close(found.stream[name], value, rtol=1e-5, atol=1e-6, equal_nan=True, msg=name)


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Sums of some hundred float32 terms in another order: 1e-5 of the largest entry (measured: 2e-6)."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5 * float(value.abs().max()) + 1e-12, msg=name)


# Loss and gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECS)
def test_loss_and_gradients_are_those_of_the_transformer(name: str) -> None:
    spec = SPECS[name]
    tokens, targets = some_tokens(spec)
    found, ours = differentiated(training_model(spec), tokens, targets)
    plain = Transformer(spec, seed=1)
    expected = functional.cross_entropy(plain(tokens).flatten(0, 1), targets.flatten())
    expected.backward()
    torch.testing.assert_close(found.loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.cross_entropy, expected.detach(), rtol=1e-6, atol=0)
    close(ours, gradients(plain))
    assert any(float(gradient.abs().max()) > 0 for gradient in ours.values())


@pytest.mark.parametrize("name", ["moe", "moe_pattern", "moe_sigmoid", "moe_expert_choice"])
def test_auxiliary_losses_by_hand(name: str) -> None:
    """0.1 E sum_e f_e p_e and 0.01 mean (log sum exp z)^2 for each mixture layer, whatever the depth."""
    spec = SPECS[name]
    assert spec.moe is not None
    tokens, targets = some_tokens(spec)
    model = training_model(spec, load_balance_weight=0.1, router_z_weight=0.01)
    found, ours = differentiated(model, tokens, targets)
    plain = Transformer(spec, seed=1)
    seen: dict[int, dict[str, Tensor]] = {}
    hidden = plain.hidden(tokens, observe=lambda layer, what, x: seen.setdefault(layer, {}).update({what: x}))
    cross_entropy = functional.cross_entropy(plain.logits(hidden).flatten(0, 1), targets.flatten())
    loss, balance, router_z, loads = cross_entropy, [], [], []
    for layer in (layer for layer in range(1, spec.n_layers + 1) if spec.is_moe(layer)):
        logits, gates = (seen[layer][what].flatten(0, -2) for what in ("router_logits", "gates"))
        load = (gates > 0).sum(dim=0)
        scores = logits.softmax(-1) if spec.moe.router == "softmax" else logits.sigmoid()
        share = (scores / scores.sum(dim=-1, keepdim=True)).mean(dim=0)
        balance.append(spec.moe.n_experts * (load / load.sum() * share).sum())
        router_z.append(logits.logsumexp(dim=-1).square().mean())
        loads.append(load)
        loss = loss + 0.1 * balance[-1] + 0.01 * router_z[-1]
    loss.backward()
    torch.testing.assert_close(found.loss, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.cross_entropy, cross_entropy.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.mixtures["load_balance"], torch.stack(balance).detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.mixtures["router_z"], torch.stack(router_z).detach(), rtol=1e-5, atol=0)
    assert torch.equal(found.mixtures["expert_load"].long(), torch.stack(loads))
    close(ours, gradients(plain))


@pytest.mark.parametrize("name", ["base", "gqa", "parallel", "logits", "window", "window_pattern", "full", "moe"])
def test_documents_do_not_see_each_other(name: str) -> None:
    """Every token has the sums that it has in its document alone."""
    spec = SPECS[name]
    (tokens, targets), lengths = some_tokens(spec, 2, 9), [(4, 5), (1, 8)]
    documents = torch.stack([torch.arange(2).repeat_interleave(torch.tensor(n)) for n in lengths]).int()
    model = training_model(spec)
    _, sums, found = token_sums(model, tokens, targets, documents)
    assert not torch.allclose(sums, token_sums(model, tokens, targets)[1], rtol=1e-3)
    total = 0.0
    for row, parts in enumerate(lengths):
        start = 0
        for length in parts:
            part = slice(start, start + length)
            _, own, alone = token_sums(model, tokens[row : row + 1, part], targets[row : row + 1, part])
            # sums over neurons of terms of both signs; rotary angles are of other positions
            torch.testing.assert_close(sums[:, :, row, part], own[:, :, 0], rtol=1e-4, atol=1e-5)
            total += float(alone.cross_entropy.detach()) * length
            start += length
    assert float(found.cross_entropy) == pytest.approx(total / tokens.numel(), rel=1e-6)


# How it is computed ---------------------------------------------------------------------------------------------------


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything of torch.compile but the code for the device: the graphs run in eager mode."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize(
    "name, changes, compile_layers, n_kinds",
    [
        pytest.param("base", {"n_layers": 12}, 2, 1, marks=pytest.mark.long),
        ("base", {}, 2, 2),  # a pair and what is left
        ("placement_lns", {"n_layers": 12}, 1, 1),
        pytest.param("mix", {"n_layers": 8}, 1, 2, marks=pytest.mark.long),
        ("window_pattern", {"n_layers": 6}, 1, 2),
        ("moe_pattern", {"n_layers": 6}, 2, 1),
        ("key_mask_before", {}, 1, 1),
    ],
)
def test_layers_of_a_kind_share_one_compiled_function(
    name: str, changes: dict[str, Any], compile_layers: int, n_kinds: int
) -> None:
    """As many graphs as kinds of units, none broken; values, gradients and statistics are those of eager mode."""
    spec = SPECS[name].with_fields(changes)
    inputs = some_tokens(spec)
    plain, expected = differentiated(training_model(spec), *inputs)
    model = training_model(spec, compile=True, compile_layers=compile_layers)
    found, ours = differentiated(model, *inputs)
    assert counters["stats"]["unique_graphs"] == OUTER + n_kinds
    differentiated(model, *some_tokens(spec))
    with torch.no_grad():
        model.eval()
        model(*some_tokens(spec, 2, 5))  # not compiled
        model.train()
    assert counters["stats"]["unique_graphs"] == OUTER + n_kinds
    assert not counters["graph_break"]
    torch.testing.assert_close(found.loss, plain.loss, rtol=1e-6, atol=0)
    same_statistics(found, plain)
    close(ours, expected)


@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize(
    "name, compiled", [("base", False), ("moe_shared", False), ("key_mask_before", False), ("base", True)]
)
def test_activation_checkpointing_changes_nothing(name: str, compiled: bool) -> None:
    spec, fields = SPECS[name], {"load_balance_weight": 0.1}
    inputs = some_tokens(spec)
    plain, expected = differentiated(training_model(spec, **fields), *inputs)
    model = training_model(spec, **fields, activation_checkpointing=True, compile=compiled, compile_layers=2)
    found, ours = differentiated(model, *inputs)
    assert torch.equal(found.loss, plain.loss)
    same_statistics(found, plain)
    close(ours, expected)


def test_activation_checkpointing_keeps_less() -> None:
    """What is kept for the backward pass does not hold the inner activations of the blocks."""
    spec = SPECS["base"].with_fields(n_layers=8)

    def kept(**fields: Any) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        model = training_model(spec, **fields)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            found = model(*some_tokens(spec, 4, 16))
        assert found.loss.requires_grad
        return sum(size for address, size in sizes.items() if address not in weights)

    assert kept(activation_checkpointing=True) < kept() / 4


@pytest.mark.long
@pytest.mark.parametrize("name, compile_layers", [("base", 2), ("placement_lns", 1), ("moe_sigmoid", 1)])
def test_compiled_to_machine_code(name: str, compile_layers: int) -> None:
    spec = SPECS[name]
    torch._dynamo.reset()
    plain, expected = differentiated(training_model(spec), *some_tokens(spec))
    model = training_model(spec, compile=True, compile_layers=compile_layers)
    found, ours = differentiated(model, *some_tokens(spec))
    torch.testing.assert_close(found.loss, plain.loss, rtol=1e-6, atol=0)
    same_statistics(found, plain)
    close(ours, expected)


# Statistics -----------------------------------------------------------------------------------------------------------


def recorded(spec: ModelSpec, tokens: Tensor) -> dict[tuple[int, str], Tensor]:
    seen: dict[tuple[int, str], Tensor] = {}
    with torch.no_grad():
        Transformer(spec, seed=1).hidden(
            tokens, lambda layer, site, x: seen.update({(layer, site): x.double().clone()})
        )
    return seen


@pytest.mark.parametrize("name", [name for name in SPECS if not name.startswith(("activation_", "init_", "mask_"))])
def test_statistics_are_those_of_the_tensors(name: str) -> None:
    """Before the final norm, token by token in float64; what a site does not have is NaN."""
    spec = SPECS[name]
    tokens, targets = some_tokens(spec)
    found = training_model(spec)(tokens, targets)
    values = {key: value.numpy() for key, value in batch_statistics(found, spec).items()}
    seen = recorded(spec, tokens)
    for layer in range(spec.n_layers + 1):
        for column, site in enumerate(SITES):
            cell = {key: values[key][layer, column] for key in ("variance", "second_moment")}
            if (layer, site) not in seen:
                assert np.isnan([*cell.values()]).all()
                continue
            x = seen[layer, site]
            # float32 sums over 16 neurons
            assert cell["variance"] == pytest.approx(x.var(dim=-1, correction=0).mean().item(), rel=1e-5)
            assert cell["second_moment"] == pytest.approx(x.square().mean().item(), rel=1e-6)
    for layer in range(1, spec.n_layers + 1):
        for column, (stream, branch) in enumerate((("resid_pre", "attn_out"), ("resid_mid", "mlp_out"))):
            s, b = seen[layer, stream].flatten(1), seen[layer, branch].flatten(1)
            cosine = functional.cosine_similarity(s, b, dim=-1).mean().item()
            assert values["branch_correlation"][layer, column] == pytest.approx(cosine, abs=1e-6)
    assert np.isnan(values["branch_correlation"][0]).all()
    loads = {layer for layer in range(1, spec.n_layers + 1) if spec.is_moe(layer)}
    assert ("expert_load" in values) == bool(loads)
    if loads:
        known = ~np.isnan(values["expert_load"]).any(axis=1)
        assert set(np.flatnonzero(known)) == loads
        np.testing.assert_allclose(values["expert_load"][known].sum(axis=1), 1, rtol=1e-12)
        others = [layer for layer in range(1, spec.n_layers + 1) if layer not in loads]
        assert (values["gate_second_moment"][others] == 1).all()


def test_token_sums_are_sums_over_neurons() -> None:
    spec = SPECS["parallel"]
    tokens, targets = some_tokens(spec)
    (embedded, sums, _), seen = token_sums(training_model(spec), tokens, targets), recorded(spec, tokens)
    torch.testing.assert_close(embedded[0].double(), seen[0, "resid_post"].sum(-1), rtol=1e-5, atol=1e-6)
    for layer in range(1, spec.n_layers + 1):
        for row, name in enumerate(SUMS):
            what, kind = name.split()
            x = seen[layer, what]
            stream = seen[layer, measure.BRANCH_STREAM[what]] if kind == "product" else None
            expected = x if kind == "sum" else x.square() if stream is None else stream * x
            row_found = sums[layer - 1, row].double()
            torch.testing.assert_close(row_found, expected.sum(dim=-1), rtol=1e-5, atol=1e-5, msg=name)


def test_statistics_take_no_part_in_the_gradient() -> None:
    spec = SPECS["moe"]
    inputs = some_tokens(spec)
    model = training_model(spec)
    found, expected = differentiated(model, *inputs)
    assert not any(value.requires_grad for value in (*found.stream.values(), *found.mixtures.values()))
    model.statistics = False
    without, ours = differentiated(model, *inputs)
    assert without.stream == {}
    assert torch.equal(without.loss, found.loss)
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


# GPU ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def waits_are_errors() -> Any:
    before = torch.cuda.get_sync_debug_mode()
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode(before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compile_layers", [1, 2])
@pytest.mark.parametrize("name", ["base", "gqa", "window_pattern", "logits", "moe"])
def test_on_a_gpu_bfloat16_is_near_float32_and_nothing_waits(
    name: str, compile_layers: int, waits_are_errors: Any
) -> None:
    spec = SPECS[name].with_fields(d_model=64, n_layers=4, vocab_size=512, head_dim=16)  # 4 heads
    if name != "moe":
        spec = spec.with_fields(d_ff=96)
    config = TrainConfig(n_steps=1, warmup_steps=0, seed=1, compile=True, compile_layers=compile_layers)
    model = TrainingModel(spec, config, device=torch.device("cuda"), compute_dtype=torch.bfloat16)
    tokens, targets = (ids.cuda() for ids in some_tokens(spec, 4, 256))
    differentiated(model, tokens, targets)  # compiles
    waits_are_errors()
    found, ours = differentiated(model, tokens, targets)
    values = batch_statistics(found, spec)
    torch.cuda.set_sync_debug_mode("default")
    exact = TrainingModel(spec, TrainConfig(seed=1), device=torch.device("cuda"), compute_dtype=torch.float32)
    wide, expected = differentiated(exact, tokens, targets)
    # a product rounded to 8 bits is off by 2^-9 of itself; sums over four layers of them by less than 5 %
    torch.testing.assert_close(found.cross_entropy, wide.cross_entropy, rtol=0.02, atol=0)
    variance = batch_statistics(wide, spec)["variance"]
    torch.testing.assert_close(values["variance"], variance, rtol=0.05, atol=0, equal_nan=True)
    if name == "moe":  # rounding gives tokens to other experts, whose gradients then differ
        return
    for one in expected:
        angle = functional.cosine_similarity(ours[one].flatten(), expected[one].flatten(), dim=0)
        assert float(angle) > 0.95, one
