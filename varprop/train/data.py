"""The batch of a step as a pure function of (seed, step). Legend: B sequences in a batch, T tokens of a sequence."""

from __future__ import annotations

import numpy as np
import torch

from varprop.corpus import Corpus, n_windows, window_starts, windows


def batch(
    corpus: Corpus, seed: int, step: int, batch_size: int, n_tokens: int, device: str | torch.device = "cpu"
) -> torch.Tensor:
    """The training batch of a global step: token ids (B, T + 1), int64; inputs `[:, :-1]`, targets `[:, 1:]`.

    Each epoch visits every window of the training text once, in an order drawn from (seed, epoch); sequence b of a
    step is number `step * batch_size + b` of that order, whatever the number of workers. On CUDA the copy is
    asynchronous. Raises `ArgumentError` if the text is shorter than one sequence.
    """
    numbers = range(step * batch_size, (step + 1) * batch_size)
    starts = window_starts(corpus.train, n_tokens, seed, numbers)
    return _on_device(windows(corpus.train, starts, n_tokens + 1), device)


def validation_batches(
    corpus: Corpus, n_batches: int, batch_size: int, n_tokens: int, device: str | torch.device = "cpu"
) -> list[torch.Tensor]:
    """Up to `n_batches` batches of windows spread evenly over the validation text, the same at every step.

    All batches have `batch_size` rows; a text with fewer windows gives one smaller batch of them all.
    """
    size = n_windows(corpus.validation, n_tokens)
    count = min(size, n_batches * batch_size)
    count -= count % batch_size if count > batch_size else 0
    starts = [number * size // count * n_tokens for number in range(count)]
    rows = [starts[row : row + batch_size] for row in range(0, count, batch_size)]
    return [_on_device(windows(corpus.validation, row, n_tokens + 1), device) for row in rows]


def _on_device(ids: np.ndarray, device: str | torch.device) -> torch.Tensor:
    rows = torch.from_numpy(ids)
    if torch.device(device).type == "cuda":
        return rows.pin_memory().to(device, non_blocking=True)
    return rows.to(device)
