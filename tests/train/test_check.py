"""What a run cannot be is said before anything is made."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from varprop.corpus import Corpus
from varprop.errors import ArgumentError
from varprop.spec import AttentionSpec, ModelSpec
from varprop.train import TrainConfig
from varprop.train.check import check_run

TOKENS = np.zeros(100, np.uint16)
CORPUS = Corpus(TOKENS, TOKENS[:60], 32, 2.5, "text", "0" * 64, None)
FIELDS: dict[str, Any] = {"n_steps": 4, "warmup_steps": 0, "batch_size": 8, "n_tokens": 16, "evaluation_length": 16}


def test_a_good_run_passes(spec: ModelSpec) -> None:
    check_run(spec, TrainConfig(**FIELDS), CORPUS)
    check_run(spec, TrainConfig(**FIELDS, micro_batch_size=2, compile_layers=2), CORPUS, 4)


@pytest.mark.parametrize(
    ("fields", "n_processes", "line"),
    [
        ({"n_steps": None, "total_tokens": 128, "warmup_steps": 5}, 1, "^warmup_steps=5 is too large; "),
        ({"base_n_layers": 1}, 1, "^base_n_layers=1 is given with residual.rule="),
        ({}, 3, "^batch_size=8 is not divisible; expected a multiple of 3 processes$"),
        ({"micro_batch_size": 3}, 1, "^micro_batch_size=3 is not a divisor; expected a divisor of the 8 sequences"),
        ({"micro_batch_size": 3}, 2, "^micro_batch_size=3 is not a divisor; expected a divisor of the 4 sequences"),
        ({"parallel": "fsdp", "compile_layers": 2}, 2, "^compile_layers=2 is too large; "),
        ({"document_mask": True}, 1, "^document_mask=True is not possible; "),
        ({"evaluation_length": 60}, 1, "^evaluation_length=60 is too long for a held-out text of 60 tokens; "),
        ({"n_tokens": 60}, 1, "^n_tokens=60 is too long for a held-out text of 60 tokens; "),
    ],
)
def test_bad_runs(spec: ModelSpec, fields: dict[str, Any], n_processes: int, line: str) -> None:
    config = TrainConfig(**(FIELDS | fields))
    if "base_n_layers" in fields:
        spec = spec.with_fields({"norm.placement": "post"})
    with pytest.raises(ArgumentError, match=line):
        check_run(spec, config, CORPUS, n_processes)


def test_a_bad_spec_or_corpus(spec: ModelSpec) -> None:
    config = TrainConfig(**FIELDS)
    with pytest.raises(ArgumentError, match=r"^vocab_size=16 is too small; expected a vocab_size of at least 32"):
        check_run(spec.with_fields(vocab_size=16), config, CORPUS)
    masked = spec.with_fields(attention=AttentionSpec(n_heads=2, key_mask_density=0.5))
    with pytest.raises(ArgumentError, match=r"^cuda_graph=True is given with key_mask_density < 1"):
        check_run(masked, TrainConfig(**FIELDS, cuda_graph=True), CORPUS)
    short = Corpus(TOKENS[:10], TOKENS, 32, 2.5, "text", "0" * 64, None)
    with pytest.raises(ArgumentError, match=r"^n_tokens=16 is too long for a text of 10 tokens; "):
        check_run(spec, config, short)
