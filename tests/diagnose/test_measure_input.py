"""The input of `measure`: what tells two models apart, and bad input in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from varprop.diagnose.measure import fingerprint, measure
from varprop.diagnose.replay import IGNORED, Batch
from varprop.errors import ArgumentError, LeftOutWarning

from . import zoo


def test_equal_models_have_one_fingerprint() -> None:
    model, again = zoo.make("llama"), zoo.make("llama")
    again.config.use_cache = False
    again.config._name_or_path = "elsewhere"
    assert fingerprint(again) == fingerprint(model)


def test_another_config_is_another_model(tmp_path: Path) -> None:
    """Same weights, other numbers: the parts of the one are not those of the other."""
    rows, rotated = zoo.tokens(), zoo.make("llama", rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    assert fingerprint(zoo.make("llama", rms_norm_eps=0.1)) != fingerprint(zoo.make("llama"))
    assert fingerprint(rotated) != fingerprint(zoo.make("llama"))
    measure(zoo.make("llama"), rows, scores=["causal"], parts=tmp_path / "parts")
    with pytest.raises(ArgumentError, match="of another measurement"):
        measure(rotated, rows, scores=["causal"], parts=tmp_path / "parts")


def test_another_buffer_or_spec_is_another_model() -> None:
    model = zoo.make("llama")
    before = fingerprint(model)
    model.register_buffer("scale", torch.ones(1))
    assert fingerprint(model) != before
    own = zoo.make_own()
    other = type(own)(own.spec.with_fields({"attention.pattern": "window", "attention.window": 3}), dtype=torch.float64)
    other.load_state_dict(own.state_dict())
    assert fingerprint(other) != fingerprint(own)


def with_(name: str, place: tuple[int, int], value: int) -> Batch:
    batch = Batch.causal(zoo.tokens())
    getattr(batch, name)[place] = value
    return batch


@pytest.mark.parametrize(
    "given, options, message",
    [
        (with_("tokens", (2, 1), -1), {}, "token id=-1 is negative; expected ids >= 0"),
        (with_("tokens", (2, 1), 96), {}, "token id=96 is beyond the vocabulary; expected ids below 96"),
        (with_("targets", (2, 1), 96), {}, "target=96 is beyond the vocabulary; expected ids below 96"),
        (with_("targets", (2, 1), -7), {}, "target=-7 is negative"),
        (Batch(zoo.tokens(), zoo.tokens(2)), {}, r"targets=\(2, 10\) is not those of the tokens"),
        (zoo.tokens(2, 65), {}, "length=65 is beyond the model's positions; expected at most 64"),
        (zoo.tokens(), {"seed": -1}, "seed=-1 is negative"),
        (zoo.tokens(), {"memory_gib": 0}, "memory_gib=0 is outside the domain"),
        (zoo.tokens(), {"memory_gib": float("nan")}, "memory_gib=nan is outside the domain"),
    ],
)
def test_bad_input_is_one_line(given: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as error:
        measure(zoo.make("gpt2" if torch.is_tensor(given) else "llama"), given, scores=["moments"], **options)
    assert "\n" not in str(error.value)


def test_ids_beyond_the_embedding_of_a_model_without_a_head() -> None:
    rows = zoo.tokens()
    rows[0, 0] = zoo.VOCABULARY
    with pytest.raises(ArgumentError, match="token id=96 is beyond the vocabulary; expected ids below 96"):
        measure(zoo.make("bert").base_model, rows, scores=["moments"])


def test_sequences_without_a_target_may_come_first() -> None:
    batch = Batch.causal(zoo.tokens())
    batch.targets[:2] = IGNORED
    assert measure(zoo.make("llama"), batch, scores=["weights"]).attrs["replay_error"] < 1e-6
    batch.targets[2] = IGNORED
    with pytest.raises(ArgumentError, match="targets=0 is too few for a loss"):
        measure(zoo.make("llama"), batch, scores=["weights"])


def test_positions_that_begin_behind_the_padding_id() -> None:
    config = zoo.t.RobertaConfig(**zoo.COMMON | {"pad_token_id": 1}, intermediate_size=48)
    model = zoo.t.RobertaModel(config, add_pooling_layer=False)
    assert np.isfinite(measure(model, zoo.tokens(2, 62), scores=["moments"]).attrs["replay_error"])
    with pytest.raises(ArgumentError, match="length=63 is beyond the model's positions; expected at most 62"):
        measure(model, zoo.tokens(2, 63), scores=["moments"])


def test_models_without_a_head_are_checked_too() -> None:
    small = dict(vocab_size=zoo.VOCABULARY, d_model=32, num_layers=3, num_heads=4, d_ff=48, d_kv=8)
    model = zoo.enlarged(zoo.t.T5EncoderModel(zoo.t.T5Config(**small)))
    with pytest.raises(ArgumentError, match="'T5EncoderModel' is replayed with last hidden states that are"):
        measure(model, zoo.tokens(), scores=["moments"])


def test_the_released_scores_without_a_head_leave_out_what_needs_one() -> None:
    with pytest.warns(LeftOutWarning) as warned:
        found = measure(zoo.make("bert").base_model, zoo.tokens(4), scores="all", definition="released")
    said = [str(one.message).split(" ")[0] for one in warned if issubclass(one.category, LeftOutWarning)]
    assert said == ["usefulness", "permutation", "defects"]
    assert {"causal_score", "jacobian_norm", "layer_similarity"} <= set(found)


def test_a_group_goes_on_without_attention() -> None:
    model = zoo.make("llama")
    model.config._attn_implementation = "eager"
    for layer in zoo.layers_of(model):
        layer.self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.warns(
        LeftOutWarning, match="attention is left out: architecture='LlamaForCausalLM' is without softmax"
    ):
        found = measure(model, zoo.tokens(4), scores="standard")
    assert "causal_score" in found
    assert "attention_entropy" not in found
