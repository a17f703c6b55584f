"""Weight masks before and after training: variance of the stream, and the share of the last block in it.

Claim tested (arXiv 2603.15389, the mask argument): lower weight density damps the growth of the residual variance and
so keeps deep blocks from becoming identities. At initialisation the first half is true and the second false: the share
v/q of a block falls with the density. For a trained, coherent stream (branch correlation r > 0) the coherent part
falls with the density squared and the share may rise. Measured here: one model (preset d256, 12 layers) at densities
1, 1/2, 1/4 and 1/10, fixed Bernoulli masks, the same steps and text, three seeds each.
Cost: about 3 minutes on one H200; `--smoke` seconds on a CPU. Expected: growth falls with density at both ends; the
share of the last block falls with density at the start and rises at the end.
Outcome: the first as expected (q_L/q_0 after training 135 at density 1 to 3.2 at 1/10). The second half as expected at
the start (last block's share 8.9 % to 0.065 %); at the end the shares of the last block lie within each other's
intervals (9 to 13 %), so neither a rise nor a fall is shown, and in the lower half of the stack lower density still
means a smaller share. Branch correlation r falls with density, from 0.18 to 0.08.

The results kept are of the training loop before the present one: another order of the data, other dimensions.

    python -m experiments.masked_training --device cuda --n-workers 4

writes `results/masked_training.nc` (every run: seed, density, step, layer, site) and `results/masked_training.png`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from experiments.common import options, run_all
from varprop import presets, results, stats, train
from varprop.corpus import load_corpus
from varprop.errors import SchemaError
from varprop.spec import ModelSpec

HERE = Path(__file__).resolve().parent
DENSITIES = (1.0, 0.5, 0.25, 0.1)
N_SEEDS = 3


@dataclass(frozen=True)
class Task:
    """One training run."""

    density: float
    spec: ModelSpec
    config: train.TrainConfig

    @property
    def file_name(self) -> str:
        """The density and the seed of the run; the folder belongs to one version of this program."""
        return f"masked-{self.density:g}-{self.config.seed}-{self.config.n_steps}.nc"


def tasks(smoke: bool = False, device: str = "auto") -> list[Task]:
    """Every density with every seed."""
    base = presets.tiny().with_fields(d_model=32, n_layers=2, d_ff=48) if smoke else presets.d256()
    size = {
        "n_steps": 4,
        "batch_size": 2,
        "n_tokens": 16,
        "record_every": 2,
        "warmup_steps": 1,
        "n_evaluation_sequences": 2,
    }
    if not smoke:
        size = {"n_steps": 600, "batch_size": 32, "n_tokens": 256, "record_every": 50, "warmup_steps": 60}
    return [
        Task(density, base.with_fields(density=density), train.TrainConfig(seed=seed, device=device, **size))  # type: ignore[arg-type]
        for density in (DENSITIES[:2] if smoke else DENSITIES)
        for seed in range(2 if smoke else N_SEEDS)
    ]


def run(task: Task, folder: Path) -> xr.Dataset:
    """The task's result, from its file where that is whole, else trained and saved."""
    path = folder / task.file_name
    try:
        return results.load(path)
    except SchemaError:
        return results.load(results.save(train.fit(task.spec, task.config, progress=False), path))


def reduce(done: Sequence[tuple[float, xr.Dataset]]) -> xr.Dataset:
    """All runs in one Dataset (density, seed, step, layer, site), with the block share v / q beside the moments."""
    densities = sorted({density for density, _ in done}, reverse=True)
    rows = [results.merge([run for d, run in done if d == density], "seed") for density in densities]
    table = results.merge(rows, "density").assign_coords(density=densities)
    moments = table.second_moment
    added = moments.sel(site="attn_out", drop=True) + moments.sel(site="mlp_out", drop=True)
    share = added / moments.sel(site="resid_post", drop=True)
    table["block_share"] = share.isel(layer=slice(1, None)).rename(layer="block")
    return table


def _interval(values: xr.DataArray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over seeds and the half-width of its 95 % t interval."""
    low, high = stats.t_interval(values.to_numpy(), axis=values.dims.index("seed"))
    return (low + high) / 2, (high - low) / 2


def figure(table: xr.Dataset) -> Figure:
    """Second moment of the stream and block share by layer, first and last step, one line a density."""
    drawing = Figure(figsize=(10, 6), layout="constrained")
    panels = drawing.subplots(2, 2, sharex=True)
    colours = ("#4477aa", "#66ccee", "#ccbb44", "#ee6677")
    for column, (index, title) in enumerate(((0, "before training"), (-1, "after training"))):
        at = table.isel(step=index)
        quantities = ((at.second_moment.sel(site="resid_post"), "layer"), (at.block_share, "block"))
        for axis, (values, dim) in zip(panels[:, column], quantities, strict=True):
            for colour, density in zip(colours, table.density.values, strict=False):
                mean, half = _interval(values.sel(density=density))
                axis.errorbar(
                    values[dim], mean, half, color=colour, marker="o", ms=3, lw=1.2, label=f"density {density:g}"
                )
            axis.set_yscale("log")
            axis.grid(alpha=0.3)
        panels[0, column].set_title(f"{title} (step {int(at.step)})")
        panels[1, column].set_xlabel("layer")
    panels[0, 0].set_ylabel("second moment of the stream")
    panels[1, 0].set_ylabel("block share v / q")
    panels[0, 0].legend(frameon=False, fontsize=8)
    return drawing


def summary(table: xr.Dataset) -> str:
    """One line a density: growth, last block's share and mean branch correlation at both ends, and the loss."""
    lines = []
    for density in table.density.values:
        cells = [f"density {density:<5g}"]
        for name, index in (("start", 0), ("end", -1)):
            at = table.sel(density=density).isel(step=index)
            stream = at.second_moment.sel(site="resid_post")
            for label, values in (
                ("q_L/q_0", stream.isel(layer=-1) / stream.isel(layer=0)),
                ("last share", at.block_share.isel(block=-1)),
                ("r", at.branch_correlation.isel(layer=slice(1, None)).mean(["layer", "branch"])),
            ):
                mean, half = _interval(values)
                cells.append(f"{name} {label} {float(mean):.4g} ± {float(half):.2g}")
        bits = table.sel(density=density, evaluation="fixed_length").isel(evaluation_step=-1).bits_per_byte
        mean, half = _interval(bits)
        lines.append("  ".join([*cells, f"bits per byte {float(mean):.4g} ± {float(half):.2g}"]))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run every task that has no result yet, reduce, save, draw and print the summary."""
    chosen = options(__doc__, arguments, device="auto")
    todo = tasks(chosen.smoke, chosen.device)
    load_corpus("embedded")  # tokenised once, before the workers start
    done = run_all(functools.partial(run, folder=chosen.runs), todo, chosen.n_workers)
    table = reduce([(task.density, run) for task, run in zip(todo, done, strict=True)])
    results.save(table, chosen.out / "masked_training.nc")
    figure(table).savefig(chosen.out / "masked_training.png", dpi=150)
    print(summary(table))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
