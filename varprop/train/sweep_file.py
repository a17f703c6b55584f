"""`sweep.toml`: training runs as a file, so that every machine trains the same ones.

spec = "tiny"                        # a preset or a spec JSON file, which is looked for beside this file; or
                                     # run = "paper-dense-1b-l16-small", spec and config of a run by name
seeds = [0, 1, 2]                    # of every point; left out: that of the run, or 0
[set]                                # changes of the spec
vocab_size = 8192
[config]                             # fields of TrainConfig; the budget is n_steps, total_tokens or total_flops
total_tokens = 20_000_000
[axes]                               # field = values; "null" stands for null
density = [1.0, 0.5]
config.weight_decay = [0.0, 0.1]     # of TrainConfig
model.l8 = {}                        # or an axis of your own: label = changes
model.l16 = {n_layers = 16, config.learning_rate = 1e-3}

A budget takes the place of another one that stands in the run or, for an axis, in [config].
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from varprop import presets, results
from varprop.corpus import load_corpus
from varprop.errors import ArgumentError, require
from varprop.spec import ModelSpec
from varprop.spec.axes import CONFIG, Axes, check_names, combinations, dimensions, plain
from varprop.spec.plan_file import nulls, read_plan, require_known, spec_name
from varprop.train import runs, track
from varprop.train.check import check_run
from varprop.train.config import BUDGETS, TrainConfig

FIELDS = tuple(field.name for field in dataclasses.fields(TrainConfig))
TAKEN = {*results.VARIABLES, *track.VARIABLES, *(results.HAS + name for name in results.DIMENSIONS)}
"""Names that a collected sweep uses for its variables."""


@dataclass(frozen=True)
class SweepRun:
    """One training run. `task` is the canonical JSON of all that decides its numbers."""

    spec: ModelSpec
    config: TrainConfig
    task: str

    @functools.cached_property
    def id(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of the task: the name of the run's directory."""
        return hashlib.sha256(self.task.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Sweep:
    """Runs for every combination of the axes, the last axis fastest, and within it every seed; some may be equal."""

    spec: ModelSpec
    axes: Axes
    seeds: tuple[int, ...]
    runs: tuple[SweepRun, ...]
    corpus_dir: str | None = None

    @functools.cached_property
    def distinct(self) -> tuple[SweepRun, ...]:
        """Every run once."""
        return tuple({run.id: run for run in self.runs}.values())

    def values(self) -> list[dict[str, Any]]:
        """Labels of each run along the axes and `seed`."""
        labels = dimensions(self.axes) | {"seed": list(self.seeds)}
        return [dict(zip(labels, point, strict=True)) for point in itertools.product(*labels.values())]


def describe() -> str:
    """The form of a sweep file with all keys, as text."""
    keys = textwrap.fill(f"Keys of [config]: {', '.join(FIELDS)}", 100, subsequent_indent="  ")
    return f"{str(__doc__).strip()}\n\nKeys of [set], [axes]: any field of a spec\n{keys}"


def read_sweep(path: str | Path, corpus_dir: str | None = None) -> Sweep:
    """The runs of a sweep file, checked: `ArgumentError` or `SpecError`, one line, before anything runs.

    corpus_dir: of `load_corpus`; a run's id holds the hash of its text.
    """
    source = Path(path)
    table = read_plan(path, "sweep", ("set", "axes", "config"), ("spec", "run", "seeds"))
    config, base = nulls(table.get("config", {})), {}
    require_known(CONFIG, config, FIELDS)
    if "run" in table:
        require("spec" not in table, ArgumentError, "run", table["run"], "given with spec", "one of them")
        name = table["run"]
        require(isinstance(name, str), ArgumentError, "run", name, "no name", "the name of a run")
        spec, base = runs.get(name).spec, json.loads(runs.get(name).config.to_json())
    else:
        require("spec" in table, ArgumentError, "spec", None, "missing", f"spec or run in {source.name}")
        spec = presets.load(spec_name(table["spec"], source.parent))
    axes = _with_config_fields(nulls(table.get("axes", {})))
    spec = spec.with_fields(nulls(table.get("set", {})))
    seeds = table.get("seeds", [base.pop("seed", 0)])
    return make_sweep(spec, axes, _over(base, config), seeds, corpus_dir)


def make_sweep(
    spec: ModelSpec,
    axes: Axes,
    config: Mapping[str, Any] | None = None,
    seeds: Sequence[int] = (0,),
    corpus_dir: str | None = None,
) -> Sweep:
    """The runs at every combination of `axes` and every seed, checked as by `read_sweep`.

    axes: distinct values by name, `{"density": [1.0, 0.5], "config.weight_decay": [0.0, 0.1]}`, the second of a field
    of the config; or a name of your own with named sets of changes of both kinds. config: fields of `TrainConfig` at
    all points.

    >>> sweep = make_sweep(presets.tiny(), {"density": [1.0, 0.5], "config.weight_decay": [0.0, 0.1]}, {"n_steps": 50})
    >>> len(sweep.runs), sweep.values()[1]
    (4, {'density': 1.0, 'weight_decay': 0.1, 'seed': 0})
    """
    check_names(axes, results.DIMENSIONS, TAKEN, "seeds beside the axes")
    given = dict(config or {})
    require("seed" not in given, ArgumentError, "config.seed", given.get("seed"), "no field here", "seeds")
    good = isinstance(seeds, Sequence) and 0 < len(seeds) == len(set(map(str, seeds)))
    require(good, ArgumentError, "seeds", seeds, "empty or repeats a value", "a list of distinct integers")
    made = []
    corpus_of = functools.cache(lambda name: load_corpus(name, corpus_dir))
    for changes in combinations(axes, depths=True):
        fields = {name.removeprefix(CONFIG): changes.pop(name) for name in list(changes) if name.startswith(CONFIG)}
        require_known(CONFIG, fields, FIELDS)
        changed = spec.with_fields(changes)
        for seed in seeds:
            own = TrainConfig.from_json(json.dumps(_over(given, fields) | {"seed": seed}, default=plain))
            corpus = corpus_of(own.corpus)
            check_run(changed, own, corpus)
            task = {"spec": changed.to_dict(), "config": own.identity(), "corpus": corpus.sha256}
            made.append(SweepRun(changed, own, json.dumps(task, sort_keys=True, separators=(",", ":"))))
    return Sweep(spec, axes, tuple(map(plain, seeds)), tuple(made), corpus_dir)


def _over(fields: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a config with changes; a budget among them takes the place of the one before."""
    budget = any(changes.get(name) is not None for name in BUDGETS)
    return {name: value for name, value in fields.items() if not (budget and name in BUDGETS)} | dict(changes)


def _with_config_fields(axes: Mapping[str, Any]) -> dict[str, Any]:
    """TOML reads `config.field` as a table `config`: its fields under their dotted names, also in sets of changes."""
    flat: dict[str, Any] = {}
    for name, values in axes.items():
        if name == "config" and isinstance(values, Mapping):
            flat |= {CONFIG + field: of for field, of in values.items()}
        elif isinstance(values, Mapping):
            flat[name] = {
                label: _with_config_fields(changes) if isinstance(changes, Mapping) else changes
                for label, changes in values.items()
            }
        else:
            flat[name] = values
    return flat
