"""`measure`: scores of one's own, and the settings that a result says it was measured with."""

from __future__ import annotations

import json

import numpy as np
import pytest

from varprop.diagnose import Session, measure
from varprop.diagnose.options import with_defaults
from varprop.diagnose.session import Variables
from varprop.errors import ArgumentError
from varprop.nn import Transformer
from varprop.presets import tiny

from . import zoo


def first_tokens(session: Session) -> Variables:
    return {"first_token_mean": ((), session.batch.tokens[:, 0].double().mean().item())}


def again(session: Session) -> Variables:
    return {"causal_score": ((), 0.0)}


def test_scores_of_ones_own() -> None:
    tokens = zoo.tokens(3, 6)
    found = measure(zoo.make("llama"), tokens, scores=[first_tokens, "causal"])
    assert found.first_token_mean.item() == tokens[:, 0].double().mean().item()
    assert found.attrs["scores"] == "causal,first_tokens"
    assert found.causal_score.item() == measure(zoo.make("llama"), tokens, scores="causal").causal_score.item()
    assert "first_token_mean" in measure(zoo.make("llama"), tokens, scores=first_tokens)


def test_variables_and_names_are_given_once() -> None:
    model, tokens = zoo.make("llama"), zoo.tokens(2, 6)
    with pytest.raises(ArgumentError, match=r"variables of score again=\['causal_score'\] is there already; expected"):
        measure(model, tokens, scores=["causal", again])
    with pytest.raises(ArgumentError, match="scores='again' is the name of another score; expected a name of its own"):
        measure(model, tokens, scores=[again, again])


def test_settings_are_in_the_result() -> None:
    options = {"n_probes": 4}
    found = measure(zoo.make("llama"), zoo.tokens(2, 6), scores="weights", options=options, memory_gib=0.5).attrs
    assert json.loads(found["options"]) == with_defaults(options)
    assert found["memory_gib"] == 0.5
    assert found["transformers_version"].split(".")[0].isdigit()
    assert found["attention_implementation"] in ("sdpa", "eager")
    ours = measure(Transformer(tiny().with_fields(n_layers=2)), np.arange(8)[None], scores="weights").attrs
    assert ours["memory_gib"] == 2.0
    assert "transformers_version" not in ours
