"""Axes of a grid: field names and their values, checked, combined and labelled alike by all who read a spec.

An axis is a field name with a sequence of values, or a name of its own with named sets of changes,
`model = {"dense": {}, "moe": {"feed_forward": None, "n_experts": 8, "top_k": 2}}`.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from varprop.errors import ArgumentError, require

Axis = Sequence[Any] | Mapping[str, Mapping[str, Any]]
Axes = Mapping[str, Axis]
RENAMED = {
    "token_correlation": "input_token_correlation",
    "learning_rate": "peak_learning_rate",
    "evaluation_length": "fixed_evaluation_length",
}
"""Dimension of an axis whose own name is that of a variable."""
CONFIG = "config."
"""Begins the name of a field that is not the spec's but of how a model is trained."""
MAX_POINTS = 10**6
DOMAIN = "at least one value, all distinct"


def combinations(axes: Axes, *, depths: bool = False) -> list[dict[str, Any]]:
    """Every combination as field name -> plain value, the last axis fastest; `ArgumentError` for an unfit axis.

    depths: whether the number of layers may differ.
    """
    choices = [_choices(name, values) for name, values in axes.items()]
    n_points = math.prod(map(len, choices))
    require(n_points <= MAX_POINTS, ArgumentError, "axes", n_points, "too many points", f"at most {MAX_POINTS}")
    wrong = "not an axis, as profiles differ in length"
    for name, sets in zip(axes, choices, strict=True):
        good = depths or not any("n_layers" in changes for changes in sets)
        require(good, ArgumentError, "axes", name, wrong, "one grid per n_layers")
    fields = [field for sets in choices for field in {field: None for changes in sets for field in changes}]
    twice = next((field for field in fields if fields.count(field) > 1), None)
    require(twice is None, ArgumentError, "axes", twice, "changed by two axes", "one axis for each field")
    return [
        {field: value for changes in combination for field, value in changes.items()}
        for combination in itertools.product(*choices)
    ]


def _choices(name: Any, values: Any) -> list[dict[str, Any]]:
    """The changes that each value of an axis stands for."""
    require(isinstance(name, str), ArgumentError, "axes", name, "not a field name", "a string")
    if isinstance(values, Mapping):
        require(len(values) > 0, ArgumentError, f"axes.{name}", {}, "empty", "at least one named set of changes")
        for label, changes in values.items():
            good = isinstance(label, str) and isinstance(changes, Mapping)
            require(good, ArgumentError, f"axes.{name}.{label}", changes, "no set of changes", "field: value")
        _json_texts(name, values.values())
        return [{field: plain(value) for field, value in changes.items()} for changes in values.values()]
    sequence = isinstance(values, Sequence) or hasattr(values, "tolist")
    good = sequence and not isinstance(values, str)
    require(good, ArgumentError, f"axes.{name}", values, "not a sequence", DOMAIN)
    _json_texts(name, values)
    labels = _labels([plain(value) for value in values])
    distinct = 0 < len(set(labels)) == len(labels)
    require(distinct, ArgumentError, f"axes.{name}", list(values), "empty or repeats a value", DOMAIN)
    return [{name: plain(value)} for value in values]


def _json_texts(name: str, values: Iterable[Any]) -> list[str]:
    try:
        return [json.dumps(value, default=plain) for value in values]
    except (TypeError, ValueError):  # arrays, objects
        raise ArgumentError(f"axes.{name} has a value that is no field's; expected {DOMAIN}") from None


def plain(value: Any) -> Any:
    """A numpy scalar as a Python number."""
    return value.item() if hasattr(value, "item") else value


def axes_json(axes: Axes) -> str:
    """The axes as JSON, as results keep them."""
    return json.dumps({name: dict(v) if isinstance(v, Mapping) else list(v) for name, v in axes.items()}, default=plain)


def dimensions(axes: Axes) -> dict[str, list[Any]]:
    """Dimension name -> labels; values that are not all numbers or all text are labelled by their JSON.

    >>> dimensions({"config.learning_rate": [1e-3], "n_kv_heads": [1, None]})
    {'peak_learning_rate': [0.001], 'n_kv_heads': ['1', 'null']}
    """
    return {dimension(name): _labels([plain(value) for value in values]) for name, values in axes.items()}


def dimension(name: str) -> str:
    """The dimension of an axis: the name of its field, or another where that is a variable's."""
    field = name.removeprefix(CONFIG)
    return RENAMED.get(field, field)


def check_names(axes: Axes, dimensions: Collection[str], variables: Collection[str], seed: str) -> None:
    """`ArgumentError` for an axis whose dimension would not stand beside those and the variables of the result.

    seed: what there is instead of an axis over seeds.
    """
    require(isinstance(axes, Mapping), ArgumentError, "axes", type(axes).__name__, "no mapping", "field: values")
    for name in axes:
        good = isinstance(name, str) and name.isprintable() and name
        require(bool(good), ArgumentError, "axes", name, "no name", "the name of a field, or one of your own")
        require(name.removeprefix(CONFIG) != "seed", ArgumentError, "axes", name, "no axis of a grid", seed)
        require(name not in dimensions, ArgumentError, "axes", name, "the name of a dimension", "another name")
        taken = dimension(name) in variables
        require(not taken, ArgumentError, "axes", name, "the name of a variable of the result", "another name")
    names = [dimension(name) for name in axes]
    twice = next((name for name in names if names.count(name) > 1), None)
    require(twice is None, ArgumentError, "axes", twice, "the dimension of another axis", "another name")


def _labels(values: list[Any]) -> list[Any]:
    same = all(isinstance(v, (int, float)) for v in values) or all(isinstance(v, str) for v in values)
    return values if same else [json.dumps(v) for v in values]
