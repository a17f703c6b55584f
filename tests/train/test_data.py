"""Batches: which tokens a step sees."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from varprop.corpus import load_corpus, n_windows
from varprop.errors import ArgumentError
from varprop.train import data
from varprop.train.data import batch, batches, document_ids, evaluation_windows


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


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_ranks_and_micro_batches_share_out_the_batch_of_one(token_file: Path, world_size: int) -> None:
    corpus = load_corpus(token_file)
    whole = batch(corpus, 1, 5, 24, 16)
    share = 24 // world_size
    for micro in (share, 1):
        starts = range(0, 24, micro)
        parts = [batch(corpus, 1, 5, 24, 16, rows=slice(start, start + micro)) for start in starts]
        assert torch.equal(torch.cat(parts), whole)


def test_prefetched_batches_are_the_batches(token_file: Path) -> None:
    corpus = load_corpus(token_file)
    rows = slice(2, 6)
    for n_ahead in (0, 1, 3):
        with batches(corpus, 3, 8, 16, first_step=4, rows=rows, n_ahead=n_ahead) as stream:
            for step in range(4, 40):  # more than one epoch of 237 windows
                assert torch.equal(next(stream), batch(corpus, 3, step, 8, 16, rows=rows))


def test_batches_are_prepared_before_they_are_asked_for(token_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = [threading.Event() for _ in range(4)]
    here = threading.get_ident()
    prepare = data._batch

    def watched(corpus, seed, step, *others):
        assert threading.get_ident() != here
        read[step].set()
        return prepare(corpus, seed, step, *others)

    monkeypatch.setattr(data, "_batch", watched)
    with batches(load_corpus(token_file), 0, 4, 16, n_ahead=2) as stream:
        assert not read[0].is_set()
        next(stream)
        assert read[2].wait(10)  # two ahead, and no more
        assert not read[3].wait(0.05)


def test_the_thread_ends_with_the_context_and_its_errors_are_raised(token_file: Path) -> None:
    before = threading.active_count()
    with (
        pytest.raises(ArgumentError, match="n_tokens=3800 is too long for a text of 3800 tokens"),
        batches(load_corpus(token_file), 0, 1, 3800) as stream,
    ):
        next(stream)
    assert threading.active_count() == before


def test_global_random_numbers_are_left_alone(token_file: Path) -> None:
    torch.manual_seed(0)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
    with batches(load_corpus(token_file), 0, 4, 16) as stream:
        next(stream)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


def test_documents_are_counted_by_a_loop_too() -> None:
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 4, (5, 40)))
    tokens[0, :2] = 3
    ids = document_ids(tokens, 3)
    assert ids.dtype == torch.int32
    for row, found in zip(tokens.tolist(), ids.tolist(), strict=True):
        document = 0
        for token, number in zip(row, found, strict=True):
            assert number == document
            document += token == 3
    with pytest.raises(ArgumentError, match="document_end=None is not known"):
        document_ids(tokens, None)


def test_evaluation_windows_are_whole_distinct_and_spread_over_the_text(tmp_path: Path) -> None:
    path = tmp_path / "count.u32"
    np.arange(20_000, dtype="<u4").tofile(path)  # the last 1,000 are held out
    corpus = load_corpus(path)
    for length, n_sequences, expected in ((16, 1000, 62), (16, 10, 10), (7, 5, 5), (999, 3, 1)):
        found = evaluation_windows(corpus, n_sequences, length)
        assert found.dtype == np.int64
        assert found.shape == (expected, length + 1)
        assert np.array_equal(found, found[:, :1] + np.arange(length + 1))
        starts = found[:, 0] - 19_000
        gaps = np.diff(starts)
        assert starts[0] == 0
        assert (gaps >= length).all()
        assert len(gaps) == 0 or gaps.max() - gaps.min() <= length  # even, to one window
        assert starts[-1] + length < 1000


def test_texts_shorter_than_a_sequence(token_file: Path) -> None:
    corpus = load_corpus(token_file)
    with pytest.raises(ArgumentError, match="n_tokens=3800 is too long for a text of 3800 tokens"):
        batch(corpus, 0, 0, 1, 3800)
    with pytest.raises(ArgumentError, match="n_tokens=200 is too long for a text of 200 tokens"):
        evaluation_windows(corpus, 1, 200)


@pytest.mark.gpu
def test_prefetched_batches_on_a_gpu(token_file: Path) -> None:
    corpus = load_corpus(token_file)
    with batches(corpus, 0, 8, 16, device="cuda") as stream:
        for step in range(20):
            found = next(stream)
            assert found.device.type == "cuda"
            assert torch.equal(found.cpu(), batch(corpus, 0, step, 8, 16))
