"""Speed and memory of `simulate.sample` against the bare cost of its numbers and against a plain loop, in one process.

Three sides, per network: `sample`; `bare`, which draws the same random numbers and does the same matrix products in
the same blocks and nothing else (no norm, softmax, activation, residual sum, nor any statistic); `loop`, one fresh
`nn.Module` of `nn.Linear` layers after another, initialised on the device, its statistics those of `sample` without the
attention's. Every side is warmed up; the median of several rounds, taken in turn, counts. A loop over few networks
stands for one over many. Memory: the highest allocated by a device call, or resident in a fresh process on the CPU.

Claims tested: bare / sample at least 0.8 on the CPU and on an accelerator; loop / sample at least 10 on an accelerator;
1,000 networks of d_model 512, 32 layers and 128 tokens in under 10 s on one H200; memory flat in depth and networks.

    python -m experiments.benchmarks.simulate_speed                  # CPU, one thread, about 3 minutes
    python -m experiments.benchmarks.simulate_speed --device cuda    # one minute
    python -m experiments.benchmarks.simulate_speed --smoke          # seconds

Writes `simulate_speed_<device>.json` in the results folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from varprop import presets
from varprop.files import write_text
from varprop.simulate import sample
from varprop.simulate.block import networks_per_block
from varprop.simulate.recorder import Recorder
from varprop.spec import ModelSpec, layer_table

Case = tuple[str, ModelSpec, int, int]


def spec_of(d_model: int, n_layers: int, **changes: Any) -> ModelSpec:
    """A SwiGLU model with heads of 64 and a tiny vocabulary (the embedding is not what is measured)."""
    shape = {"d_model": d_model, "n_heads": max(1, d_model // 64), "d_ff": 11 * d_model // 4, "n_layers": n_layers}
    return presets.tiny().with_fields({**shape, "vocab_size": 16, **changes})


def cases(device: str, smoke: bool) -> list[Case]:
    """Label, spec, tokens and networks of every row."""
    if smoke:
        return [("dense", spec_of(64, 2), 8, 8)]
    mixture = {"feed_forward": None, "moe": {"n_experts": 8, "top_k": 2, "d_expert": 704, "normalize_gates": True}}
    if device == "cpu":
        return [
            ("dense", spec_of(64, 8), 64, 64),
            ("dense", spec_of(256, 8), 64, 16),
            ("dense", spec_of(512, 8), 128, 8),
            ("masked 1/2", spec_of(256, 8, density=0.5), 64, 16),
            ("GQA 4", spec_of(512, 8, n_kv_heads=2), 128, 8),
            ("MoE 8/2", spec_of(512, 4, **mixture), 128, 4),
            ("dense", spec_of(2048, 1), 64, 1),
        ]
    return [
        ("dense", spec_of(512, 32), 128, 1000),
        ("dense", spec_of(128, 32), 64, 2048),
        ("dense", spec_of(2048, 8), 128, 64),
        ("dense", spec_of(512, 32), 1024, 128),
        ("masked 1/2", spec_of(512, 32, density=0.5), 128, 500),
        ("GQA 4", spec_of(512, 32, n_kv_heads=2), 128, 500),
        ("MoE 8/2", spec_of(512, 32, **mixture), 128, 160),
    ]


# The three sides ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def bare(spec: ModelSpec, n_tokens: int, n_networks: int, device: str) -> None:
    """The random numbers and the matrix products of `sample`, in its blocks."""
    size = networks_per_block(spec, n_tokens, device)
    generator = torch.Generator(device).manual_seed(0)
    heads = (size, spec.n_heads, n_tokens, spec.head_dim)
    wide = max(max(row.shape[-1] for row in layer_table(spec, 1).values()), spec.d_model)
    x = torch.ones(size, n_tokens, wide, device=device)
    q = torch.ones(heads, device=device)
    for _ in range(-(-n_networks // size)):
        for layer in range(1, spec.n_layers + 1):
            for row in layer_table(spec, layer).values():
                if not row.init_std:
                    continue
                shape = (size, *row.shape)
                weight = torch.empty(shape, device=device).normal_(0.0, row.init_std, generator=generator)
                if row.mask is not None:
                    torch.rand(shape, generator=generator, device=device)
                given = x[..., : row.shape[-1]]
                if len(row.shape) == 3 and spec.moe is not None:  # experts: as many slots as the average load
                    slots = max(1, n_tokens * spec.moe.top_k // spec.moe.n_experts)
                    given = given[:, None, :slots].expand(-1, row.shape[0], -1, -1)
                torch.matmul(given, weight.mT)
            torch.matmul(torch.matmul(q, q.mT), q)
    if device != "cpu":
        torch.cuda.synchronize()


class Layer(nn.Module):
    """One dense Pre-LN block of `nn.Linear` layers, as a user would write it."""

    def __init__(self, spec: ModelSpec, device: str) -> None:
        super().__init__()
        self.spec = spec
        d, kv = spec.d_model, spec.n_kv_heads * spec.head_dim
        assert spec.feed_forward is not None
        inner = spec.feed_forward.d_ff
        sizes = {"q": (d, d), "k": (d, kv), "v": (d, kv), "o": (d, d), "gate": (d, inner), "up": (d, inner)}
        self.matrices = nn.ModuleDict()
        for name, (n_in, n_out) in {**sizes, "down": (inner, d)}.items():
            self.matrices[name] = matrix = nn.Linear(n_in, n_out, bias=False, device="meta").to_empty(device=device)
            nn.init.normal_(matrix.weight, std=n_in**-0.5)
        self.norms = nn.ModuleList(nn.RMSNorm(d, eps=spec.norm.eps, device=device) for _ in range(2))

    def forward(self, x: Tensor, record: Callable[[str, Tensor], None]) -> Tensor:
        """The stream after the block; every site is recorded."""
        record("resid_pre", x)
        y = self.norms[0](x)
        q, k, v = (self.matrices[name](y).unflatten(-1, (-1, self.spec.head_dim)).transpose(1, 2) for name in "qkv")
        mixed = functional.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True, enable_gqa=True)
        out = self.matrices["o"](mixed.transpose(1, 2).flatten(-2))
        record("attn_out", out)
        x = x + out
        record("resid_mid", x)
        y = self.norms[1](x)
        gate, up = (self.matrices[name](y) for name in ("gate", "up"))
        out = self.matrices["down"](functional.silu(gate) * up)
        record("mlp_out", out)
        x = x + out
        record("resid_post", x)
        return x


def rotate(y: Tensor) -> Tensor:
    """A rotary embedding."""
    half = y.shape[-1] // 2
    rates = 10_000.0 ** (-torch.arange(half, device=y.device) / half)
    angle = torch.arange(y.shape[-2], device=y.device)[:, None] * rates
    a, b = y.split(half, dim=-1)
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), dim=-1)


@torch.inference_mode()
def loop(spec: ModelSpec, n_tokens: int, n_networks: int, device: str) -> None:
    """One fresh network at a time."""
    for _ in range(n_networks):
        layers = nn.ModuleList(Layer(spec, device) for _ in range(spec.n_layers))
        recorder = Recorder(spec, n_tokens, 1, device)
        x = torch.randn(1, n_tokens, spec.d_model, device=device)
        for number, layer in enumerate(layers, start=1):
            x = layer(x, partial(recorder, number))
        recorder.arrays()


# Measuring ------------------------------------------------------------------------------------------------------------


def measure(case: Case, device: str, repeats: int) -> dict[str, Any]:
    """Seconds per network of the three sides (medians) and their ratios; None where a side does not exist."""
    label, spec, n_tokens, n_networks = case
    plain = spec.moe is None and not spec.masks.any
    few = max(2, min(n_networks, 40)) if device != "cpu" else max(2, n_networks // 2)
    options = {"n_networks": n_networks, "n_tokens": n_tokens, "device": device, "progress": False}
    sides: dict[str, tuple[Callable[[], object], int]] = {
        "sample": (partial(sample, spec, **options), n_networks),
        "bare": (partial(bare, spec, n_tokens, n_networks, device), n_networks),
    }
    if plain:
        sides["loop"] = (partial(loop, spec, n_tokens, few, device), few)
    size = networks_per_block(spec, n_tokens, device)
    sample(spec, **{**options, "n_networks": size})
    bare(spec, n_tokens, size, device)
    if plain:
        loop(spec, n_tokens, 2, device)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, (action, count) in sides.items():
            start = time.perf_counter()
            action()
            seconds[name].append((time.perf_counter() - start) / count)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    # Whole blocks are computed: `sample` and `bare` do the same number of them.
    row: dict[str, Any] = {"case": label, "d_model": spec.d_model, "n_layers": spec.n_layers, "n_tokens": n_tokens}
    row |= {"n_networks": n_networks, "networks_per_block": size}
    row |= {f"{name}_seconds_per_network": value for name, value in median.items()}
    row |= {"sample_seconds": median["sample"] * n_networks, "bare_over_sample": median["bare"] / median["sample"]}
    row["spread"] = max(max(v) / min(v) for v in seconds.values())
    return row | {"loop_over_sample": median["loop"] / median["sample"] if plain else None}


def peak_memory(device: str, n_layers: int, n_networks: int, d_model: int) -> float:
    """MiB: allocated on the device at most, or resident at most in a fresh process on the CPU."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        sample(spec_of(d_model, n_layers), n_networks=n_networks, n_tokens=64, device=device, progress=False)
        return torch.cuda.max_memory_allocated() / 2**20
    program = (
        "import resource; from experiments.benchmarks.simulate_speed import sample, spec_of;"
        f"sample(spec_of({d_model}, {n_layers}), n_networks={n_networks}, n_tokens=64, progress=False);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return float(done.stdout)


def memory_table(device: str, smoke: bool) -> list[dict[str, float]]:
    """Peak memory over depth and over the number of networks."""
    size = networks_per_block(spec_of(256, 1), 64, device)
    shapes = [(4, size), (64, size), (4, 8 * size)] if not smoke else [(1, size), (4, size)]
    width = 64 if smoke else 256
    return [
        {"n_layers": n_layers, "n_networks": n, "d_model": width, "mebibytes": peak_memory(device, n_layers, n, width)}
        for n_layers, n in shapes
    ]


def main(arguments: list[str] | None = None) -> None:
    """Print the tables and write them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="one small case, nothing written")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "results")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    print(f"{'case':<11} {'d':>5} {'L':>3} {'T':>5} {'N':>5} {'sample s':>9} {'bare/sample':>11} {'loop/sample':>11}")
    for case in cases(chosen.device, chosen.smoke):
        row = measure(case, chosen.device, 1 if chosen.smoke else chosen.repeats)
        rows.append(row)
        ratio = f"{row['loop_over_sample']:11.1f}" if row["loop_over_sample"] else " " * 11
        sizes = f"{row['d_model']:>5} {row['n_layers']:>3} {row['n_tokens']:>5} {row['n_networks']:>5}"
        line = f"{row['case']:<11} {sizes} {row['sample_seconds']:>9.2f} {row['bare_over_sample']:>11.2f} {ratio}"
        print(line, flush=True)
    memory = memory_table(chosen.device, chosen.smoke)
    for entry in memory:
        print("peak memory:", entry)
    if not chosen.smoke:
        name = torch.cuda.get_device_name() if chosen.device != "cpu" else "one CPU thread"
        found = {"device": name, "torch": str(torch.__version__), "rows": rows, "memory": memory}
        write_text(chosen.out / f"simulate_speed_{chosen.device}.json", json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
