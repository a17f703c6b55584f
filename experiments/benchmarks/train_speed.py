"""Speed of `fit`'s step beside a plain compiled loop, in one run: tokens per second, MFU, memory, cost of statistics.

Claim: with the statistics of every layer and site at every step, a step is at least 1.05 times as fast as the plain
loop (`plain_loop.py`), and the statistics cost at most 1 % of it. Models: head_dim 128, vocabulary 8,192, T = 1024,
64 sequences in one micro-batch. MFU: `train.budget.flops_per_token` (6 per active weight of a product, 6 L d T) over
989 TFLOP/s. Each variant: warm-up, then repeats of `--n-calls` steps; the median over repeats. Variants are built one
after the other, and the plain loop before and after them, which shows how much the device drifts.

    python -m experiments.benchmarks.train_speed --d-model 512 --out train_speed_512.json   # one GPU, 2 minutes
    python -m experiments.benchmarks.train_speed --table train_speed_*.json                 # the table of the README
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.benchmarks.plain_loop import PlainLoop
from varprop import presets
from varprop.corpus import Corpus
from varprop.spec import AttentionSpec, FeedForwardSpec, ModelSpec, MoESpec
from varprop.train import TrainConfig
from varprop.train.budget import flops_per_token, peak_flops
from varprop.train.distributed import World
from varprop.train.track import Fetcher
from varprop.train.trainer import Trainer

WIDTHS = {256: (32, 768), 512: (32, 1536), 1024: (32, 2816), 2048: (16, 8192)}
"""n_layers and d_ff by d_model."""
AIMS = {256: 0.30, 512: 0.42, 1024: 0.52, 2048: 0.60}
VOCABULARY = 8192
VARIANTS = ("plain", "fit", "without_statistics", "without_graph", "moe", "plain_again")


def spec_of(d_model: int, *, experts: bool = False, n_layers: int | None = None) -> ModelSpec:
    """The dense model of a width, or with 8 experts of half the width, 2 active."""
    layers, d_ff = WIDTHS[d_model]
    spec = ModelSpec(
        d_model=d_model,
        n_layers=n_layers or layers,
        vocab_size=VOCABULARY,
        tied_embeddings=False,
        attention=AttentionSpec(n_heads=max(1, d_model // 128)),
        feed_forward=FeedForwardSpec(d_ff=d_ff),
    )
    if not experts:
        return spec
    moe = MoESpec(n_experts=8, top_k=2, d_expert=d_ff // 2, normalize_gates=True)
    return dataclasses.replace(spec, feed_forward=None, moe=moe)


def corpus_of(n_tokens: int) -> Corpus:
    """Random tokens: speed does not depend on them, except through the balance of experts."""
    ids = np.random.default_rng(0).integers(0, VOCABULARY, 16 * n_tokens + 1).astype(np.uint16)
    return Corpus(ids, ids, VOCABULARY, None, "random", "0" * 64, None)


def stepper(variant: str, spec: ModelSpec, config: TrainConfig, device: torch.device) -> Callable[[torch.Tensor], None]:
    """What makes one update on a batch (B, T + 1)."""
    world = World(0, 1, 0, device)
    if variant.startswith("plain"):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        return PlainLoop(spec, config.n_tokens, device, dtype, config.compile).step
    graph = config.cuda_graph and variant != "without_graph"
    trainer = Trainer(spec, dataclasses.replace(config, cuda_graph=graph), corpus_of(config.n_tokens), world)
    trainer.plain.statistics = variant != "without_statistics"
    fetcher = Fetcher()
    number = iter(range(10**9))

    def step(tokens: torch.Tensor) -> None:
        record = trainer.forward_backward(tokens, True)
        at = next(number)
        fetcher.put(at, {**record, "gradient_norm": trainer.update(at)})
        fetcher.take(at)

    return step


def seconds_per_step(step: Callable[[torch.Tensor], None], batches: list[torch.Tensor], n_calls: int) -> float:
    """Of `n_calls` steps, the device's work included."""
    cuda = batches[0].is_cuda
    if cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    for call in range(n_calls):
        step(batches[call % len(batches)])
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / n_calls


def clock_and_power(
    step: Callable[[torch.Tensor], None], batches: list[torch.Tensor], seconds: float
) -> dict[str, float]:
    """The device's clock in MHz and its power in watts in the middle of 2 s of work; nothing where they are not known.

    seconds: of one step.
    """
    began = time.perf_counter()
    for call in range(int(2 / seconds) + 1):
        step(batches[call % len(batches)])
    time.sleep(max(0.0, began + 1.2 - time.perf_counter()))
    found = {}
    with contextlib.suppress(Exception):  # no such library, or a machine that hides them
        found = {"sm_mhz": float(torch.cuda.clock_rate()), "watts": torch.cuda.power_draw() / 1e3}
    torch.cuda.synchronize()
    return found


def profile(step: Callable[[torch.Tensor], None], batches: list[torch.Tensor]) -> list[dict[str, Any]]:
    """Time of each kernel in a step, the largest first: milliseconds and calls."""
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as found:
        for batch in batches[:2]:
            step(batch)
        torch.cuda.synchronize()
    rows = [(e.self_device_time_total / 2e3, e.count / 2, e.key) for e in found.key_averages()]
    return [{"ms": round(ms, 3), "calls": calls, "kernel": name[:90]} for ms, calls, name in sorted(rows)[::-1] if ms]


def measure(d_model: int, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """One row per variant, and ratios."""
    config = TrainConfig(
        batch_size=arguments.batch_size,
        n_tokens=arguments.n_tokens,
        compile=device.type == "cuda",
        compile_layers=4,
        cuda_graph=device.type == "cuda",
        device=str(device),
        n_probe_sequences=1,
        n_evaluation_sequences=1,
    )
    cuda = device.type == "cuda"
    found: dict[str, Any] = {}
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.batch_size, arguments.n_tokens + 1)
    batches = [torch.randint(VOCABULARY, shape, generator=generator).to(device) for _ in range(4)]
    for variant in arguments.variant or VARIANTS:
        if arguments.preset:
            spec = presets.get(arguments.preset)
        else:
            spec = spec_of(d_model, experts=variant == "moe", n_layers=arguments.n_layers)
        torch._dynamo.reset()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        step = stepper(variant, spec, config, device)
        seconds_per_step(step, batches, 6 if cuda else 1)
        warm = time.perf_counter() - began
        times = [seconds_per_step(step, batches, arguments.n_calls) for _ in range(arguments.n_repeats)]
        middle = statistics.median(times)
        rate = config.tokens_per_step / middle
        row: dict[str, Any] = {"ms": middle * 1e3, "ms_repeats": [t * 1e3 for t in times], "tokens_per_s": rate}
        row["warm_up_s"] = warm
        peak = peak_flops(torch.cuda.get_device_name(device)) if cuda else None
        if cuda and peak:
            row["mfu"] = rate * flops_per_token(spec, arguments.n_tokens) / peak
            row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            row |= clock_and_power(step, batches, middle)
        if cuda and variant in arguments.profile:
            row["kernels"] = profile(step, batches)[:24]
        found[variant] = row
        print(json.dumps({"d_model": d_model, "variant": variant, **{k: v for k, v in row.items() if k != "kernels"}}))
        del step
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
    return found


def ratios(found: dict[str, Any]) -> dict[str, float]:
    """What the claims are about."""
    ms = {name: row["ms"] for name, row in found.items()}
    result = {}
    if {"plain", "fit"} <= ms.keys():
        plain = statistics.mean([ms["plain"], ms.get("plain_again", ms["plain"])])
        result["speed_over_plain"] = plain / ms["fit"]
    if {"fit", "without_statistics"} <= ms.keys():
        result["cost_of_statistics"] = ms["fit"] / ms["without_statistics"] - 1
    if "mfu" in found.get("moe", {}) and "fit" in ms:
        result["moe_mfu_over_dense"] = found["moe"]["mfu"] / found["fit"]["mfu"]
    return result


def as_markdown(paths: Sequence[Path]) -> str:
    """Results of several runs of this program as one table: medians, and ratios within each run."""
    columns = ("d_model, n_layers, d_ff", "tokens/s", "MFU", "aim", "over the plain loop", "cost of statistics")
    columns += ("MFU of the mixture over dense", "peak memory")
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for path in paths:
        result = json.loads(path.read_text())
        for width, row in result["widths"].items():
            layers, d_ff = WIDTHS[int(width)]
            fit, ratio = row["variants"]["fit"], row["ratios"]
            mixture = f"{ratio['moe_mfu_over_dense']:.2f}" if "moe_mfu_over_dense" in ratio else "-"
            sequences = "" if result["batch_size"] == 64 else f" ({result['batch_size']} sequences)"
            cells = (
                f"{width}, {layers}, {d_ff}{sequences}",
                f"{fit['tokens_per_s'] / 1e3:.0f} k",
                f"{fit['mfu']:.1%}",
                f"{row['aim_mfu']:.0%}",
                f"{ratio['speed_over_plain']:.3f}",
                f"{ratio['cost_of_statistics']:.2%}",
                mixture,
                f"{fit['peak_gib']:.0f} GiB",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print a line per variant, and write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--d-model", type=int, action="append", choices=list(WIDTHS))
    parser.add_argument("--preset", help="another model, such as paper-dense-1b: does it fit, and how fast is it")
    parser.add_argument("--variant", action="append", choices=VARIANTS)
    parser.add_argument("--profile", action="append", default=[], choices=VARIANTS)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--n-tokens", type=int, default=1024)
    parser.add_argument("--n-layers", type=int, default=None)
    parser.add_argument("--n-calls", type=int, default=8, help="steps in one repeat")
    parser.add_argument("--n-repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--smoke", action="store_true", help="two small layers, a few tokens")
    parser.add_argument("--table", type=Path, nargs="+", help="print these results as a table, and measure nothing")
    arguments = parser.parse_args()
    if arguments.table:
        print(as_markdown(arguments.table))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.smoke:
        arguments.batch_size, arguments.n_tokens, arguments.n_layers = 2, 32, 2
        arguments.n_calls, arguments.n_repeats, arguments.d_model = 1, 1, [256]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    result: dict[str, Any] = {
        "device": name,
        "torch": torch.__version__,
        "batch_size": arguments.batch_size,
        "n_tokens": arguments.n_tokens,
        "widths": {},
    }
    if arguments.preset:
        result["preset"] = arguments.preset
        arguments.d_model = [presets.get(arguments.preset).d_model]
    for d_model in arguments.d_model or list(WIDTHS):
        found = measure(d_model, arguments, device)
        result["widths"][d_model] = {"variants": found, "ratios": ratios(found), "aim_mfu": AIMS.get(d_model)}
        print(json.dumps({"d_model": d_model, **ratios(found)}), flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
