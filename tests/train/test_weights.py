"""Weights, gradients and updates by layer and matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from varprop import results
from varprop.errors import ArgumentError
from varprop.nn import Transformer
from varprop.nn.init import make_generator
from varprop.spec import FeedForwardSpec, ModelSpec, MoESpec
from varprop.train import weights
from varprop.train.weights import WeightSnapshot, gradient_norms, matrix_labels, weight_statistics

MIXED = {
    "moe": MoESpec(n_experts=4, top_k=2, d_expert=16, n_shared_experts=1, shared_gate=True),
    "moe_pattern": (False, True),
}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"density": 0.5},
    MIXED,
    {"attention": None, "feed_forward": FeedForwardSpec(d_ff=8, gated=False)},
]


def effective(model: Transformer, name: str) -> np.ndarray:
    """A matrix as a block uses it, by its full name."""
    _, number, short = name.split(".", 2)
    return model.layers[int(number)].weights()[short].detach().double().numpy()  # type: ignore[operator]


def backward(model: Transformer) -> None:
    tokens = torch.randint(32, (2, 8), generator=make_generator(3))
    model(tokens).logsumexp(dim=-1).mean().backward()


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: ",".join(changes) or "plain")
@pytest.mark.parametrize("numbers", [1, 2 * 32 * 16, 2**26])
def test_tables_equal_the_definitions(
    spec: ModelSpec, changes: dict[str, Any], numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer by layer, two layers of some matrices together, and all."""
    monkeypatch.setattr(weights, "GROUP_NUMBERS", numbers)
    spec = spec.with_fields({"n_layers": 3, **changes})
    model = Transformer(spec, seed=2)
    labels = matrix_labels(spec)
    backward(model)
    snapshot = WeightSnapshot(model, spec)
    before = {row.name: effective(model, row.name) for row in spec.tensor_table() if row.layer and len(row.shape) > 1}
    statistics = {name: table.numpy() for name, table in weight_statistics(model, spec).items()}
    gradients = gradient_norms(model, spec)["matrix_gradient_norm"].numpy()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=make_generator(parameter.numel()))
    ratios = snapshot.update_ratios(model)["update_ratio"].numpy()
    filled = np.zeros_like(ratios, dtype=bool)
    for name, w in before.items():
        layer, label = int(name.split(".")[1]) + 1, name.split(".", 3)[3]
        at = layer, labels.index(label)
        filled[at] = True
        assert statistics["weight_norm"][at] == pytest.approx(np.sqrt((w**2).sum()), rel=1e-7)
        assert statistics["weight_rms"][at] == pytest.approx(np.sqrt((w**2).mean()), rel=1e-7)
        second, fourth = ((w**power).mean(axis=(-2, -1)) for power in (2, 4))
        expected = (3 * second**2 / fourth).mean()
        assert statistics["effective_density_participation"][at] == pytest.approx(expected, rel=1e-7)
        expected = (np.abs(w) > 0.1 * np.sqrt(second)[..., None, None]).mean()
        assert statistics["effective_density_threshold_tenth_rms"][at] == pytest.approx(expected, rel=1e-7)
        largest = np.linalg.norm(w, ord=2, axis=(-2, -1))
        expected = ((w**2).sum(axis=(-2, -1)) / largest**2).mean()
        assert statistics["stable_rank"][at] == pytest.approx(expected, rel=1e-4)
        gradient = dict(model.named_parameters())[name].grad
        assert gradient is not None
        assert gradients[at] == pytest.approx(float(gradient.double().square().sum().sqrt()), rel=1e-7)
        moved = effective(model, name) - w
        assert ratios[at] == pytest.approx(np.sqrt((moved**2).sum() / (w**2).sum()), rel=1e-6)
    for table in (*statistics.values(), gradients, ratios):
        assert np.array_equal(np.isfinite(table), filled)


def test_the_schema_takes_the_tables_and_no_other_gaps(spec: ModelSpec) -> None:
    """Two seeds at two steps; a value that is missing once is refused."""
    spec = spec.with_fields(MIXED)
    tables = weight_statistics(Transformer(spec), spec)
    arrays = {name: np.tile(table.numpy(), (2, 2, 1, 1)) for name, table in tables.items()}

    def dataset() -> Any:
        variables = {name: (("seed", "probe_step", *weights.DIMENSIONS[name]), a) for name, a in arrays.items()}
        about = {"spec_json": spec.to_json(), "spec_id": spec.spec_id, "n_tokens": 8}
        return results.new(variables, source="training", coords={"matrix": matrix_labels(spec)}, **about)

    made = dataset()
    assert np.isnan(made.weight_norm.sel(layer=1, matrix="router")).all()
    assert np.isfinite(made.weight_norm.sel(layer=2, matrix="experts.down")).all()
    arrays["weight_rms"][1, 0, 1, 0] = np.nan
    with pytest.raises(results.SchemaError, match="weight_rms is nan at seed=1, probe_step=0, layer=1, matrix=q"):
        dataset()


def test_labels_of_a_mixture(spec: ModelSpec) -> None:
    labels = matrix_labels(spec.with_fields(MIXED))
    assert labels[:7] == ["q", "k", "v", "o", "gate", "up", "down"]
    assert labels[7:11] == ["router", "experts.gate", "experts.up", "experts.down"]
    assert labels[11:] == ["shared.gate", "shared.up", "shared.down", "shared_gate"]


def test_gradients_that_are_not_there(spec: ModelSpec) -> None:
    with pytest.raises(ArgumentError, match=r"gradient='layers.0.attention.q' is missing; expected one"):
        gradient_norms(Transformer(spec), spec)


def test_nothing_moved(spec: ModelSpec) -> None:
    model = Transformer(spec)
    ratios = WeightSnapshot(model, spec).update_ratios(model)["update_ratio"]
    assert float(ratios[1:].abs().max()) == 0.0
