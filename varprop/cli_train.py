"""`varprop train`: one training run, alone or under torchrun."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import os
import textwrap
from pathlib import Path

from varprop import files, presets, results
from varprop.cli_arguments import assignments, path, profile
from varprop.corpus import load_corpus
from varprop.errors import ArgumentError, require
from varprop.train import TrainConfig, checkpoint, fit, grow, log, runs
from varprop.train.check import check_run


def describe() -> str:
    """The fields of a config and their defaults, as text."""
    about = inspect.cleandoc(str(TrainConfig.__doc__)).partition("\nA field outside")[0]
    defaults = " ".join(f"{field.name}={_default(field.default)}" for field in dataclasses.fields(TrainConfig))
    return f"Fields of --config:\n{about}\nDefaults (null = None):\n{textwrap.fill(defaults, 100)}"


def _default(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, describe()
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--spec", metavar="PRESET-or-FILE", help="one of `varprop presets`, or a spec JSON file")
    what.add_argument("--run", metavar="NAME", help="one of `varprop runs`: its spec and its config")
    pairs = {"action": "append", "default": [], "metavar": "field=value"}
    parser.add_argument("--set", **pairs, help="change a field of the spec (repeatable): n_layers=4")
    parser.add_argument("--config", **pairs, help="change a field of the config (repeatable), see below: n_steps=1000")
    kept = "folder that keeps checkpoints and final weights; the same command goes on from there"
    parser.add_argument("--run-dir", type=path, default=None, help=kept)
    parser.add_argument(
        "--corpus-dir", type=path, default=None, help="folder of a prepared corpus (default $VARPROP_CORPUS)"
    )
    names = "console; and, into --run-dir, jsonl, tensorboard, wandb"
    parser.add_argument("--log", metavar="NAME,NAME", default="", help=names)
    parser.add_argument(
        "--grow-from", type=path, metavar="RUN", help="start from the blocks of a finished, shallower run"
    )
    order = "order of the blocks: 1 2 1 2 (default), or 1 1 2 2"
    parser.add_argument("--grow-method", choices=("stack", "interleave"), default=None, help=order)
    said = "check all of it, say what it would take, and train nothing"
    parser.add_argument("--dry-run", action="store_true", help=said)


def run(arguments: argparse.Namespace) -> int:
    """Train; write the result and print its last profile. Returns the exit code."""
    if arguments.run is not None:
        base = runs.get(arguments.run)
    else:
        base = runs.Run(arguments.spec, presets.load(arguments.spec), TrainConfig())
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
            initial = grow(arguments.grow_from, wanted.spec, arguments.grow_method or "stack")
    if arguments.dry_run:
        print(f"{runs.describe(wanted)}\n{_checked(wanted, arguments.corpus_dir)}")
        return 0
    dataset = fit(
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


def _checked(wanted: runs.Run, corpus_dir: str | None) -> str:
    """A line on the corpus, if the run can be started; its cost is known without a corpus."""
    check_run(wanted.spec, wanted.config, None)
    try:
        found = load_corpus(wanted.config.corpus, corpus_dir)
    except ArgumentError as error:
        return f"lengths and vocabulary are not checked: {error}"
    check_run(wanted.spec, wanted.config, found)
    return f"corpus {found.name}: {len(found.train):,} tokens, {len(found.validation):,} held out"
