"""The training configuration: JSON form and refusals."""

from __future__ import annotations

from typing import Any

import pytest

from varprop.errors import ArgumentError
from varprop.train import TrainConfig


def test_json_round_trip_and_one_canonical_form() -> None:
    config = TrainConfig(learning_rate=1, clip_norm=None, betas=(0, 0.5), seed=2**40)
    assert TrainConfig.from_json(config.to_json()) == config
    assert config.to_json() == TrainConfig(learning_rate=1.0, clip_norm=None, betas=(0.0, 0.5), seed=2**40).to_json()


@pytest.mark.parametrize(
    "field, value",
    [
        ("n_steps", 0),
        ("n_steps", 2.0),
        ("n_steps", True),
        ("batch_size", -1),
        ("n_tokens", 1),
        ("seed", -1),
        ("seed", 2**63),
        ("warmup_steps", 201),
        ("record_every", 0),
        ("n_evaluation_sequences", 0),
        ("checkpoint_every", 0),
        ("learning_rate", 0),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("learning_rate", "1e-3"),
        ("final_lr_fraction", 1.5),
        ("weight_decay", -0.1),
        ("eps", 0),
        ("clip_norm", 0),
        ("betas", (0.9, 1.0)),
        ("betas", 0.9),
        ("betas", (0.9,)),
        ("decay", "some"),
        ("precision", "float16"),
        ("corpus", ""),
        ("device", None),
        ("compile", 1),
    ],
)
def test_bad_fields(field: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=f"^{field}=.* is .*; expected ") as error:
        TrainConfig(**{field: value})
    assert "\n" not in str(error.value)


def test_bad_json() -> None:
    with pytest.raises(ArgumentError, match="learning_rat is an unknown field; expected 'learning_rate'"):
        TrainConfig.from_json('{"learning_rat": 1}')
    with pytest.raises(ArgumentError, match="broken"):
        TrainConfig.from_json("{")
