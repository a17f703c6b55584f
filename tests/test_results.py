"""results: the schema holds on the way in, on disk and on the way out."""

from __future__ import annotations

import numpy as np
import pytest

from varprop import results
from varprop.errors import ArgumentError, SchemaError

ABOUT = {"spec_json": '{"d_model":4}', "spec_id": "0" * 12, "n_tokens": 8}
DIMS = ("network", "layer", "site")


def values(n: int = 3, seed: int = 0) -> np.ndarray:
    array = np.random.default_rng(seed).random((n, 2, 5))
    array[:, 0, :4] = np.nan
    return array


def result(array: np.ndarray | None = None, **about):
    array = values() if array is None else array
    return results.new({"second_moment": (DIMS, array)}, source="simulation", **{**ABOUT, **about})


def test_new_labels_and_attributes():
    dataset = result(seed_entropy="123")
    assert dataset.site.values.tolist() == list(results.SITES)
    assert dataset.layer.values.tolist() == [0, 1]
    assert set(results.ATTRIBUTES) <= set(dataset.attrs)
    assert dataset.attrs["seed_entropy"] == "123"


def test_variable_named_as_its_dimension_holds_the_labels(tmp_path):
    variables = {"loss": (("intervention",), [1.0, 2.0]), "intervention": (("intervention",), ["skip", "mean"])}
    dataset = results.new(variables, source="checkpoint", **ABOUT)
    again = results.load(results.save(dataset, tmp_path / "result.nc"))
    assert list(again.data_vars) == ["loss"]
    assert again.loss.sel(intervention="mean").item() == 2.0


@pytest.mark.parametrize("dtype", ["float64", "float32", "int64"])
def test_round_trip_is_bitwise(tmp_path, dtype):
    variables = {
        "second_moment": (DIMS, values()),
        "train_loss": (("seed", "step"), np.arange(6).reshape(2, 3).astype(dtype)),
        "name": (("seed",), np.array(["first", "später"])),
    }
    coords = {"step": [0, 10, 2**40]}
    dataset = results.new(variables, source="training", coords=coords, seed_entropy=str(2**100), **ABOUT)
    again = results.load(results.save(dataset, tmp_path / "result.nc"))
    assert results.identical(dataset, again)
    assert again.train_loss.dtype == dtype
    assert {k: str(v) for k, v in again.attrs.items()} == {k: str(v) for k, v in dataset.attrs.items()}


def test_missing_file(tmp_path):
    with pytest.raises(SchemaError, match=r"is missing; expected a result file"):
        results.load(tmp_path / "none.nc")


@pytest.mark.parametrize("keep", [0, 100, 2000, -1])
def test_truncated_file(tmp_path, keep):
    path = results.save(result(), tmp_path / "result.nc")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(SchemaError, match=r"^[^\n]*is truncated or no netCDF-4 file[^\n]*$"):
        results.load(path)


def test_file_of_another_kind(tmp_path):
    path = tmp_path / "text.nc"
    path.write_text("not a result")
    with pytest.raises(SchemaError, match="truncated or no netCDF-4 file"):
        results.load(path)


def test_netcdf_without_our_attributes(tmp_path):
    dataset = result()
    dataset.attrs = {}
    dataset.to_netcdf(tmp_path / "other.nc", engine="h5netcdf")
    with pytest.raises(SchemaError, match=r"other.nc: attribute 'schema_version' is missing"):
        results.load(tmp_path / "other.nc")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_have_to_be_finite(bad):
    array = values()
    array[1, 1, 2] = bad
    with pytest.raises(SchemaError, match=r"second_moment is .*(nan|inf) at network=1, layer=1, site=resid_mid"):
        result(array)


def test_embedding_layer_has_only_resid_post():
    array = values()
    array[0, 0, 4] = np.nan
    with pytest.raises(SchemaError, match="nan at network=0, layer=0, site=resid_post"):
        result(array)
    array = values()
    array[0, 0, 1] = 1.0
    with pytest.raises(SchemaError, match="has values at layer 0 outside resid_post; expected NaN there"):
        result(array)


@pytest.mark.parametrize("dims", [("site", "layer", "network"), ("layer", "network", "site")])
def test_nan_rule_does_not_depend_on_the_order_of_dimensions(dims):
    array = np.moveaxis(values(), range(3), [dims.index(dim) for dim in DIMS])
    results.new({"second_moment": (dims, array)}, source="simulation", **ABOUT)
    array = values()
    array[1, 1, 2] = np.nan
    array = np.moveaxis(array, range(3), [dims.index(dim) for dim in DIMS])
    with pytest.raises(SchemaError, match=r"nan at .*site=resid_mid"):
        results.new({"second_moment": (dims, array)}, source="simulation", **ABOUT)


def test_branches_do_not_exist_at_the_embedding():
    array = np.zeros((2, 2))
    array[0] = np.nan
    variables = {"branch_correlation": (("layer", "branch"), array)}
    assert results.new(variables, source="theory", **ABOUT).branch.values.tolist() == list(results.BRANCHES)
    array[1, 0] = np.nan
    with pytest.raises(SchemaError, match="branch_correlation is nan at layer=1, branch=attn"):
        results.new(variables, source="theory", **ABOUT)


def test_overlaps_of_branches_do_not_exist_at_the_embedding():
    array = np.ones((2, 3, 3))
    array[:, 0], array[:, :, 0] = np.nan, np.nan
    variables = {"branch_overlap": (("branch", "source_layer", "target_layer"), array)}
    results.new(variables, source="training", **ABOUT)
    array[1, 1, 2] = np.nan
    with pytest.raises(SchemaError, match="branch_overlap is nan at branch=mlp, source_layer=1, target_layer=2"):
        results.new(variables, source="training", **ABOUT)
    blocks = np.ones((3, 3))  # of which the embedding is one, or is none
    blocks[0, 1] = np.nan
    with pytest.raises(SchemaError, match="block_overlap is nan at source_layer=0, target_layer=1"):
        results.new({"block_overlap": (("source_layer", "target_layer"), blocks)}, source="training", **ABOUT)


def test_scores_of_layers_that_were_not_measured_are_nan():
    pairs = ("source_layer", "target_layer")
    score, measured = np.full((3, 3), np.nan), np.zeros((3, 3), dtype=bool)
    score[1, 1] = score[2, 2] = 0
    variables = {"permutation_score": (pairs, score), "permutation_measured": (pairs, measured)}
    results.new(variables, source="checkpoint", **ABOUT)
    measured[1, 2] = True
    with pytest.raises(SchemaError, match="permutation_score is nan at source_layer=1, target_layer=2"):
        results.new(variables, source="checkpoint", **ABOUT)
    with pytest.raises(SchemaError, match="permutation_score is nan"):
        results.new({"permutation_score": (pairs, score)}, source="checkpoint", **ABOUT)
    lags = {"permutation_by_lag": (("lag",), [0.0, np.nan, 2.0]), "permutation_lag_pairs": (("lag",), [0, 0, 1])}
    results.new(lags, source="checkpoint", **ABOUT)
    lags["permutation_lag_pairs"] = (("lag",), [0, 1, 1])
    with pytest.raises(SchemaError, match="permutation_by_lag is nan at lag=1"):
        results.new(lags, source="checkpoint", **ABOUT)


@pytest.mark.parametrize("name", ["causal_layer_score", "causal_layer_score_at_initialisation"])
def test_only_the_last_layer_has_none_behind_it(name):
    results.new({name: (("layer",), [np.nan, 1.0, np.nan])}, source="checkpoint", **ABOUT)
    with pytest.raises(SchemaError, match="is nan at layer=1"):
        results.new({name: (("layer",), [np.nan, np.nan, 1.0])}, source="checkpoint", **ABOUT)
    with pytest.raises(SchemaError, match="is nan at layer=2"):
        results.new({"block_influence": (("layer",), [np.nan, 1.0, np.nan])}, source="checkpoint", **ABOUT)


def test_an_unknown_standard_error_is_nan_all_over():
    scores = {"score": (("layer",), [1.0, 2.0, 3.0]), "score_stderr": (("layer",), [np.nan, 0.0, np.nan])}
    results.new(scores, source="checkpoint", **ABOUT)
    scores["score_stderr"] = (("layer",), [np.nan, 0.1, np.nan])
    with pytest.raises(SchemaError, match="score_stderr is nan at layer=2"):
        results.new(scores, source="checkpoint", **ABOUT)
    with pytest.raises(SchemaError, match="score is nan"):
        results.new({"score": ((), np.nan)}, source="checkpoint", **ABOUT)


@pytest.mark.parametrize("name, last", [("weight_norm", "matrix"), ("expert_load", "expert")])
def test_layers_without_a_matrix_or_experts_are_nan_in_every_seed_and_step(name, last):
    array = np.ones((2, 3, 3, 4))
    array[:, :, 0] = np.nan
    array[:, :, 1, slice(None) if last == "expert" else 2] = np.nan
    variables = {name: (("seed", "probe_step", "layer", last), array)}
    results.new(variables, source="training", **ABOUT)
    for steps, first in ((2, 2), (slice(None), 0)):  # one step of a seed, all of them
        array[1, steps, 2, 3] = np.nan
        with pytest.raises(SchemaError, match=f"{name} is nan at seed=1, probe_step={first}, layer=2, {last}=3"):
            results.new(variables, source="training", **ABOUT)


def run_of(**about):
    """Records at 0, 10, 20 and 25 updates, the probe at 0, 20 and 25, evaluations at 0 and 25."""
    moment = np.tile(values()[None], (1, 4, 1, 1, 1))[:, :, 0] * np.arange(1.0, 5.0)[None, :, None, None]
    variables = {
        "second_moment": (("seed", "step", "layer", "site"), moment),
        "attention_entropy": (("seed", "probe_step", "layer"), [[[np.nan, 1.0], [np.nan, 2.0], [np.nan, 3.0]]]),
        "validation_loss": (("seed", "evaluation_step", "evaluation"), [[[4.0, 4.5], [3.0, 3.5]]]),
    }
    coords = {"step": [0, 10, 20, 25], "probe_step": [0, 20, 25], "evaluation_step": [0, 25]}
    coords["evaluation"] = ["fixed_length", "training_length"]
    return results.new(variables, source="training", coords=coords, **{**ABOUT, **about})


@pytest.mark.parametrize("step, entropy, loss", [(None, 3.0, 3.0), (25, 3.0, 3.0), (0, 1.0, 4.0), (20, 2.0, None)])
def test_the_state_at_a_step(step, entropy, loss):
    run = run_of()
    at = results.at_step(run, step)
    results.validate(at)
    chosen = 25 if step is None else step
    assert at.step.item() == chosen
    assert not set(results.STEPS) & set(at.dims)
    assert at.second_moment.equals(run.second_moment.sel(step=chosen))
    assert at.attention_entropy.sel(layer=1).item() == entropy
    assert ("validation_loss" in at) == (loss is not None)
    if loss is not None:
        assert at.validation_loss.sel(evaluation="fixed_length").item() == loss


def test_a_step_that_nothing_was_recorded_at():
    with pytest.raises(SchemaError, match="step=7 was not recorded; expected one of 0, 10, 20, 25"):
        results.at_step(run_of(), 7)
    assert results.at_step(result()).equals(result())


def test_runs_at_one_step_merge():
    runs = [results.at_step(run_of(seed_entropy=str(seed))).assign_coords(seed=[seed]) for seed in (0, 1)]
    assert results.merge(runs, "seed").validation_loss.sizes["seed"] == 2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"source": "guess"}, "source='guess' is unknown"),
        ({"schema_version": 2}, "schema_version=2 is unknown; expected 1"),
        ({"schema_version": "first"}, "schema_version='?first'? is unknown; expected 1"),
        ({"note": [1, 2]}, r"attribute note=\[1, 2\] is not a string or a number"),
        ({"note": True}, "attribute note=True is not a string or a number"),
        ({"note": None}, "attribute note=None is not a string or a number"),
    ],
)
def test_attributes_are_checked(change, message):
    dataset = result()
    dataset.attrs.update(change)
    with pytest.raises(SchemaError, match=message):
        results.validate(dataset)


def test_sites_are_checked():
    with pytest.raises(SchemaError, match="is wrong; expected"):
        results.validate(result().isel(site=[4, 3, 2, 1, 0]))


def test_save_replaces_a_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "result.nc"
    results.save(result(), path)
    newer = result(values(seed=1))
    results.save(newer, path)
    assert results.identical(results.load(path), newer)
    assert [p.name for p in tmp_path.iterdir()] == ["result.nc"]


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = results.save(result(), tmp_path / "result.nc")
    before = path.read_bytes()

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("xarray.Dataset.to_netcdf", full)
    with pytest.raises(ArgumentError, match=r"cannot be written \(No space left on device\)"):
        results.save(result(values(seed=1)), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["result.nc"]


def test_interrupted_write_keeps_the_old_file_and_leaves_nothing_else(tmp_path, monkeypatch):
    path = results.save(result(), tmp_path / "result.nc")
    before = path.read_bytes()

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("xarray.Dataset.to_netcdf", interrupted)
    with pytest.raises(KeyboardInterrupt):
        results.save(result(values(seed=1)), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["result.nc"]


def test_folder_that_does_not_exist(tmp_path):
    with pytest.raises(ArgumentError, match=r"output='.*' cannot be written \(No such file or directory\)"):
        results.save(result(), tmp_path / "none" / "result.nc")


def test_target_that_is_a_folder(tmp_path):
    (tmp_path / "result.nc").mkdir()
    with pytest.raises(ArgumentError, match="cannot be written"):
        results.save(result(), tmp_path / "result.nc")
    assert [p.name for p in tmp_path.iterdir()] == ["result.nc"]


def test_merge_joins_in_order():
    first, second = (result(values(seed=i)).assign_coords(network=[3 * i, 3 * i + 1, 3 * i + 2]) for i in (0, 1))
    joined = results.merge([first, second], "network")
    assert joined.network.values.tolist() == list(range(6))
    assert joined.isel(network=slice(3, 6)).second_moment.equals(second.second_moment)
    assert joined.attrs["spec_id"] == ABOUT["spec_id"]


def test_merge_empties_attributes_that_differ():
    joined = results.merge([result(seed_entropy="1"), result(seed_entropy="2")], "network")
    assert joined.attrs["seed_entropy"] == ""


def test_merge_of_nothing():
    with pytest.raises(SchemaError, match="expected at least one result"):
        results.merge([], "network")


def test_merge_of_other_layers_is_an_error_of_ours():
    longer = np.concatenate([values(), values()[:, 1:]], axis=1)
    with pytest.raises(SchemaError, match="layer"):
        results.merge([result(), result(longer)], "network")


def test_identical_looks_at_variables_and_lasting_attributes():
    one, other = result(), result()
    other.attrs["created_at"] = other.attrs["command"] = "another"
    assert results.identical(one, other)
    other.attrs["device"] = "cuda"
    assert not results.identical(one, other)
    changed = result()
    changed.second_moment[0, 1, 1] += 1e-16
    changed.second_moment[0, 1, 1] *= 1 + 1e-15
    assert not results.identical(one, changed)


def test_identical_sees_an_attribute_of_either_side():
    one, other = result(), result()
    other.attrs["note"] = "only here"
    assert results.identical(one, other) == results.identical(other, one)


GRID = {"axes": "{}"}


def padded():
    """Two points: two networks and three, one layer and two; the second has gates."""
    moment, gates = np.full((2, 3, 3, 5), np.nan), np.full((2, 3, 3), np.nan)
    for point, (networks, layers) in enumerate([(2, 1), (3, 2)]):
        moment[point, :networks, : layers + 1, 4] = 1.0
        moment[point, :networks, 1 : layers + 1] = 2.0
    gates[1, :, 1:] = 0.5
    return {
        "second_moment": (("density", *DIMS), moment),
        "gate_second_moment": (("density", "network", "layer"), gates),
        "n_networks": (("density",), [2, 3]),
        "last_layer": (("density",), [1, 2]),
    }


def grid_of(variables, attributes=GRID):
    return results.new(variables, source="simulation", coords={"density": [1.0, 0.5]}, attributes=attributes, **ABOUT)


def test_points_of_different_extent_are_nan_exactly_beyond_it(tmp_path):
    dataset = grid_of(padded())
    assert results.identical(results.load(results.save(dataset, tmp_path / "grid.nc")), dataset)
    first, second = (results.present(dataset.sel(density=density)) for density in (1.0, 0.5))
    assert dict(first.sizes) == {"network": 2, "layer": 2, "site": 5}
    assert list(first.data_vars) == ["second_moment"]
    assert dict(second.sizes) == {"network": 3, "layer": 3, "site": 5}
    assert list(second.data_vars) == ["second_moment", "gate_second_moment"]
    for point in (first, second):
        results.validate(point)
    assert results.present(dataset) is not None
    assert dict(results.present(dataset).sizes) == dict(dataset.sizes)


@pytest.mark.parametrize(
    "name, index, value, message",
    [
        ("second_moment", (0, 2, 1, 4), 1.0, "second_moment has values beyond n_networks"),
        ("second_moment", (0, 1, 2, 4), 1.0, "second_moment has values beyond last_layer"),
        ("second_moment", (0, 1, 1, 3), np.nan, "nan at density=1.0, network=1, layer=1, site=mlp_out"),
        ("second_moment", (1, 2, 2, 4), np.nan, "nan at density=0.5, network=2, layer=2, site=resid_post"),
        ("gate_second_moment", (1, 0, 1), np.nan, "gate_second_moment is nan at density=0.5"),
        ("gate_second_moment", (0, 0, 1), 0.5, "gate_second_moment is nan at density=1.0"),
    ],
)
def test_nan_elsewhere_and_values_beyond_are_seen(name, index, value, message):
    variables = padded()
    variables[name][1][index] = value
    with pytest.raises(SchemaError, match=message):
        grid_of(variables)


def test_without_extents_or_axes_nothing_may_be_absent():
    variables = padded()
    del variables["n_networks"], variables["last_layer"]
    with pytest.raises(SchemaError, match="second_moment is nan"):
        grid_of(variables)
    with pytest.raises(SchemaError, match="gate_second_moment is nan"):
        grid_of(padded(), attributes={})
    with pytest.raises(SchemaError, match="n_networks is no array of integers"):
        grid_of({**padded(), "n_networks": (("density",), [2.0, 3.0])})


def test_merge_of_grids_keeps_what_is_absent():
    joined = results.merge([grid_of(padded()), grid_of(padded())], "network")
    first = results.present(joined.sel(density=1.0))
    assert first.network.values.tolist() == [0, 1, 0, 1]
    assert results.present(joined.sel(density=0.5)).sizes["network"] == 6


def test_a_flipped_bit_of_a_value_or_an_attribute_is_seen(tmp_path):
    path = results.save(result(seed_entropy="a seed to find"), tmp_path / "result.nc")
    whole = path.read_bytes()
    for found in (values()[1, 1, 2].tobytes(), b"a seed to find", b"resid_mid"):
        changed = bytearray(whole)
        changed[whole.index(found)] ^= 1
        path.write_bytes(changed)
        with pytest.raises(SchemaError, match=r"damaged|wrong|truncated"):
            results.load(path)
    path.write_bytes(whole)
    results.load(path)


def test_checksums_are_those_of_identical_results():
    dataset = result()
    same = dataset.assign_attrs(created_at="later", command="another")
    assert results.checksum(dataset) == results.checksum(same)
    seen = {results.checksum(dataset)}
    changed = dataset.copy(deep=True)
    changed.second_moment[0, 1, 1] = np.nextafter(changed.second_moment[0, 1, 1], 2)
    for other in (changed, dataset.assign_attrs(device="cuda"), dataset.assign_coords(network=[0, 1, 3])):
        seen.add(results.checksum(other))
    seen.add(results.checksum(dataset.rename(second_moment="variance")))
    seen.add(results.checksum(dataset.transpose("layer", "network", "site")))
    assert len(seen) == 6


def test_a_file_without_a_checksum_is_read(tmp_path):
    dataset = result()
    dataset.to_netcdf(tmp_path / "old.nc", engine="h5netcdf")
    assert results.identical(results.load(tmp_path / "old.nc"), dataset)


def test_zarr_round_trip_replaces_whole_stores(tmp_path):
    pytest.importorskip("zarr", reason="zarr is not installed")
    path = tmp_path / "grid.zarr"
    for dataset in (result(), grid_of(padded())):
        results.save(dataset, path)
        assert results.identical(results.load(path), dataset)
        assert [p.name for p in tmp_path.iterdir()] == ["grid.zarr"]
    chunk = max((p for p in path.glob("second_moment/*") if p.is_file()), key=lambda p: p.stat().st_size, default=None)
    chunk = chunk or max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    chunk.write_bytes(chunk.read_bytes()[:-1])
    with pytest.raises(SchemaError, match=r"truncated or no zarr store|damaged|is nan"):
        results.load(path)


def test_zarr_where_it_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ArgumentError, match=r"zarr is not installed; expected a .nc file, or zarr"):
        results.save(result(), tmp_path / "result.zarr")
    assert not list(tmp_path.iterdir())
