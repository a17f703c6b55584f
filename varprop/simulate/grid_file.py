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
import inspect
import textwrap
from pathlib import Path

from varprop import presets
from varprop.errors import ArgumentError, require
from varprop.simulate.plan import RUN_ARGUMENTS, Plan, make_plan
from varprop.simulate.stop import StopRule
from varprop.spec.plan_file import nulls, read_plan, require_known, spec_name

STOP = tuple(field.name for field in dataclasses.fields(StopRule))
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
    table = read_plan(path, "grid", ("set", "axes", "run", "stop"), ("spec",))
    run, stop = table.get("run", {}), table.get("stop")
    require_known("run.", run, RUN)
    require_known("stop.", stop or {}, STOP)
    for name, needed in (("spec", table), ("axes", table), ("n_networks", run)):
        expected = f"{'run.' if needed is run else ''}{name} in {source.name}"
        require(name in needed, ArgumentError, name, None, "missing", expected)
    if stop is not None:
        require("stderr" in stop, ArgumentError, "stop.stderr", None, "missing", f"stop.stderr in {source.name}")
    spec = presets.load(spec_name(table["spec"], source.parent)).with_fields(nulls(table.get("set", {})))
    return make_plan(spec, nulls(table["axes"]), **run, stop=None if stop is None else StopRule(**stop))
