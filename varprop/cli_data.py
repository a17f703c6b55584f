"""`varprop data tokenize`: text files to a corpus directory."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from varprop import corpus
from varprop.cli_arguments import path
from varprop.corpus.build import DOCUMENT_END, VALIDATION_FRACTION

DESCRIPTION = """\
Tokenize text files into a corpus directory: train and validation token ids, manifest.json, tokenizer.json.
varprop train --config corpus=DIR trains on it.
"""


def add(parser: argparse.ArgumentParser) -> None:
    """The command and its arguments."""
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="tokenize")
    one = commands.add_parser("tokenize", help="Tokenize text files.", description=DESCRIPTION)
    inputs = ".txt or .jsonl (also .gz, .xz), or .parquet (needs varprop[parquet])"
    one.add_argument("inputs", nargs="+", metavar="INPUT", help=inputs)
    one.add_argument(
        "--tokenizer", type=path, required=True, metavar="FILE", help="a tokenizer.json of Hugging Face tokenizers"
    )
    one.add_argument("--out", type=path, required=True, metavar="DIR", help="the corpus directory, a new one")
    one.add_argument("--field", default="text", help="text in .jsonl and .parquet (default %(default)s)")
    held_out = one.add_mutually_exclusive_group()
    fraction = "documents held out, chosen by a hash of their text (default %(default)s)"
    held_out.add_argument("--validation-fraction", type=float, default=VALIDATION_FRACTION, metavar="x", help=fraction)
    held_out.add_argument("--validation", nargs="+", default=[], metavar="FILE", help="files held out instead")
    end = "token that ends a document; in a text, it separates documents (default %(default)s)"
    one.add_argument("--document-end", default=DOCUMENT_END, metavar="TOKEN", help=end)
    one.add_argument("--n-workers", type=int, default=1, metavar="N", help="processes (default %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Tokenize and print what there is; return the exit code."""
    with _terminated_as_interrupted(), _progress_bar() as progress:
        manifest = corpus.tokenize(
            arguments.inputs,
            arguments.tokenizer,
            arguments.out,
            field=arguments.field,
            validation_fraction=arguments.validation_fraction,
            validation=arguments.validation,
            document_end=arguments.document_end,
            n_workers=arguments.n_workers,
            progress=progress,
        )
    for part in ("train", "validation"):
        entry = manifest[part]
        per_token = entry["bytes_of_text"] / entry["tokens"]
        print(f"{part}: {entry['tokens']:,} tokens of {entry['documents']:,} documents, {per_token:.3f} bytes a token")
    print(f"wrote {arguments.out}")
    return 0


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """A request to end (SIGTERM) is an interrupt, which leaves nothing half written."""

    def interrupt(*_: Any) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _progress_bar() -> Iterator[Callable[[int, int], None] | None]:
    """A function (bytes read, all bytes) that moves a bar on stderr; None where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    columns = (TextColumn("tokenizing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("tokenizing", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
