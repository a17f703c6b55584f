"""`grid`: points are the same alone, in any grid and on any number of workers; finished ones kept, damaged redone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from varprop import presets, results
from varprop.errors import ArgumentError, SpecError
from varprop.simulate import grid, sample

SPEC = presets.tiny().with_fields(n_layers=2, d_model=32, d_ff=48)
AXES: dict[str, Any] = {"density": [1.0, 0.5], "token_correlation": [0.0, 0.5]}


def test_points_are_those_of_sample_in_labelled_dimensions(tmp_path: Path) -> None:
    dataset = grid(SPEC, AXES, directory=tmp_path, n_networks=3, n_tokens=5, seed=2)
    assert dict(dataset.sizes)["density"] == 2
    for density in AXES["density"]:
        for correlation in AXES["token_correlation"]:
            alone = sample(
                SPEC.with_fields(density=density), n_networks=3, n_tokens=5, token_correlation=correlation, seed=2
            )
            point = dataset.sel(density=density, input_token_correlation=correlation)
            assert point.drop_vars(["density", "input_token_correlation"]).equals(alone)
    saved = results.save(dataset, tmp_path / "grid.nc")
    assert results.identical(results.load(saved), dataset)


def test_any_number_of_workers_and_any_larger_grid(tmp_path: Path) -> None:
    one = grid(SPEC, AXES, directory=tmp_path / "one", n_networks=3, n_tokens=5)
    two = grid(SPEC, AXES, directory=tmp_path / "two", n_networks=3, n_tokens=5, n_workers=2)
    assert results.identical(one, two)
    part = grid(SPEC, {"density": [0.5]}, directory=tmp_path / "part", n_networks=3, n_tokens=5)
    inside = one.sel(density=[0.5], input_token_correlation=0.0)
    assert part.equals(inside.drop_vars("input_token_correlation"))


def test_finished_points_are_kept_and_damaged_ones_redone(tmp_path: Path) -> None:
    first = grid(SPEC, AXES, directory=tmp_path, n_networks=2, n_tokens=5)
    files = sorted(tmp_path.glob("*.nc"))
    assert len(files) == 4
    whole, other = files[0].read_bytes(), files[1].read_bytes()
    stamps = {path: path.stat().st_mtime_ns for path in files}
    files[0].write_bytes(whole[: len(whole) // 2])
    files[1].write_bytes(files[2].read_bytes())  # valid, but of another point
    again = grid(SPEC, AXES, directory=tmp_path, n_networks=2, n_tokens=5)
    assert results.identical(first, again)
    kept = [path for path in files if path.stat().st_mtime_ns == stamps[path]]
    assert kept == files[2:]
    assert len(other) > 0


def test_points_of_other_arguments_are_not_reused(tmp_path: Path) -> None:
    for arguments in ({"n_networks": 2}, {"n_networks": 3}, {"n_networks": 2, "seed": 1}):
        grid(SPEC, {"density": [0.5]}, directory=tmp_path, n_tokens=5, **arguments)
    grid(SPEC, {"density": [0.5]}, directory=tmp_path, n_networks=2, n_tokens=5, token_correlation=0)
    assert len(list(tmp_path.glob("*.nc"))) == 3


def test_axes_of_run_arguments_widths_and_equal_specs(tmp_path: Path) -> None:
    axes = {"d_model": np.array([16, 32]), "n_kv_heads": [None, 4], "n_tokens": [2, 3]}
    dataset = grid(SPEC, axes, directory=tmp_path, n_networks=2, n_tokens=64)
    assert dataset.second_moment.dims[:3] == ("d_model", "n_kv_heads", "n_tokens")
    assert list(dataset.n_kv_heads.values) == ["null", "4"]
    assert dataset.attrs["n_tokens"] == ""
    assert len(list(tmp_path.glob("*.nc"))) == 4  # 4 of 4 heads is multi-head: one point for both labels
    np.testing.assert_array_equal(dataset.second_moment[:, 0], dataset.second_moment[:, 1])


@pytest.mark.parametrize(
    "axes, arguments, error, message",
    [
        ({"n_layers": [1, 2]}, {"n_tokens": 2}, ArgumentError, "axes='n_layers' is not an axis"),
        ({"density": []}, {"n_tokens": 2}, ArgumentError, r"axes.density=\[\] is empty or repeats"),
        ({"density": [0.5, 0.5]}, {"n_tokens": 2}, ArgumentError, "repeats a value"),
        ({"density": [0.5, 2.0]}, {"n_tokens": 2}, SpecError, "density=2.0 is outside"),
        ({"n_kv_heads": [3]}, {"n_tokens": 2}, SpecError, "n_kv_heads=3 is not a divisor"),
        ({"colour": [1]}, {"n_tokens": 2}, SpecError, "colour is an unknown field"),
        ({"density": [0.5]}, {}, ArgumentError, "n_tokens=None is missing"),
        ({"token_correlation": [0.5, 2]}, {"n_tokens": 2}, ArgumentError, "token_correlation=2 is outside"),
        ({"density": [0.5]}, {"n_tokens": 2, "n_workers": 0}, ArgumentError, "n_workers=0 is outside"),
        ({"density": [0.5]}, {"n_tokens": 2, "device": "abacus"}, ArgumentError, "device='abacus' is not available"),
    ],
)
def test_bad_arguments_raise_before_anything_runs(
    axes: dict[str, Any], arguments: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        grid(SPEC, axes, directory=tmp_path / "points", n_networks=1, **arguments)
    assert not (tmp_path / "points").exists()


def test_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(ArgumentError, match="cannot be made"):
        grid(SPEC, AXES, directory=tmp_path / "taken", n_networks=1, n_tokens=2)


PROGRAM = """
import sys
from varprop import presets
from varprop.simulate import grid
spec = presets.tiny().with_fields(n_layers=2, d_model=32, d_ff=48)
grid(spec, {"density": [n / 40 for n in range(1, 41)]}, directory=sys.argv[1], n_networks=40, n_tokens=5)
"""


def test_a_kill_loses_one_point(tmp_path: Path) -> None:
    folder = tmp_path / "points"
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(folder)], env={**os.environ})
    while len(list(folder.glob("*.nc"))) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("*.nc")}
    assert 3 <= len(finished) < 40
    for path in finished:
        results.load(path)
    axes = {"density": [n / 40 for n in range(1, 41)]}
    resumed = grid(SPEC, axes, directory=folder, n_networks=40, n_tokens=5)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in finished.items())
    clean = sample(SPEC.with_fields(density=0.5), n_networks=40, n_tokens=5)
    assert resumed.sel(density=0.5).drop_vars("density").equals(clean)
