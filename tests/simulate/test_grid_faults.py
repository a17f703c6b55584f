"""Grids under faults: kills, damaged files, full disks, short memory, several processes at once."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from joblib.externals.loky import get_reusable_executor

from varprop import presets, results
from varprop.errors import ArgumentError, DamagedShardWarning, ReducedBatchWarning, SchemaError
from varprop.simulate import StopRule, assemble, block, grid, help_with, make_plan, run_plan, sample, shards, status

SPEC = presets.tiny().with_fields(n_layers=2, d_model=32, d_ff=48)
AXES: dict[str, Any] = {"density": [1.0, 0.5], "token_correlation": [0.0, 0.5]}
OPTIONS: dict[str, Any] = {"n_networks": 24, "n_tokens": 5, "round_networks": 8}
PROCESSES = multiprocessing.get_context("forkserver")  # imports once: a process starts in no time
PROCESSES.set_forkserver_preload(["varprop.simulate.grid"])


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.nc"))


def program(folder: Path, n_workers: int = 1) -> xr.Dataset:
    axes: dict[str, Any] = {"density": [1.0, 0.5], "model": {"dense": {}, "gqa": {"n_kv_heads": 1}}}
    stop = StopRule(stderr=0.02, min_networks=8)
    return grid(
        SPEC, axes, directory=folder, n_networks=48, n_tokens=4, stop=stop, round_networks=8, n_workers=n_workers
    )


def session(folder: Path, n_workers: int) -> None:
    os.setsid()
    program(folder, n_workers)
    if n_workers > 1:
        get_reusable_executor().shutdown()  # at its end a child of multiprocessing waits for its own children


def start(folder: Path, n_workers: int = 1) -> Any:
    """A process with a session of its own, so that it can be killed with its workers."""
    process = PROCESSES.Process(target=session, args=(folder, n_workers))
    process.start()
    return process


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> xr.Dataset:
    dataset = program(tmp_path_factory.mktemp("undisturbed"))
    assert dataset.n_networks.min() < dataset.n_networks.max()  # the rule decides
    return dataset


@pytest.mark.parametrize(
    "n_kills, n_workers",
    [(4, 1), pytest.param(35, 1, marks=pytest.mark.long), pytest.param(15, 2, marks=pytest.mark.long)],
)
def test_kills_at_random_moments_leave_the_same_dataset(
    n_kills: int, n_workers: int, tmp_path: Path, undisturbed: xr.Dataset
) -> None:
    rng, landed = random.Random(n_kills), 0
    n_files = int(undisturbed.n_networks.sum()) // 8
    while landed < n_kills:
        if len(files(tmp_path)) >= n_files // 2:  # go on from a random part
            for path in rng.sample(files(tmp_path), n_files // 2 - 1):
                path.unlink()
        process, goal = start(tmp_path, n_workers), len(files(tmp_path)) + rng.randrange(3)
        while process.is_alive() and len(files(tmp_path)) < goal:
            time.sleep(0.002)
        process.join(rng.random() * 0.2)
        if process.is_alive() and os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGKILL)
            landed += 1
        process.join()
    assert results.identical(program(tmp_path), undisturbed)
    assert len(files(tmp_path)) == n_files
    # Nothing half written. A kill before the removal of a lock leaves an empty one, which nobody holds.
    assert {path.suffix for path in tmp_path.glob("*/*")} <= {".nc", ".lock"}


def test_two_processes_share_the_work(tmp_path: Path, undisturbed: xr.Dataset) -> None:
    processes = [start(tmp_path) for _ in range(2)]
    seen: dict[Path, int] = {}
    while any(process.is_alive() for process in processes):
        for path in files(tmp_path):
            stamp = path.stat().st_mtime_ns
            assert seen.setdefault(path, stamp) == stamp  # never written again
        time.sleep(0.02)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(files(tmp_path)) == int(undisturbed.n_networks.sum()) // 8
    assert len({results.load(path).attrs["process"] for path in files(tmp_path)}) == 2
    assert results.identical(program(tmp_path), undisturbed)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "other point", "empty"])
def test_damaged_rounds_are_computed_again(damage: str, tmp_path: Path) -> None:
    first = grid(SPEC, AXES, directory=tmp_path, **OPTIONS)
    shards = files(tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in shards}
    whole = shards[0].read_bytes()
    flipped = bytearray(whole)
    value = results.load(shards[0]).second_moment.values[0, -1, -1].tobytes()
    flipped[whole.index(value) + 2] ^= 1
    content = {
        "truncated": whole[: len(whole) // 2],
        "flipped": bytes(flipped),
        "other point": shards[3].read_bytes(),
        "empty": b"",
    }
    shards[0].write_bytes(content[damage])
    plan = make_plan(SPEC, AXES, n_networks=24, n_tokens=5, round_networks=8)
    assert status(plan, tmp_path).damaged == (str(shards[0]),)
    with pytest.warns(DamagedShardWarning, match="computed again") as caught:
        again = grid(SPEC, AXES, directory=tmp_path, **OPTIONS)
    assert len(caught) == 1
    assert results.identical(first, again)
    assert [path for path in shards if path.stat().st_mtime_ns != stamps[path]] == shards[:1]


def hold(path: Path, ready: Any) -> None:
    with shards.claim(path) as mine:
        assert mine
        ready.set()
        time.sleep(600)


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    plan = make_plan(SPEC, {"density": [1.0]}, n_networks=4, n_tokens=5, round_networks=4)
    path = tmp_path / plan.points[0].id / "0-4.nc"
    path.parent.mkdir()
    ready = PROCESSES.Event()
    process = PROCESSES.Process(target=hold, args=(path, ready))
    process.start()
    assert ready.wait(60)
    assert status(plan, tmp_path).running == 1
    assert help_with(plan, tmp_path) == 0  # the other process has the only round
    process.kill()
    process.join()
    assert status(plan, tmp_path).running == 0
    assert help_with(plan, tmp_path) == 1
    assert status(plan, tmp_path).finished == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_whole_rounds_and_the_run_goes_on(small_disk: Path, tmp_path: Path) -> None:
    undisturbed = grid(SPEC, AXES, directory=tmp_path / "undisturbed", **OPTIONS)
    with pytest.raises(ArgumentError, match=r"^[^\n]* cannot be written \(No space left on device\)[^\n]*$"):
        grid(SPEC, AXES, directory=small_disk, **OPTIONS)
    kept = {path: path.stat().st_mtime_ns for path in files(small_disk)}
    assert 0 < len(kept) < 12
    assert {path.suffix for path in small_disk.glob("*/*")} <= {".nc", ".lock"}  # nothing half written
    subprocess.run(["mount", "-o", "remount,size=10m", str(small_disk)], check=True)
    assert results.identical(grid(SPEC, AXES, directory=small_disk, **OPTIONS), undisturbed)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())


def test_without_a_right_to_write_a_finished_grid_is_read(small_disk: Path) -> None:
    options: dict[str, Any] = {"n_networks": 2, "n_tokens": 5}
    first = grid(SPEC, {"density": [0.5]}, directory=small_disk, **options)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert results.identical(grid(SPEC, {"density": [0.5]}, directory=small_disk, **options), first)
    with pytest.raises(ArgumentError, match=r"^directory=.* cannot be written \(Read-only file system\)"):
        grid(SPEC, {"density": [0.4]}, directory=small_disk, **options)


def test_a_write_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same where no disk can be mounted."""
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ArgumentError, match=r"^[^\n]* cannot be written \(No space left on device\)[^\n]*$"):
        grid(SPEC, AXES, directory=tmp_path, **OPTIONS)
    assert not [path for path in tmp_path.glob("*/*") if path.suffix != ".lock"]


def full(*arguments: Any) -> None:
    raise OSError(28, "No space left on device")


def test_short_memory_halves_the_batch_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = grid(SPEC, AXES, directory=tmp_path / "undisturbed", **OPTIONS)
    whole = block._part

    def short(run: Any, number: int, keep: slice) -> Any:
        if keep.stop - keep.start > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(run, number, keep)

    monkeypatch.setattr(block, "_part", short)
    message = "memory was short in 12 rounds: computed in smaller batches; the numbers are the same"
    with pytest.warns(ReducedBatchWarning, match=message):
        reduced = grid(SPEC, AXES, directory=tmp_path / "short", **OPTIONS)
    assert results.identical(reduced, undisturbed)
    plan = make_plan(SPEC, AXES, **OPTIONS)
    assert "memory    short in 12 rounds" in str(status(plan, tmp_path / "short"))
    assert "memory" not in str(status(plan, tmp_path / "undisturbed"))


def test_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(ArgumentError, match="cannot be written"):
        grid(SPEC, AXES, directory=tmp_path / "taken", **OPTIONS)


SMALL: dict[str, Any] = {"n_networks": 4, "n_tokens": 4, "round_networks": 4}


def _without_checksum(path: Path) -> None:
    dataset = results.load(path)
    dataset["second_moment"] = 2 * dataset.second_moment
    dataset.to_netcdf(path, engine="h5netcdf")


DAMAGE: dict[str, Any] = {
    "a variable less": lambda path: results.save(results.load(path).drop_vars("fourth_moment"), path),
    "layers less": lambda path: results.save(results.load(path).isel(layer=[0]), path),
    "no checksum": _without_checksum,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=list(DAMAGE))
def test_rounds_of_another_content_are_computed_again(damage: Any, tmp_path: Path) -> None:
    first = grid(SPEC, {"density": [1.0, 0.5]}, directory=tmp_path, **SMALL)
    damage(files(tmp_path)[0])
    with pytest.warns(DamagedShardWarning):
        assert results.identical(grid(SPEC, {"density": [1.0, 0.5]}, directory=tmp_path, **SMALL), first)


@pytest.mark.parametrize("name", ["notes", "device_name", "torch_version", "method", "seconds"])
def test_rounds_without_their_attributes_are_damaged(name: str, tmp_path: Path) -> None:
    grid(SPEC, {"density": [1.0]}, directory=tmp_path, **SMALL)
    dataset = results.load(files(tmp_path)[0])
    del dataset.attrs[name]
    results.save(dataset, files(tmp_path)[0])
    assert len(status(make_plan(SPEC, {"density": [1.0]}, **SMALL), tmp_path).damaged) == 1


def test_a_fault_that_no_round_has_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise SchemaError("a fault of the whole")

    monkeypatch.setitem(run_plan.__globals__, "assemble", fail)
    with pytest.raises(SchemaError, match="a fault of the whole"):
        grid(SPEC, {"density": [1.0]}, directory=tmp_path, **SMALL)


def test_merge_takes_the_whole_copy_of_a_round(tmp_path: Path) -> None:
    plan = make_plan(SPEC, {"density": [1.0]}, **SMALL)
    first = grid(SPEC, {"density": [1.0]}, directory=tmp_path / "a", **SMALL)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    files(tmp_path / "a")[0].write_bytes(b"")
    for folders in ("ab", "ba"):
        assert results.identical(assemble(plan, [tmp_path / name for name in folders]), first)


def test_time_left_counts_processes_and_looks_leave_no_trace(tmp_path: Path) -> None:
    plan = make_plan(SPEC, {"density": [1.0]}, n_networks=10**9, n_tokens=4, round_networks=4)
    shards.compute(tmp_path, plan.points[0], (0, 4), "cpu")
    folder = tmp_path / plan.points[0].id
    (folder / "4-8.lock").touch()  # left by a killed process
    one = status(plan, tmp_path)
    assert (one.processes, one.running, one.networks_missing) == (0, 0, 10**9 - 4)
    with shards.claim(folder / "4-8.nc"), shards.claim(folder / "8-12.nc"):
        two = status(plan, tmp_path)
        assert (two.processes, two.running) == (2, 1)
        assert two.seconds_left == pytest.approx(one.seconds_left / 2)
    assert not list(folder.glob("8-12.nc"))


def test_integers_of_numpy_in_a_rule_are_kept(tmp_path: Path) -> None:
    rule = StopRule(stderr=0.5, min_networks=np.int64(2), max_networks=np.int32(4))  # type: ignore[arg-type]
    assert '"max_networks": 4' in grid(SPEC, {"density": [1.0]}, directory=tmp_path, stop=rule, **SMALL).attrs["stop"]


def test_the_bar_of_a_halved_block_does_not_overshoot(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, calls = block.block_forward, iter(range(10**6))
    steps: list[int] = []

    def short(*arguments: Any) -> Any:
        if next(calls) == 1:  # in the second layer of the whole block
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*arguments)

    monkeypatch.setattr(block, "block_forward", short)
    monkeypatch.setattr(block.Run, "advance", property(lambda run: lambda: steps.append(1), lambda run, value: None))
    with pytest.warns(ReducedBatchWarning):
        sample(SPEC, n_networks=8, n_tokens=4, backward=True)
    assert len(steps) == 2 * SPEC.n_layers
