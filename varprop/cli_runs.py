"""`varprop runs [NAME]`: the paper's training runs and their reduced twins, and what they cost."""

from __future__ import annotations

import argparse


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument("name", nargs="?", help="a run to describe (default: a table of all, in markdown)")
    parser.add_argument("--mfu", type=float, help="share of the peak to assume (default: by width, stated)")


def run(arguments: argparse.Namespace) -> int:
    """Print the table or one run; return the exit code."""
    from varprop.train import runs  # brings torch's compiler in

    if arguments.name is None:
        print(runs.as_markdown(mfu=arguments.mfu))
    else:
        print(runs.describe(runs.get(arguments.name), arguments.mfu))
    return 0
