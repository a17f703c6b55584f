"""`Corpus`, and token files as memory maps. Files are little-endian token ids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from varprop.errors import ArgumentError, require

CHECKED_AT_ONCE = 2**24
"""Token ids compared with the vocabulary at a time: memory does not grow with a file."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """Training and validation token ids.

    train, validation: read-only token ids (n,). vocab_size: ids are below it. bytes_per_token: bytes of text per
    validation token, None where the tokeniser is not known. sha256: of the token bytes (of a plain file), or of the
    two hexadecimal hashes of the training and validation token bytes, joined. document_end: the token behind each
    document, None where it is not known (a plain file). tokenizer: the tokenizer.json that the ids are of, None where
    it is not known. token_bytes: bytes of text that each id stands for (n_ids,), None where that is not known.
    """

    train: np.ndarray
    validation: np.ndarray
    vocab_size: int
    bytes_per_token: float | None
    name: str
    sha256: str
    document_end: int | None
    tokenizer: Path | None = None
    token_bytes: np.ndarray | None = None


def memory_map(path: Path, dtype: str) -> np.memmap:
    """The token ids of a file, read-only; `ArgumentError` if it is empty or ends within a token."""
    size, width = path.stat().st_size, np.dtype(dtype).itemsize
    whole = size > 0 and size % width == 0
    require(whole, ArgumentError, "corpus", str(path), f"truncated ({size} bytes)", f"whole tokens of {width} bytes")
    return np.memmap(path, dtype=dtype, mode="r")


def require_ids_below(vocab_size: int, tokens: np.ndarray, name: str) -> None:
    """Raise `ArgumentError`, with the first one and its position, if a token id is not below vocab_size."""
    for start in range(0, len(tokens), CHECKED_AT_ONCE):
        block = tokens[start : start + CHECKED_AT_ONCE]
        if int(block.max()) >= vocab_size:
            position = int((block >= vocab_size).argmax())
            wrong = f"wrong (token id {block[position]} at position {start + position} is beyond the vocabulary)"
            require(False, ArgumentError, "corpus", name, wrong, f"ids below {vocab_size}")
