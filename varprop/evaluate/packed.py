"""Loss on held-out text cut into windows of one stated length."""

from __future__ import annotations

import math

import numpy as np
import xarray as xr

from varprop.corpus import n_windows, window_starts, windows
from varprop.errors import ArgumentError, require
from varprop.evaluate.common import dataset
from varprop.evaluate.score import score
from varprop.nn import Transformer


def packed_loss(
    model: Transformer,
    tokens: np.ndarray,
    length: int,
    *,
    text: str = "validation",
    bytes_of_text: np.ndarray | float | None = None,
    n_sequences: int | None = None,
    seed: int = 0,
) -> xr.Dataset:
    """Mean loss over non-overlapping windows of `length` tokens, each token given those before it in its window.

    tokens: ids of a held-out text, documents one after the other. length: predictions of a window; losses at different
    lengths are not comparable. text: the name of the text in the result. bytes_of_text: of each id (n_ids,), for bits
    per byte = nats / (ln 2 bytes) of the tokens predicted; or the mean of a token, which is approximate unless it is of
    those very tokens. n_sequences: so many windows, drawn by `seed`; None = all.
    Variables: loss and loss_stderr in nats per token, the windows being independent, bits_per_byte where asked for,
    loss_sequences, their number; all (text, length). Raises as `score` does, and for a text shorter than two windows.
    """
    most = n_windows(tokens, length)
    n = most if n_sequences is None else n_sequences
    require(2 <= n <= most, ArgumentError, "n_sequences", n, "outside the domain", f"an integer in 2..{most}")
    starts = window_starts(tokens, length, seed, range(n))
    rows = windows(tokens, starts, length + 1)
    sums, _ = score(model, rows, [length] * n)  # type: ignore[arg-type]
    losses = -sums / length
    dims = ("text", "length")
    mean, stderr = losses.mean(), losses.std(ddof=1) / n**0.5
    variables = {
        "loss": (dims, [[mean]]),
        "loss_stderr": (dims, [[stderr]]),
        "loss_sequences": (dims, [[n]]),
    }
    if bytes_of_text is not None:
        per_token = bytes_of_text[rows[:, 1:]].mean() if isinstance(bytes_of_text, np.ndarray) else bytes_of_text
        variables["bits_per_byte"] = (dims, [[mean / (math.log(2) * per_token)]])
    coords = {"text": [text], "length": [length]}
    return dataset(model, variables, n_tokens=length, seed=seed, coords=coords)
