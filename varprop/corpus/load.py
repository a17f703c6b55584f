"""`load_corpus`: the embedded text, the prepared corpora, tokenised directories and plain token files."""

from __future__ import annotations

import functools
import hashlib
import json
import lzma
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from varprop.corpus.cache import cached, sha256_of_file
from varprop.corpus.directory import load_directory
from varprop.corpus.encode import load_tokenizer, token_bytes
from varprop.corpus.tokens import Corpus, memory_map, require_ids_below
from varprop.errors import ArgumentError, require

ASSETS = Path(__file__).resolve().parent.parent / "assets"
TOKENIZER = ASSETS / "bpe8192.json"
"""Of the text in the package and of the prepared corpora."""
DOCUMENT_END = "<|endoftext|>"
HELD_OUT_NOVEL = "Persuasion"
"""The novel of the embedded text that is held out for validation (9 % of its tokens)."""
HELD_OUT_FRACTION = 1 / 20
"""Share of a plain token file, at its end, that is held out for validation."""
CORPORA = ("docs", "books")
"""Corpora read from a corpus directory."""


def load_corpus(name_or_path: str | Path = "embedded", corpus_dir: str | Path | None = None) -> Corpus:
    """The corpus `embedded`, `docs` or `books`, a directory of `varprop data tokenize`, or a plain token file.

    `embedded` lies in the package: six novels of Jane Austen and Moby Dick, 1.3 million tokens; `Persuasion` is the
    validation text. `docs` and `books` are read from `corpus_dir`, or the directory named by the environment variable
    VARPROP_CORPUS: `<name>.train.u16.xz`, `<name>.val.u16.xz` and `manifest.json` with their token counts and hashes.
    Another directory is one of `varprop data tokenize`, checked as `directory.load_directory` says. A path ending in
    `.u16` or `.u32` is a file of token ids; its last twentieth is the validation text.

    Unpacked files are kept in the user's cache directory and checked by hash on every load. Raises `ArgumentError` for
    an unknown name, a missing directory, a truncated or damaged file, and a token id beyond the vocabulary.

    >>> corpus = load_corpus()
    >>> len(corpus.train), len(corpus.validation), corpus.vocab_size
    (1221519, 114792, 8192)
    """
    name = str(name_or_path)
    if name == "embedded":
        return _embedded()
    if name in CORPORA:
        return _from_directory(name, corpus_dir or os.environ.get("VARPROP_CORPUS") or None)
    if name.endswith((".u16", ".u32")):
        return _from_file(Path(name_or_path))
    if Path(name_or_path).is_dir():
        return load_directory(Path(name_or_path))
    known = ", ".join(("embedded", *CORPORA))
    expected = f"one of {known}, a corpus directory, or a path ending in .u16 or .u32"
    raise ArgumentError(f"corpus={name!r} is unknown; expected {expected}")


def embedded_text(part: str = "validation") -> str:
    """The text of a part of the embedded corpus, for other tokenizers than its own: `train` or `validation`.

    >>> embedded_text().strip()[:27].split()
    ['Persuasion', 'by', 'Jane', 'Austen']
    """
    return DOCUMENT_END.join(_documents(ASSETS)[part])


def require_same_tokenizer(tokenizer: Tokenizer, corpus: Corpus) -> None:
    """`ArgumentError` unless the corpus is known to have the same vocabulary, or its tokenizer is not known.

    The ids of a text mean nothing to a model of another tokenizer.
    """
    same = corpus.tokenizer is None or load_tokenizer(corpus.tokenizer).get_vocab() == tokenizer.get_vocab()
    wrong, expected = "of another tokenizer than the model", "a text of the model's tokenizer"
    require(same, ArgumentError, "text", corpus.name, wrong, expected)


# Sources --------------------------------------------------------------------------------------------------------------


def _embedded() -> Corpus:
    builds = {
        f"embedded.{part}.u16": functools.partial(_embedded_tokens, ASSETS, part) for part in ("train", "validation")
    }
    return _tokenised("embedded", ASSETS, builds)


def _embedded_tokens(folder: Path, part: str) -> bytes:
    return _tokenise(folder)[part]


@functools.cache
def _tokenise(folder: Path) -> dict[str, bytes]:
    """Token bytes of the two parts of the embedded text, documents in file order, each followed by token 0."""
    tokenizer = _tokenizer()
    parts: dict[str, bytes] = {}
    for part, documents in _documents(folder).items():
        # One at a time: a batch starts threads, which warn when a user forks.
        ids = [[*tokenizer.encode(document).ids, _document_end()] for document in documents]
        parts[part] = np.concatenate([np.array(of_one, dtype="<u2") for of_one in ids]).tobytes()
    return parts


def _documents(folder: Path) -> dict[str, list[str]]:
    """The documents of the two parts of the embedded text, in file order."""
    parts: dict[str, list[str]] = {"train": [], "validation": []}
    for document in _unpack(folder / "embedded.txt.xz").decode().split(DOCUMENT_END):
        parts["validation" if document.lstrip().startswith(HELD_OUT_NOVEL) else "train"].append(document)
    return parts


def _from_directory(name: str, corpus_dir: str | Path | None) -> Corpus:
    if corpus_dir is None:
        raise ArgumentError(f"corpus={name!r} is not in the package; expected corpus_dir, or VARPROP_CORPUS to be set")
    folder = Path(corpus_dir)
    require(folder.is_dir(), ArgumentError, "corpus_dir", str(corpus_dir), "missing", "a directory of token files")
    files = [f"{name}.{part}.u16.xz" for part in ("train", "val")]
    return _tokenised(name, folder, {file: functools.partial(_unpack, folder / file) for file in files})


def _tokenised(name: str, folder: Path, builds: Mapping[str, Callable[[], bytes]]) -> Corpus:
    """A corpus of our tokeniser from the builders of its training and its validation file, named as in the manifest."""
    manifest = _manifest(folder)
    hashes = [_entry(manifest, file, folder) for file in builds]
    paths = [
        cached(file.removesuffix(".xz"), sha256, build)
        for (file, build), sha256 in zip(builds.items(), hashes, strict=True)
    ]
    train, validation = (memory_map(path, "<u2") for path in paths)
    lengths = _token_bytes()
    for path, tokens in zip(paths, (train, validation), strict=True):
        require_ids_below(len(lengths), tokens, str(path))
    bytes_per_token = float(lengths[validation].mean())
    sha256 = hashlib.sha256("".join(hashes).encode()).hexdigest()
    return Corpus(train, validation, len(lengths), bytes_per_token, name, sha256, _document_end(), TOKENIZER, lengths)


def _from_file(path: Path) -> Corpus:
    require(path.is_file(), ArgumentError, "corpus", str(path), "missing", "a file of token ids")
    tokens = memory_map(path, "<u2" if path.suffix == ".u16" else "<u4")
    held_out = int(len(tokens) * HELD_OUT_FRACTION)
    train, validation = tokens[: len(tokens) - held_out], tokens[len(tokens) - held_out :]
    return Corpus(train, validation, int(tokens.max()) + 1, None, path.name, sha256_of_file(path), None)


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        raise ArgumentError(f"corpus manifest={str(path)!r} is missing or broken; expected a JSON object") from None


def _entry(manifest: Mapping[str, Any], file: str, folder: Path) -> str:
    """The hash of the unpacked bytes of `file` in a manifest."""
    try:
        return str(manifest[file]["sha256_of_u16"])
    except (KeyError, TypeError):
        raise ArgumentError(
            f"corpus manifest={str(folder / 'manifest.json')!r} has no hash of {file}; expected 'sha256_of_u16' there"
        ) from None


def _unpack(path: Path) -> bytes:
    try:
        return lzma.decompress(path.read_bytes())
    except (OSError, EOFError, lzma.LZMAError):
        raise ArgumentError(f"corpus file={str(path)!r} is missing or truncated; expected a whole xz file") from None


@functools.cache
def _tokenizer() -> Tokenizer:
    return load_tokenizer(TOKENIZER)


@functools.cache
def _document_end() -> int:
    return _tokenizer().get_vocab()[DOCUMENT_END]


@functools.cache
def _token_bytes() -> np.ndarray:
    """Of our tokenizer, which is byte-level."""
    lengths = token_bytes(_tokenizer(), _document_end())
    assert lengths is not None
    return lengths
