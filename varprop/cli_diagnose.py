"""`varprop diagnose`: the layer scores of a checkpoint."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xarray as xr
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from varprop import diagnose, files, plot, results
from varprop.cli_arguments import assignments, path
from varprop.diagnose.measure import chosen
from varprop.diagnose.open import mask_token_of, open_model, quiet, require_length, vocab_size_of
from varprop.diagnose.options import OPTIONS, require_options
from varprop.diagnose.precision import spot_check
from varprop.diagnose.table import table
from varprop.diagnose.text import sequences
from varprop.errors import ArgumentError, LeftOutWarning, ShortMemoryError, Stopped, VarpropError, require

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    scores = "\n".join(
        f"  {name}: {(score.__doc__ or name).splitlines()[0]}" for name, score in diagnose.SCORES.items()
    )
    others = ", ".join(f"{name}{'' if name in diagnose.SCORES else ' (this alone)'}" for name in diagnose.RELEASED)
    settings = "\n".join(
        f"  {name}={json.dumps(option.default)}: {option.meaning} ({option.domain.text})"
        for name, option in OPTIONS.items()
    )
    parser.epilog = (
        f"Scores (standard = {', '.join(diagnose.STANDARD)}):\n{scores}\n"
        f"With --definition released: {others}.\n\nSettings of --option and their defaults:\n{settings}"
    ).replace("%", "%%")
    folder = "a model folder of Hugging Face's form, or a finished run"
    parser.add_argument("model", type=path, metavar="MODEL", help=folder)
    texts = "embedded, a .txt file, token ids in a .npy file, or a corpus in the model's tokens (default %(default)s)"
    parser.add_argument("--data", type=path, default="embedded", help=texts)
    parser.add_argument("--corpus-dir", type=path, default=None, help="folder of a corpus (default $VARPROP_CORPUS)")
    parser.add_argument(
        "--scores", default="standard", help="all, standard, or names as causal,moments (default standard)"
    )
    kinds = "the paper's, mended, or as its released code computes them (default %(default)s)"
    parser.add_argument("--definition", choices=("paper", "released"), default="paper", help=kinds)
    parser.add_argument("--n-sequences", type=int, default=16, help="(default %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence (default %(default)s)")
    begin = "whether a sequence begins as a text does; auto = where the tokenizer does it itself (default %(default)s)"
    parser.add_argument("--begin", choices=("auto", "yes", "no"), default="auto", help=begin)
    parser.add_argument("--device", default="auto", help="torch device (default CUDA where there is one)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default %(default)s)")
    held = "memory beside the weights (default 2 on a CPU, 4 on a GPU)"
    parser.add_argument("--memory", type=float, default=None, metavar="GiB", help=held)
    parser.add_argument("--seed", type=int, default=0, help="of windows, probes and pairs (default %(default)s)")
    setting = "a setting of a score (repeatable), see below"
    parser.add_argument("--option", action="append", default=[], metavar="name=value", help=setting)
    parser.add_argument("--figure", type=path, default=None, metavar="FILE", help="also one page of panels: .png, .pdf")
    kept = "keep FILE.parts, what a killed command goes on from, when the result is written"
    parser.add_argument("--keep-parts", action="store_true", help=kept)
    gap = "also measure the cheap scores in float32 and bfloat16, and store how far apart they are"
    parser.add_argument("--spot-check", action="store_true", help=gap)


def run(arguments: argparse.Namespace) -> int:
    """Measure, write the result and print its table. Returns the exit code."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is loaded
    out = files.writable(arguments.out)
    figure = None if arguments.figure is None else _figure_path(arguments.figure)
    different = figure is None or figure.resolve() != out.resolve()
    require(different, ArgumentError, "figure", str(figure), "the file of the result (--out)", "another name")
    options = assignments(arguments.option, "--option")
    require_options(options)
    good = arguments.memory is None or 0 < arguments.memory < math.inf
    require(good, ArgumentError, "memory", arguments.memory, "outside the domain", "a number of GiB > 0")
    names = _names(arguments.scores)
    chosen(names, arguments.definition)
    parts = Path(f"{out}.parts")
    with quiet(), _stopping(parts):
        model, tokens = open_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
        require_length(model, arguments.length)
        batch = sequences(
            arguments.data,
            tokens,
            vocab_size=vocab_size_of(model),
            n_sequences=arguments.n_sequences,
            length=arguments.length,
            seed=arguments.seed,
            begin=arguments.begin,
            mask_token=mask_token_of(model, tokens),
            corpus_dir=arguments.corpus_dir,
        )
        about: dict[str, Any] = {"seed": arguments.seed, "memory_gib": arguments.memory, "options": options}
        with _none_left(parts), _bars() as progress:
            kept = {"parts": parts, "progress": progress, "definition": arguments.definition}
            dataset = diagnose.measure(model, batch, scores=names, **about, **kept)
            if arguments.spot_check:
                del model
                gaps = spot_check(arguments.model, batch, device=arguments.device, **about)
                dataset = dataset.assign(gaps.data_vars)
        dataset = dataset.assign_attrs(model=str(arguments.model), data=str(arguments.data), begin=arguments.begin)
        results.save(dataset, out)
    if not arguments.keep_parts:
        shutil.rmtree(parts, ignore_errors=True)
    print(table(dataset))
    print(f"wrote {out}")
    if figure is not None:
        _draw(dataset, Path(arguments.model).name, figure)
    return 0


def _draw(dataset: xr.Dataset, name: str, figure: Path) -> None:
    """The figure, or a warning where these scores have no panel: the result is written already."""
    if plot.has_panels(dataset):
        plot.plot_diagnosis({name: dataset}).savefig(figure)
        print(f"wrote {figure}")
    else:
        message = f"--figure={str(figure)!r} is not written: the scores {dataset.attrs['scores']} have no panel"
        warnings.warn(message, LeftOutWarning, stacklevel=2)


def _names(text: str) -> str | list[str]:
    names = [name.strip() for name in text.split(",")]
    return names[0] if len(names) == 1 else names


def _figure_path(text: str) -> Path:
    target = files.writable(text)
    kinds = (".png", ".pdf", ".svg")
    require(
        target.suffix in kinds, ArgumentError, "figure", text, "of an unknown kind", "a name with " + ", ".join(kinds)
    )
    return target


@contextlib.contextmanager
def _stopping(parts: Path) -> Iterator[None]:
    """A signal ends the command at once as `Stopped`: parts are written whole, the one under way is lost."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt  # which no library takes for an error of its own

    if threading.current_thread() is not threading.main_thread():  # where Python takes no signals
        yield
        return
    before = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    try:
        yield
    except KeyboardInterrupt:
        kept = f"what is done is kept in {parts}" if parts.is_dir() else "nothing was done yet"
        raise Stopped(f"stopped; {kept}, and the same command goes on from there") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _none_left(parts: Path) -> Iterator[None]:
    """Bad input leaves no parts of this call behind, which would stand in the way of the corrected command.

    Where the memory did not suffice the same command may go on later, so what is done is kept.
    """
    before = parts.exists()
    try:
        yield
    except VarpropError as error:
        done = isinstance(error, ShortMemoryError) and any(parts.glob("*.safetensors"))
        if not before and not done:
            shutil.rmtree(parts, ignore_errors=True)
        raise


@contextlib.contextmanager
def _bars() -> Iterator[Any]:
    """A bar on standard error for each score: sequences done."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    tasks: dict[str, Any] = {}
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bars:

        def update(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.update(tasks[name], completed=done, total=total)

        yield update
