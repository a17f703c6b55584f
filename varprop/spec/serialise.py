"""Specs to and from JSON, and changed copies: driven by the dataclasses' own type hints."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from varprop.errors import SpecError

T = TypeVar("T")
replace = dataclasses.replace


def to_dict(spec: Any) -> dict[str, Any]:
    """Nested plain dictionary; pairs (the init overrides) become an object."""
    result: dict[str, Any] = {}
    for f in dataclasses.fields(spec):
        value = getattr(spec, f.name)
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        elif f.name == "overrides":
            value = dict(value)
        elif isinstance(value, tuple):
            value = list(value)
        result[f.name] = value
    return result


def canonical_json(spec: Any) -> str:
    """JSON with every field, sorted keys and no white space."""
    return json.dumps(to_dict(spec), sort_keys=True, separators=(",", ":"), allow_nan=False)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise SpecError(f"{twice} is given twice in the spec JSON; expected each field once")
    return dict(pairs)


def parse_json(text: str) -> dict[str, Any]:
    """The JSON object in `text`; `SpecError` names the line and column of a fault."""
    try:
        data = json.loads(text, object_pairs_hook=_distinct)
    except json.JSONDecodeError as error:
        raise SpecError(
            f"spec JSON is broken at line {error.lineno} column {error.colno} ({error.msg}); expected a JSON object"
        ) from None
    except SpecError:
        raise
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, nesting without end
        raise SpecError(f"spec JSON cannot be read ({str(error)[:60]}); expected a JSON object") from None
    if not isinstance(data, dict):
        raise SpecError(f"spec JSON is a {type(data).__name__}; expected a JSON object")
    return data


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def from_dict(cls: type[T], data: Mapping[str, Any], path: str = "") -> T:
    """An instance of a spec dataclass from a mapping; unknown, missing and ill-typed fields raise `SpecError`."""
    if not isinstance(data, Mapping):
        raise SpecError(f"{path or cls.__name__}={data!r} is a {type(data).__name__}; expected a JSON object")
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in data:
        if name not in known:
            raise SpecError(f"{_join(path, name)} is an unknown field; expected {_suggestion(name, list(known))}")
    missing = [
        name
        for name, f in known.items()
        if name not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise SpecError(f"{_join(path, missing[0])} is missing; expected a value")
    return cls(**{name: _convert(value, _hints(cls)[name], _join(path, name)) for name, value in data.items()})


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else str(name)


def _suggestion(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"{close[0]!r}?" if close else "one of " + ", ".join(known)


def _convert(value: Any, hint: Any, path: str) -> Any:
    origin = get_origin(hint)
    if origin is types.UnionType:
        if value is None and type(None) in get_args(hint):
            return None
        return _convert(value, next(a for a in get_args(hint) if a is not type(None)), path)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, path)  # type: ignore[arg-type]
    if origin is Literal:
        return value  # the part's own check names the choices
    if origin is tuple:
        if isinstance(value, Mapping):
            value = list(value.items())
        if not isinstance(value, (list, tuple)):
            raise SpecError(f"{path}={value!r} is a {type(value).__name__}; expected a list")
        inner = get_args(hint)[0]
        if get_origin(inner) is tuple and not all(isinstance(v, (list, tuple)) and len(v) == 2 for v in value):
            raise SpecError(f"{path}={value!r} is not a list of pairs; expected an object of name: number")
        return tuple(
            (str(v[0]), _convert(v[1], float, f"{path}.{v[0]}"))
            if get_origin(inner) is tuple
            else _convert(v, inner, path)
            for v in value
        )
    if hint is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) <= 2**53:
        return float(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise SpecError(f"{path}={value!r} is a {type(value).__name__}; expected {hint.__name__}")
    return value


@functools.cache
def field_paths(cls: type, path: str = "") -> tuple[str, ...]:
    """Dotted paths of every field of a spec and of its parts."""
    paths: list[str] = []
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        hint = _hints(cls)[f.name]
        part = next((a for a in (hint, *get_args(hint)) if dataclasses.is_dataclass(a)), None)
        paths.append(_join(path, f.name))
        if part is not None:
            paths.extend(field_paths(part, _join(path, f.name)))  # type: ignore[arg-type]
    return tuple(paths)


def resolve_path(cls: type, name: str, present: Mapping[str, Any]) -> str:
    """The one dotted path that `name` stands for; a name that occurs more than once prefers the parts present."""
    paths = field_paths(cls)
    if name in paths or name.startswith("init.overrides."):
        return name
    candidates = [p for p in paths if p.endswith("." + name)]
    if len(candidates) > 1:
        candidates = [p for p in candidates if present.get(p.split(".")[0]) is not None] or candidates
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise SpecError(f"{name} is ambiguous; expected one of {', '.join(candidates)}")
    leaves = sorted({p.split(".")[-1] for p in paths} | {"density"})
    raise SpecError(f"{name} is an unknown field; expected {_suggestion(name, leaves)}")


def _part(data: dict[str, Any], name: str, path: str) -> dict[str, Any]:
    """The nested dictionary of a part, made where the part is absent."""
    if data.get(name) is None:
        data[name] = {}
    if not isinstance(data[name], dict):
        raise SpecError(f"{name}={data[name]!r} is no part; expected an object for {path}")
    return data[name]


def with_fields(spec: T, changes: Mapping[str, Any]) -> T:
    """A copy of `spec` with fields changed by dotted path or unique name; all changes apply at once."""
    cls = type(spec)
    data = to_dict(spec)
    uniform = ("q", "k", "v", "o", "gate", "up", "down")
    for name, value in changes.items():
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        if name == "density":
            for matrix in uniform:
                masks = _part(data, "masks", "masks")
                dense = value == 1 and not isinstance(value, bool)
                masks[matrix] = None if dense else {**(masks.get(matrix) or {}), "density": value}
            continue
        *parents, leaf = resolve_path(cls, name, data).split(".")
        target = data
        for parent in parents:
            target = _part(target, parent, name)
        target[leaf] = value
    return from_dict(cls, data)
