"""Sweeps: what a file stands for, what becomes of runs that fail, are killed or are trained elsewhere, collecting."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from varprop import locks, results
from varprop.errors import ArgumentError, SchemaError, Stopped
from varprop.spec import ModelSpec
from varprop.spec.axes import RENAMED, check_names, dimensions
from varprop.train import TrainConfig, fit, runs, sweep_run
from varprop.train.sweep_collect import collect, status
from varprop.train.sweep_file import FIELDS, TAKEN, Sweep, make_sweep, read_sweep
from varprop.train.sweep_run import run_sweep, state, work, write_task

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def fields(config: TrainConfig) -> dict[str, Any]:
    """A run of milliseconds: 4 updates, recorded at 0, 2 and 4."""
    shorter = {"n_steps": 4, "record_every": 2, "batch_size": 2, "n_evaluation_sequences": 2, "evaluation_length": 16}
    changed = dataclasses.replace(config, **shorter, max_loss_rise=None)
    defaults = TrainConfig()
    given = {f.name: getattr(changed, f.name) for f in dataclasses.fields(changed)}
    return {name: value for name, value in given.items() if value != getattr(defaults, name)}


def train_all(sweep: Sweep, directory: Path) -> None:
    for run in sweep.distinct:
        work(write_task(sweep, run, directory))


def test_a_file_is_the_same_sweep_as_its_arguments(spec: ModelSpec, fields: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text(spec.to_json())
    lines = [f"{name} = {json.dumps('null' if value is None else value)}" for name, value in fields.items()]
    text = f"""
spec = "model.json"
seeds = [3, 1]
[set]
d_ff = 24
[config]
{chr(10).join(lines)}
[axes]
density = [1.0, 0.5]
config.clip_norm = ["null", 1.0]
model.short = {{}}
model.long = {{n_layers = 3, config.weight_decay = 0.0}}
"""
    (tmp_path / "sweep.toml").write_text(text)
    axes = {
        "density": [1.0, 0.5],
        "config.clip_norm": [None, 1.0],
        "model": {"short": {}, "long": {"n_layers": 3, "config.weight_decay": 0.0}},
    }
    from_file = read_sweep(tmp_path / "sweep.toml")
    made = make_sweep(spec.with_fields(d_ff=24), axes, fields, [3, 1])
    assert [run.task for run in from_file.runs] == [run.task for run in made.runs]
    assert len(made.distinct) == len(made.runs) == 16
    for run, values in zip(made.runs, made.values(), strict=True):
        assert run.config.seed == values["seed"]
        assert run.config.clip_norm == (None if values["clip_norm"] == "null" else 1.0)
        assert (run.spec.n_layers, run.config.weight_decay) == ((2, 0.1) if values["model"] == "short" else (3, 0.0))
        assert (run.spec.masks.q is None) == (values["density"] == 1.0)


def test_a_run_by_name_with_other_fields(fields: dict[str, Any], tmp_path: Path) -> None:
    corpus = json.dumps(fields["corpus"])
    text = f"""
run = "paper-dense-1b-l32-small"
[config]
corpus = {corpus}
n_steps = 700
n_tokens = 128
evaluation_length = 128
[axes]
n_layers = [1, 2]
budget.steps = {{}}
budget.tokens = {{config.total_tokens = 20_000_000}}
"""
    (tmp_path / "sweep.toml").write_text(text)
    base = runs.get("paper-dense-1b-l32-small")
    steps, tokens = read_sweep(tmp_path / "sweep.toml").runs[2:]
    assert steps.spec == tokens.spec == base.spec.with_fields(n_layers=2)
    own = dataclasses.replace(base.config, corpus=fields["corpus"], n_tokens=128, evaluation_length=128)
    assert steps.config == dataclasses.replace(own, total_tokens=None, n_steps=700)
    assert tokens.config == dataclasses.replace(own, total_tokens=20_000_000)


def test_the_id_of_a_run_is_what_decides_its_numbers(spec: ModelSpec, fields: dict[str, Any], tmp_path: Path) -> None:
    def ids(*arguments: Any) -> list[str]:
        return [run.id for run in make_sweep(*arguments).runs]

    (alone,) = ids(spec, {}, fields)
    assert alone in ids(spec, {"density": [0.5, 1.0], "config.learning_rate": [1e-3, 3e-3]}, fields, [1, 0])
    assert ids(spec, {}, fields | {"checkpoint_every": 7, "micro_batch_size": 1}) == [alone]
    assert ids(spec, {}, fields | {"weight_decay": 0.2}) != [alone]
    assert ids(spec.with_fields(d_ff=24), {}, fields) != [alone]
    text = tmp_path / "chain.u16"
    np.roll(np.fromfile(fields["corpus"], "<u2"), 1).tofile(text)
    before = ids(spec, {}, fields | {"corpus": str(text)})
    np.fromfile(fields["corpus"], "<u2").tofile(text)
    assert ids(spec, {}, fields | {"corpus": str(text)}) != before


def test_the_runs_of_a_sweep_are_those_of_fit(spec: ModelSpec, fields: dict[str, Any], tmp_path: Path) -> None:
    """Collected: points of other depths and other budgets, two seeds; each is the one that fit gives alone."""
    axes = {"n_layers": [1, 2], "budget": {"short": {}, "long": {"config.n_steps": 7}}}
    sweep = make_sweep(spec, axes, fields, [0, 5])
    train_all(sweep, tmp_path)
    dataset = collect(sweep, tmp_path)
    results.save(dataset, tmp_path / "all.nc")
    assert results.identical(results.load(tmp_path / "all.nc"), dataset)
    assert dataset.variance.dims[:3] == ("n_layers", "budget", "seed")
    assert dataset.step.values.tolist() == [0, 2, 4, 6, 7]
    assert dataset.last_layer.values.tolist() == [[1, 1], [2, 2]]
    for run, values in zip(sweep.runs, sweep.values(), strict=True):
        alone = fit(run.spec, run.config)
        point = results.present(dataset.sel(n_layers=values["n_layers"], budget=values["budget"]))
        assert point.sel(seed=[values["seed"]]).drop_vars(["n_layers", "budget"], errors="ignore").equals(alone)
        assert point.attrs["spec_id"] == run.spec.spec_id
        assert point.attrs["n_tokens"] == run.config.n_tokens
        config = dataclasses.replace(TrainConfig.from_json(point.attrs["config"]), seed=values["seed"])
        assert config == run.config


def test_collecting_a_part(spec: ModelSpec, fields: dict[str, Any], tmp_path: Path) -> None:
    sweep = make_sweep(spec, {"density": [1.0, 0.5]}, fields, [0, 1])
    with pytest.raises(ArgumentError, match="holds no result of this sweep"):
        collect(sweep, tmp_path, partial=True)
    work(write_task(sweep, sweep.runs[1], tmp_path))
    with pytest.raises(ArgumentError, match=f"3 of 4 runs are missing or unfinished, the first {sweep.runs[0].id}"):
        collect(sweep, tmp_path)
    dataset = collect(sweep, tmp_path, partial=True)
    assert dataset.attrs["end_condition"] == "budget"
    assert dataset.has_seed.values.tolist() == [[False, True], [False, False]]
    assert np.isnan(dataset.train_loss.sel(density=0.5)).all()
    point = results.present(dataset.sel(density=1.0))
    assert point.drop_vars("density", errors="ignore").equals(fit(spec, sweep.runs[1].config))
    forged = dataset.copy(deep=True)
    forged.train_loss[0, 0, 0] = 1.0
    with pytest.raises(SchemaError, match="train_loss has values beyond has_seed"):
        results.validate(forged)
    (tmp_path / sweep.runs[1].id / "result.nc").write_bytes(b"nothing")
    with pytest.raises(SchemaError, match=sweep.runs[1].id):
        collect(sweep, tmp_path, partial=True)


def test_points_of_other_lengths_and_parts(spec: ModelSpec, fields: dict[str, Any], tmp_path: Path) -> None:
    """What they share stands as in `fit`; the lengths of their evaluations, which differ, over the axes."""
    moe = {"feed_forward": None, "n_experts": 4, "top_k": 2, "d_expert": 16}
    sweep = make_sweep(spec, {"config.n_tokens": [8, 16], "model": {"dense": {}, "moe": moe}}, fields)
    train_all(sweep, tmp_path)
    dataset = collect(sweep, tmp_path)
    assert dataset.evaluation_length.sel(evaluation="training_length", model="moe").values.tolist() == [[8], [16]]
    assert dataset.attrs["n_tokens"] == ""
    for run, values in zip(sweep.runs, sweep.values(), strict=True):
        alone = fit(run.spec, run.config)
        point = results.present(dataset.sel(n_tokens=values["n_tokens"], model=values["model"]))
        assert point.attrs["n_tokens"] == values["n_tokens"]
        results.validate(point)
        assert point.drop_vars("evaluation_length").equals(alone.drop_vars("evaluation_length"))
        assert ("expert" in point.dims) == (values["model"] == "moe")


def test_an_axis_is_not_called_like_a_variable(spec: ModelSpec, fields: dict[str, Any], tmp_path: Path) -> None:
    found = {str(name) for name in fit(spec, TrainConfig(**fields)).variables}
    moe = spec.with_fields({"feed_forward": None, "n_experts": 4, "top_k": 2, "d_expert": 16})
    found |= {str(name) for name in fit(moe, TrainConfig(**fields)).variables}
    assert found <= TAKEN | set(results.DIMENSIONS)
    for name in (found - set(RENAMED)) | {"has_seed", "last_layer", "point"}:
        with pytest.raises(ArgumentError, match=f"axes='{name}' is .*; expected another name|'seed' is no axis"):
            make_sweep(spec, {name: {"dense": {}, "sparse": {"density": 0.5}}}, fields)


@pytest.mark.parametrize("name", [name for name in FIELDS if name != "seed"])
def test_every_field_of_the_config_can_be_an_axis(name: str) -> None:
    axes = {f"config.{name}": [getattr(TrainConfig(), name)]}
    check_names(axes, results.DIMENSIONS, TAKEN, "seeds")
    assert set(dimensions(axes)).isdisjoint(TAKEN | set(results.DIMENSIONS))


def test_evaluation_length_is_an_axis(spec: ModelSpec, fields: dict[str, Any], tmp_path: Path) -> None:
    sweep = make_sweep(spec, {"config.evaluation_length": [8, 16]}, fields)
    train_all(sweep, tmp_path)
    dataset = collect(sweep, tmp_path)
    assert dataset.fixed_evaluation_length.values.tolist() == [8, 16]
    assert dataset.evaluation_length.sel(evaluation="fixed_length").values.tolist() == [[8], [16]]


def test_states(spec: ModelSpec, fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = make_sweep(spec, {}, fields)
    folder = tmp_path / sweep.runs[0].id
    assert state(folder) == "waiting"
    write_task(sweep, sweep.runs[0], tmp_path)
    assert state(folder) == "waiting"
    with locks.claim(folder / "task.lock"):
        assert state(folder) == "running"
        work(folder)  # leaves it to the other process
        assert state(folder) == "running"
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ArgumentError, match="is in use by another process; expected a free one"):
            work(folder)
        monkeypatch.delenv("WORLD_SIZE")
    with monkeypatch.context() as patch:
        patch.setattr(sweep_run, "fit", raising(ArgumentError("loss at step 3 is not finite; expected\na finite one")))
        with pytest.raises(ArgumentError):
            work(folder)
    assert state(folder) == "failed"
    assert status(sweep, tmp_path)[0].error == "loss at step 3 is not finite; expected a finite one"
    with monkeypatch.context() as patch:
        patch.setattr(sweep_run, "fit", raising(Stopped("stopped at step 3")))
        with pytest.raises(Stopped):
            work(folder)
    assert state(folder) == "waiting"
    (folder / "run.json").touch()
    assert state(folder) == "stopped"
    (folder / "run.json").unlink()
    work(folder)
    assert state(folder) == "finished"
    (row,) = status(sweep, tmp_path)
    assert (row.state, row.step, row.n_steps, row.error) == ("finished", 4, 4, "")
    with monkeypatch.context() as patch:
        patch.setattr(sweep_run, "fit", raising(AssertionError("trained again")))
        work(folder)


def raising(error: Exception) -> Any:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    return fails


def test_status_reads_the_log(spec: ModelSpec, fields: dict[str, Any], tmp_path: Path) -> None:
    sweep = make_sweep(spec, {}, fields)
    folder = write_task(sweep, sweep.runs[0], tmp_path)
    records = [
        {"step": 0, "train/loss": 3.5, "throughput/tokens_per_s": 16.0},
        {"step": 2, "evaluation/bits_per_byte": 2.0, "train/loss": 3.25},
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 3, "tr')
    with locks.claim(folder / "task.lock"):
        (row,) = status(sweep, tmp_path)
    assert (row.state, row.step, row.n_steps, row.loss, row.tokens_per_s) == ("running", 2, 4, 3.25, 16.0)
    assert row.seconds_left == 2 * 2 * 16 / 16.0
    assert status(sweep, tmp_path)[0].seconds_left is None


def test_status_of_damaged_files(spec: ModelSpec, fields: dict[str, Any], tmp_path: Path) -> None:
    sweep = make_sweep(spec, {}, fields)
    folder = write_task(sweep, sweep.runs[0], tmp_path)
    (folder / "failed.txt").write_bytes(b"out of \xff memory\n")
    good, text = (
        '{"step": 2, "train/loss": 3.25}\n',
        '{"step": 3, "train/loss": "low", "throughput/tokens_per_s": []}\n',
    )
    (folder / "log.jsonl").write_bytes((good + text + "[" * 100_000 + "\n").encode() + b'{"step": "\xff"}\n')
    (row,) = status(sweep, tmp_path)
    assert (row.state, row.step, row.loss, row.tokens_per_s) == ("failed", 3, 3.25, None)
    assert row.error == "out of \N{REPLACEMENT CHARACTER} memory"
    (folder / "task.json").write_text("[" * 100_000)
    with pytest.raises(ArgumentError, match=r"has no task\.json of a run"):
        work(folder)


def test_failed_and_killed_runs_do_not_stop_the_others(
    spec: ModelSpec, fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes of the test's own in place of training: one fails, one is killed, one ends without a word."""
    sweep = make_sweep(spec, {}, fields, [0, 1, 2, 3])
    bad, killed, silent, good = (tmp_path / run.id for run in sweep.runs)
    programs = {
        bad: f"open('{bad}/failed.txt', 'w').write('bad line')\nsys.exit(2)",
        killed: f"open('{killed}/run.json', 'w')\nimport os\nos.kill(os.getpid(), 9)",
        silent: "raise SystemError",
        good: "from varprop import results",
    }
    began: list[Path] = []

    def popen(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        folder = Path(command[-1])
        began.append(folder)
        if folder == good:
            work(folder)
        return original([sys.executable, "-c", f"import sys\n{programs[folder]}"], **options)

    original = subprocess.Popen
    monkeypatch.setattr(sweep_run.subprocess, "Popen", popen)
    lines: list[str] = []
    assert run_sweep(sweep, tmp_path, n_workers=2, report=lines.append) == 1
    assert began == [bad, killed, silent, good]
    assert [state(folder) for folder in began] == ["failed", "stopped", "failed", "finished"]
    assert f"{bad.name} failed: bad line" in lines
    assert f"{killed.name} was killed by signal 9; it goes on at the next call" in lines
    assert f"{silent.name} failed: the process ended with exit code 1; its last lines are in log.txt" in lines
    assert "SystemError" in (silent / "log.txt").read_text()
    assert lines[-1] == "2 failed, 1 stopped, 1 finished of 4"
    del began[:]
    run_sweep(sweep, tmp_path, report=lines.append)
    assert began == [killed]
    del began[:]
    run_sweep(sweep, tmp_path, report=lines.append, retry=True)
    assert began == [bad, killed, silent]


def test_each_process_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert sweep_run._places() == ["2", "5"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(sweep_run.torch.cuda, "device_count", lambda: 3)
    assert sweep_run._places() == ["0", "1", "2"]
    monkeypatch.setattr(sweep_run.torch.cuda, "device_count", lambda: 0)
    assert sweep_run._places() == [None]


def test_a_damaged_result_is_made_again(spec: ModelSpec, fields: dict[str, Any], tmp_path: Path) -> None:
    sweep = make_sweep(spec, {}, fields)
    train_all(sweep, tmp_path)
    folder = tmp_path / sweep.runs[0].id
    whole = results.load(folder / "result.nc")
    (folder / "result.nc").write_bytes((folder / "result.nc").read_bytes()[:-50])
    lines: list[str] = []
    sweep_run._discard_damaged(folder, lines.append)
    assert state(folder) == "stopped"
    assert lines[0].startswith(f"{folder.name} is made again: ")
    work(folder)
    assert results.identical(results.load(folder / "result.nc"), whole)


@pytest.mark.long
def test_killed_processes_and_commands_at_random_times(spec: ModelSpec, fields: dict[str, Any], tmp_path: Path) -> None:
    """The whole command is killed, and single runs; what is collected is the undisturbed sweep."""
    rng = np.random.default_rng(0)
    sweep = make_sweep(spec, {"density": [1.0, 0.5]}, fields | {"n_steps": 300, "checkpoint_every": 20}, [0, 1])
    program = (
        "import json, sys\nfrom varprop.spec import ModelSpec\nfrom varprop.train import sweep_file, sweep_run\n"
        "spec, axes, fields, seeds, folder = map(json.loads, sys.argv[1:])\n"
        "sweep = sweep_file.make_sweep(ModelSpec.from_dict(spec), axes, fields, seeds)\n"
        "sys.exit(sweep_run.run_sweep(sweep, folder, n_workers=2))"
    )
    given = [spec.to_dict(), dict(sweep.axes), fields | {"n_steps": 300, "checkpoint_every": 20}, [0, 1]]
    words = [json.dumps(value) for value in (*given, str(tmp_path / "runs"))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        command = subprocess.Popen([sys.executable, "-c", program, *words], env=environment, stdout=subprocess.DEVNULL)
        time.sleep(float(rng.uniform(5, 20)))
        command.send_signal(number)
        command.wait(timeout=120)
    while any(state(tmp_path / "runs" / run.id) == "running" for run in sweep.runs):  # of a command that was killed
        time.sleep(0.5)
    done = subprocess.run([sys.executable, "-c", program, *words], env=environment, timeout=300)
    assert done.returncode == 0
    train_all(sweep, tmp_path / "whole")
    assert results.identical(collect(sweep, tmp_path / "runs"), collect(sweep, tmp_path / "whole"))
