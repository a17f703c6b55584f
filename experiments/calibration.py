"""Does `check` fail as seldom as it says, and see what it says, on real networks?

Claim tested: at most 1 % of the calls of `check` on a right prediction say `disagrees`, over linear, feed-forward,
attention, dense, masked, grouped-query and mixture models, depth 1 to 128, width 64 to 1024; and with the networks that
`simulate.required_networks` asks for, a prediction that is wrong by 2 % in one cell, the one that varies most, gets
`disagrees` there in at least 90 % of the calls. Follows no figure of the paper.

A verdict is one call of `check` on networks of its own. Predictions that are exact for the ensemble come from
`predict`: an RMS-normed token has squared length d whatever the stream (but for eps, 1e-5 of it, which is claimed), so
that the inner activations of a feed-forward are exactly Gaussian given the stream, at every depth; linear maps and,
with one token, attention need no more than the second moment of their weights, masks and shared key/value heads
included. Elsewhere the prediction is an ensemble of 50 times the networks of a verdict, disjoint from them, drawn once
a cell; its own error enters the check. `gram` draws the unmasked networks, `explicit` the masked ones.

The verdicts of a cell of the second kind share its reference, so that they are not independent. The reference has 1/51
of the variance of a deviation; two Student statistics with correlation r = 1/51 both pass a two-sided limit z with a
correlation of r^2 (2 z phi(z))^2 / (2 p (1 - p)) of the two events, 1e-4 at p = 0.01 and less at smaller p: with 60
verdicts a cell the variance of the rate is 1.01 times the binomial one. The table gives, beside the exact binomial
interval, one that takes whole cells as the replicates, which holds under any dependence within a cell.

    python -m experiments.calibration --dry-run
    python -m experiments.calibration --device cuda --n-workers 8 --runs runs
    python -m experiments.calibration --stage report --runs runs
    python -m experiments.calibration --stage table    # the report again, from the rows in calibration.json

Cost: see `--dry-run`; `--smoke` takes seconds on a CPU. A task is a cell; finished ones are kept by content id in the
folder `--runs`, and `--max-seconds` starts none after that time. Writes `results/calibration.json`, `.md` and `.png`,
but for fewer cells than the file there holds. Each cell has a seed of its own; in rows without `seed` it was 0, so that
the power cells began with the networks of the rate cells of the same model.

Not covered: spreads above 0.5 of the mean (the widest here: 0.48), other inner widths, block masks, masked models above
`MOST_WEIGHTS` weights. Nearly all rate calls are `underpowered` (16 networks, resolution 5 %): they measure false fails
alone. The sides of an error are pooled where a row has no `seen_by_side`.

Expected: a rate below 1 % (Holm's correction and the widened intervals are careful: 0.1 to 0.7 %), power above 0.9.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from scipy import stats as distributions

from experiments.common import device_work, options, run_all
from varprop import presets
from varprop._version import __version__
from varprop.compare import check
from varprop.files import write_text
from varprop.simulate import required_networks, sample
from varprop.spec import ModelSpec
from varprop.stats import clopper_pearson
from varprop.theory import predict

Task = dict[str, Any]
Row = dict[str, Any]

EXACT: dict[str, dict[str, Any]] = {
    "mlp relu": {"attention": None, "activation": "relu", "gated": False},
    "mlp swiglu": {"attention": None},
    "linear masked": {"attention": None, "activation": "identity", "gated": False, "density": 0.25},
    "gqa one token": {"feed_forward": None, "n_kv_heads": 2},
    "gqa one token masked": {"feed_forward": None, "n_kv_heads": 2, "density": 0.25},
}
"""Changes to a SwiGLU model for which `predict` gives the mean of the ensemble."""
REFERENCE: dict[str, dict[str, Any]] = {
    "dense": {},
    "gqa": {"n_kv_heads": 2},
    "masked": {"density": 0.25},
    "moe": {"n_experts": 8, "top_k": 2, "normalize_gates": True},
}
DEPTHS, WIDTHS = (1, 4, 16, 64, 128), (64, 256, 1024)
MOST_WEIGHTS = 3e8
"""Largest explicit network drawn, in weights: masked cells stop there."""
N_TOKENS = 8
NETWORKS, VERDICTS = 16, 60
POWER_VERDICTS = 40
ERROR = 0.02
REFERENCE_SIZE = 50
FALSE_FAIL_RATE = 0.01
POWER_CELLS = (
    *(("mlp relu", 1, 64), ("mlp swiglu", 16, 256), ("linear masked", 4, 64), ("gqa one token", 1, 64)),
    *(("gqa one token masked", 4, 256), ("dense", 1, 64), ("dense", 4, 256), ("dense", 4, 1024)),
    *(("gqa", 1, 256), ("gqa", 4, 256), ("masked", 1, 64), ("masked", 4, 256), ("moe", 1, 256), ("moe", 4, 256)),
)


# Tasks ----------------------------------------------------------------------------------------------------------------


def tasks(smoke: bool = False) -> list[Task]:
    """One plain dictionary per cell: of the false-fail rate (few networks a verdict), then of the power."""
    if smoke:
        small = {"n_networks": 4, "verdicts": 6, "error": 0.0, "method": "explicit"}
        found = [_task(case, 2, 64, **small) for case in ("mlp relu", "masked")]
        return [*found, _task("gqa one token", 1, 64, verdicts=4, error=0.5, method="explicit")]
    found = [task for task in _rate_tasks() if _is_drawn(task)]
    return found + [_task(*cell, verdicts=POWER_VERDICTS, error=ERROR) for cell in POWER_CELLS]


def _rate_tasks() -> list[Task]:
    cells = [(case, depth, width) for case in EXACT for depth in DEPTHS[::2] for width in WIDTHS]
    cells += [(case, depth, width) for case in REFERENCE for depth in DEPTHS for width in WIDTHS]
    return [_task(*cell, n_networks=NETWORKS, verdicts=VERDICTS, error=0.0) for cell in cells]


def _is_drawn(task: Task) -> bool:
    return task["method"] == "gram" or _weights(task) <= MOST_WEIGHTS


def _task(case: str, depth: int, width: int, **rest: Any) -> Task:
    """error: 0 for a cell of the false-fail rate; `n_networks` is then given, else that of `required_networks`."""
    tokens = 1 if "one token" in case else N_TOKENS
    method = "explicit" if "masked" in case else "gram"
    return {"case": case, "depth": depth, "d_model": width, "n_tokens": tokens, "method": method, **rest}


def task_id(task: Task) -> str:
    """First 12 hexadecimal digits of the SHA-256 of the task's canonical JSON."""
    return hashlib.sha256(json.dumps(task, sort_keys=True).encode()).hexdigest()[:12]


def make_spec(task: Task) -> ModelSpec:
    """The model of a task: 8 heads, inner widths proportional to d_model."""
    changes, width = {**EXACT, **REFERENCE}[task["case"]], task["d_model"]
    sizes = {"d_model": width, "n_heads": 8, "n_layers": task["depth"]}
    if "n_experts" in changes:
        return presets.tiny_moe().with_fields(sizes | {"d_expert": 3 * width // 2} | changes)
    without = {name: changes[name] for name in ("attention", "feed_forward") if name in changes}
    rest = {name: value for name, value in changes.items() if name not in without}
    if without.get("feed_forward", "present") is not None:
        sizes["d_ff"] = 3 * width
    if without.get("attention", "present") is None:
        del sizes["n_heads"]
    return presets.tiny().with_fields(without).with_fields(sizes | rest)


def n_networks(task: Task) -> int:
    """Networks of one verdict."""
    if not task["error"]:
        return task["n_networks"]
    return required_networks(make_spec(task), task["error"], n_tokens=task["n_tokens"])


def _weights(task: Task) -> int:
    return make_spec(task).parameter_counts()["body"]


# Verdicts -------------------------------------------------------------------------------------------------------------


def verdicts(task: Task, device: str) -> Row:
    """The outcome of every call of `check` in one cell."""
    started = time.time()
    spec, size, count = make_spec(task), n_networks(task), task["verdicts"]
    n_reference = 0 if task["case"] in EXACT else REFERENCE_SIZE * size
    seed = int(task_id(task)[:8], 16)
    arguments = {
        "n_tokens": task["n_tokens"],
        "seed": seed,
        "method": task["method"],
        "device": device,
        "progress": False,
    }
    drawn = sample(spec, n_networks=n_reference + count * size, **arguments)[["second_moment"]]
    sampled = time.time() - started
    right = drawn.isel(network=slice(0, n_reference)) if n_reference else predict(spec, n_tokens=task["n_tokens"])
    moments = drawn.second_moment.values[n_reference:]
    mean = moments.mean(axis=0)
    spread = np.divide(moments.std(axis=0, ddof=1), mean, out=np.zeros_like(mean), where=mean > 0)
    widest = np.unravel_index(np.argmax(spread), spread.shape)
    resolution = math.log1p(task["error"]) if task["error"] else 0.05
    row: Row = {"task": task, "n_networks": size, "n_reference": n_reference, "cells": int((spread > 0).sum())}
    row |= {"largest_spread": float(spread.max()), "verdicts": [], "p_values": [], "detectable": [], "seen": 0}
    row |= {"seed": seed, "seen_by_side": {"prediction low": 0, "prediction high": 0}}
    for index in range(count):
        first = n_reference + index * size
        own = drawn.isel(network=slice(first, first + size))
        outcome = check(right, own, false_fail_rate=FALSE_FAIL_RATE, resolution=resolution)
        row["verdicts"].append(outcome.verdict)
        row["p_values"].append(float(f"{float(outcome.dataset.p_adjusted.min()):.3g}"))
        row["detectable"].append(float(f"{outcome.detectable:.4g}"))
        if task["error"]:
            wrong = _shifted(right, widest, (1 + task["error"]) ** (1 if index % 2 else -1))
            found = check(wrong, own, false_fail_rate=FALSE_FAIL_RATE, resolution=resolution)
            seen = int(found.dataset.verdict.values[widest] == "disagrees")
            row["seen"] += seen
            row["seen_by_side"]["prediction high" if index % 2 else "prediction low"] += seen
    return row | {"sample_seconds": round(sampled, 2), "seconds": round(time.time() - started, 2), "device": device}


def _shifted(predicted: xr.Dataset, cell: tuple[Any, ...], factor: float) -> xr.Dataset:
    """The prediction, wrong by a factor in one cell (layer, site)."""
    values = predicted.second_moment.transpose(..., "layer", "site")
    array = values.values.copy()
    array[..., cell[0], cell[1]] *= factor
    return predicted.assign(second_moment=(values.dims, array))


def judged(task: Task, folder: Path, device: str, deadline: float) -> Row | None:
    """The verdicts of a cell, from its file where there is one; None past the deadline (wall clock)."""
    path = folder / f"calibration-{task_id(task)}.json"
    if path.is_file():
        return json.loads(path.read_text())
    if time.time() > deadline:
        return None
    row = verdicts(task, device)
    write_text(path, json.dumps(row) + "\n")
    counts = {name: row["verdicts"].count(name) for name in ("disagrees", "underpowered", "agrees")}
    print(f"{label(task):<44} n {row['n_networks']:>5}  {counts}  seen {row['seen']}  {row['seconds']} s", flush=True)
    return row


def label(task: Task) -> str:
    """The cell of a task in words."""
    return f"{task['case']} L={task['depth']} d={task['d_model']}{' power' if task['error'] else ''}"


# Report ---------------------------------------------------------------------------------------------------------------


def rate(counts: Sequence[tuple[int, int]]) -> Row:
    """Share of (successes, trials) over cells, with two 95 % intervals: exact binomial, and with cells as replicates.

    The second: share +/- t(cells - 1) sqrt(cells / (cells - 1) sum_i (k_i - share n_i)^2) / sum_i n_i; none for a share
    of 0 or 1.

    >>> found = rate([(0, 50), (1, 50), (2, 50)])
    >>> found["successes"], found["trials"], [round(x, 4) for x in found["interval_over_cells"]]
    (3, 150, [0.0, 0.0697])
    """
    k, n = np.array(counts).T
    share = k.sum() / n.sum()
    found = {"successes": int(k.sum()), "trials": int(n.sum()), "share": float(share), "cells": len(counts)}
    found["interval"] = clopper_pearson(int(k.sum()), int(n.sum()))
    if len(counts) > 1 and 0 < share < 1:
        stderr = math.sqrt(len(k) / (len(k) - 1) * float(((k - share * n) ** 2).sum())) / n.sum()
        half = float(distributions.t.isf(0.025, len(k) - 1)) * stderr
        found["interval_over_cells"] = (max(0.0, float(share - half)), min(1.0, float(share + half)))
    return found


def table(rows: Sequence[Row]) -> dict[str, Any]:
    """Over all cells and by group: false fails and underpowered calls of the rate cells, power of the power cells."""
    found: dict[str, Any] = {"nominal_false_fail_rate": FALSE_FAIL_RATE, "error": ERROR}

    def count(chosen: Sequence[Row], verdict: str) -> Row:
        return rate([(r["verdicts"].count(verdict), len(r["verdicts"])) for r in chosen])

    def group(chosen: Sequence[Row]) -> Row:
        entry: Row = {}
        rated, powered = ([r for r in chosen if bool(r["task"]["error"]) == kind] for kind in (False, True))
        if rated:
            entry = {"false_fails": count(rated, "disagrees"), "underpowered_at_few": count(rated, "underpowered")}
            entry["networks_for_rate"] = sorted({r["n_networks"] for r in rated})
        if powered:
            entry["power"] = rate([(r["seen"], len(r["verdicts"])) for r in powered])
            entry["underpowered"] = count(powered, "underpowered")
            entry["false_fails_with_power"] = count(powered, "disagrees")
            entry["networks_for_power"] = sorted({r["n_networks"] for r in powered})
            if all("seen_by_side" in r for r in powered):
                sides = powered[0]["seen_by_side"]
                entry["seen_by_side"] = {side: sum(r["seen_by_side"][side] for r in powered) for side in sides}
        return entry

    found["all"] = group(rows)
    for name, keys in (("case", (*EXACT, *REFERENCE)), ("depth", DEPTHS), ("d_model", WIDTHS)):
        chosen = {key: [r for r in rows if r["task"][name] == key] for key in keys}
        found[f"by_{name}"] = {str(key): group(some) for key, some in chosen.items() if some}
    return found


def markdown(found: dict[str, Any]) -> str:
    """The table as Markdown."""

    def cell(entry: Row | None) -> str:
        if entry is None:
            return "|"
        low, high = entry["interval"]
        return f"| {entry['successes']} / {entry['trials']}: {_percent(low)} to {_percent(high)} "

    def networks(numbers: Sequence[int] | None) -> str:
        return "|" if not numbers else f"| {numbers[0]} " if len(numbers) == 1 else f"| {numbers[0]} to {numbers[-1]} "

    columns = ("networks_for_rate", "false_fails", "underpowered_at_few", "networks_for_power", "power", "underpowered")
    head = "| cells | networks | `disagrees` on a right prediction | `underpowered` | networks asked for "
    lines = [head + "| error of 2 % seen | `underpowered` with these |", "|---" * (1 + len(columns)) + "|"]
    groups = {"all": found["all"]}
    for name, prefix in (("by_case", ""), ("by_depth", "depth "), ("by_d_model", "d_model ")):
        groups |= {prefix + key: entry for key, entry in found[name].items()}
    for name, entry in groups.items():
        row = (networks(entry.get(key)) if "networks" in key else cell(entry.get(key)) for key in columns)
        lines.append(f"| {name} {''.join(row)}|")
    every = found["all"]
    lines += [
        "",
        "Intervals: exact binomial, 95 %. Nominal rate 1 %. Rates: cells of few networks alone, resolution 5 %.",
    ]
    over = every.get("false_fails", {}).get("interval_over_cells")
    if over:
        lines.append(f"With whole cells as replicates: {_percent(over[0])} to {_percent(over[1])} `disagrees`.")
    if "power" in every:
        more = every["false_fails_with_power"]
        lines.append(
            f"With the networks asked for, {more['successes']} of {more['trials']} right predictions `disagrees`."
        )
        sides = every.get("seen_by_side")
        lines.append(f"Seen by side: {sides}." if sides else "Predictions too low and too high are pooled.")
    for name, text in (("not_drawn", f"Not drawn (above {MOST_WEIGHTS:.0e} weights)"), ("missing", "Missing")):
        if found.get(name):
            lines.append(f"{text}: {'; '.join(found[name])}.")
    lines.append(f"varprop {found.get('version')}, `{found.get('command')}`.")
    return "\n".join(lines) + "\n"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def figure(rows: Sequence[Row]) -> Figure:
    """Share of calls whose smallest adjusted p-value is below a level, against the level: on or below the diagonal."""
    drawing = Figure(figsize=(5.2, 4.2), layout="constrained")
    axes = drawing.subplots()
    for name, cases, colour in (("exact mean", EXACT, "#4477aa"), ("reference mean", REFERENCE, "#ee6677")):
        values = np.sort([p for r in rows if r["task"]["case"] in cases for p in r["p_values"]])
        if len(values):
            axes.step(values, np.arange(1, len(values) + 1) / len(values), where="post", label=name, color=colour)
    axes.plot([1e-4, 1], [1e-4, 1], color="0.3", lw=0.8)
    axes.axvline(FALSE_FAIL_RATE, color="0.6", lw=0.8, ls=":")
    axes.set(xscale="log", yscale="log", xlim=(1e-4, 1), ylim=(1e-4, 1))
    axes.set(xlabel="level (smallest adjusted p-value of a call)", ylabel="share of the calls")
    axes.legend(frameon=False)
    return drawing


# Command line ---------------------------------------------------------------------------------------------------------


def work(task: Task) -> dict[str, float]:
    """Networks and a rough cost of a task on an accelerator; `gram` draws T numbers in place of d a matrix row."""
    size = n_networks(task)
    networks = task["verdicts"] * size + (0 if task["case"] in EXACT else REFERENCE_SIZE * size)
    found = device_work(make_spec(task), task["n_tokens"], networks)
    if task["method"] == "gram":
        launches = 600 * task["depth"] * math.ceil(networks / 256) / 2e5
        found["seconds"] = launches + found["draws"] * task["n_tokens"] / task["d_model"] / 2e10
    return {"networks": networks, "seconds": found["seconds"]}


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stage", choices=("all", "report", "table"), default="all")
    parser.add_argument("--max-seconds", type=float, default=math.inf, help="start no cell after this time")
    parser.add_argument("--max-width", type=int, default=max(WIDTHS), help="only cells up to this d_model")
    parser.add_argument("--max-depth", type=int, default=max(DEPTHS), help="only cells up to this depth")
    parser.add_argument("--method", choices=("gram", "explicit"), help="instead of that of the task")
    parser.add_argument("--dry-run", action="store_true", help="print the work of every task and stop")


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge what has no result yet, then save and print the table."""
    started = time.time()
    chosen = options(__doc__, arguments, extend=_arguments)
    everything = tasks(chosen.smoke)
    todo = [t for t in everything if t["d_model"] <= chosen.max_width and t["depth"] <= chosen.max_depth]
    todo = [task | {"method": chosen.method} if chosen.method else task for task in todo]
    if chosen.dry_run:
        return _print_work(todo)
    path = chosen.out / "calibration.json"
    before = json.loads(path.read_text()) if path.is_file() else {"rows": []}
    given = sys.argv[1:] if arguments is None else arguments
    about = {"version": __version__, "command": shlex.join(["python", "-m", "experiments.calibration", *given])}
    if chosen.stage != "all":  # the run that drew the networks, not the one that reports
        about |= {name: before[name] for name in about if name in before}
    if chosen.stage == "table":
        done = before["rows"]
    else:
        deadline = started + chosen.max_seconds if chosen.stage == "all" else -math.inf
        one = functools.partial(judged, folder=chosen.runs, device=chosen.device, deadline=deadline)
        done = [row for row in run_all(one, todo, chosen.n_workers) if row is not None]
    print(f"{len(done)} of {len(everything)} cells, {time.time() - started:.0f} s")
    if not done:
        return 0
    if len(done) < len(before["rows"]):
        print(f"{path} holds {len(before['rows'])} cells and is kept; give another folder by --out", file=sys.stderr)
        return 2
    labels = {label(row["task"]) for row in done}
    found = {**table(done), **about, "missing": [label(t) for t in everything if label(t) not in labels]}
    found |= {"not_drawn": [] if chosen.smoke else [label(task) for task in _rate_tasks() if not _is_drawn(task)]}
    write_text(path, json.dumps(found | {"rows": done}) + "\n")
    write_text(chosen.out / "calibration.md", markdown(found))
    figure(done).savefig(chosen.out / "calibration.png", dpi=150)
    print(markdown(found))
    return 0


def _print_work(todo: Sequence[Task]) -> int:
    total = 0.0
    for task in todo:
        w = work(task)
        total += w["seconds"]
        print(f"{label(task):<44} {w['networks']:>9.0f} networks {w['seconds']:8.1f} s {total:8.1f} s")
    calls = sum(task["verdicts"] for task in todo)
    print(f"{calls} verdicts; seconds: a rough guess for one worker on one accelerator, without the checks")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
