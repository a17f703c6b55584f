"""Reading plans, the TOML files of grids and sweeps: their keys, the spec they name, and null, which TOML lacks."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from varprop.errors import ArgumentError, require


def read_plan(path: str | Path, name: str, tables: Iterable[str], keys: Iterable[str] = ()) -> dict[str, Any]:
    """The top level of a TOML file; `ArgumentError` if it cannot be read or has other keys, or no tables at `tables`.

    name: of the argument, in messages. tables: keys that hold a table. keys: the other keys.
    """
    try:
        plan = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ArgumentError(f"{name}={str(path)!r} cannot be read ({error.strerror}); expected a TOML file") from None
    except (ValueError, RecursionError) as error:  # also integers of thousands of digits
        reason = str(error).splitlines()[0]
        raise ArgumentError(f"{name}={str(path)!r} is no TOML ({reason}); expected a TOML file") from None
    require_known("", plan, (*keys, *tables))
    for table in tables:
        good = isinstance(plan.get(table, {}), dict)
        require(good, ArgumentError, table, plan.get(table), "no table", f"[{table}]")
    return plan


def require_known(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    """`ArgumentError` for the first given key that is not known, with the nearest one that is."""
    names = list(known)
    for name in given:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            expected = f"{where}{close[0]}" if close else "one of " + ", ".join(names)
            shown = name if name.isprintable() else repr(name)
            raise ArgumentError(f"{where}{shown} is an unknown key; expected {expected}")


def spec_name(name: Any, folder: Path) -> str:
    """The spec that a plan names: a preset as it is, a JSON file as looked for beside the plan, in `folder`."""
    good = isinstance(name, str) and name.isprintable()
    require(good, ArgumentError, "spec", name, "no name", "a preset or a spec JSON file")
    return str(folder / name) if name.endswith(".json") else name


def nulls(value: Any) -> Any:
    """TOML has no null: the text "null" stands for it.

    >>> nulls({"feed_forward": "null", "n_experts": [8, "null"]})
    {'feed_forward': None, 'n_experts': [8, None]}
    """
    if isinstance(value, Mapping):
        return {name: nulls(item) for name, item in value.items()}
    if isinstance(value, list):
        return [nulls(item) for item in value]
    return None if value == "null" else value
