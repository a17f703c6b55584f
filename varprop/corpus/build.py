"""`tokenize`: a corpus directory (`directory.py`) from text files and any Hugging Face tokenizer file."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from varprop.corpus.cache import sha256_of_file
from varprop.corpus.directory import FORMAT, MANIFEST, PARTS, SUFFIXES, TOKENIZER, little_endian, read_manifest
from varprop.corpus.documents import kind_of, read_documents
from varprop.corpus.encode import Chunk, Encoding, Part, encode_all, load_tokenizer
from varprop.errors import ArgumentError, require
from varprop.files import replacing_folder
from varprop.locks import claim

DOCUMENT_END = "<|endoftext|>"
VALIDATION_FRACTION = 0.01
CHUNK_CHARACTERS = 2**20
"""A process is handed documents of at least this many characters at a time."""
LOCK = "lock"
"""In an unfinished folder: held by the process that writes it."""
Progress = Callable[[int, int], None]


def tokenize(
    inputs: Sequence[str | Path],
    tokenizer: str | Path,
    out: str | Path,
    *,
    field: str = "text",
    validation_fraction: float = VALIDATION_FRACTION,
    validation: Sequence[str | Path] = (),
    document_end: str = DOCUMENT_END,
    n_workers: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Tokenize text files into the corpus directory `out`, which `load_corpus` reads; return its manifest.

    The ids of each document are those of `Tokenizer.encode(text, add_special_tokens=False)`, not truncated, and the id
    of `document_end` behind them. Documents keep their order however many processes work. The ids are uint16 where the
    vocabulary ends below 65,536, else uint32.

    inputs: files, at least one (`documents.read_documents` says which). tokenizer: a `tokenizer.json`. field: of .jsonl
    and .parquet. validation: files that are held out; without them a document is held out by the hash of its text,
    with probability `validation_fraction` in (0, 1) (`encode.is_held_out`). document_end: a token of the vocabulary;
    where a text contains it, a document ends. n_workers: processes. progress: called with the bytes of the files read
    so far and their sum.

    The directory is written under another name and renamed when it is whole; only a kill -9 leaves something, a folder
    `.NAME.*.part` beside it, which the next call for the same directory removes. One that already holds this very
    corpus is left as it is; anything else at `out` raises `ArgumentError`, as do bad input and a part without a
    document. Memory does not grow with the files, only with the longest document.
    Checked by: tests/corpus/test_build.py.
    """
    require(len(inputs) > 0, ArgumentError, "inputs", [], "empty", "at least one file")
    whole = isinstance(n_workers, int) and not isinstance(n_workers, bool) and n_workers >= 1
    require(whole, ArgumentError, "n_workers", n_workers, "outside the domain", "an integer >= 1")
    inside = bool(validation) or (isinstance(validation_fraction, float) and 0 < validation_fraction < 1)
    require(inside, ArgumentError, "validation_fraction", validation_fraction, "outside the domain", "between 0 and 1")
    fraction = 0.0 if validation else validation_fraction
    made_from = {
        "inputs": [_identity(Path(path)) for path in inputs],
        "validation_inputs": [_identity(Path(path)) for path in validation],
        "validation_fraction": fraction,
        "field": field,
        "document_end": document_end,
    }
    rules = load_tokenizer(tokenizer)
    made_from["tokenizer_sha256"] = sha256_of_file(Path(tokenizer))
    manifest = _already_there(Path(out), made_from)
    if manifest is not None:
        return manifest
    vocab_size = 1 + max(rules.get_vocab().values())
    dtype = "uint16" if vocab_size <= 2**16 else "uint32"
    end = _end_id(rules, document_end, tokenizer)
    files = [*((Path(path), fraction) for path in inputs), *((Path(path), 1.0) for path in validation)]
    chunks = _chunks(files, field, document_end, progress or (lambda done, total: None))
    _remove_abandoned(Path(out).resolve())
    with contextlib.ExitStack() as held, replacing_folder(out) as folder:  # held until the folder has its name
        with contextlib.suppress(ArgumentError):  # a file system without locks: nothing abandoned is removed there
            held.enter_context(claim(folder.parent / LOCK))
        folder.mkdir()
        shutil.copyfile(tokenizer, folder / TOKENIZER)
        encoding = Encoding(str((folder / TOKENIZER).resolve()), end, little_endian(dtype))
        parts = _write(folder, dtype, encode_all(chunks, encoding, n_workers))
        _require_documents(parts, fraction)
        manifest = {
            **{"format": FORMAT, "dtype": dtype, "vocab_size": vocab_size, "document_end": end},
            **parts,
            **{"made_from": made_from, "tokenizers_version": tokenizers.__version__},
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def _remove_abandoned(target: Path) -> None:
    """Remove the unfinished folders of `target` that no process writes: each holds a lock as long as it does."""
    for lock in target.parent.glob(f".{glob.escape(target.name)}.*.part/{LOCK}"):
        with contextlib.suppress(ArgumentError), claim(lock) as abandoned:
            if abandoned:
                shutil.rmtree(lock.parent, ignore_errors=True)


def _identity(path: Path) -> dict[str, Any]:
    """What says which file this is, wherever it lies."""
    kind_of(path)
    require(path.is_file(), ArgumentError, "input", str(path), "missing, or no file", "a file")
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of_file(path)}


def _already_there(folder: Path, made_from: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of the corpus at `folder` if it is this one, None if there is nothing; else `ArgumentError`."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    manifest = {}
    with contextlib.suppress(ArgumentError):
        manifest = read_manifest(folder)
    same = manifest.get("made_from") == made_from
    wrong = "there already, and not from these inputs and options"
    require(same, ArgumentError, "out", str(folder), wrong, "a new name, or an empty directory")
    return manifest


def _end_id(rules: tokenizers.Tokenizer, token: str, tokenizer: str | Path) -> int:
    vocabulary = rules.get_vocab()
    special = ", ".join(each.content for each in list(rules.get_added_tokens_decoder().values())[:8])
    expected = f"one of its tokens{', as ' if special else ''}{special}"
    wrong = f"not in the vocabulary of {str(tokenizer)!r}"
    require(token in vocabulary, ArgumentError, "document_end", token, wrong, expected)
    return vocabulary[token]


def _chunks(files: Sequence[tuple[Path, float]], field: str, document_end: str, progress: Progress) -> Iterator[Chunk]:
    """The documents of all files, in their order; a chunk is of one file."""
    sizes = [path.stat().st_size for path, _ in files]
    for index, (path, held_out) in enumerate(files):
        documents, characters = [], 0
        for document, position in read_documents(path, field, document_end):
            documents.append(document)
            characters += len(document)
            if characters >= CHUNK_CHARACTERS:
                yield Chunk(documents, held_out)
                documents, characters = [], 0
                progress(sum(sizes[:index]) + position, sum(sizes))
        yield Chunk(documents, held_out)
        progress(sum(sizes[: index + 1]), sum(sizes))


def _write(folder: Path, dtype: str, encoded: Iterator[tuple[Part, Part]]) -> dict[str, dict[str, Any]]:
    """Write the token files; the manifest's entries of the parts."""
    totals, hashes = [Part(), Part()], [hashlib.sha256(), hashlib.sha256()]
    paths = [folder / f"{part}{SUFFIXES[dtype]}" for part in PARTS]
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(path.open("wb")) for path in paths]
        for pair in encoded:
            for part, stream, digest, total in zip(pair, streams, hashes, totals, strict=True):
                stream.write(part.tokens)
                digest.update(part.tokens)
                total.documents += part.documents
                total.bytes_of_text += part.bytes_of_text
    return {
        part: {
            "tokens": path.stat().st_size // np.dtype(dtype).itemsize,
            "documents": total.documents,
            "bytes_of_text": total.bytes_of_text,
            "sha256": digest.hexdigest(),
        }
        for part, path, total, digest in zip(PARTS, paths, totals, hashes, strict=True)
    }


def _require_documents(parts: dict[str, dict[str, Any]], fraction: float) -> None:
    """Both parts must have a document. fraction: of documents held out by hash, 0 where files are held out."""
    n_documents = sum(parts[part]["documents"] for part in PARTS)
    for part, option, wrong in (("train", "inputs", "too large"), ("validation", "validation", "too small")):
        if parts[part]["documents"] == 0:
            if fraction == 0 or n_documents == 0:
                raise ArgumentError(f"{option} files are without a document; expected some text")
            raise ArgumentError(
                f"validation_fraction={fraction} is {wrong} for {n_documents} documents ({part} has none); expected"
                " another fraction, or files of validation text"
            )
