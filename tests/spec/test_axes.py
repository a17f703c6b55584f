"""Axes of grids: combinations, named sets of changes, labels; what is no axis."""

from __future__ import annotations

import json

import numpy as np
import pytest

from varprop import presets, theory
from varprop.errors import ArgumentError, VarpropError
from varprop.spec.axes import axes_json, combinations, dimensions

AXES = {"density": np.array([1.0, 0.5]), "model": {"dense": {}, "gqa": {"n_kv_heads": np.int64(1), "d_ff": 48}}}


def test_named_sets_of_changes_combine_with_fields() -> None:
    assert combinations(AXES) == [
        {"density": 1.0},
        {"density": 1.0, "n_kv_heads": 1, "d_ff": 48},
        {"density": 0.5},
        {"density": 0.5, "n_kv_heads": 1, "d_ff": 48},
    ]
    assert dimensions(AXES) == {"density": [1.0, 0.5], "model": ["dense", "gqa"]}
    assert json.loads(axes_json(AXES)) == {
        "density": [1.0, 0.5],
        "model": {"dense": {}, "gqa": {"n_kv_heads": 1, "d_ff": 48}},
    }


def test_theory_takes_the_same_axes_but_no_depths() -> None:
    spec = presets.tiny().with_fields(n_layers=2)
    predicted = theory.predict(spec, n_tokens=8, over=AXES)
    alone = theory.predict(spec.with_fields(density=0.5, n_kv_heads=1, d_ff=48), n_tokens=8)
    point = predicted.sel(density=0.5, model="gqa").second_moment.values
    np.testing.assert_allclose(point, alone.second_moment.values, rtol=1e-12)
    for axes in ({"n_layers": [1, 2]}, {"model": {"deep": {"n_layers": 4}}}):
        assert combinations(axes, depths=True)
        with pytest.raises(VarpropError, match="is not an axis, as profiles differ in length"):
            theory.predict(spec, n_tokens=8, over=axes)


@pytest.mark.parametrize(
    "axes, message",
    [
        ({1: [2]}, "axes=1 is not a field name"),
        ({"density": 0.5}, "axes.density=0.5 is not a sequence"),
        ({"density": [0.5, np.float64(0.5)]}, "repeats a value"),
        ({"density": [object()]}, "axes.density has a value that is no field's"),
        ({"model": {}}, "axes.model={} is empty"),
        ({"model": {"a": [1]}}, r"axes.model.a=\[1\] is no set of changes"),
        ({"model": {"a": {"d_ff": np.zeros(3)}}}, "axes.model has a value that is no field's"),
        ({"a": {"x": {"d_ff": 1}}, "b": {"y": {"d_ff": 2}}}, "axes='d_ff' is changed by two axes"),
    ],
)
def test_what_is_no_axis(axes: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        combinations(axes)
