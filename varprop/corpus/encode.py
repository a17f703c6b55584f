"""Documents to token ids in several processes, in the order of the documents."""

from __future__ import annotations

import collections
import functools
import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from varprop.errors import ArgumentError

CHUNKS_AHEAD = 4
"""Chunks of documents for each process that are read before the first of them is done."""


@dataclass(frozen=True)
class Encoding:
    """How documents become ids: path of a tokenizer file, the id behind each document, the ids' type for numpy."""

    tokenizer: str
    document_end: int
    dtype: str


@dataclass(frozen=True)
class Chunk:
    """Documents that one process encodes at a time, and the probability of each to be held out (`is_held_out`)."""

    documents: list[str]
    held_out: float


@dataclass
class Part:
    """Documents of one part of a corpus: the bytes of their token ids, their number and the bytes of their text."""

    tokens: bytes = b""
    documents: int = 0
    bytes_of_text: int = 0


def is_held_out(document: str, fraction: float) -> bool:
    """Whether the first 8 bytes of the SHA-256 of the text (UTF-8), as a number in [0, 1), are below `fraction`.

    So the same text is always on the same side, whatever else is in the corpus, and a larger fraction holds out all
    that a smaller one does.

    >>> [is_held_out("text", fraction) for fraction in (0.0, 0.5, 1.0)]
    [False, False, True]
    """
    first = int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "big")
    return first < fraction * 2**64


def encode_all(chunks: Iterable[Chunk], encoding: Encoding, n_workers: int) -> Iterator[tuple[Part, Part]]:
    """The training and the held-out part of each chunk of documents, in their order.

    One worker is this process; more are new processes (started by `spawn`: a program that calls this needs its
    `if __name__ == "__main__"`), which end with this one however it ends. Raises `ArgumentError` for a text that the
    tokenizer refuses, and where a process dies.
    """
    if n_workers == 1:
        yield from (_encode(chunk, encoding) for chunk in chunks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n_workers, context, initializer=_end_with_parent) as pool:
        waiting: collections.deque[Future[tuple[Part, Part]]] = collections.deque()
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_encode, chunk, encoding))
                if len(waiting) >= CHUNKS_AHEAD * n_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            wrong = "too many for this machine, or they were killed (a process died)"
            raise ArgumentError(f"n_workers={n_workers} is {wrong}; expected fewer, or more memory") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _encode(chunk: Chunk, encoding: Encoding) -> tuple[Part, Part]:
    tokenizer = _tokenizer_of_process(encoding.tokenizer)
    parts, ids = (Part(), Part()), ([], [])
    for document in chunk.documents:
        side = int(is_held_out(document, chunk.held_out))
        try:
            # One at a time: the library's own threads share one cache and slow each other down.
            found = tokenizer.encode(document, add_special_tokens=False).ids
        except Exception as error:  # the library raises nothing narrower
            wrong = f"refused by the tokenizer ({str(error).splitlines()[0]})"
            raise ArgumentError(f"document={document[:40]!r} is {wrong}; expected text that it can encode") from None
        ids[side].append(np.array([*found, encoding.document_end], dtype=encoding.dtype))
        parts[side].documents += 1
        parts[side].bytes_of_text += len(document.encode())
    for part, arrays in zip(parts, ids, strict=True):
        part.tokens = b"".join(map(bytes, arrays))
    return parts


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`, without the truncation and padding that many of them ask for.

    Raises `ArgumentError` for a file that is missing or not of the tokenizers library.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        reason = (str(error).splitlines() or ["unreadable"])[0]
        raise ArgumentError(
            f"tokenizer={str(path)!r} is missing or broken ({reason}); expected a tokenizer.json"
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def token_bytes(tokenizer: Tokenizer, document_end: int) -> np.ndarray | None:
    """Bytes of text that each id stands for (n_ids,), int64; None for a vocabulary that is not byte-level.

    A byte-level token is written with one printable character per byte, an added token as it stands in the text. The
    end of a document is no text. What such a tokenizer normalises or adds is not seen: compare the sum of a text.

    >>> from varprop.corpus.load import TOKENIZER
    >>> own = load_tokenizer(TOKENIZER)
    >>> int(token_bytes(own, 0)[own.encode(" naïve café").ids].sum()), len(" naïve café".encode())
    (13, 13)
    """
    words, alphabet = tokenizer.get_vocab(), set(ByteLevel.alphabet())
    added = {i: len(token.content.encode()) for i, token in tokenizer.get_added_tokens_decoder().items()}
    if not all(i in added or alphabet.issuperset(word) for word, i in words.items()):
        return None
    lengths = np.zeros(1 + max(words.values()), dtype=np.int64)
    for word, i in words.items():
        lengths[i] = added.get(i, len(word))
    lengths[document_end] = 0
    return lengths


_tokenizer_of_process = functools.lru_cache(maxsize=1)(load_tokenizer)


def _end_with_parent() -> None:
    """End this process when its parent has ended, be it by kill -9; leave an interrupt to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
