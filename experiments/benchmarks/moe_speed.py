"""Speed of one mixture layer, forward and backward, beside a dense feed-forward of as many active FLOP and beside the
bare products: bfloat16, compiled, 65,536 tokens, one GPU.

Claim: dropless experts cost what their products cost, plus a few passes over the tokens. Cost: a few minutes on one
H200, most of it compiling; seconds with --smoke, on a CPU, where only the program is tested.

    python -m experiments.benchmarks.moe_speed                         # all shapes
    python -m experiments.benchmarks.moe_speed --d-model 512 --pieces  # one width, with the parts of the mixture
    python -m experiments.benchmarks.moe_speed --smoke

Predicted for an H200, before any measurement: dense products at 600, 650 and 700 TFLOP/s for d_model 512, 1024 and
2048, grouped ones at 500, 550 and 600 with 8 experts and a fifth less with 64 narrow ones; passes at 4 TB/s.
Between the products the mixture passes over the tokens more often than the dense layer does: spread and collect, once
forward and once backward, move 4 (K + 1) n D numbers of 2 bytes in all; the router in float32 moves 10 n D bytes
forward and as many backward; the sort of n K keys takes 50 us. In milliseconds:

    d_model  d_ff   dense   8 experts, top 2      64 experts, top 8
        512  1536    2.0    2.9 (ratio 0.69)       3.9 (0.51)
       1024  2816    6.1    8.0 (0.76)             9.8 (0.62)
       2048  8192   30.7     38 (0.81)              44 (0.70)

One line of JSON per shape: `*_s` seconds of a forward and backward pass, `*_tflops` 18 n D d_ff FLOP over them (the
router's not counted), `ratio` dense over mixture time, `kernels_us` the kernels of a pass of the mixture, longest
first, `pieces_us` those of its parts, each compiled alone, forward.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.profiler import DeviceType, ProfilerActivity, profile

from varprop.nn.experts import assign_tokens, grouped_linear
from varprop.nn.feed_forward import two_layers
from varprop.nn.moe import moe, route
from varprop.spec import FeedForwardSpec, ModelSpec, MoESpec, layer_table

SHAPES = {512: 1536, 1024: 2816, 2048: 8192}


def seconds_per_call(call: Callable[[int], object], device: torch.device, n_calls: int) -> float:
    """Of one of `n_calls` calls, after three to warm up, the device's work included."""
    for number in range(3):
        call(number)
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for number in range(n_calls):
        call(number)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / n_calls


MIXTURES = ((8, 2), (64, 8))
FLOP_PER_WEIGHT = 6


def weights_of(spec: ModelSpec, part: str, device: torch.device) -> dict[str, Tensor]:
    """Float32 matrices of layer 1 whose names start with `part`, at the scale of the spec's initialisation."""
    rows = {name: row for name, row in layer_table(spec, 1).items() if name.startswith(part)}
    return {name: (torch.randn(row.shape, device=device) * row.init_std).requires_grad_() for name, row in rows.items()}


def forward_backward(call: Callable[[], Tensor], inputs: list[Tensor]) -> Callable[[int], None]:
    """A pass whose output gradient is a fixed random tensor, as wide as the output."""
    grad = torch.randn_like(call())

    def run(_: int) -> None:
        torch.autograd.grad(call(), inputs, grad)

    return run


def kernel_times(run: Callable[[int], object], n_calls: int) -> dict[str, float]:
    """Microseconds per call by the name of the kernel, longest first; empty without CUDA."""
    if not torch.cuda.is_available():
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for number in range(n_calls):
            run(number)
        torch.cuda.synchronize()
    times: dict[str, float] = defaultdict(float)
    for event in recorded.events() or []:
        if event.device_type == DeviceType.CUDA:
            times[event.name[:90]] += event.time_range.elapsed_us() / n_calls
    return dict(sorted(times.items(), key=lambda item: -item[1]))


def calls(spec: ModelSpec, x: Tensor, compile_: Callable[..., Any]) -> Iterator[tuple[str, Callable[[int], None]]]:
    """The three layers of equal active FLOP: name and pass."""
    assert spec.moe is not None
    width = spec.moe.top_k * spec.moe.d_expert
    dense = spec.with_fields({"moe": None, "feed_forward": FeedForwardSpec(d_ff=width)})
    weights = weights_of(dense, "mlp.", x.device)

    def dense_layer(x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        return two_layers(x, {name: w.to(x.dtype) for name, w in weights.items()}, "mlp", "silu")

    layer = compile_(dense_layer)
    yield "dense", forward_backward(functools.partial(layer, x, weights), [x, *weights.values()])
    weights = weights_of(spec, "moe.", x.device)
    mixture = compile_(lambda x, weights: moe(x, weights, spec, 1))
    yield "mixture", forward_backward(functools.partial(mixture, x, weights), [x, *weights.values()])
    with torch.no_grad():
        routing = route(x, weights, spec.moe)
        pairs = assign_tokens(routing.chosen.flatten(0, -2), routing.gates.flatten(0, -2), spec.moe.n_experts)
    up, gate, down = (weights[f"moe.experts.{name}"].detach().to(x.dtype) for name in ("up", "gate", "down"))
    inputs = [w.requires_grad_() for w in (torch.cat((gate, up), dim=1), down)]
    rows = [torch.randn(len(pairs.token), w.shape[2], device=x.device).to(x.dtype).requires_grad_() for w in inputs]
    passes = [
        forward_backward(functools.partial(grouped_linear, row, w, pairs.ends), [row, w])
        for row, w in zip(rows, inputs, strict=True)
    ]

    def products(number: int) -> None:
        for run in passes:
            run(number)

    yield "products", products


def pieces(spec: ModelSpec, x: Tensor, compile_: Callable[..., Any], n_calls: int) -> dict[str, float]:
    """Microseconds of kernels of each part of the mixture besides its products, forward."""
    part = spec.moe
    assert part is not None
    weights = weights_of(spec, "moe.", x.device)
    with torch.no_grad():
        routing = route(x, weights, part)
        chosen, gates = routing.chosen.flatten(0, -2), routing.gates.flatten(0, -2)
        pairs = assign_tokens(chosen, gates, part.n_experts)
        flat, rows = x.flatten(0, -2), x.flatten(0, -2)[pairs.token]
        parts: dict[str, Callable[[], object]] = {
            "route": compile_(lambda: route(x, weights, part)),
            "router_product": compile_(lambda: flat.float() @ weights["moe.router"].mT),
            "choose_by_sort": compile_(
                lambda: routing.logits.sort(dim=-1, descending=True, stable=True).indices[..., : part.top_k]
            ),
            "choose_by_topk": compile_(lambda: routing.logits.topk(part.top_k, dim=-1).indices),
            "assign": compile_(lambda: assign_tokens(chosen, gates, part.n_experts)),
            "spread": compile_(lambda: flat[pairs.token]),
            "collect": compile_(lambda: rows[pairs.places].sum(dim=1)),
            "dense_gates": compile_(lambda: routing.dense(part)[0]),
        }
        found = {}
        for name, call in parts.items():
            call()
            found[name] = sum(kernel_times(lambda _, call=call: call(), n_calls).values())
    return found


def measure(
    d_model: int, d_ff: int, n_experts: int, top_k: int, n_tokens: int, n_calls: int, compiled: bool, with_pieces: bool
) -> dict[str, Any]:
    """One row: speeds of the layers of a shape."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch._dynamo.reset()

    def compile_(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, fullgraph=True, dynamic=False) if compiled else function

    mixture = MoESpec(n_experts=n_experts, top_k=top_k, d_expert=d_ff // top_k, normalize_gates=True)
    spec = ModelSpec(d_model=d_model, n_layers=1, vocab_size=2, attention=None, feed_forward=None, moe=mixture)
    x = torch.randn(n_tokens // 64, 64, d_model, device=device).bfloat16().requires_grad_()
    flop = FLOP_PER_WEIGHT * 3 * n_tokens * d_model * d_ff
    row: dict[str, Any] = {"d_model": d_model, "d_ff": d_ff, "n_experts": n_experts, "top_k": top_k}
    row |= {"n_tokens": n_tokens, "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu"}
    for name, run in calls(spec, x, compile_):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = seconds_per_call(run, device, n_calls)
        row |= {f"{name}_s": seconds, f"{name}_tflops": flop / seconds / 1e12}
        if device.type == "cuda":
            row[f"{name}_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if name == "mixture":
            row["kernels_us"] = dict(list(kernel_times(run, n_calls).items())[:24])
    row["ratio"] = row["dense_s"] / row["mixture_s"]
    if with_pieces:
        row["pieces_us"] = pieces(spec, x, compile_, n_calls)
    return row


def main(argv: Sequence[str] | None = None) -> None:
    """Print one line of JSON per shape."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--d-model", type=int, choices=SHAPES, help="one width, not all")
    parser.add_argument("--n-tokens", type=int, default=65536)
    parser.add_argument("--n-calls", type=int, default=20, help="passes in one timing")
    parser.add_argument(
        "--pieces", action="store_true", help="also each part of the mixture alone, which compiles longer"
    )
    parser.add_argument("--smoke", action="store_true", help="d_model 32, 256 tokens, not compiled")
    arguments = parser.parse_args(argv)
    shapes = {arguments.d_model: SHAPES[arguments.d_model]} if arguments.d_model else SHAPES
    n_tokens, n_calls = arguments.n_tokens, arguments.n_calls
    if arguments.smoke:
        shapes, n_tokens, n_calls = {32: 64}, 256, 1
    for d_model, d_ff in shapes.items():
        for n_experts, top_k in MIXTURES:
            row = measure(d_model, d_ff, n_experts, top_k, n_tokens, n_calls, not arguments.smoke, arguments.pieces)
            print(json.dumps(row, default=float), flush=True)


if __name__ == "__main__":
    main()
