"""Decay groups, learning-rate schedule, clipping."""

from __future__ import annotations

import math

import pytest
import torch

from varprop import presets
from varprop.nn import Transformer
from varprop.spec import ModelSpec
from varprop.train import TrainConfig
from varprop.train.optim import adamw, clip_gradients, decayed_tensors, learning_rate


def test_schedule_values() -> None:
    config = TrainConfig(n_steps=110, warmup_steps=10, learning_rate=2.0, final_lr_fraction=0.1)
    assert [learning_rate(config, step) for step in (0, 4, 9)] == [0.2, 1.0, 2.0]
    assert learning_rate(config, 10) == 2.0
    assert learning_rate(config, 60) == pytest.approx(2.0 * 0.55, rel=1e-15)
    assert learning_rate(config, 35) == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2), rel=1e-15)
    assert learning_rate(config, 110) == pytest.approx(0.2, rel=1e-15)
    assert learning_rate(TrainConfig(n_steps=5, warmup_steps=0, learning_rate=1.0), 0) == 1.0
    assert learning_rate(TrainConfig(n_steps=5, warmup_steps=5, learning_rate=1.0), 5) == 1.0


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


def test_clipping_by_global_norm() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]
    for clip, scale in ((None, 1.0), (10.0, 1.0), (1.0, 0.2)):
        parameters[0].grad, parameters[1].grad = torch.tensor([3.0]), torch.tensor([4.0])
        assert float(clip_gradients(parameters, clip)) == 5.0
        # torch divides by norm + 1e-6, a relative change of 2e-7
        assert float(parameters[1].grad) == pytest.approx(4 * scale, rel=1e-6)
