"""Grids under faults: kills, damaged files, full disks, short memory, several processes at once."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import xarray as xr

from varprop import presets, results
from varprop.errors import ArgumentError, DamagedShardWarning, ReducedBatchWarning
from varprop.simulate import StopRule, block, grid, help_with, make_plan, shards, status

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
    [(4, 1), pytest.param(25, 1, marks=pytest.mark.long), pytest.param(25, 2, marks=pytest.mark.long)],
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
    assert not list(tmp_path.glob("*/*.lock"))


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
    options = {"n_networks": 2, "n_tokens": 5}
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
