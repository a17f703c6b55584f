"""Arguments that several commands have, and the profile that they print."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import xarray as xr

from varprop import presets
from varprop.errors import ArgumentError
from varprop.spec import ModelSpec


def value(text: str) -> Any:
    """JSON where it is JSON, else the string itself: 0.5, null, [1,2], {"n_experts":8} or causal."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # not JSON, thousands of digits, or nested without end
        return text


def path(text: str) -> str:
    """A path that is given: an empty one would be the folder one stands in."""
    if not text:
        raise argparse.ArgumentTypeError("'' is empty; expected a path")
    return text


def assignments(texts: Sequence[str], option: str) -> dict[str, Any]:
    pairs = {}
    for text in texts:
        name, equals, right = text.partition("=")
        if not name or not equals:
            raise ArgumentError(f"{option}={text!r} is not an assignment; expected field=value")
        if name.strip() in pairs and option != "--set":  # a later --set overrides an earlier one
            raise ArgumentError(f"{option}={text!r} is given twice; expected {name.strip()} once")
        pairs[name.strip()] = value(right.strip())
    return pairs


def spec_of(arguments: argparse.Namespace) -> ModelSpec:
    """The spec that --spec names (a JSON file or a preset) with the --set changes applied."""
    return presets.load(arguments.spec).with_fields(assignments(arguments.set, "--set"))


def add_spec(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--spec", required=True, metavar="PRESET-or-FILE", help="a preset name or a spec JSON file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="field=value", help="change a field (repeatable): n_kv_heads=2"
    )


def profile(dataset: xr.Dataset, variable: str = "second_moment") -> str:
    """The stream's second moment by layer in a few lines of text."""
    values = dataset[variable].sel(site="resid_post")
    values = values.mean([d for d in values.dims if d != "layer"])
    layers = sorted(
        {0, 1, *range(0, values.sizes["layer"], max(1, values.sizes["layer"] // 8)), values.sizes["layer"] - 1}
    )
    cells = "  ".join(f"{layer}: {values.values[layer]:.4g}" for layer in layers)
    return f"second moment of the stream by layer   {cells}"
