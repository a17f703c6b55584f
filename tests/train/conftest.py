"""A corpus of a few thousand small token ids and a network that trains on it in milliseconds per step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from varprop.spec import AttentionSpec, FeedForwardSpec, ModelSpec
from varprop.train import TrainConfig

VOCAB_SIZE = 32


@pytest.fixture(autouse=True)
def _no_corpus_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VARPROP_CORPUS", raising=False)


@pytest.fixture(scope="session")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Markov chain: each token is followed by one of two others."""
    rng = np.random.default_rng(0)
    tokens = [0]
    for choice in rng.integers(0, 2, size=3999):
        tokens.append((5 * tokens[-1] + 1 + 7 * int(choice)) % VOCAB_SIZE)
    path = tmp_path_factory.mktemp("tokens") / "chain.u16"
    np.array(tokens, "<u2").tofile(path)
    return path


@pytest.fixture(scope="session")
def spec() -> ModelSpec:
    return ModelSpec(
        d_model=16,
        n_layers=2,
        vocab_size=VOCAB_SIZE,
        attention=AttentionSpec(n_heads=2),
        feed_forward=FeedForwardSpec(d_ff=32),
    )


@pytest.fixture
def config(token_file: Path) -> TrainConfig:
    return TrainConfig(
        n_steps=10,
        batch_size=4,
        n_tokens=16,
        warmup_steps=2,
        record_every=4,
        n_evaluation_sequences=8,
        checkpoint_every=3,
        corpus=str(token_file),
        device="cpu",
    )
