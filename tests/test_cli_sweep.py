"""`varprop sweep`: run, status, collect, slurm; bad sweep files are one line and exit code 2."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.command_line import assert_refused
from varprop import results
from varprop.__main__ import main
from varprop.train import fit
from varprop.train.sweep_file import read_sweep
from varprop.train.sweep_run import state

ROOT = str(Path(__file__).resolve().parents[1])
SWEEP = """
spec = "tiny"
seeds = [0, 1]
[set]
d_model = 16
n_heads = 2
d_ff = 32
n_layers = 1
vocab_size = 32
[config]
corpus = "chain.u16"
n_steps = 4
warmup_steps = 2
batch_size = 2
n_tokens = 16
record_every = 2
n_evaluation_sequences = 2
evaluation_length = 16
max_loss_rise = "null"
device = "cpu"
[axes]
density = [1.0, 0.5]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", ROOT)
    np.random.default_rng(0).integers(0, 32, size=4000).astype("<u2").tofile("chain.u16")
    Path("sweep.toml").write_text(SWEEP)
    return tmp_path


def run(*words: object) -> int:
    return main(["sweep", *map(str, words)])


def test_a_sweep_file_runs_and_resumes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three runs by hand, then the command for the other one, in a process of its own."""
    assert run("status", "sweep.toml") == 0
    assert "4 waiting of 4" in capsys.readouterr().out
    first, second, third, fourth = read_sweep("sweep.toml").runs
    assert run("slurm", "sweep.toml", "--nodes", "2", "--gpus-per-node", "4") == 0  # makes the directories
    script = capsys.readouterr().out
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert "#SBATCH --array=0-3\n" in script
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=1\n" in script
    assert "#SBATCH --gres=gpu:4\n" in script
    for one in (first, second, third):
        assert run("work", f"sweep/{one.id}") == 0
    assert run("collect", "sweep.toml") == 2
    assert "1 of 4 runs are missing or unfinished" in capsys.readouterr().err
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("sweep/*/result.nc")}
    assert run("run", "sweep.toml", "--n-workers", 2) == 0
    out = capsys.readouterr().out
    assert f"{fourth.id} begins: density=0.5 seed=1\n" in out
    assert f"{fourth.id} finished\n" in out
    assert not any(one.id in out for one in (first, second, third))
    assert out.endswith("4 finished of 4\n")
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert run("run", "sweep.toml") == 0
    assert capsys.readouterr().out == "4 finished of 4\n"
    assert run("status", "sweep.toml") == 0
    assert f"{fourth.id}  0.5      1     finished  4/4" in capsys.readouterr().out
    assert run("collect", "sweep.toml", "--out", "all.nc") == 0
    dataset = results.load("all.nc")
    point = results.present(dataset.sel(density=0.5)).sel(seed=[1])
    assert point.equals(fit(fourth.spec, fourth.config))


def test_a_dry_run_trains_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("run", "sweep.toml", "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:5] == ["run", "density", "seed", "steps", "tokens"]
    assert lines[1].split()[:5] == [read_sweep("sweep.toml").runs[0].id, "1.0", "0", "4", "128"]
    assert lines[5].startswith("4 runs, ")
    assert not Path("sweep").exists()


@pytest.mark.long
def test_jobs_of_a_slurm_array_share_the_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a scheduler: two jobs by hand, at the same time."""
    Path("sweep.toml").write_text(SWEEP.replace("seeds = [0, 1]", "seeds = [0]"))
    assert run("slurm", "sweep.toml", "--n-jobs", 2, "--directory", "shared folder", "--time", "8:00:00") == 0
    script = capsys.readouterr().out
    Path("job.sh").write_text(script)
    subprocess.run(["bash", "-n", "job.sh"], check=True)
    assert "#SBATCH --array=0-1\n#SBATCH --time=8:00:00\n#SBATCH --signal=B:USR1@120\n#SBATCH --requeue\n" in script
    assert "gpu" not in script
    jobs = [
        subprocess.Popen(
            ["bash", folder / "job.sh"],
            env={**os.environ, "SLURM_ARRAY_TASK_ID": str(index), "SLURM_JOB_ID": str(7 + index)},
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
        )
        for index in range(2)
    ]
    out = [job.communicate(timeout=120)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0]
    for one in read_sweep("sweep.toml").runs:
        assert sum(text.count(f"{one.id} begins") for text in out) >= 1
        assert (folder / "shared folder" / one.id / "log.txt").read_text() == ""
    (collect,) = [line for line in script.splitlines() if " sweep collect " in line]
    assert "'" in collect  # the folder has a space in its name
    assert run("collect", "sweep.toml", "--directory", "shared folder") == 0


def test_a_job_at_its_limit_goes_back_into_the_queue(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The script around a command that saves and ends with 3 on SIGTERM; a stand-in for scontrol."""
    assert run("slurm", "sweep.toml", "--n-jobs", 1) == 0
    script = capsys.readouterr().out
    program = (
        "import signal, sys\nsignal.signal(15, lambda *_: sys.exit(3))\nprint('ready', flush=True)\nsignal.pause()"
    )
    command = next(line for line in script.splitlines() if line.endswith(" &"))
    Path("job.sh").write_text(script.replace(command, f'{sys.executable} -c "{program}" &'))
    Path("scontrol").write_text('#!/bin/bash\necho "scontrol $*"\n')
    Path("scontrol").chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    for number, expected in ((10, "scontrol requeue 7\n"), (15, "")):  # SIGUSR1; SIGTERM of scancel
        job = subprocess.Popen(["bash", "job.sh"], env=environment, stdout=subprocess.PIPE, text=True)
        assert job.stdout is not None
        assert job.stdout.readline() == "ready\n"
        job.send_signal(number)
        assert job.stdout.read() == expected
        job.wait(timeout=60)
        assert job.returncode in (3, 128 + number)


@pytest.mark.long
def test_a_job_stopped_and_requeued_is_the_undisturbed_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """USR1 as the run is under way: its state is saved, the job goes back, and the next one goes on from there."""
    text = SWEEP.replace("n_steps = 4", "n_steps = 2000").replace("density = [1.0, 0.5]", "density = [0.5]")
    Path("sweep.toml").write_text(text.replace("seeds = [0, 1]", "seeds = [0]"))
    assert run("slurm", "sweep.toml", "--n-jobs", 1) == 0
    Path("job.sh").write_text(capsys.readouterr().out)
    Path("scontrol").write_text('#!/bin/bash\necho "scontrol $*"\n')
    Path("scontrol").chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    (one,) = read_sweep("sweep.toml").runs
    log = folder / "sweep" / one.id / "log.jsonl"
    job = subprocess.Popen(["bash", "job.sh"], env=environment, stdout=subprocess.PIPE, text=True)
    while not (log.exists() and log.read_bytes().count(b"\n") > 5):
        assert job.poll() is None
        time.sleep(0.1)
    assert run("status", "sweep.toml") == 0
    row = capsys.readouterr().out.splitlines()[1].split()
    assert row[3] == "running"
    assert float(row[5]) > 0 and float(row[6].replace(",", "")) > 0 and row[7].startswith("0:")  # noqa: PT018
    job.send_signal(signal.SIGUSR1)
    out = job.communicate(timeout=60)[0]
    assert f"{one.id} stopped\n1 stopped of 1\n" in out
    assert out.endswith("scontrol requeue 7\n")
    assert job.returncode == 3
    begun = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert begun[-1] < 2000
    subprocess.run(["bash", "job.sh"], env=environment, check=True, timeout=120)
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert sorted(set(steps)) == list(range(0, 2001, 2))
    assert results.identical(results.load(f"sweep/{one.id}/result.nc"), fit(one.spec, one.config))


@pytest.mark.long
def test_a_run_of_several_processes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One job by hand, a node of two processes: stand-ins for srun and scontrol. Stopped on the way, then ended."""
    Path("sweep.toml").write_text(SWEEP.replace("n_steps = 4", "n_steps = 1000"))
    assert run("slurm", "sweep.toml", "--nodes", 1, "--gpus-per-node", 2) == 0
    Path("job.sh").write_text(capsys.readouterr().out)
    Path("scontrol").write_text('#!/bin/bash\n[ "$1" = show ] && echo localhost || echo "scontrol $*"\n')
    Path("srun").write_text('#!/bin/bash\nexec "$@"\n')
    for name in ("srun", "scontrol"):
        Path(name).chmod(0o755)
    slurm = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "localhost"}
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **slurm}
    third = read_sweep("sweep.toml").runs[2]
    log = folder / "sweep" / third.id / "log.jsonl"
    job = subprocess.Popen(["bash", "job.sh"], env=environment, stdout=subprocess.PIPE, text=True)
    while not (log.exists() and log.read_bytes().count(b"\n") > 5):
        assert job.poll() is None
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    assert job.communicate(timeout=60)[0].endswith(f"scontrol requeue {os.getpid()}\n")
    assert state(log.parent) == "stopped"
    assert list((log.parent / "checkpoints").glob("step-*"))
    done = subprocess.run(["bash", "job.sh"], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    trained = results.load(log.parent / "result.nc").sel(step=[0, 2, 4, 6])
    alone = fit(third.spec, third.config).sel(step=[0, 2, 4, 6])
    np.testing.assert_allclose(trained.train_loss, alone.train_loss, rtol=1e-5)
    np.testing.assert_allclose(trained.variance, alone.variance, rtol=1e-5)


BAD = [
    (("density = [1.0, 0.5]", "density = [1.0, 1.0]"), "axes.density=[1.0, 1.0] is empty or repeats a value"),
    (("density = [", "densty = ["), "densty is an unknown field; expected 'density'?"),
    (
        ("density = [", "config.learning_rat = ["),
        "config.learning_rat is an unknown key; expected config.learning_rate",
    ),
    (("density = [", "seed = ["), "axes='seed' is no axis of a grid; expected seeds beside the axes"),
    (("density = [", "config.seed = ["), "axes='config.seed' is no axis of a grid"),
    (("density = [", "layer = ["), "axes='layer' is the name of a dimension"),
    (("density = [1.0, 0.5]", "config.weight_decay = [-1]"), "weight_decay=-1.0 is outside the domain"),
    (("n_steps = 4", "n_step = 4"), "config.n_step is an unknown key; expected config.n_steps"),
    (("n_steps = 4", "n_steps = 4\ntotal_tokens = 64"), "total_tokens=64 is given with n_steps"),
    (("n_steps = 4", 'n_steps = "4"'), "n_steps='4' is a str; expected int"),
    (("n_steps = 4", "n_steps = 4\nseed = 1"), "config.seed=1 is no field here; expected seeds"),
    (("seeds = [0, 1]", "seeds = [0, 0]"), "seeds=[0, 0] is empty or repeats a value"),
    (("seeds = [0, 1]", "seeds = 3"), "seeds=3 is empty or repeats a value; expected a list"),
    (("seeds = [0, 1]", "seeds = [-1]"), "seed=-1 is outside the domain"),
    (("[set]", "[set"), "sweep='sweep.toml' is no TOML"),
    (("[set]", "[sett]"), "sett is an unknown key; expected set"),
    (('spec = "tiny"', ""), "spec=None is missing; expected spec or run in sweep.toml"),
    (
        ('spec = "tiny"', 'run = "paper-dense-1b-l33"'),
        "run='paper-dense-1b-l33' is unknown; expected 'paper-dense-1b-l32'?",
    ),
    (('spec = "tiny"', 'spec = "tiny"\nrun = "paper-dense-1b-l32"'), "run='paper-dense-1b-l32' is given with spec"),
    (
        ("density = [1.0, 0.5]", "config.total_tokens = [64]\nconfig.n_steps = [4]"),
        "total_tokens=64 is given with n_steps",
    ),
    (('spec = "tiny"', 'spec = "none.json"'), "none.json' cannot be read"),
    (("vocab_size = 32", "vocab_size = 8"), "vocab_size=8 is too small; expected a vocab_size of at least 32"),
    (('"chain.u16"', '"none.u16"'), "corpus='none.u16' is missing"),
    (("batch_size = 2", "batch_size = 4\nmicro_batch_size = 3"), "micro_batch_size=3 is not a divisor"),
    (("evaluation_length = 16", "evaluation_length = 200"), "evaluation_length=200 is too long for a held-out text"),
    (("warmup_steps = 2", "warmup_steps = 5"), "warmup_steps=5 is too large"),
]


@pytest.mark.parametrize("change, message", BAD, ids=[change[1][-30:] or "nothing" for change, _ in BAD])
def test_bad_sweep_files_are_one_line(
    change: tuple[str, str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = SWEEP.replace(*change)
    assert text != SWEEP
    (folder / "sweep.toml").write_text(text)
    assert run("run", "sweep.toml") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (folder / "sweep").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (("run", "none.toml"), "sweep='none.toml' cannot be read (No such file or directory)"),
        (("run", "sweep.toml", "--n-workers", "0"), "n_workers=0 is outside the domain"),
        (("status", "sweep.toml", "--directory", ""), "--directory: '' is empty; expected a path"),
        (("status", "sweep.toml", "--directory", "none"), "directory='none' is missing"),
        (("collect", "sweep.toml", "--partial"), "holds no result of this sweep"),
        (("collect", "sweep.toml", "--out", "sweep.toml"), "out='sweep.toml' is the sweep file"),
        (("collect", "sweep.toml", "--out", "no/folder/a.nc"), "cannot be written"),
        (("slurm", "sweep.toml"), "n_jobs=None is not one way; expected --n-jobs, or --nodes"),
        (("slurm", "sweep.toml", "--n-jobs", "2", "--nodes", "2"), "n_jobs=2 is not one way"),
        (("slurm", "sweep.toml", "--n-jobs", "0"), "n_jobs=0 is outside the domain"),
        (("slurm", "sweep.toml", "--nodes", "0"), "nodes=0 is outside the domain"),
        (("slurm", "sweep.toml", "--nodes", "2", "--gpus-per-node", "0"), "gpus_per_node=0 is outside the domain"),
        (("slurm", "sweep.toml", "--n-jobs", "2", "--time", "1 day"), "time='1 day' is no limit of SLURM"),
        (("work", "nowhere"), "directory='nowhere' has no task.json of a run"),
        ((), "required: run|status|collect|slurm"),
    ],
)
def test_bad_arguments_are_one_line(
    words: tuple[str, ...], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(["sweep", *words], message, folder, capsys)


def test_help_lists_the_keys_of_a_sweep_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("run", "--help")
    text = capsys.readouterr().out
    for key in ("total_flops", "max_loss_rise", "seeds", "[axes]"):
        assert key in text
