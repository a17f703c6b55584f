"""`grid`: points are the same alone, in any grid and on any number of workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from varprop import presets, results
from varprop.errors import ArgumentError, SpecError
from varprop.simulate import grid, sample, text_tokens

SPEC = presets.tiny().with_fields(n_layers=2, d_model=32, d_ff=48)
AXES: dict[str, Any] = {"density": [1.0, 0.5], "token_correlation": [0.0, 0.5]}


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.nc"))


def test_points_are_those_of_sample_in_labelled_dimensions(tmp_path: Path) -> None:
    dataset = grid(SPEC, AXES, directory=tmp_path, n_networks=11, n_tokens=5, seed=2, round_networks=4)
    assert dict(dataset.sizes)["density"] == 2
    assert len(files(tmp_path)) == 4 * 3
    for density in AXES["density"]:
        for correlation in AXES["token_correlation"]:
            alone = sample(
                SPEC.with_fields(density=density), n_networks=11, n_tokens=5, token_correlation=correlation, seed=2
            )
            point = results.present(dataset.sel(density=density, input_token_correlation=correlation))
            assert point.equals(alone)
            same = set(alone.attrs) - {*results.VOLATILE_ATTRIBUTES, "torch_version"}  # a grid has it in `made_with`
            assert {name: point.attrs[name] for name in same} == {name: alone.attrs[name] for name in same}
            assert set(point.attrs) - set(alone.attrs) == {"made_with"}
    saved = results.save(dataset, tmp_path / "grid.nc")
    assert results.identical(results.load(saved), dataset)


def test_any_number_of_workers_and_any_larger_grid(tmp_path: Path) -> None:
    one = grid(SPEC, AXES, directory=tmp_path / "one", n_networks=3, n_tokens=5)
    two = grid(SPEC, AXES, directory=tmp_path / "two", n_networks=3, n_tokens=5, n_workers=2, round_networks=1)
    assert results.identical(one, two)
    part = grid(SPEC, {"density": [0.5]}, directory=tmp_path / "part", n_networks=3, n_tokens=5)
    inside = one.sel(density=[0.5], input_token_correlation=0.0)
    assert part.equals(inside.drop_vars("input_token_correlation"))


def test_a_larger_grid_reuses_the_rounds_of_a_smaller_one(tmp_path: Path) -> None:
    options: dict[str, Any] = {"n_tokens": 5, "round_networks": 4}
    grid(SPEC, {"density": [0.5]}, directory=tmp_path, n_networks=6, **options)
    stamps = {path: path.stat().st_mtime_ns for path in files(tmp_path)}
    more = grid(SPEC, {"density": [1.0, 0.5]}, directory=tmp_path, n_networks=10, **options)
    assert [path.name for path in stamps] == ["0-4.nc", "4-6.nc"]
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    fewer = grid(SPEC, {"density": [1.0]}, directory=tmp_path, n_networks=3, **options)
    for density, n_networks, dataset in ((0.5, 10, more), (1.0, 10, more), (1.0, 3, fewer)):
        alone = sample(SPEC.with_fields(density=density), n_networks=n_networks, n_tokens=5)
        assert results.present(dataset.sel(density=density)).equals(alone)


def test_points_of_other_arguments_are_not_reused(tmp_path: Path) -> None:
    for arguments in ({}, {"seed": 1}, {"dtype": "float64"}, {"token_correlation": 0.5}, {"n_tokens": 4}):
        grid(SPEC, {"density": [0.5]}, directory=tmp_path, n_networks=2, **({"n_tokens": 5} | arguments))
    grid(SPEC, {"density": [0.5]}, directory=tmp_path, n_networks=2, n_tokens=5, token_correlation=0)
    assert len(files(tmp_path)) == 5


def test_models_and_depths_side_by_side(tmp_path: Path) -> None:
    mixture = {"feed_forward": None, "n_experts": 4, "top_k": 2, "d_expert": 16}
    axes: dict[str, Any] = {"model": {"dense": {}, "moe": mixture, "no attention": {"attention": None}}}
    axes["n_layers"] = [1, 3]
    dataset = grid(SPEC, axes, directory=tmp_path, n_networks=2, n_tokens=5)
    assert dataset.last_layer.values.tolist() == [[1, 3]] * 3
    for label, changes in axes["model"].items():
        for n_layers in (1, 3):
            alone = sample(SPEC.with_fields(changes).with_fields(n_layers=n_layers), n_networks=2, n_tokens=5)
            point = results.present(dataset.sel(model=label, n_layers=n_layers))
            assert point.equals(alone)
    assert results.identical(results.load(results.save(dataset, tmp_path / "grid.nc")), dataset)


@pytest.mark.parametrize("options", [{"backward": True}, {"method": "gram"}, {"text": 3}], ids=str)
def test_points_of_other_kinds_are_those_of_sample(options: dict[str, Any], tmp_path: Path) -> None:
    axes = {"n_tokens": [4, 40], "density": [1.0, 0.5]}
    dataset = grid(SPEC, axes, directory=tmp_path, n_networks=3, round_networks=2, seed=1, **options)
    given = {name: value for name, value in options.items() if name != "text"}
    for n_tokens in axes["n_tokens"]:
        read: dict[str, Any] = {"n_tokens": n_tokens}
        if "text" in options:
            read = {"inputs": text_tokens(n_tokens, n_sequences=3, seed=1)}
        alone = sample(SPEC.with_fields(density=0.5), n_networks=3, seed=1, **read, **given)
        point = results.present(dataset.sel(n_tokens=n_tokens, density=0.5))
        assert point.equals(alone)
        for name in ("method_error", "method_spread_error", "inputs", "n_sequences", "spec_id", "n_tokens"):
            assert point.attrs[name] == alone.attrs[name]
    again = results.load(results.save(dataset, tmp_path / "grid.nc"))
    assert results.identical(again, dataset)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_process_a_gpu(tmp_path: Path) -> None:
    options: dict[str, Any] = {"n_networks": 600, "n_tokens": 5, "device": "cuda"}
    dataset = grid(SPEC, {"density": [1.0, 0.5]}, directory=tmp_path, n_workers=2, **options)
    alone = sample(SPEC.with_fields(density=0.5), **options)
    assert results.present(dataset.sel(density=0.5)).equals(alone)
    assert dataset.attrs["device"] == "cuda"
    assert torch.cuda.get_device_name() in dataset.attrs["made_with"]
    assert len({results.load(path).attrs["process"] for path in files(tmp_path)}) == 2


def test_axes_of_run_arguments_widths_and_equal_specs(tmp_path: Path) -> None:
    axes = {"d_model": np.array([16, 32]), "n_kv_heads": [None, 4], "n_tokens": [2, 3]}
    dataset = grid(SPEC, axes, directory=tmp_path, n_networks=2, n_tokens=64)
    assert dataset.second_moment.dims[:3] == ("d_model", "n_kv_heads", "n_tokens")
    assert list(dataset.n_kv_heads.values) == ["null", "4"]
    assert dataset.attrs["n_tokens"] == ""
    assert len(files(tmp_path)) == 4  # 4 of 4 heads is multi-head: one point for both labels
    np.testing.assert_array_equal(dataset.second_moment[:, 0], dataset.second_moment[:, 1])


@pytest.mark.parametrize(
    "axes, arguments, error, message",
    [
        ({"network": [1, 2]}, {"n_tokens": 2}, ArgumentError, "axes='network' is the name of a dimension"),
        ({"model": {}}, {"n_tokens": 2}, ArgumentError, "axes.model={} is empty"),
        ({"model": {"dense": 1}}, {"n_tokens": 2}, ArgumentError, "axes.model.dense=1 is no set of changes"),
        ({"model": {"a": {"colour": 1}}}, {"n_tokens": 2}, SpecError, "colour is an unknown field"),
        (
            {"density": [0.5], "model": {"a": {"density": 0.1}}},
            {"n_tokens": 2},
            ArgumentError,
            "axes='density' is changed by two axes",
        ),
        ({f"axis{i}": {"a": {}, "b": {}} for i in range(30)}, {"n_tokens": 2}, ArgumentError, "is too many points"),
        (
            {"token_correlation": [0.5], "input_token_correlation": {"a": {}}},
            {"n_tokens": 2},
            ArgumentError,
            "axes='input_token_correlation' is the dimension of another axis",
        ),
        ({"n_tokens": [[1, 2]]}, {"text": 2}, ArgumentError, "n_tokens=.* is outside the domain"),
        ({"n_tokens": [8, [8]]}, {"text": 2}, ArgumentError, "n_tokens=.* is outside the domain"),
        ({"density": []}, {"n_tokens": 2}, ArgumentError, r"axes.density=\[\] is empty or repeats"),
        ({"density": [0.5, 0.5]}, {"n_tokens": 2}, ArgumentError, "repeats a value"),
        ({"density": [0.5, 2.0]}, {"n_tokens": 2}, SpecError, "density=2.0 is outside"),
        ({"n_kv_heads": [3]}, {"n_tokens": 2}, SpecError, "n_kv_heads=3 is not a divisor"),
        ({"colour": [1]}, {"n_tokens": 2}, SpecError, "colour is an unknown field"),
        ({"density": [0.5]}, {}, ArgumentError, "n_tokens=None is missing"),
        ({"token_correlation": [0.5, 2]}, {"n_tokens": 2}, ArgumentError, "token_correlation=2 is outside"),
        ({"density": [0.5]}, {"n_tokens": 2, "n_workers": 0}, ArgumentError, "n_workers=0 is outside"),
        ({"density": [0.5]}, {"n_tokens": 2, "devices": ["meta"]}, ArgumentError, "devices='meta' is"),
        ({"density": [0.5]}, {"n_tokens": 2, "method": "guess"}, ArgumentError, "method='guess' is unknown"),
        ({"density": [0.5]}, {"n_tokens": 2, "round_networks": 0}, ArgumentError, "round_networks=0 is outside"),
        ({"density": [0.5]}, {"n_tokens": 2, "device": "abacus"}, ArgumentError, "device='abacus' is not available"),
    ],
)
def test_bad_arguments_raise_before_anything_runs(
    axes: dict[str, Any], arguments: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        grid(SPEC, axes, directory=tmp_path / "points", n_networks=1, **arguments)
    assert not (tmp_path / "points").exists()
