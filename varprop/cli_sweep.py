"""`varprop sweep run | status | collect | slurm sweep.toml`."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from varprop import files, results, slurm
from varprop.cli_arguments import path
from varprop.errors import ArgumentError, require
from varprop.train import cost, log, sweep_collect, sweep_file, sweep_run
from varprop.train.sweep_file import Sweep

HEAD = """\
#!/bin/bash
#SBATCH --job-name=varprop-sweep
#SBATCH --array=0-{last}
#SBATCH --time={time}
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
# Save this as a file and submit it: sbatch FILE. The directory has to be on a file system that all nodes share, with
# its locks. Two minutes before the limit a job has its runs save their state, and goes back into the queue. When all
# have ended:
#   {program} sweep collect {sweep} --directory {directory} --out {out}
"""
ARRAY = """\
#SBATCH --ntasks=1
#SBATCH --cpus-per-task={cpus}{gpu}
set -u
cd {folder} || exit
"""
NODES = """\
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task={cpus}
#SBATCH --gres=gpu:{gpus_per_node}
set -u
cd {folder} || exit
runs=({runs})
export NCCL_NVLS_ENABLE=0
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))
"""
TAIL = """\
# A signal ends the command `wait` early: it is passed on, and the job waits for the state to be saved.
asked=0
trap 'asked=1; kill -TERM "$child"' USR1
trap 'kill -TERM "$child"' TERM
{command} &
child=$!
while :; do
    wait "$child"
    code=$?
    kill -0 "$child" 2>/dev/null || break
done
if [ "$asked" = 1 ] && [ "$code" != 0 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
"""
SHARED = "{program} sweep run {sweep} --directory {directory} --n-workers {n_workers}{corpus}"
TORCHRUN = (
    "srun {python} -m torch.distributed.run --nnodes {nodes} --nproc-per-node {gpus_per_node} --rdzv-backend c10d"
    ' --rdzv-endpoint "$head:$port" --rdzv-id "$SLURM_JOB_ID"'
    ' -m varprop sweep work {directory}/"${{runs[$SLURM_ARRAY_TASK_ID]}}"'
)
"""torchrun passes SIGTERM on to its processes and gives them 30 seconds."""


def add(parser: argparse.ArgumentParser) -> None:
    """The commands and their arguments."""
    commands = parser.add_subparsers(dest="sweep_command", required=True, metavar="run|status|collect|slurm")
    epilog = sweep_file.describe()

    def command(name: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=text, description=text, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        added.add_argument("sweep", metavar="sweep.toml", help="the sweep")
        added.add_argument(
            "--directory", type=path, help="folder of the runs (default: the sweep file's name less .toml)"
        )
        added.add_argument(
            "--corpus-dir", type=path, default=None, help="folder of a prepared corpus (default $VARPROP_CORPUS)"
        )
        return added

    run = command("run", "Train what is not finished, one process per GPU; a killed run goes on.")
    command("status", "A table of the runs: how far each is, its loss, speed and time left.")
    collect = command("collect", "One result from the finished runs.")
    job = command("slurm", "Print a SLURM job array that trains the sweep: > job.sh, then sbatch job.sh.")
    for one in (run, job):
        workers = "runs at a time (default: one per GPU; in a job: 1)"
        one.add_argument("--n-workers", type=int, default=None, help=workers)
    run.add_argument("--retry", action="store_true", help="also runs that failed")
    run.add_argument("--log", metavar="NAME,NAME", help="also to console, tensorboard or wandb, beside log.jsonl")
    run.add_argument("--dry-run", action="store_true", help="a table of steps, tokens, FLOP, memory and hours alone")
    for one in (collect, job):
        one.add_argument(
            "--out", type=path, default="sweep.nc", metavar="FILE", help="netCDF or .zarr (default %(default)s)"
        )
    collect.add_argument("--partial", action="store_true", help="also of an unfinished sweep, with what there is")
    job.add_argument("--n-jobs", type=int, help="jobs of the array, which share the runs (one GPU per run)")
    job.add_argument("--nodes", type=int, help="instead: each run on this many nodes, through torchrun, a job per run")
    job.add_argument("--gpus-per-node", type=int, default=8, help="with --nodes (default %(default)s)")
    job.add_argument("--cpus", type=int, default=8, help="cores of a task (default %(default)s)")
    job.add_argument("--time", default="24:00:00", help="limit of a job, as 30, 8:00:00 or 2-12 (default %(default)s)")
    work = commands.add_parser("work", description="Train the run in a directory of a sweep (what `run` starts).")
    work.add_argument("run_dir", type=path, metavar="RUN_DIR")


def run(arguments: argparse.Namespace) -> int:
    """Carry out one of the commands; return the exit code."""
    if arguments.sweep_command == "work":
        sweep_run.work(arguments.run_dir)
        return 0
    sweep = sweep_file.read_sweep(arguments.sweep, arguments.corpus_dir)
    directory = Path(arguments.directory or Path(arguments.sweep).with_suffix(""))
    actions = {"run": _run, "status": _status, "collect": _collect, "slurm": _slurm}
    return actions[arguments.sweep_command](sweep, directory, arguments)


def _run(sweep: Sweep, directory: Path, arguments: argparse.Namespace) -> int:
    logs = arguments.log.split(",") if arguments.log else ()
    log.check_names(["jsonl", *logs], directory)
    if arguments.dry_run:
        _print(_costs(sweep))
        return 0
    options = {"n_workers": arguments.n_workers, "retry": arguments.retry, "logs": logs, "report": _report}
    return sweep_run.run_sweep(sweep, directory, **options)


def _report(line: str) -> None:
    print(line, flush=True)


def _costs(sweep: Sweep) -> Table:
    """What each run takes on one GPU, by estimates; equal runs once."""
    table = _table(sweep, "steps", "tokens", "FLOP", "MFU assumed", "memory GiB", "time")
    rows = {run.id: (run, values) for run, values in zip(sweep.runs, sweep.values(), strict=True)}
    costs = {id: cost.estimate(run.spec, run.config) for id, (run, _) in rows.items()}
    for id, (_, values) in rows.items():
        one = costs[id]
        numbers = (
            f"{one.steps:,}",
            f"{one.tokens:.3g}",
            f"{one.flops:.3g}",
            f"{one.mfu:.0%}",
            f"{one.memory / cost.GIB:.3g}",
        )
        table.add_row(id, *map(str, values.values()), *numbers, cost.duration(one.hours))
    flops, hours = sum(one.flops for one in costs.values()), sum(one.hours for one in costs.values())
    table.caption = f"{len(rows)} runs, {flops:.3g} FLOP, {cost.duration(hours)} of one H200 in all"
    return table


def _status(sweep: Sweep, directory: Path, arguments: argparse.Namespace) -> int:
    there = arguments.directory is None or directory.is_dir()
    require(there, ArgumentError, "directory", arguments.directory, "missing", "a folder of runs")
    rows = sweep_collect.status(sweep, directory)
    table = _table(sweep, "state", "step", "loss", "tokens/s", "left", "error")
    for row in rows:
        table.add_row(
            row.id,
            *map(str, row.values.values()),
            row.state,
            f"{row.step}/{row.n_steps}",
            "" if row.loss is None else f"{row.loss:.4f}",
            "" if row.tokens_per_s is None else f"{row.tokens_per_s:,.0f}",
            "" if row.seconds_left is None else log.duration(row.seconds_left),
            row.error,
        )
    states = [row.state for row in rows]
    table.caption = ", ".join(f"{states.count(name)} {name}" for name in dict.fromkeys(states)) + f" of {len(rows)}"
    _print(table)
    return 0


def _table(sweep: Sweep, *columns: str) -> Table:
    """A table with the run and its labels as first columns."""
    table = Table(box=None, caption_justify="left", pad_edge=False)
    for name in ("run", *sweep.values()[0], *columns):
        table.add_column(name, overflow="fold", no_wrap=name != "error")
    return table


def _print(table: Table) -> None:
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:  # a file or a pipe takes whole lines
        console = Console(highlight=False, markup=False, width=10_000)
    console.print(table)


def _collect(sweep: Sweep, directory: Path, arguments: argparse.Namespace) -> int:
    out = _out(arguments)
    dataset = sweep_collect.collect(sweep, directory, partial=arguments.partial)
    results.save(dataset, out)
    print(f"sweep {dict(dataset.sizes)}, {dataset.attrs['end_condition']}\nwrote {out}")
    return 0


def _out(arguments: argparse.Namespace) -> Path:
    out = files.writable(arguments.out)
    other = out.resolve() != Path(arguments.sweep).resolve()
    require(other, ArgumentError, "out", arguments.out, "the sweep file", "another file")
    return out


def _slurm(sweep: Sweep, directory: Path, arguments: argparse.Namespace) -> int:
    many = arguments.nodes is not None
    one = many != (arguments.n_jobs is not None)
    require(one, ArgumentError, "n_jobs", arguments.n_jobs, "not one way", "--n-jobs, or --nodes for a job per run")
    n_workers = arguments.n_workers or 1
    counts = {"nodes": arguments.nodes, "gpus_per_node": arguments.gpus_per_node} if many else {"n_workers": n_workers}
    n_jobs = len(sweep.distinct) if many else arguments.n_jobs
    for name, number in {**counts, "n_jobs": n_jobs, "cpus": arguments.cpus}.items():
        slurm.require_count(name, number)
    slurm.require_time(arguments.time)
    if many:
        for run in sweep.distinct:
            sweep_run.write_task(sweep, run, directory)
    on_cpu = all(run.config.device == "cpu" for run in sweep.runs)
    given = counts | {
        "last": n_jobs - 1,
        "time": arguments.time,
        "cpus": arguments.cpus,
        "gpu": "" if on_cpu else f"\n#SBATCH --gres=gpu:{n_workers}",
        "runs": " ".join(run.id for run in sweep.distinct),
        "python": shlex.quote(sys.executable),
        "program": f"{shlex.quote(sys.executable)} -m varprop",
        "sweep": shlex.quote(str(Path(arguments.sweep).absolute())),
        "directory": shlex.quote(str(directory.absolute())),
        "out": shlex.quote(str(_out(arguments).absolute())),
        "folder": shlex.quote(str(Path.cwd())),
        "corpus": f" --corpus-dir {shlex.quote(arguments.corpus_dir)}" if arguments.corpus_dir else "",
    }
    command = (TORCHRUN if many else SHARED).format(**given)
    print((HEAD + (NODES if many else ARRAY) + TAIL).format(**given, command=command))
    return 0
