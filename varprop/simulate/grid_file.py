"""`grid.toml`: a grid as a file, so that every machine runs the same one.

spec = "tiny"                        # a preset or a spec JSON file, which is looked for beside this file
[set]                                # changes of the spec
n_layers = 4
[axes]                               # field = values; "null" stands for null
density = [1.0, 0.5]
model.dense = {}                     # or an axis of your own: label = changes
model.moe = {feed_forward = "null", n_experts = 8, top_k = 2}
[run]                                # arguments of `grid`
n_networks = 64
n_tokens = 16
[stop]                               # fields of `StopRule`; leave it out to draw n_networks everywhere
stderr = 0.01
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import textwrap
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from varprop import presets
from varprop.errors import ArgumentError, require
from varprop.simulate.plan import RUN_ARGUMENTS, Plan, make_plan
from varprop.simulate.stop import StopRule
from varprop.spec import ModelSpec

STOP = tuple(field.name for field in dataclasses.fields(StopRule))
TABLES = ("spec", "set", "axes", "run", "stop")
RUN = tuple(name for name in inspect.signature(make_plan).parameters if name not in ("spec", "axes", "inputs", "stop"))


def describe() -> str:
    """The form of a grid file with all keys, as text."""
    keys = {"[set], [axes]": ("any field of a spec",), "[axes] also": RUN_ARGUMENTS, "[run]": RUN, "[stop]": STOP}
    lines = [
        textwrap.fill(f"{table}: {', '.join(names)}", 100, subsequent_indent="  ") for table, names in keys.items()
    ]
    return "\n".join([str(__doc__).strip(), "", "Keys of", *lines])


def read_grid(path: str | Path) -> Plan:
    """The plan of a grid file; `ArgumentError` or `SpecError`, one line, for what is wrong in it.

    Raises before anything runs.
    """
    source = Path(path)
    try:
        table = tomllib.loads(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArgumentError(f"grid={str(path)!r} cannot be read ({error.strerror}); expected a TOML file") from None
    except (ValueError, RecursionError) as error:  # also integers of thousands of digits
        reason = str(error).splitlines()[0]
        raise ArgumentError(f"grid={str(path)!r} is no TOML ({reason}); expected a TOML file") from None
    _known("", table, TABLES)
    for name in ("set", "axes", "run", "stop"):
        good = isinstance(table.get(name, {}), dict)
        require(good, ArgumentError, name, table.get(name), "no table", f"[{name}]")
    run, stop = table.get("run", {}), table.get("stop")
    _known("run.", run, RUN)
    _known("stop.", stop or {}, STOP)
    for name, needed in (("spec", table), ("axes", table), ("n_networks", run)):
        expected = f"{'run.' if needed is run else ''}{name} in {source.name}"
        require(name in needed, ArgumentError, name, None, "missing", expected)
    if stop is not None:
        require("stderr" in stop, ArgumentError, "stop.stderr", None, "missing", f"stop.stderr in {source.name}")
    spec = _spec(table["spec"], source.parent).with_fields(_nulls(table.get("set", {})))
    return make_plan(spec, _nulls(table["axes"]), **run, stop=None if stop is None else StopRule(**stop))


def _spec(name: Any, folder: Path) -> ModelSpec:
    good = isinstance(name, str) and name.isprintable()
    require(good, ArgumentError, "spec", name, "no name", "a preset or a spec JSON file")
    return presets.load(str(folder / name) if name.endswith(".json") else name)


def _known(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    names = list(known)
    for name in given:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            expected = f"{where}{close[0]}" if close else "one of " + ", ".join(names)
            shown = name if name.isprintable() else repr(name)
            raise ArgumentError(f"{where}{shown} is an unknown key; expected {expected}")


def _nulls(value: Any) -> Any:
    """TOML has no null: the text "null" stands for it."""
    if isinstance(value, Mapping):
        return {name: _nulls(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_nulls(item) for item in value]
    return None if value == "null" else value
