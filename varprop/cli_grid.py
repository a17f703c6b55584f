"""`varprop grid run | status | merge | slurm grid.toml`."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from varprop import files, results, simulate, slurm
from varprop.errors import ArgumentError, require

SLURM = """\
#!/bin/bash
#SBATCH --job-name=varprop-grid
#SBATCH --array=0-{last}
#SBATCH --ntasks=1
#SBATCH --cpus-per-task={n_workers}
#SBATCH --time={time}{gpu}
# Save this as a file and submit it: sbatch FILE. Each job begins with its own points and then helps the others.
# Finished networks are files: a job that was killed is submitted again as it is. The directory has to be on a file
# system that all nodes share. The jobs write no result; when all have ended:
#   {program} grid merge {grid} --directory {directory} --out {out}
set -euo pipefail
cd {folder}
exec {program} grid run {grid} --directory {directory} --n-workers {n_workers} --shard "$SLURM_ARRAY_TASK_ID/{n_jobs}"
"""


def add(parser: argparse.ArgumentParser) -> None:
    """The commands and their arguments."""
    commands = parser.add_subparsers(dest="grid_command", required=True, metavar="run|status|merge|slurm")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        shape = argparse.RawDescriptionHelpFormatter
        epilog = simulate.describe_grid_file()
        added = commands.add_parser(name, help=text, description=text, epilog=epilog, formatter_class=shape)
        added.add_argument("grid", metavar="grid.toml", help="the grid")
        return added

    run = command("run", "Compute what is missing, with any other process at it, and write the result.")
    status = command("status", "Points, networks and damaged files; the time left.")
    merge = command("merge", "One result from finished rounds, after runs with --shard.")
    job = command("slurm", "Print a SLURM job array that runs the grid: > job.sh, then sbatch job.sh.")
    for one in (run, status, job):
        one.add_argument("--directory", help="folder of the finished rounds (default: the grid file's name less .toml)")
    for one in (run, merge, job):
        one.add_argument("--out", default="grid.nc", metavar="FILE", help="netCDF or .zarr (default %(default)s)")
    for one in (run, job):
        one.add_argument("--n-workers", type=int, default=1, help="processes (default %(default)s)")
    run.add_argument("--devices", help="of the processes in turn, as cuda:0,cuda:1 (default all of the grid's kind)")
    shard = "begin with the points i, i + n, ...; writes no result: merge does, also from one shared folder"
    run.add_argument("--shard", metavar="i/n", help=shard)
    run.add_argument("--only-own", action="store_true", help="leave the points of other shards to other machines")
    merge.add_argument("--directory", action="append", required=True, help="folder of finished rounds (repeatable)")
    merge.add_argument("--partial", action="store_true", help="also of an unfinished grid, with what there is")
    job.add_argument("--n-jobs", type=int, required=True, help="jobs of the array")
    job.add_argument("--time", default="24:00:00", help="limit of a job, as 30, 8:00:00 or 2-12 (default %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Carry out one of the commands; return the exit code."""
    return {"run": _run, "status": _status, "merge": _merge, "slurm": _slurm}[arguments.grid_command](arguments)


def _directory(arguments: argparse.Namespace) -> Path:
    return Path(arguments.directory or Path(arguments.grid).with_suffix(""))


def _out(arguments: argparse.Namespace) -> Path:
    out = files.writable(arguments.out)
    other = out.resolve() != Path(arguments.grid).resolve()
    require(other, ArgumentError, "out", arguments.out, "the grid file", "another file")
    return out


def _run(arguments: argparse.Namespace) -> int:
    plan, directory = simulate.read_grid(arguments.grid), _directory(arguments)
    devices = arguments.devices.split(",") if arguments.devices else None
    if arguments.shard is not None:
        shard = _shard(arguments.shard)
        only_own, n_workers = arguments.only_own, arguments.n_workers
        simulate.help_with(plan, directory, shard, only_own=only_own, n_workers=n_workers, devices=devices)
        print(simulate.status(plan, directory))
        return 0
    if arguments.only_own:
        raise ArgumentError("--only-own is given without a shard; expected --shard i/n with it")
    out = _out(arguments)
    dataset = simulate.run_plan(plan, directory, n_workers=arguments.n_workers, devices=devices)
    results.save(dataset, out)
    print(f"grid {dict(dataset.sizes)}, {dataset.attrs['end_condition']}\nwrote {out}")
    return 0


def _shard(text: str) -> tuple[int, int]:
    try:
        index, count = map(int, text.split("/"))
    except ValueError:
        raise ArgumentError(f"shard={text!r} is no pair of integers; expected i/n, as 0/16") from None
    return index, count


def _status(arguments: argparse.Namespace) -> int:
    plan, directory = simulate.read_grid(arguments.grid), _directory(arguments)
    there = arguments.directory is None or directory.is_dir()
    require(there, ArgumentError, "directory", arguments.directory, "missing", "a folder of finished rounds")
    print(simulate.status(plan, directory))
    return 0


def _merge(arguments: argparse.Namespace) -> int:
    out = _out(arguments)
    dataset = simulate.assemble(simulate.read_grid(arguments.grid), arguments.directory, partial=arguments.partial)
    results.save(dataset, out)
    print(f"grid {dict(dataset.sizes)}, {dataset.attrs['end_condition']}\nwrote {out}")
    return 0


def _slurm(arguments: argparse.Namespace) -> int:
    plan = simulate.read_grid(arguments.grid)
    for name in ("n_jobs", "n_workers"):
        slurm.require_count(name, getattr(arguments, name))
    slurm.require_time(arguments.time)
    quoted = {
        "program": f"{shlex.quote(sys.executable)} -m varprop",
        "grid": shlex.quote(str(Path(arguments.grid).absolute())),
        "directory": shlex.quote(str(_directory(arguments).absolute())),
        "out": shlex.quote(str(_out(arguments).absolute())),
        "folder": shlex.quote(str(Path.cwd())),
        "time": arguments.time,
    }
    gpu = f"\n#SBATCH --gres=gpu:{arguments.n_workers}" if plan.device == "cuda" else ""
    print(
        SLURM.format(
            **quoted, last=arguments.n_jobs - 1, n_jobs=arguments.n_jobs, n_workers=arguments.n_workers, gpu=gpu
        )
    )
    return 0
