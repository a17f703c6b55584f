"""Grids under faults: kills, damaged files, full disks, short memory, several processes at once."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from varprop import presets, results
from varprop.errors import ArgumentError, DamagedShardWarning
from varprop.simulate import grid
from varprop.simulate.collect import status
from varprop.simulate.plan import make_plan

SPEC = presets.tiny().with_fields(n_layers=2, d_model=32, d_ff=48)
AXES: dict[str, Any] = {"density": [1.0, 0.5], "token_correlation": [0.0, 0.5]}
OPTIONS: dict[str, Any] = {"n_networks": 24, "n_tokens": 5, "round_networks": 8}
PROGRAM = """
import sys
from varprop import presets
from varprop.simulate import StopRule, grid
spec = presets.tiny().with_fields(n_layers=2, d_model=32, d_ff=48)
axes = {"density": [1.0, 0.5], "n_tokens": [4, 8, 16], "model": {"dense": {}, "gqa": {"n_kv_heads": 1}}}
stop = StopRule(stderr=0.015, min_networks=8)
grid(spec, axes, directory=sys.argv[1], n_networks=96, stop=stop, round_networks=8, n_workers=int(sys.argv[2]))
"""


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.nc"))


def start(folder: Path, n_workers: int = 1) -> subprocess.Popen[bytes]:
    """A process of its own session, so that it can be killed with its workers."""
    return subprocess.Popen([sys.executable, "-c", PROGRAM, str(folder), str(n_workers)], start_new_session=True)


def whole_program(folder: Path) -> Any:
    """What `PROGRAM` gives, from what is in the folder."""
    from varprop.simulate import StopRule

    axes = {"density": [1.0, 0.5], "n_tokens": [4, 8, 16], "model": {"dense": {}, "gqa": {"n_kv_heads": 1}}}
    stop = StopRule(stderr=0.015, min_networks=8)
    return grid(SPEC, axes, directory=folder, n_networks=96, stop=stop, round_networks=8)


@pytest.mark.parametrize(
    "n_kills, n_workers",
    [(4, 1), pytest.param(25, 1, marks=pytest.mark.long), pytest.param(25, 2, marks=pytest.mark.long)],
)
def test_kills_at_random_moments_leave_the_same_dataset(n_kills: int, n_workers: int, tmp_path: Path) -> None:
    undisturbed = whole_program(tmp_path / "undisturbed")
    n_networks = undisturbed.n_networks.values
    assert n_networks.min() < n_networks.max()  # the rule decides
    rng, folder = random.Random(n_kills), tmp_path / "killed"
    n_files, landed = len(files(tmp_path / "undisturbed")), 0
    while landed < n_kills:
        process = start(folder, n_workers)
        goal = len(files(folder)) + 1
        while process.poll() is None and len(files(folder)) < min(goal, n_files):
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            landed += 1
        process.wait()
        if len(files(folder)) >= n_files - n_workers:  # begin again from a random part
            for path in rng.sample(files(folder), 3 * n_files // 4):
                path.unlink()
    assert results.identical(whole_program(folder), undisturbed)
    assert len(files(folder)) == n_files
    assert not list(folder.glob("*/*.part")) or n_kills  # what a kill leaves half written has another name


def test_two_processes_share_the_work(tmp_path: Path) -> None:
    undisturbed = whole_program(tmp_path / "undisturbed")
    folder = tmp_path / "shared"
    processes = [start(folder) for _ in range(2)]
    seen: dict[Path, int] = {}
    while any(process.poll() is None for process in processes):
        for path in files(folder):
            assert seen.setdefault(path, path.stat().st_ino) == path.stat().st_ino  # never written again
        time.sleep(0.01)
    assert [process.returncode for process in processes] == [0, 0]
    assert results.identical(whole_program(folder), undisturbed)
    assert len(files(folder)) == len(files(tmp_path / "undisturbed"))
    workers = {results.load(path).attrs["process"] for path in files(folder)}
    assert len(workers) == 2


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


def test_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(ArgumentError, match="cannot be written"):
        grid(SPEC, AXES, directory=tmp_path / "taken", **OPTIONS)
