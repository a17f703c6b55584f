"""The batch of a step as a pure function of (seed, step). Legend: B sequences in a batch, T tokens of a sequence."""

from __future__ import annotations

import collections
import contextlib
import itertools
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from varprop.corpus import Corpus, n_windows, window_starts, windows
from varprop.errors import ArgumentError, require

ALL_ROWS = slice(None)


def batch(
    corpus: Corpus,
    seed: int,
    step: int,
    batch_size: int,
    n_tokens: int,
    device: str | torch.device = "cpu",
    rows: slice = ALL_ROWS,
) -> torch.Tensor:
    """The training batch of a global step, or some rows of it: token ids (B, T + 1), int64.

    Inputs are `[:, :-1]`, targets `[:, 1:]`. Each epoch visits every window of the training text once, in an order
    drawn from (seed, epoch); sequence b of a step is number `step * batch_size + b` of that order, so that neither the
    number of processes nor the micro-batches change what a step sees.

    batch_size: B of the whole batch, over all processes. rows: the part of this process. On CUDA the copy is
    asynchronous, from pinned memory. Raises `ArgumentError` if the text is shorter than one sequence.
    """
    return _on_device(_batch(corpus, seed, step, batch_size, n_tokens, torch.device(device), rows), device)


@contextlib.contextmanager
def batches(
    corpus: Corpus,
    seed: int,
    batch_size: int,
    n_tokens: int,
    *,
    first_step: int = 0,
    device: str | torch.device = "cpu",
    rows: slice = ALL_ROWS,
    n_ahead: int = 2,
) -> Iterator[Iterator[torch.Tensor]]:
    """A context that gives `batch(...)` of the steps first_step, first_step + 1, ... without end.

    Tokens are read, and copied to pinned memory where the device is a GPU, in one background thread, `n_ahead` steps
    before they are asked for; the asynchronous copy to the device is made when they are. Other arguments and errors:
    as of `batch`. An error of a step is raised when that step is asked for.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())  # of this thread: the other one starts with GPU 0
    with ThreadPoolExecutor(1, initializer=_use_device, initargs=(device,)) as thread:
        ready: collections.deque[Future[torch.Tensor]] = collections.deque()

        def stream() -> Iterator[torch.Tensor]:
            for step in itertools.count(first_step):
                ready.append(thread.submit(_batch, corpus, seed, step, batch_size, n_tokens, device, rows))
                if len(ready) > n_ahead:
                    yield _on_device(ready.popleft().result(), device)

        try:
            yield stream()
        finally:
            thread.shutdown(cancel_futures=True)


def document_ids(tokens: torch.Tensor, document_end: int | None) -> torch.Tensor:
    """The document of each token, counted from 0 in each row: (B, T), int32. The end token is of the one it ends.

    tokens: (B, T). document_end: `Corpus.document_end`; None raises `ArgumentError`. Computed on the tokens' device.

    >>> document_ids(torch.tensor([[5, 0, 6, 0, 0, 7]]), 0).tolist()
    [[0, 0, 1, 1, 2, 3]]
    """
    known = document_end is not None
    require(known, ArgumentError, "document_end", document_end, "not known", "a corpus that says what ends a document")
    ends = tokens == document_end
    return ends.cumsum(1, dtype=torch.int32) - ends.int()


def evaluation_windows(corpus: Corpus, n_sequences: int, length: int) -> np.ndarray:
    """Token ids (n, length + 1), int64, of whole windows spread evenly over the validation text: always the same.

    n is n_sequences, or all windows of a text that has fewer. Raises `ArgumentError` if it has none.

    >>> from varprop.corpus import load_corpus
    >>> evaluation_windows(load_corpus(), 3, 128).shape
    (3, 129)
    """
    size = n_windows(corpus.validation, length)
    count = min(size, n_sequences)
    return windows(corpus.validation, [number * size // count * length for number in range(count)], length + 1)


def mean_bytes(corpus: Corpus, ids: np.ndarray) -> float | None:
    """Bytes of text per token of `ids`; the mean of the validation text where the bytes of an id are not known.

    None where that is not known either.

    >>> from varprop.corpus import load_corpus
    >>> corpus = load_corpus()
    >>> mean_bytes(corpus, corpus.validation) == corpus.bytes_per_token
    True
    """
    return corpus.bytes_per_token if corpus.token_bytes is None else float(corpus.token_bytes[ids].mean())


def _batch(
    corpus: Corpus, seed: int, step: int, batch_size: int, n_tokens: int, device: torch.device, rows: slice
) -> torch.Tensor:
    """The rows of a batch in memory that `device` can copy from while the processor goes on."""
    numbers = range(step * batch_size, (step + 1) * batch_size)[rows]
    ids = torch.from_numpy(windows(corpus.train, window_starts(corpus.train, n_tokens, seed, numbers), n_tokens + 1))
    return ids.pin_memory() if device.type == "cuda" else ids


def _on_device(rows: torch.Tensor, device: str | torch.device) -> torch.Tensor:
    return rows.to(device, non_blocking=True)


def _use_device(device: torch.device) -> None:
    """Pinning memory in a new thread would otherwise start a context on the first GPU."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
