"""The grid that validates the theory: `predict` against explicit networks at every point, with one verdict each.

Claim tested: second moments and token correlations of every site are within the error that the theory claims, at every
combination of depth {1, 4, 16, 64, 128}, density {1, .5, .25, .1}, {MHA, GQA, MQA}, {dense, 2 of 8 and 8 of 64 experts,
gates normalised or not}, {16, 128, 1024} tokens and norm placement {pre, post, peri, reordered, mix, lns}, and for each
part of a model alone (`points.COMPONENTS`). Follows no figure of the paper.

A network of 128 layers holds the shallower ones where a block does not depend on n_layers: read at five depths. `mix`
has its own networks at each depth. 16 and 128 tokens are causal with rotary positions; 1024 tokens attend in full
without positions (causal ones are predicted in a second a layer: main effects at depth 1 and 4 only). At 1024 tokens
triples of factors and more end at 16 layers. `reordered` at 1024 tokens ends at one layer, and at 128 tokens, pairs of
factors and more, at 16 (`points._deepest`).

    python -m experiments.theory_vs_simulation --dry-run
    python -m experiments.theory_vs_simulation --stage simulate --device cuda --n-workers 12 --max-seconds 540
    python -m experiments.theory_vs_simulation --stage compare --n-workers 2
    python -m experiments.theory_vs_simulation --stage page     # again from results/, with other causes or explanations

Rounds and shards: simulation.py. A later call goes on where the deadline ended this one; a job that has begun ends, so
leave a margin of a minute. Networks do not depend on the theory: another theory needs `--stage compare` alone.
Cost: `--dry-run`; predictions about 25 minutes of one core, kept in `--runs` as the networks are. `--smoke`: seconds.
Writes `results/rows.csv.gz`, `results/verdict.json`, three figures and VERDICT.md, whose last part is explanations.md;
causes.toml names the causes of disagreements.
Expected: every cell agrees.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.common import options
from experiments.theory_vs_simulation import figure, verdict
from experiments.theory_vs_simulation.comparison import NUMBERS, compare_all
from experiments.theory_vs_simulation.points import points
from experiments.theory_vs_simulation.simulation import print_work, simulate
from varprop.files import replacing, write_text

HERE = Path(__file__).resolve().parent
LEFT_OUT = ("missing", "refused")


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(out=HERE)
    parser.add_argument("--stage", choices=("all", "simulate", "compare", "page"), default="all")
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), help="K N: points K, K + N, ... (default 0 1)")
    parser.add_argument("--most-seconds", type=float, default=8, help="of a device for a point (default %(default)s)")
    parser.add_argument("--max-seconds", type=float, default=math.inf, help="wall clock of the simulations")
    parser.add_argument("--n-devices", type=int, default=1, help="of the dry run (default %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print the work and stop")


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulate, compare, save, draw, and write the page."""
    deadline = time.time()
    chosen = options(__doc__, arguments, extend=_arguments)
    deadline += chosen.max_seconds
    first, step = chosen.part
    everything = points(chosen.smoke)
    todo = everything[first::step]
    if chosen.dry_run:
        print_work(todo, chosen.n_devices)
        return 0
    if chosen.stage == "page":
        _page(chosen.out)
        return 0
    if chosen.stage != "compare":
        most = 0.01 if chosen.smoke else chosen.most_seconds
        simulate(todo, chosen.runs, chosen.device, chosen.n_workers, most, deadline, len(everything))
    if chosen.stage == "simulate":
        return 0
    table = compare_all(todo, chosen.runs, chosen.n_workers, len(everything))
    if not table["rows"]:
        print("nothing simulated yet")
        return 0
    folder = chosen.out / "results"
    folder.mkdir(exist_ok=True)
    rows = pd.DataFrame(table["rows"])
    with replacing(folder / "rows.csv.gz") as temporary:
        compression = {"method": "gzip", "mtime": 0}
        rows.to_csv(temporary, index=False, float_format="%.4g", compression=compression)
    write_text(folder / "left_out.json", json.dumps({name: table[name] for name in LEFT_OUT}, indent=1) + "\n")
    print(json.dumps(_page(chosen.out)["all"], indent=1))
    return 0


def _page(out: Path) -> dict[str, Any]:
    """`verdict.json`, VERDICT.md and the figures, from the rows saved."""
    folder = out / "results"
    absent = {name: [""] for name in NUMBERS}
    rows = pd.read_csv(folder / "rows.csv.gz", keep_default_na=False, na_values=absent, dtype={"density": str})
    left_out = json.loads((folder / "left_out.json").read_text())
    found = verdict.summary(rows.to_dict("records"), left_out["missing"], left_out["refused"])
    write_text(folder / "verdict.json", json.dumps(found, indent=1) + "\n")
    write_text(out / "VERDICT.md", verdict.page(found, (HERE / "explanations.md").read_text()))
    numbers = rows.assign(density=pd.to_numeric(rows.density))  # a component has none
    figure.heat_maps(numbers, "resid_post").savefig(folder / "ratios.png", dpi=130)
    figure.deviations(numbers).savefig(folder / "deviations.png", dpi=130)
    figure.profiles(numbers, figure.CASES).savefig(folder / "profiles.png", dpi=130)
    return found


if __name__ == "__main__":
    raise SystemExit(main())
