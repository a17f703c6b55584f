"""Corpus directories, as `varprop data tokenize` writes them.

train and validation, each .u16 or .u32: little-endian token ids. tokenizer.json: the tokenizer. manifest.json: `dtype`,
`vocab_size`, `document_end` (an id); for each part `tokens`, `documents`, `bytes_of_text` and `sha256`; `made_from`:
names, sizes and hashes of the inputs, the hash of the tokenizer (`tokenizer_sha256`), the options.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from varprop.corpus.cache import once, sha256_of_file
from varprop.corpus.encode import load_tokenizer, token_bytes
from varprop.corpus.tokens import CHECKED_AT_ONCE, Corpus, memory_map, require_ids_below
from varprop.errors import ArgumentError, require

FORMAT = "varprop corpus 1"
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
PARTS = ("train", "validation")
COUNTS = ("tokens", "documents", "bytes_of_text")
SUFFIXES = {"uint16": ".u16", "uint32": ".u32"}
"""Name endings of the token files by the type of the ids."""


def little_endian(dtype: str) -> str:
    """The little-endian type as numpy writes it.

    >>> little_endian("uint16")
    '<u2'
    """
    return np.dtype(dtype).newbyteorder("<").str


def load_directory(folder: Path) -> Corpus:
    """The corpus of a directory; `ArgumentError`, one line, where its files are not as its manifest says.

    Sizes are compared at every load. Hashes and ids are checked at the first one, and again when a file or what the
    manifest says of it has changed (`cache.once`): tens of gigabytes are not read each time.
    """
    manifest = read_manifest(folder)
    tokens = [_part(folder, part, manifest) for part in PARTS]
    tokenizer = _tokenizer(folder, manifest)
    validation = manifest["validation"]
    return Corpus(
        train=tokens[0],
        validation=tokens[1],
        vocab_size=manifest["vocab_size"],
        bytes_per_token=validation["bytes_of_text"] / validation["tokens"],
        name=folder.resolve().name,
        sha256=hashlib.sha256("".join(manifest[part]["sha256"] for part in PARTS).encode()).hexdigest(),
        document_end=manifest["document_end"],
        tokenizer=tokenizer,
        token_bytes=_token_bytes(tokenizer, manifest, tokens[1]),
    )


def _tokenizer(folder: Path, manifest: dict[str, Any]) -> Path:
    path, expected = folder / TOKENIZER, manifest["made_from"]["tokenizer_sha256"]
    require(path.is_file(), ArgumentError, "corpus file", str(path), "missing", "the tokenizer of the corpus")

    def check() -> None:
        found = sha256_of_file(path)
        wrong = f"another one (sha256 {found[:16]})"
        require(found == expected, ArgumentError, "corpus file", str(path), wrong, f"sha256 {expected[:16]}")

    once(path, expected, check)
    return path


def _token_bytes(tokenizer: Path, manifest: dict[str, Any], validation: np.ndarray) -> np.ndarray | None:
    """Bytes of each id, if those of the validation text have the sum that the manifest tells of; else None.

    Another sum is that of a tokenizer which normalises the text, or adds to it.
    """
    lengths = token_bytes(load_tokenizer(tokenizer), manifest["document_end"])
    if lengths is None or len(lengths) < manifest["vocab_size"]:
        return None
    blocks = range(0, len(validation), CHECKED_AT_ONCE)
    total = sum(int(lengths[validation[start : start + CHECKED_AT_ONCE]].sum()) for start in blocks)
    return lengths if total == manifest["validation"]["bytes_of_text"] else None


def _part(folder: Path, part: str, manifest: dict[str, Any]) -> np.memmap:
    dtype, vocab_size, entry = manifest["dtype"], manifest["vocab_size"], manifest[part]
    path = folder / f"{part}{SUFFIXES[dtype]}"
    require(path.is_file(), ArgumentError, "corpus file", str(path), "missing", "the file that the manifest tells of")
    size, expected = path.stat().st_size, entry["tokens"] * np.dtype(dtype).itemsize
    wrong = f"{'truncated' if size < expected else 'too long'} ({size} bytes)"
    require(size == expected, ArgumentError, "corpus file", str(path), wrong, f"{expected} bytes, as of the manifest")
    tokens = memory_map(path, little_endian(dtype))

    def check() -> None:
        require_ids_below(vocab_size, tokens, str(path))
        found = sha256_of_file(path)
        damaged = f"damaged (sha256 {found[:16]})"
        good = found == entry["sha256"]
        require(good, ArgumentError, "corpus file", str(path), damaged, f"sha256 {entry['sha256'][:16]}")

    once(path, f"{entry['sha256']} {vocab_size}", check)
    return tokens


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a corpus directory; `ArgumentError` where it is missing, broken or of another kind."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        good = manifest["format"] == FORMAT and manifest["dtype"] in SUFFIXES
        counts = [manifest["vocab_size"], *(manifest[part][key] for part in PARTS for key in COUNTS)]
        good = good and all(type(count) is int and count > 0 for count in counts)
        good = good and type(manifest["document_end"]) is int and 0 <= manifest["document_end"] < counts[0]
        good = good and all(isinstance(manifest[part]["sha256"], str) for part in PARTS)
        good = good and isinstance(manifest["made_from"]["tokenizer_sha256"], str)
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        good, manifest = False, {}
    require(good, ArgumentError, "corpus manifest", str(path), "missing or broken", "one of varprop data tokenize")
    return manifest
