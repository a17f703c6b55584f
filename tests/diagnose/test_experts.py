"""Load and gates against loops over what routers and experts are given in an ordinary forward pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.diagnose.zoo import MIXTURES, VOCABULARY, WIDTH, each_family, enlarged, make, tokens
from tests.reference.specs import SPECS
from varprop.diagnose import Batch, Replay, Session, bootstrap, measure, released
from varprop.diagnose.expert_ablation import expert_ablation
from varprop.diagnose.experts import experts, experts_modules, is_mixture, n_experts, routing
from varprop.diagnose.session import Variables
from varprop.errors import UnsuitedError
from varprop.nn import Transformer

N_SEQUENCES, N_TOKENS, N_EXPERTS, N_LAYERS = 3, 10, 4, 3
OWN = ("moe", "moe_sigmoid", "moe_pattern", "moe_expert_choice")


def session(model: nn.Module) -> Session:
    return Session(Replay(model), Batch.causal(tokens(N_SEQUENCES, N_TOKENS)))


class Observed:
    """Gates and logits (S, T, E) of every mixture, by layer from 1, of one ordinary forward pass."""

    def __init__(self, model: Any) -> None:
        self.gates: dict[int, np.ndarray] = {}
        self.logits: dict[int, np.ndarray] = {}
        hooks = []
        for number, layer in enumerate(model.model.layers, start=1):
            for name, part in layer.named_modules():
                if name.endswith(".experts"):
                    hooks.append(part.register_forward_pre_hook(self._gates(number)))
                if name.endswith((".gate", ".router")):
                    hooks.append(part.register_forward_pre_hook(self._logits(number)))
        with torch.no_grad():
            model(tokens(N_SEQUENCES, N_TOKENS))
        for hook in hooks:
            hook.remove()

    def _gates(self, number: int) -> Any:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            gates = np.zeros((N_SEQUENCES * N_TOKENS, N_EXPERTS))
            for row, (chosen, values) in enumerate(zip(args[1].tolist(), args[2].tolist(), strict=True)):
                for expert, value in zip(chosen, values, strict=True):
                    gates[row, expert] = value
            self.gates[number] = gates.reshape(N_SEQUENCES, N_TOKENS, N_EXPERTS)

        return hook

    def _logits(self, number: int) -> Any:
        def hook(part: Any, args: tuple[torch.Tensor, ...]) -> None:
            logits = args[0].reshape(-1, args[0].shape[-1]).double() @ part.weight.double().T
            if getattr(part, "bias", None) is not None:
                logits = logits + part.bias.double()
            self.logits[number] = logits.numpy().reshape(N_SEQUENCES, N_TOKENS, N_EXPERTS)

        return hook


class ObservedOwn(Observed):
    """The same of our own models."""

    def __init__(self, model: Transformer) -> None:
        self.gates, self.logits = {}, {}

        def observe(layer: int, what: str, values: torch.Tensor) -> None:
            if what in ("gates", "router_logits"):
                {"gates": self.gates, "router_logits": self.logits}[what][layer] = values.double().numpy()

        with torch.no_grad():
            model.hidden(tokens(N_SEQUENCES, N_TOKENS), observe=observe)


def entropy(logits: np.ndarray, sigmoid: bool) -> float:
    scores = 1 / (1 + np.exp(-logits)) if sigmoid else np.exp(logits - logits.max())
    p = scores / scores.sum()
    return float(-(p * np.log(p)).sum())


def check(found: Variables, seen: Observed, n_layers: int, sigmoid: bool, rtol: float) -> None:
    for layer in range(1, n_layers + 1):
        values = {name: found[name][1][layer] for name in found}
        if layer not in seen.gates:
            assert np.isnan(values["expert_load"]).all()
            dense = [values[f"{name}"] for name in ("gate_sum", "gate_second_moment", "expert_load_concentration")]
            assert dense == [1.0, 1.0, 1.0]
            assert values["router_entropy"] == 0.0
            continue
        gates = seen.gates[layer]
        load = (gates > 0).sum(axis=1)
        np.testing.assert_allclose(values["expert_load"], load.sum(axis=0) / load.sum(), rtol=1e-12)
        np.testing.assert_allclose(values["gate_sum"], gates.sum(axis=-1).mean(), rtol)
        np.testing.assert_allclose(values["gate_second_moment"], (gates**2).sum(axis=-1).mean(), rtol)
        shares = load / load.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(values["expert_load_concentration"], (shares**2).sum(axis=1).mean(), rtol=1e-12)
        entropies = [[entropy(token, sigmoid) for token in sequence] for sequence in seen.logits[layer]]
        np.testing.assert_allclose(values["router_entropy"], np.mean(entropies), rtol)
        error = bootstrap.stderr(lambda mean: mean, (gates**2).sum(axis=-1).mean(axis=-1))
        np.testing.assert_allclose(values["gate_second_moment_stderr"], error, 100 * rtol, rtol)
    assert all(np.isnan(found[name][1][0]).all() for name in found)


@each_family(*MIXTURES)
def test_equals_loops_over_an_ordinary_pass(family: str) -> None:
    model = enlarged(make(family), 2.0)
    found = experts(session(model))
    check(found, Observed(model), N_LAYERS, family == "deepseek_v3", 2e-5)


@each_family(*MIXTURES)
def test_gates_and_logits_of_every_token(family: str) -> None:
    model = enlarged(make(family), 2.0)
    seen, one = Observed(model), session(model)
    captured = one.capture(slice(0, N_SEQUENCES))
    for number, gates in seen.gates.items():
        found = routing(one.replay, number - 1, captured)
        np.testing.assert_allclose(found.gates, gates, rtol=2e-5, atol=1e-6)
        assert found.logits is not None
        np.testing.assert_allclose(found.logits, seen.logits[number], rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("name", OWN)
def test_equals_loops_over_what_our_own_layers_observe(name: str) -> None:
    spec = SPECS[name].with_fields(vocab_size=VOCABULARY)
    model = enlarged(Transformer(spec, dtype=torch.float64), 1.5).eval()
    assert isinstance(model, Transformer)
    assert spec.moe is not None
    check(experts(session(model)), ObservedOwn(model), spec.n_layers, spec.moe.router == "sigmoid", 1e-10)


@each_family(*MIXTURES)
def test_finds_the_experts(family: str) -> None:
    model: Any = make(family)
    layers = model.model.layers
    dense = 1 if family == "deepseek_v3" else 0
    for number, layer in enumerate(layers):
        found = experts_modules(layer)
        assert [type(part).__name__.endswith("Experts") for part in found] == [True] * (number >= dense)
        assert is_mixture(layer) == (number >= dense)
        assert all(n_experts(part) == N_EXPERTS for part in found)


@each_family("llama", "gpt2", "bert")
def test_a_dense_model_has_none(family: str) -> None:
    one = session(make(family))
    assert not any(experts_modules(layer) for layer in one.replay.layers)
    assert experts(one) == {}


class SingleExperts(nn.Module):
    """A mixture as transformers 4 kept it: a router beside a list of experts."""

    def __init__(self, n: int = N_EXPERTS) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, n, bias=False)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        gates = self.gate(x).softmax(dim=-1)
        return sum(gates[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))  # type: ignore


def test_experts_kept_as_single_modules_are_refused() -> None:
    model: Any = make("llama")
    model.model.layers[1].mlp = SingleExperts()
    one = session(model)
    line = "experts='SingleExperts' is single modules; expected stacked weights, as transformers 5 keeps them"
    for score in (experts, expert_ablation, released.defects_of):
        with pytest.raises(UnsuitedError, match=f"^{line}$"):
            score(one)
    model.model.layers[1].mlp = SingleExperts(1)
    assert experts(session(model)) == {}
    model.model.layers[1].mlp = SingleExperts(3)
    model.model.layers[1].mlp.gate = nn.Linear(WIDTH, WIDTH)  # no router of these
    assert experts(session(model)) == {}


def test_the_router_is_told_from_the_gates() -> None:
    one = session(make("deepseek_v3"))
    captured = one.capture(slice(0, 2))
    assert routing(one.replay, 1, captured).router == "sigmoid"
    one = session(make("olmoe"))
    assert routing(one.replay, 1, one.capture(slice(0, 2))).router == "softmax"


def test_is_a_result() -> None:
    found = measure(make("deepseek_v3"), tokens(N_SEQUENCES, N_TOKENS), scores=["experts"])
    assert found.expert_load.dims == ("layer", "expert")
    np.testing.assert_allclose(found.expert_load[2:].sum("expert"), 1.0)
    assert (found.expert_load_stderr[2:] >= 0).all()
    assert float(found.router_entropy_stderr[2]) > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each_family("mixtral", "gpt_oss", "deepseek_v3")
def test_cuda_agrees_with_cpu(family: str) -> None:
    model = make(family)
    expected = experts(session(model))
    found = experts(session(model.to("cuda")))
    for name in ("gate_sum", "gate_second_moment", "router_entropy"):
        np.testing.assert_allclose(found[name][1], expected[name][1], rtol=1e-4, atol=1e-6, err_msg=name)
