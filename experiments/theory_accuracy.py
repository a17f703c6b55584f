"""Is the theory within 1 % for one block and 3 % for a stack? `predict` against explicit networks.

Claim tested: second moments of one block within 1 % at d_model 512; stacks of 24 and 128 layers within 3 % in the
stream's second moment and 0.02 in its token correlation, at d_model 1024 or after the extrapolation of d_model 256, 512
and 1024 in 1/d_model; for dense, masked, grouped-query and mixture models, causal with rotary positions and full
without positions. Norm placements and residual rules at 24 layers besides. Follows no figure of the paper.

Every model has 8 heads of d_model/8 and inner widths proportional to d_model, so that all finite-width terms fall as
1/d_model. Networks are added in rounds (fresh seeds) until the standard error over networks is at most the target at
the last layer: 0.25 % at all three sites of a block; 0.5 % for a stack's second moment and 0.005 for its token
correlation. Stopping on the spread biases a mean by less than a tenth of its error at these counts. Token correlations
are ratios of means over networks, what the theory predicts.

Verdicts: `within` if |deviation| + 2 stderr is inside the tolerance, `outside` if |deviation| - 2 stderr is beyond it,
else `undecided`. The standard error has the prediction's own sampling error in it.

    python -m experiments.theory_accuracy --dry-run
    python -m experiments.theory_accuracy --stage simulate --device cuda --draw-device cuda --n-workers 8 --runs runs
    python -m experiments.theory_accuracy --stage compare --runs runs

`--max-seconds` ends the simulations: what is finished is kept, and the next call goes on. A task in its first round
ends it, so leave a margin of two minutes.

Cost: see `--dry-run`; the comparison predicts on the CPU, seconds a task. `--smoke` takes seconds. Simulations are kept
by content id in the folder `--runs` and do not depend on the theory: a better theory needs `--stage compare` alone.
Writes `results/theory_accuracy.json` (rows, extrapolations, verdicts) and `results/theory_accuracy.png`.

Expected: every block `within`; stacks `within` at d_model 1024 or after the extrapolation.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from experiments.common import device_work, extrapolate, judge, options, run_all
from varprop import presets, results
from varprop.errors import AssumptionError, SchemaError
from varprop.files import write_text
from varprop.simulate import sample
from varprop.spec import ModelSpec
from varprop.theory import predict

Task = dict[str, Any]
Row = dict[str, Any]

CASES: dict[str, dict[str, Any]] = {
    "swiglu": {},
    "masked": {"density": 0.25},
    "gqa": {"n_kv_heads": 2},
    "moe_8_2": {"n_experts": 8, "top_k": 2, "normalize_gates": True},
    "relu": {"activation": "relu", "gated": False},
    "mqa": {"n_kv_heads": 1},
    "gelu": {"activation": "gelu", "gated": False},
    "layer_norm": {"norm.kind": "layer"},
    "moe_64_8": {"n_experts": 64, "top_k": 8, "normalize_gates": False},
}
"""Changes to a SwiGLU model, the most informative cases first."""
PLACEMENTS: dict[str, dict[str, Any]] = {
    "peri": {"norm.placement": "peri"},
    "lns": {"norm.placement": "lns"},
    "post": {"norm.placement": "post"},
    "reordered": {"norm.placement": "reordered"},
    "mix": {"norm.placement": "mix"},
    "deepnorm": {"norm.placement": "post", "residual.rule": "deepnorm"},
    "scaled_residual": {"residual.rule": "inverse_sqrt_2L"},
}
PATTERNS: dict[str, dict[str, Any]] = {"causal": {}, "full": {"pattern": "full", "rope_theta": None}}
WIDTHS = (1024, 256, 512)
DEPTHS = (1, 24, 128)
BLOCK_SITES = ("attn_out", "mlp_out", "resid_post")
TOLERANCE = {"block": 0.01, "stack": 0.03, "correlation": 0.02}
CORRELATION_TARGET = 0.005
FIRST_ROUND, MOST_NETWORKS = 32, 4096


# Tasks ----------------------------------------------------------------------------------------------------------------


def tasks(block_stderr: float = 0.0025, stack_stderr: float = 0.005, smoke: bool = False) -> list[Task]:
    """One plain dictionary per case, pattern, depth and width, the most informative first."""
    if smoke:
        shape = {"n_tokens": 8, "target": 0.1, "correlation_target": 0.1}
        stack = [{"case": "swiglu", "pattern": "causal", "depth": 3, "d_model": d, **shape} for d in (32, 64)]
        return [
            {"case": "moe_8_2", "pattern": "full", "depth": 1, "d_model": 32, **shape},
            *stack,
            {"case": "post", "pattern": "causal", "depth": 3, "d_model": 32, **shape},
        ]
    found = [_task(case, pattern, 1, 512, block_stderr) for pattern in PATTERNS for case in CASES]
    for depth in DEPTHS[1:]:
        for width in WIDTHS:
            found += [_task(case, "causal", depth, width, stack_stderr) for case in CASES]
            found += [_task(case, "full", depth, width, stack_stderr) for case in CASES]
            if depth == 24 and width < 1024:
                found += [_task(case, "causal", depth, width, stack_stderr) for case in PLACEMENTS]
    slow = [task for task in found if task["case"] == "moe_64_8" and task["depth"] == 128]
    return [task for task in found if task not in slow] + slow


def _task(case: str, pattern: str, depth: int, d_model: int, target: float) -> Task:
    shape = {"case": case, "pattern": pattern, "depth": depth, "d_model": d_model, "n_tokens": 64}
    return {**shape, "target": target, "correlation_target": CORRELATION_TARGET}


def task_id(task: Task) -> str:
    """First 12 hexadecimal digits of the SHA-256 of the task's canonical JSON."""
    return hashlib.sha256(json.dumps(task, sort_keys=True).encode()).hexdigest()[:12]


def make_spec(task: Task) -> ModelSpec:
    """The model of a task: 8 heads, inner widths proportional to d_model."""
    changes = dict({**CASES, **PLACEMENTS}[task["case"]]) | PATTERNS[task["pattern"]]
    d_model = task["d_model"]
    sizes = {"d_model": d_model, "n_heads": 8, "n_layers": task["depth"]}
    if "n_experts" in changes:
        return presets.tiny_moe().with_fields(sizes | {"d_expert": 3 * d_model // changes["top_k"]} | changes)
    return presets.tiny().with_fields(sizes | {"d_ff": (3 if changes.get("gated", True) else 4) * d_model} | changes)


# Simulation -----------------------------------------------------------------------------------------------------------


def summary(networks: xr.Dataset) -> dict[str, xr.DataArray]:
    """Mean second moment and token correlation (ratio of means) with standard errors over networks: (layer, site)."""
    q, c = networks.second_moment, networks.token_correlation
    count = q.sizes["network"]
    mean = q.mean("network")
    present = mean.where(mean > 0)
    ratio = ((q * c).mean("network") / present).where(mean != 0, 0.0)
    spread = ((q * (c - ratio)).std("network", ddof=1) / present).where(mean != 0, 0.0)
    return {
        "second_moment": mean,
        "second_moment_stderr": q.std("network", ddof=1) / count**0.5,
        "token_correlation": ratio,
        "token_correlation_stderr": spread / count**0.5,
    }


def shortfall(found: Mapping[str, xr.DataArray], task: Task) -> float:
    """The largest standard error at the last layer over its target: at most 1 when the task is done."""
    last = {name: values.isel(layer=-1) for name, values in found.items()}
    relative = last["second_moment_stderr"] / last["second_moment"]
    if task["depth"] == 1:
        return float(relative.sel(site=list(BLOCK_SITES)).max()) / task["target"]
    correlation = float(last["token_correlation_stderr"].sel(site="resid_post"))
    return max(float(relative.sel(site="resid_post")) / task["target"], correlation / task["correlation_target"])


def simulate(task: Task, device: str, draw_device: str, deadline: float) -> xr.Dataset:
    """Networks in rounds until the standard errors are at their targets, or the cap, or the deadline (wall clock).

    A round is as large as the spread asks for, at most three times all before it, and as the time left allows.
    """
    spec, size, started = make_spec(task), FIRST_ROUND, time.time()
    pieces: list[xr.Dataset] = []
    while True:
        arguments = {"n_networks": size, "n_tokens": task["n_tokens"], "seed": len(pieces), "device": device}
        pieces.append(sample(spec, **arguments, draw_device=draw_device, progress=False))
        networks = xr.concat(pieces, "network", combine_attrs="override")
        found, count = summary(networks), networks.sizes["network"]
        short = shortfall(found, task)
        done = short <= 1 or count >= MOST_NETWORKS
        affordable = count * (deadline - time.time()) / (time.time() - started)
        if done or affordable < FIRST_ROUND:
            break
        wanted = max(FIRST_ROUND, math.ceil(count * (1.1 * short**2 - 1)))
        size = int(min(wanted, 3 * count, MOST_NETWORKS - count, affordable))
    return results.new(
        {name: (("layer", "site"), values.transpose("layer", "site").values) for name, values in found.items()},
        source="simulation",
        spec_json=spec.to_json(),
        spec_id=spec.spec_id,
        n_tokens=task["n_tokens"],
        seed_entropy=f"0..{len(pieces) - 1}",
        dtype="float32",
        device=device,
        end_condition="complete" if done else "deadline",
        attributes={"task": json.dumps(task, sort_keys=True), "n_networks": count, "draw_device": draw_device},
    )


def simulated(task: Task, folder: Path, device: str, draw_device: str, deadline: float) -> xr.Dataset | None:
    """The task's networks, from its file where that is complete, else drawn and saved; None past the deadline."""
    path = folder / f"accuracy-{task_id(task)}.nc"
    kept = None
    with contextlib.suppress(SchemaError):
        kept = results.load(path)
    if (kept is not None and kept.attrs["end_condition"] == "complete") or time.time() > deadline:
        return kept
    started = time.time()
    dataset = results.load(results.save(simulate(task, device, draw_device, deadline), path))
    counts = f"{dataset.attrs['n_networks']:>5} networks, {time.time() - started:6.1f} s"
    print(f"{_label(task):<40} {counts} {dataset.attrs['end_condition']}", flush=True)
    return dataset


def _label(task: Task) -> str:
    return f"{task['case']} {task['pattern']} L={task['depth']} d={task['d_model']}"


# Comparison -----------------------------------------------------------------------------------------------------------


def compare(task: Task, measured: xr.Dataset) -> list[Row]:
    """Rows of one task: the sites of the last layer; one row with `not_covered` where `predict` refuses the spec."""
    key = {name: task[name] for name in ("case", "pattern", "depth", "d_model")}
    try:
        predicted = predict(make_spec(task), n_tokens=task["n_tokens"])
    except AssumptionError as error:
        return [{**key, "not_covered": str(error)}]
    ratio = measured.second_moment / predicted.second_moment
    own = measured.second_moment_stderr / measured.second_moment
    theirs = predicted.second_moment_stderr / predicted.second_moment
    stderr = ratio * np.hypot(own, theirs)
    difference = measured.token_correlation - predicted.token_correlation
    difference_stderr = np.hypot(measured.token_correlation_stderr, predicted.token_correlation_stderr)
    rows = []
    for site in BLOCK_SITES:
        at = {"layer": int(measured.layer[-1]), "site": site}
        inner = {"layer": slice(1, None), "site": site}
        excess = abs(ratio - 1) - 2 * stderr
        rows.append(
            {
                **key,
                "site": site,
                "n_networks": int(measured.attrs["n_networks"]),
                "ratio": float(ratio.sel(at)),
                "stderr": float(stderr.sel(at)),
                "theory_error": float(predicted.theory_error.sel(at)),
                "correlation": float(measured.token_correlation.sel(at)),
                "correlation_difference": float(difference.sel(at)),
                "correlation_stderr": float(difference_stderr.sel(at)),
                "correlation_error": float(predicted.token_correlation_error.sel(at)),
                "worst_layer_excess": float(excess.sel(inner).max()),
            }
        )
    return rows


def stacks(rows: Sequence[Row]) -> dict[tuple[str, str, int], list[Row]]:
    """Rows of the stream of each stack, (case, pattern, depth) -> one row a width, narrow to wide."""
    found: dict[tuple[str, str, int], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["d_model"]):
        if row["depth"] > 1 and row["site"] == "resid_post":
            found.setdefault((row["case"], row["pattern"], row["depth"]), []).append(row)
    return found


def extrapolations(rows: Sequence[Row]) -> list[Row]:
    """Ratio and correlation difference of the stream at infinite width, for each stack with several widths."""
    found = []
    for (case, pattern, depth), chosen in stacks(rows).items():
        widths = [row["d_model"] for row in chosen]
        if len(widths) > 1:
            entry: Row = {"case": case, "pattern": pattern, "depth": depth, "widths": widths}
            for name, error in (("ratio", "stderr"), ("correlation_difference", "correlation_stderr")):
                line = extrapolate(widths, [row[name] for row in chosen], [row[error] for row in chosen])
                entry[name], entry[error] = line
            found.append(entry)
    return found


def verdicts(rows: Sequence[Row], extrapolated: Sequence[Row]) -> list[Row]:
    """One verdict per site of a block, and one per stack for the second moment and the correlation.

    A stack is `within` if it is so at its largest width or after the extrapolation; `outside` if it is so in both.
    """
    found = []
    for row in rows:
        if row["depth"] == 1:
            verdict = judge(row["ratio"] - 1, row["stderr"], TOLERANCE["block"])
            found.append({k: row[k] for k in ("case", "pattern", "depth", "site")} | {"second_moment": verdict})
    limits = {(row["case"], row["pattern"], row["depth"]): row for row in extrapolated}
    for key, chosen in stacks(rows).items():
        case, pattern, depth = key
        entry: Row = {"case": case, "pattern": pattern, "depth": depth, "site": "resid_post"}
        for name, measure, error, centre, tolerance in (
            ("second_moment", "ratio", "stderr", 1.0, TOLERANCE["stack"]),
            ("correlation", "correlation_difference", "correlation_stderr", 0.0, TOLERANCE["correlation"]),
        ):
            judged = {f"{name}_d{chosen[-1]['d_model']}": chosen[-1], f"{name}_extrapolated": limits.get(key)}
            each = {k: judge(r[measure] - centre, r[error], tolerance) for k, r in judged.items() if r is not None}
            distinct = set(each.values())
            entry[name] = "within" if "within" in distinct else distinct.pop() if len(distinct) == 1 else "undecided"
            entry.update(each)
        found.append(entry)
    return found


def figure(rows: Sequence[Row], extrapolated: Sequence[Row]) -> Figure:
    """Measured over predicted by case, one panel a depth; the band is the accuracy aimed at."""
    depths = sorted({row["depth"] for row in rows})
    drawing = Figure(figsize=(11, 2.8 * len(depths)), layout="constrained")
    axes = drawing.subplots(len(depths), 1, squeeze=False)[:, 0]
    colours = dict(zip(sorted({row["d_model"] for row in rows}), ("#4477aa", "#ee6677", "#228833"), strict=False))
    for axis, depth in zip(axes, depths, strict=True):
        stream = [row for row in rows if row["depth"] == depth and row.get("site") == "resid_post"]
        cases = list(dict.fromkeys((row["case"], row["pattern"]) for row in stream))
        limits = [row for row in extrapolated if row["depth"] == depth]
        groups = [(f"d = {d}", c, "o", [r for r in stream if r["d_model"] == d]) for d, c in colours.items()]
        for offset, (label, colour, marker, chosen) in enumerate([*groups, ("extrapolated", "0.1", "D", limits)]):
            if chosen:
                x = [cases.index((row["case"], row["pattern"])) + 0.16 * (offset - 1.5) for row in chosen]
                y, error = ([100 * (r["ratio"] - 1) for r in chosen], [196 * r["stderr"] for r in chosen])
                axis.errorbar(x, y, error, fmt=marker, ms=4, color=colour, label=label)
        tolerance = 100 * TOLERANCE["block" if depth == 1 else "stack"]
        axis.axhspan(-tolerance, tolerance, color="0.92", zorder=0)
        axis.axhline(0, color="0.3", lw=0.8)
        axis.set_xticks(
            range(len(cases)), [f"{case} {pattern}" for case, pattern in cases], fontsize=7, rotation=35, ha="right"
        )
        axis.set(title=f"depth {depth}", ylabel="simulated / predicted\nsecond moment - 1, %")
        axis.legend(frameon=False, fontsize=7, ncols=4)
    return drawing


# Command line ---------------------------------------------------------------------------------------------------------


def work(task: Task) -> dict[str, float]:
    """Expected networks and the work of a task on an accelerator, from spreads measured at d_model 128."""
    spread = (2.0 if task["case"] in ("mqa", "masked") else 1.0) if task["depth"] == 1 else 1.1
    networks = min(MOST_NETWORKS, max(FIRST_ROUND, spread**2 / task["d_model"] / task["target"] ** 2))
    return {"networks": networks, **device_work(make_spec(task), task["n_tokens"], networks)}


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--draw-device", default="cpu", help="where weights are drawn (default %(default)s)")
    parser.add_argument("--stage", choices=("all", "simulate", "compare"), default="all")
    parser.add_argument("--cases", nargs="+", choices=[*CASES, *PLACEMENTS], help="only these")
    parser.add_argument("--depths", nargs="+", type=int, help="only these")
    parser.add_argument("--widths", nargs="+", type=int, help="only these")
    parser.add_argument("--block-stderr", type=float, default=0.0025, help="target of one block (default %(default)s)")
    parser.add_argument("--stack-stderr", type=float, default=0.005, help="target of a stack (default %(default)s)")
    parser.add_argument("--max-seconds", type=float, default=math.inf, help="wall clock of the simulations")
    parser.add_argument("--dry-run", action="store_true", help="print the work of every task and stop")


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulate what has no complete result yet, compare, save, draw and print the verdicts."""
    deadline = time.time()
    chosen = options(__doc__, arguments, extend=_arguments)
    deadline += chosen.max_seconds if chosen.stage != "compare" else -1
    wanted = {"case": chosen.cases, "depth": chosen.depths, "d_model": chosen.widths}
    todo = tasks(chosen.block_stderr, chosen.stack_stderr, chosen.smoke)
    todo = [task for task in todo if all(names is None or task[key] in names for key, names in wanted.items())]
    if chosen.dry_run:
        return _print_work(todo)
    draw = functools.partial(
        simulated, folder=chosen.runs, device=chosen.device, draw_device=chosen.draw_device, deadline=deadline
    )
    measured = run_all(draw, todo, chosen.n_workers)
    missing = [_label(task) for task, dataset in zip(todo, measured, strict=True) if dataset is None]
    print(f"{len(todo) - len(missing)} of {len(todo)} tasks simulated")
    if chosen.stage == "simulate" or len(missing) == len(todo):
        return 0
    pairs = [(task, dataset) for task, dataset in zip(todo, measured, strict=True) if dataset is not None]
    rows = [row for found in run_all(_compare_pair, pairs, chosen.n_workers) for row in found]
    covered = [row for row in rows if "site" in row]
    limits = extrapolations(covered)
    table = {
        "tolerance": TOLERANCE,
        "verdicts": verdicts(covered, limits),
        "extrapolated": limits,
        "rows": covered,
        "not_covered": [row for row in rows if "not_covered" in row],
        "missing": missing,
    }
    write_text(chosen.out / "theory_accuracy.json", json.dumps(table, indent=1) + "\n")
    if covered:
        figure(covered, limits).savefig(chosen.out / "theory_accuracy.png", dpi=150)
    _print(table)
    return 0


def _compare_pair(pair: tuple[Task, xr.Dataset]) -> list[Row]:
    return compare(*pair)


def _print_work(todo: Sequence[Task]) -> int:
    total = 0.0
    columns = ("networks", "Tflop", "1e9 draws", "1e3 launches", "seconds", "sum")
    print(f"{'task':<38}", *(f"{name:>12}" for name in columns))
    for task in todo:
        w = work(task)
        total += w["seconds"]
        amounts = (w["networks"], w["flops"] / 1e12, w["draws"] / 1e9, w["launches"] / 1e3, w["seconds"], total)
        print(f"{_label(task):<38}", *(f"{amount:>12.1f}" for amount in amounts))
    print("seconds: a rough guess for one worker on one accelerator; launches dominate and overlap between workers")
    return 0


def _print(table: Mapping[str, Any]) -> None:
    head = f"{'case':<16} {'pattern':<7} {'L':>3} {'d':>5} {'site':<10}"
    print(head, f"{'ratio - 1':>18} {'claimed':>8} {'correlation':>18}")
    for row in [*table["rows"], *table["extrapolated"]]:
        place = f"{row['depth']:>3} {row.get('d_model', 'inf'):>5} {row.get('site', 'resid_post'):<10}"
        ratio = f"{row['ratio'] - 1:+9.4f} ± {row['stderr']:.4f}"
        correlation = f"{row['correlation_difference']:+9.4f} ± {row['correlation_stderr']:.4f}"
        claim = f"{row['theory_error']:8.4f}" if "theory_error" in row else " " * 8
        print(f"{row['case']:<16} {row['pattern']:<7} {place} {ratio:>18} {claim} {correlation:>18}")
    for row in table["verdicts"]:
        print("verdict:", " ".join(f"{value}" if key == "case" else f"{key}={value}" for key, value in row.items()))
    for row in table["not_covered"]:
        print(f"not covered: {_label(row)}: {row['not_covered']}")


if __name__ == "__main__":
    raise SystemExit(main())
