"""Axes of a grid: field names and their values, checked, combined and labelled alike by theory and simulation."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from varprop.errors import ArgumentError, require

RENAMED = {"token_correlation": "input_token_correlation"}
"""Dimension of an axis whose own name is that of a variable."""


def combinations(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination as field name -> plain value, the last axis fastest; `ArgumentError` for an unfit axis."""
    domain, wrong = "at least one value, all distinct", "not an axis, as profiles differ in length"
    for name, values in axes.items():
        require(isinstance(name, str), ArgumentError, "axes", name, "not a field name", "a string")
        require(name != "n_layers", ArgumentError, "axes", name, wrong, "one grid per n_layers")
        sequence = isinstance(values, Sequence) or hasattr(values, "tolist")
        good = sequence and not isinstance(values, str)
        require(good, ArgumentError, f"axes.{name}", values, "not a sequence", domain)
        try:
            texts = {json.dumps(plain(value)) for value in values}
        except (TypeError, ValueError):  # arrays, objects
            raise ArgumentError(
                f"axes.{name}={type(values).__name__} has a value that is no field's; {domain}"
            ) from None
        distinct = 0 < len(texts) == len(values)
        require(distinct, ArgumentError, f"axes.{name}", list(values), "empty or repeats a value", domain)
    return [
        {name: plain(value) for name, value in zip(axes, combination, strict=True)}
        for combination in itertools.product(*axes.values())
    ]


def plain(value: Any) -> Any:
    """A numpy scalar as a Python number."""
    return value.item() if hasattr(value, "item") else value


def dimensions(axes: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """Dimension name -> labels; values that are not all numbers or all text are labelled by their JSON."""
    return {RENAMED.get(name, name): _labels([plain(value) for value in values]) for name, values in axes.items()}


def _labels(values: list[Any]) -> list[Any]:
    same = all(isinstance(v, (int, float)) for v in values) or all(isinstance(v, str) for v in values)
    return values if same else [json.dumps(v) for v in values]
