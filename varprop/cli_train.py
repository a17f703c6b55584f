"""`varprop train`: one training run, alone or under torchrun."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from varprop import files, presets, results
from varprop.cli_arguments import assignments, path, profile
from varprop.corpus import load_corpus
from varprop.errors import ArgumentError, require

if TYPE_CHECKING:
    from varprop.train.runs import Run


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--spec", metavar="PRESET-or-FILE", help="a preset name or a spec JSON file")
    what.add_argument("--run", metavar="NAME", help="one of `varprop runs`: its spec and its config")
    parser.add_argument("--set", action="append", default=[], metavar="field=value", help="change a field of the spec")
    parser.add_argument("--config", action="append", default=[], metavar="field=value", help="a TrainConfig field")
    parser.add_argument("--run-dir", type=path, default=None, help="folder of checkpoints; the same folder resumes")
    parser.add_argument(
        "--corpus-dir", type=path, default=None, help="folder of a prepared corpus (default $VARPROP_CORPUS)"
    )
    parser.add_argument("--log", metavar="NAME,NAME", default="", help="console, jsonl, tensorboard, wandb")
    parser.add_argument(
        "--grow-from", type=path, metavar="RUN", help="start from the blocks of a finished, shallower run"
    )
    parser.add_argument("--grow-method", choices=("stack", "interleave"), default=None, help="1 2 1 2, or 1 1 2 2")
    parser.add_argument("--dry-run", action="store_true", help="say what it would take, and train nothing")


def run(arguments: argparse.Namespace) -> int:
    """Train; write the result and print its last profile. Returns the exit code."""
    from varprop import train  # brings torch's compiler in
    from varprop.train import checkpoint, log, runs

    if arguments.run is not None:
        base = runs.get(arguments.run)
    else:
        base = runs.Run(arguments.spec, presets.load(arguments.spec), train.TrainConfig())
    wanted = base.changed(assignments(arguments.set, "--set"), assignments(arguments.config, "--config"))
    logs = tuple(filter(None, arguments.log.split(",")))
    log.check_names(logs, arguments.run_dir)
    alone = arguments.grow_method is None or arguments.grow_from is not None
    require(alone, ArgumentError, "grow_method", arguments.grow_method, "given alone", "--grow-from with it")
    first = os.environ.get("RANK", "0") == "0"  # of torchrun's processes
    out = files.writable(arguments.out)
    initial = None
    if arguments.grow_from is not None:
        # A grown run that has begun goes on without the shallow one where that is gone; else it is looked at.
        run_dir, there = arguments.run_dir, Path(arguments.grow_from).exists()
        if there or run_dir is None or not checkpoint.goes_on_alone(run_dir):
            initial = train.grow(arguments.grow_from, wanted.spec, arguments.grow_method or "stack")
    if arguments.dry_run:
        print(f"{runs.describe(wanted)}
{_checked(wanted, arguments.corpus_dir)}")
        return 0
    dataset = train.fit(
        wanted.spec,
        wanted.config,
        run_dir=arguments.run_dir,
        corpus_dir=arguments.corpus_dir,
        initial=initial,
        logs=logs,
    )
    if not first:
        return 0
    results.save(dataset, out)
    last = results.at_step(dataset)
    loss = last.validation_loss.sel(evaluation="fixed_length").item()
    length = wanted.config.evaluation_length
    print(f"{profile(last)}\nvalidation loss {loss:.4f} nats per token in windows of {length} tokens\nwrote {out}")
    return 0


def _checked(wanted: Run, corpus_dir: str | None) -> str:
    """A line on the corpus, if the run can be started; its cost is known without a corpus."""
    from varprop.train.check import check_run

    check_run(wanted.spec, wanted.config, None)
    try:
        found = load_corpus(wanted.config.corpus, corpus_dir)
    except ArgumentError as error:
        return f"lengths and vocabulary are not checked: {error}"
    check_run(wanted.spec, wanted.config, found)
    return f"corpus {found.name}: {len(found.train):,} tokens, {len(found.validation):,} held out"
