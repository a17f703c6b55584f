"""`varprop grid`: run, status, merge, slurm; bad grid files are one line and exit code 2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from varprop import presets, results
from varprop.__main__ import main
from varprop.simulate import sample

GRID = """
spec = "tiny"
[set]
n_layers = 2
d_model = 32
d_ff = 48
[axes]
density = [1.0, 0.5]
model.dense = {}
model.moe = {feed_forward = "null", n_experts = 4, top_k = 2, d_expert = 16}
[run]
n_networks = 6
n_tokens = 5
round_networks = 4
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grid.toml").write_text(GRID)
    return tmp_path


def run(*words: object) -> int:
    return main(["grid", *map(str, words)])


def test_a_grid_file_runs_and_resumes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("status", "grid.toml") == 0
    assert "0 finished, 0 running, 4 waiting, of 4" in capsys.readouterr().out
    assert run("run", "grid.toml", "--out", "a.nc") == 0
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("grid/*/*.nc")}
    assert len(stamps) == 4 * 2
    assert run("run", "grid.toml", "--out", "b.nc") == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in folder.glob("grid/*/*.nc")}
    dataset = results.load("a.nc")
    assert results.identical(dataset, results.load("b.nc"))
    spec = presets.tiny().with_fields(n_layers=2, d_model=32, d_ff=48, density=0.5)
    mixture = spec.with_fields(feed_forward=None, n_experts=4, top_k=2, d_expert=16)
    alone = sample(mixture, n_networks=6, n_tokens=5)
    point = results.present(dataset.sel(density=0.5, model="moe"))
    assert point.equals(alone)
    capsys.readouterr()
    assert run("status", "grid.toml") == 0
    lines = capsys.readouterr().out
    assert "4 finished, 0 running, 0 waiting, of 4" in lines
    assert "24 in 8 rounds, 0 missing" in lines
    assert "left" not in lines
    damaged = next(iter(stamps))
    damaged.write_bytes(b"")
    assert run("status", "grid.toml") == 0
    lines = capsys.readouterr().out
    assert "damaged   1 rounds, to be computed again" in lines
    assert f"\n          {damaged.relative_to(folder)}\n" in lines
    assert "left      about " in lines


def test_shards_of_machines_without_a_common_folder_are_merged(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("run", "grid.toml", "--out", "whole.nc") == 0
    for i in range(2):
        assert run("run", "grid.toml", "--directory", f"machine{i}", "--shard", f"{i}/2", "--only-own") == 0
        assert len(list(folder.glob(f"machine{i}/*/*.nc"))) == 4
    assert run("merge", "grid.toml", "--directory", "machine0", "--out", "half.nc") == 2
    assert "2 of 4 points are missing or unfinished, the first " in capsys.readouterr().err
    assert not Path("half.nc").exists()
    assert run("merge", "grid.toml", "--directory", "machine0", "--out", "half.nc", "--partial") == 0
    half = results.load("half.nc")
    assert half.n_networks.values.tolist() == [[6, 0], [6, 0]]
    assert half.attrs["end_condition"] == "budget"
    assert run("merge", "grid.toml", "--directory", "machine1", "--directory", "machine0", "--out", "all.nc") == 0
    assert results.identical(results.load("all.nc"), results.load("whole.nc"))


def test_a_slurm_array_runs_the_grid(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a scheduler: its jobs by hand, one after the other. The first does what the second finds finished."""
    assert run("slurm", "grid.toml", "--n-jobs", 2, "--directory", "shared folder") == 0
    script = capsys.readouterr().out
    Path("job.sh").write_text(script)
    subprocess.run(["bash", "-n", "job.sh"], check=True)
    assert "#SBATCH --array=0-1\n" in script
    assert "gpu" not in script
    root = str(Path(__file__).resolve().parents[1])
    for index in range(2):
        environment = {**os.environ, "SLURM_ARRAY_TASK_ID": str(index), "PYTHONPATH": root}
        done = subprocess.run(
            ["bash", folder / "job.sh"], env=environment, capture_output=True, text=True, check=True, cwd="/"
        )
        assert "4 finished" in done.stdout
    assert sys.executable in script
    (merge,) = [line for line in script.splitlines() if " grid merge " in line]
    assert "'" in merge  # the folder has a space in its name
    assert run("merge", "grid.toml", "--directory", "shared folder", "--out", "merged.nc") == 0
    assert run("run", "grid.toml", "--out", "whole.nc") == 0
    assert results.identical(results.load("merged.nc"), results.load("whole.nc"))


BAD = [
    (("density = [1.0, 0.5]", "density = [1.0, 1.0]"), "axes.density=[1.0, 1.0] is empty or repeats a value"),
    (("density = [", "densty = ["), "densty is an unknown field; expected 'density'?"),
    (("n_networks", "n_network"), "run.n_network is an unknown key; expected run.n_networks"),
    (("n_networks = 6", ""), "n_networks=None is missing; expected run.n_networks in grid.toml"),
    (("[run]", "[runs]"), "runs is an unknown key; expected run"),
    (("spec = ", "speck = "), "speck is an unknown key; expected spec"),
    (('spec = "tiny"', 'spec = "tinny"'), "preset='tinny' is unknown; expected 'tiny'?"),
    (('spec = "tiny"', 'spec = "none.json"'), "none.json' cannot be read"),
    (('spec = "tiny"', "spec = 3"), "spec=3 is no name"),
    (("[set]", "[set"), "grid='grid.toml' is no TOML"),
    (("n_networks = 6", f"n_networks = {'9' * 5000}"), "grid='grid.toml' is no TOML (Exceeds the limit"),
    (("n_networks = 6", f"n_networks = 1{'0' * 30}"), "is outside the domain; expected an integer up to"),
    (("n_tokens = 5", f"n_tokens = 1{'0' * 30}"), "is outside the domain; expected an integer up to"),
    (('spec = "tiny"', 'spec = "ti\\u0000ny.json"'), "is no name; expected a preset"),
    (("[run]", '[run]\n"a\\nb" = 1'), "run.'a\\nb' is an unknown key"),
    (("[run]", '[run]\nmethod = ["explicit"]'), "method=['explicit'] is unknown"),
    (("[run]", '[run]\ndtype = ["float32"]'), "dtype=['float32'] is unknown"),
    (("[run]", '[run]\ncorpus = "nope"'), "corpus='nope' is given without text"),
    (("density = [1.0, 0.5]", "density = [1, 1.0]"), "repeats a value"),
    (("density = [1.0, 0.5]", "seed = [1, 2]"), "axes='seed' is no axis of a grid; expected more n_networks"),
    (("n_tokens = 5", 'n_tokens = "5"'), "n_tokens='5' is outside the domain"),
    (("d_ff = 48", "d_f = 48"), "d_f is an unknown field"),
    (("n_tokens = 5", "n_tokens = 5\n[stop]\nstder = 0.1"), "stop.stder is an unknown key; expected stop.stderr"),
    (("n_tokens = 5", "n_tokens = 5\n[stop]\nstderr = 0"), "stop.stderr=0 is outside the domain"),
    (("n_tokens = 5", "n_tokens = 5\n[stop]\nmin_networks = 4"), "stop.stderr=None is missing"),
    (
        ("n_tokens = 5", "n_tokens = 5\n[stop]\nstderr = 1\nvariable = 'loss'"),
        "stop.variable='loss' is outside the domain",
    ),
]


@pytest.mark.parametrize("change, message", BAD, ids=[change[1][-30:] or "nothing" for change, _ in BAD])
def test_bad_grid_files_are_one_line(
    change: tuple[str, str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = GRID.replace(*change).replace("round_networks = 4\n", "")
    assert text != GRID
    (folder / "grid.toml").write_text(text)
    assert run("run", "grid.toml") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (folder / "grid.nc").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (("run", "none.toml"), "grid='none.toml' cannot be read (No such file or directory)"),
        (("run", "grid.toml", "--shard", "2/2"), "shard='2/2' is outside the domain; expected 0/n to n-1/n"),
        (("run", "grid.toml", "--shard", "one"), "shard='one' is no pair of integers"),
        (("run", "grid.toml", "--only-own"), "expected --shard i/n with it"),
        (("run", "grid.toml", "--out", "no/folder/a.nc"), "cannot be written"),
        (("run", "grid.toml", "--n-workers", "0"), "n_workers=0 is outside the domain"),
        (("merge", "grid.toml", "--directory", "none", "--partial"), "holds nothing of this grid"),
        (("run", "grid.toml", "--out", "./grid.toml"), "out='./grid.toml' is the grid file"),
        (("merge", "grid.toml", "--directory", "a", "--out", "grid.toml"), "out='grid.toml' is the grid file"),
        (("status", "grid.toml", "--directory", "none"), "directory='none' is missing"),
        (("slurm", "grid.toml", "--n-jobs", "2", "--time", "1 day"), "time='1 day' is no limit of SLURM"),
        (("slurm", "grid.toml", "--n-jobs", "99999999999"), "n_jobs=99999999999 is outside the domain"),
        (("slurm", "grid.toml", "--n-jobs", "2", "--out", "no/a.nc"), "cannot be written"),
        (("slurm", "grid.toml", "--n-jobs", "0"), "n_jobs=0 is outside the domain"),
        ((), "required: run|status|merge|slurm"),
    ],
)
def test_bad_arguments_are_one_line(
    words: tuple[str, ...], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in folder.iterdir()) == ["grid.toml"]


@pytest.mark.parametrize(
    "name", ["last_layer", "n_networks", "second_moment", "stop_error", "method_error", "point", '""']
)
def test_axes_named_like_a_variable_are_refused(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "grid.toml").write_text(GRID.replace("model.", f"{name}."))
    assert run("run", "grid.toml") == 2
    error = capsys.readouterr().err
    assert "the name of a variable" in error or "axes='' is no name" in error
    assert sorted(path.name for path in folder.iterdir()) == ["grid.toml"]


def test_help_lists_the_keys_of_a_grid_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("run", "--help")
    text = capsys.readouterr().out
    for key in ("round_networks", "n_probes", "token_correlation", "max_seconds", "corpus", "[stop]"):
        assert key in text


@pytest.mark.parametrize("time", ["30", "30:00", "8:00:00", "2-12", "2-12:30", "2-12:30:00"])
def test_limits_in_the_formats_of_slurm(time: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("slurm", "grid.toml", "--n-jobs", 2, "--time", time) == 0
    script = capsys.readouterr().out
    assert f"#SBATCH --time={time}\n" in script
    assert "sbatch FILE" in script
