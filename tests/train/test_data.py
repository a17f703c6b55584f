"""Batches: which tokens a step sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from varprop.corpus import load_corpus, n_windows
from varprop.errors import ArgumentError
from varprop.train.data import batch, validation_batches


def test_batch_is_a_function_of_seed_and_step(token_file: Path) -> None:
    corpus = load_corpus(token_file)
    first = batch(corpus, 3, 7, 4, 16)
    assert first.shape == (4, 17)
    assert first.dtype == torch.int64
    assert torch.equal(first, batch(corpus, 3, 7, 4, 16))
    assert not torch.equal(first, batch(corpus, 4, 7, 4, 16))
    assert not torch.equal(first, batch(corpus, 3, 8, 4, 16))


def test_an_epoch_visits_every_window_once_and_the_next_in_another_order(tmp_path: Path) -> None:
    path = tmp_path / "count.u32"
    np.arange(1000, dtype="<u4").tofile(path)  # a token says where it stands
    corpus = load_corpus(path)
    size = n_windows(corpus.train, 10)
    assert size == 94
    rows = torch.cat([batch(corpus, 0, step, 47, 10) for step in range(4)])
    starts = rows[:, 0].reshape(2, size)
    for epoch in starts:
        assert sorted(epoch.tolist()) == list(range(0, 940, 10))
    assert not torch.equal(starts[0], starts[1])
    assert torch.equal(rows[:, 1:], rows[:, :-1] + 1)  # targets follow inputs


def test_sequences_do_not_depend_on_how_they_are_batched(token_file: Path) -> None:
    corpus = load_corpus(token_file)
    large = torch.cat([batch(corpus, 0, step, 8, 16) for step in range(3)])
    small = torch.cat([batch(corpus, 0, step, 2, 16) for step in range(12)])
    assert torch.equal(large, small)


def test_validation_windows_are_distinct_and_bounded(token_file: Path) -> None:
    corpus = load_corpus(token_file)  # 200 validation tokens: 12 windows of 16
    assert [len(b) for b in validation_batches(corpus, 100, 5, 16)] == [5, 5]
    assert [len(b) for b in validation_batches(corpus, 100, 20, 16)] == [12]
    assert len(torch.cat(validation_batches(corpus, 3, 4, 16)).unique(dim=0)) == 12
    assert [len(b) for b in validation_batches(corpus, 1, 5, 16)] == [5]


def test_texts_shorter_than_a_sequence(token_file: Path) -> None:
    corpus = load_corpus(token_file)
    with pytest.raises(ArgumentError, match="n_tokens=3800 is too long for a text of 3800 tokens"):
        batch(corpus, 0, 0, 1, 3800)
    with pytest.raises(ArgumentError, match="n_tokens=200 is too long for a text of 200 tokens"):
        validation_batches(corpus, 1, 1, 200)
