"""Documents of text files, one after another: plain text, JSON lines and parquet."""

from __future__ import annotations

import codecs
import gzip
import importlib
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NoReturn

from varprop.errors import ArgumentError, require

KINDS = (".txt", ".jsonl", ".parquet")
"""Name endings of what can be read; the first two also with .gz or .xz behind them."""
BLOCK_BYTES = 2**20
BATCH_ROWS = 256


def read_documents(path: Path, field: str, separator: str) -> Iterator[tuple[str, int]]:
    """Documents of a file in its order, each with the bytes of the file that have been read so far.

    `.txt`: the whole text; `.jsonl`: the string `field` of each line; `.parquet`: of each row. A text that contains
    `separator` is several documents; one that is white space alone is none. A byte-order mark of UTF-8 is not text.
    Only one document, block of 1 MiB or batch of 256 rows is held in memory.

    Raises `ArgumentError`, one line that names the file and the line or row, for what is not of its kind.
    """
    readers = {".txt": _plain, ".jsonl": _json_lines, ".parquet": _parquet}
    read = readers[kind_of(path)]
    try:
        with path.open("rb") as raw:
            rest = ""
            for text, ends in read(path, raw, field):
                *whole, rest = (rest + text).split(separator)
                for document in [*whole, rest] if ends else whole:
                    if not document.isspace() and document != "":
                        yield document, raw.tell()
                rest = "" if ends else rest
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile):
        _refuse(path, "truncated or damaged", "a whole compressed file")
    except OSError as error:
        _refuse(path, f"not readable ({error.strerror or error})", "a file that can be read")


def kind_of(path: Path) -> str:
    """The kind of a file by its name, one of `KINDS`; `ArgumentError` for any other name."""
    packed = path.suffix in (".gz", ".xz")
    kind = Path(path.stem).suffix if packed else path.suffix
    known = kind in KINDS and not (packed and kind == ".parquet")
    require(known, ArgumentError, "input", str(path), "of an unknown kind", ".txt or .jsonl (.gz, .xz), or .parquet")
    return kind


def _refuse(path: Path, wrong: str, expected: str) -> NoReturn:
    raise ArgumentError(f"input={str(path)!r} is {wrong}; expected {expected}") from None


def _unpacked(path: Path, raw: IO[bytes]) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    return lzma.LZMAFile(raw) if path.suffix == ".xz" else raw  # type: ignore[return-value]


def _plain(path: Path, raw: IO[bytes], field: str) -> Iterator[tuple[str, bool]]:
    """Blocks of text, and whether a document ends with them: with the last, which is empty."""
    decoder, start = codecs.getincrementaldecoder("utf-8-sig")(), 0
    stream = _unpacked(path, raw)
    while block := stream.read(BLOCK_BYTES):
        try:
            text = decoder.decode(block)
        except UnicodeDecodeError as error:
            _refuse(path, f"not UTF-8 (near byte {start + error.start})", "UTF-8 text")
        start += len(block)
        yield text, False
    try:
        yield decoder.decode(b"", final=True), True
    except UnicodeDecodeError:
        _refuse(path, f"not UTF-8 (cut off at byte {start})", "UTF-8 text")


def _json_lines(path: Path, raw: IO[bytes], field: str) -> Iterator[tuple[str, bool]]:
    expected = f"a JSON object with a string {field!r} in each line"
    for number, line in enumerate(_unpacked(path, raw), start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            _refuse(path, f"not UTF-8 in line {number}", "UTF-8 text")
        if text.isspace():
            continue
        try:
            entry = json.loads(text)
        except (ValueError, RecursionError):
            _refuse(path, f"not JSON in line {number}", expected)
        if not isinstance(entry, dict) or not isinstance(entry.get(field), str):
            _refuse(path, f"without a string {field!r} in line {number}", f"{expected}, or another field")
        try:
            entry[field].encode()
        except UnicodeEncodeError:
            _refuse(path, f"not text in line {number} (half a surrogate pair)", expected)
        yield entry[field], True


def _parquet(path: Path, raw: IO[bytes], field: str) -> Iterator[tuple[str, bool]]:
    try:
        arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError:
        _refuse(path, "parquet, and pyarrow is not installed", "varprop[parquet]")
    try:
        table = parquet.ParquetFile(raw)
        columns = table.schema_arrow.names
        if field not in columns:
            _refuse(path, f"without a column {field!r}", f"one of its columns {', '.join(columns)}")
        rows = (row for batch in table.iter_batches(BATCH_ROWS, columns=[field]) for row in batch[0].to_pylist())
        for number, text in enumerate(rows):
            if not isinstance(text, str):
                _refuse(path, f"without a string {field!r} in row {number}", "a column of strings")
            yield text, True
    except arrow.ArrowException as error:
        _refuse(path, f"damaged, or no parquet file ({str(error).splitlines()[0]})", "a parquet file")
