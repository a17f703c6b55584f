"""One deep model on real text, every layer watched: d_model 512, 32 layers, 40 million tokens of `docs`.

Claim tested: the harness as a whole, and what arXiv 2603.15389 says of Pre-LN training: the stream's variance rises in
the first hundreds of updates, far above its initial profile, falls again under weight decay, and deep blocks come near
to the identity. Follows the paper's figure of the last layer's variance over steps (its depth 32), in small.
Cost: 2 minutes on one H200; `--smoke` seconds on a CPU. Expected: variance of the last layer at its largest before half
of the run; a share of the last blocks (what they add over the stream) near 1/L at the start.

    VARPROP_CORPUS=folder python -m experiments.deep_training --device cuda

writes `results/deep_training.nc` and `.png`. A killed run goes on from `runs/deep`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from experiments.common import options
from varprop import presets, results, theory, train
from varprop.errors import SchemaError
from varprop.spec import ModelSpec

HERE = Path(__file__).resolve().parent
SHOWN = (1, 4, 8, 16, 24, 32)
"""Layers whose variance is drawn over steps."""


def tasks(smoke: bool = False, device: str = "auto") -> list[tuple[ModelSpec, train.TrainConfig]]:
    """The one run: spec and config."""
    if smoke:
        spec = presets.tiny().with_fields(d_model=32, n_layers=3, d_ff=48)
        config = train.TrainConfig(
            n_steps=6, batch_size=2, n_tokens=16, warmup_steps=1, record_every=2, probe_every=3, evaluate_every=3,
            evaluation_length=32, n_evaluation_sequences=2, n_probe_sequences=1, device="cpu",
        )  # fmt: skip
        return [(spec, config)]
    config = train.TrainConfig(
        total_tokens=40_000_000,
        batch_size=64,
        n_tokens=1024,
        learning_rate=2e-3,
        warmup_steps=100,
        corpus="docs",
        record_every=2,
        evaluation_length=512,
        n_evaluation_sequences=128,
        compile=True,
        compile_layers=4,
        cuda_graph=True,
        checkpoint_every=200,
        device=device,
    )
    return [(presets.d512_deep(), config)]


def reduce(ds: xr.Dataset) -> dict[str, float]:
    """The numbers of the text: losses, variance of the last layer at start, peak and end, shares of the last blocks."""
    last = ds.variance.isel(seed=0, layer=-1).sel(site="resid_post")
    deep = slice(-(int(ds.layer[-1]) // 4), None)
    added = ds.variance.isel(seed=0).sel(site=["attn_out", "mlp_out"]).sum("site")
    share = added / ds.variance.isel(seed=0).sel(site="resid_post")
    peak = int(last.values.argmax())
    found = {
        "tokens": float(ds.tokens_seen.isel(seed=0, step=-1)),
        "variance_start": float(last[0]),
        "variance_peak": float(last[peak]),
        "step_of_peak": float(ds.step[peak]),
        "variance_end": float(last[-1]),
        "share_last_quarter_start": float(share.isel(step=0, layer=deep).mean()),
        "share_last_quarter_end": float(share.isel(step=-1, layer=deep).mean()),
        "branch_correlation_last_quarter_end": float(ds.branch_correlation.isel(seed=0, step=-1, layer=deep).mean()),
    }
    if "bits_per_byte" in ds:
        for name in ds.evaluation.values:
            found[f"bits_per_byte_{name}"] = float(
                ds.bits_per_byte.isel(seed=0, evaluation_step=-1).sel(evaluation=name)
            )
    return found


def figure(ds: xr.Dataset) -> Figure:
    """Loss; variance over steps; the profile at the start, the peak and the end beside the prediction; shares; r."""
    picture = Figure(figsize=(15, 8), layout="constrained")
    axes = picture.subplots(2, 3)
    run = ds.isel(seed=0)
    steps = run.step.values
    axes[0, 0].plot(steps, run.train_loss, lw=0.8, label="training batch")
    for name in run.evaluation.values:
        length = int(run.evaluation_length.sel(evaluation=name))
        values = run.validation_loss.sel(evaluation=name)
        axes[0, 0].plot(run.evaluation_step, values, "o-", ms=3, label=f"held out, {length} tokens")
    axes[0, 0].set(xlabel="step", ylabel="nats per token", title="loss")
    axes[0, 0].legend(fontsize=8)
    n_layers = int(run.layer[-1])
    for layer in [layer for layer in SHOWN if layer <= n_layers]:
        values = run.variance.sel(layer=layer, site="resid_post")
        axes[0, 1].semilogy(steps, values, lw=1, label=f"layer {layer}")
    axes[0, 1].set(xlabel="step", ylabel="variance", title="stream after a layer")
    axes[0, 1].legend(fontsize=8)
    last = run.variance.isel(layer=-1).sel(site="resid_post")
    shown = {"start": 0, "peak of the last layer": int(last.values.argmax()), "end": len(steps) - 1}
    added = run.variance.sel(site=["attn_out", "mlp_out"]).sum("site")
    for name, i in shown.items():
        stream = run.variance.isel(step=i).sel(site="resid_post")
        axes[0, 2].semilogy(run.layer, stream, label=f"{name} (step {steps[i]})")
        axes[1, 0].semilogy(run.layer[1:], (added.isel(step=i) / stream)[1:], label=name)
        for branch, style in (("attn", "-"), ("mlp", "--")):
            r = run.branch_correlation.isel(step=i).sel(branch=branch)
            axes[1, 1].plot(run.layer[1:], r[1:], style, label=f"{name}, {branch}")
    spec = ModelSpec.from_json(ds.attrs["spec"])
    start = float(run.token_correlation.isel(probe_step=0).sel(layer=0, site="resid_post"))
    predicted = theory.predict(spec, n_tokens=int(ds.attrs["n_tokens"]), token_correlation=max(0.0, start))
    axes[0, 2].semilogy(
        predicted.layer, predicted.second_moment.sel(site="resid_post"), "k:", label="predicted q, start"
    )
    axes[0, 2].set(xlabel="layer", ylabel="variance", title="stream")
    axes[1, 0].set(xlabel="layer", ylabel="added / stream", title="share of a block in the stream's variance")
    axes[1, 1].set(xlabel="layer", ylabel="r", title="correlation of a branch with its stream")
    for one in (axes[0, 2], axes[1, 0], axes[1, 1]):
        one.legend(fontsize=8)
    overlap = run.block_overlap.isel(probe_step=-1).values
    scale = np.sqrt(np.diag(overlap))
    image = axes[1, 2].imshow(overlap / np.outer(scale, scale), vmin=-1, vmax=1, cmap="RdBu_r", origin="lower")
    axes[1, 2].set(xlabel="layer", ylabel="layer", title="cosine of what two blocks add, end")
    picture.colorbar(image, ax=axes[1, 2])
    return picture


def run(task: tuple[ModelSpec, train.TrainConfig], folder: Path) -> xr.Dataset:
    """The task's result, from its file where that is whole, else trained (or trained on) and saved."""
    path = folder / "deep_training.nc"
    try:
        return results.load(path)
    except SchemaError:
        found = train.fit(*task, run_dir=folder / "deep", logs=("console", "jsonl"))
        return results.load(results.save(found, path))


def main(arguments: list[str] | None = None) -> int:
    """Train, save, print the numbers and draw."""
    chosen = options(__doc__, arguments, device="auto")
    (task,) = tasks(chosen.smoke, chosen.device)
    ds = run(task, chosen.runs)
    results.save(ds, chosen.out / "deep_training.nc")
    for name, value in reduce(ds).items():
        print(f"{name}: {value:.4g}")
    figure(ds).savefig(chosen.out / "deep_training.png", dpi=110)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
