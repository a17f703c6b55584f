"""Speed and memory of `sample(method="gram")` against `method="explicit"` on the CPU, one thread, one process.

Claims tested: `gram` at least 30 times as fast per network at d_model 4096 and 64 tokens; its memory flat in depth and
in the number of networks; d_model 100,000 and 1,000 layers on a laptop. Processor time of the process is counted, the
shortest of several rounds, both methods in turn: other work on the machine slows both.

    python -m experiments.benchmarks.gram_speed ratio     # 2 minutes, 2 GiB
    python -m experiments.benchmarks.gram_speed memory    # 1 minute
    python -m experiments.benchmarks.gram_speed root      # 1 minute: ways to a root of the Gram matrix
    python -m experiments.benchmarks.gram_speed wide      # 10 minutes, 1 GiB: 5 networks of 1.2e14 parameters
    python -m experiments.benchmarks.gram_speed --smoke    # all parts, seconds; nothing written

Writes `gram_speed_<part>.json` in the results folder.
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.benchmarks.simulate_speed import spec_of
from varprop.files import write_text
from varprop.simulate import sample
from varprop.simulate.block import networks_per_block
from varprop.simulate.gram import gram_numbers, gram_root
from varprop.spec import ModelSpec, layer_table


def seconds_per_network(spec: ModelSpec, n_tokens: int, n_networks: int, method: str) -> float:
    """Processor seconds of one call, by the networks it computes."""
    start = time.process_time()
    sample(spec, n_networks=n_networks, n_tokens=n_tokens, method=method, progress=False)
    return (time.process_time() - start) / n_networks


def ratio_table(smoke: bool) -> list[dict[str, Any]]:
    """Both methods in whole blocks of networks; `explicit` over `gram`."""
    shapes = [(64, 1, 8)] if smoke else [(4096, 1, 64), (4096, 2, 64), (4096, 1, 16), (1024, 4, 64), (512, 4, 64)]
    rows = []
    for d_model, n_layers, n_tokens in shapes:
        spec = spec_of(d_model, n_layers, vocab_size=n_tokens)
        sizes = {
            "gram": networks_per_block(spec, n_tokens, layer_numbers=gram_numbers),
            "explicit": networks_per_block(spec, n_tokens),
        }
        best = dict.fromkeys(sizes, float("inf"))
        for _ in range(1 if smoke else 4):
            for method, size in sizes.items():
                best[method] = min(best[method], seconds_per_network(spec, n_tokens, size, method))
        row: dict[str, Any] = {"d_model": d_model, "n_layers": n_layers, "n_tokens": n_tokens, "networks": sizes}
        row |= {f"{method}_seconds_per_network": value for method, value in best.items()}
        rows.append(row | {"ratio": best["explicit"] / best["gram"]})
        print(rows[-1], flush=True)
    return rows


def memory_table(smoke: bool) -> list[dict[str, Any]]:
    """Largest resident memory of fresh processes, over depth and over networks."""
    d_model = 64 if smoke else 2048
    shapes = [(1, 8), (2, 8)] if smoke else [(2, 8), (32, 8), (2, 64)]
    rows = []
    for n_layers, n_networks in shapes:
        program = (
            "import resource; from experiments.benchmarks.gram_speed import sample, spec_of;"
            f"sample(spec_of({d_model}, {n_layers}), n_networks={n_networks}, n_tokens=64, method='gram');"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        row = {"d_model": d_model, "n_layers": n_layers, "n_networks": n_networks, "mebibytes": float(done.stdout)}
        rows.append(row)
        print(row, flush=True)
    return rows


def triangular(x: Tensor) -> Tensor:
    """R^T of the QR factorisation of x^T: as accurate as `gram_root`, but not continuous where tokens are dependent."""
    return torch.linalg.qr(x.mT, mode="r").R.mT


def cholesky(x: Tensor) -> Tensor:
    """The lower root of the float64 Gram matrix, with 1e-12 of its diagonal added: equal tokens make it fail else."""
    gram = x.double() @ x.double().mT
    gram.diagonal(dim1=-2, dim2=-1).mul_(1 + 1e-12)
    return torch.linalg.cholesky(gram).to(x.dtype)


def root_table(smoke: bool) -> list[dict[str, Any]]:
    """Milliseconds of one root, 8 networks at a time; beside them the product with the numbers of n outputs."""
    shapes = [(16, 64)] if smoke else [(t, n) for t in (16, 64, 256) for n in (512, 4096, 16_384)]
    rows = []
    for n_tokens, fan_in in shapes:
        x = torch.randn(8, n_tokens, fan_in)
        ways = {"gram_root": gram_root, "triangular": triangular, "cholesky": cholesky}
        ways["image"] = lambda x: torch.ones(8, x.shape[1], x.shape[1]) @ torch.empty_like(x).normal_()
        actions = {name: functools.partial(way, x) for name, way in ways.items()}
        best = dict.fromkeys(actions, float("inf"))
        for _ in range(2 if smoke else 5):
            for name, action in actions.items():
                start = time.process_time()
                action()
                best[name] = min(best[name], (time.process_time() - start) / len(x))
        rows.append({"n_tokens": n_tokens, "fan_in": fan_in} | {k: round(1e3 * v, 3) for k, v in best.items()})
        print(rows[-1], flush=True)
    return rows


def wide_and_deep(smoke: bool) -> list[dict[str, Any]]:
    """One call at a width and depth whose matrices no machine holds."""
    d_model, n_layers, n_tokens = (800, 10, 4) if smoke else (100_000, 1_000, 8)
    spec = spec_of(d_model, n_layers, n_heads=d_model // 100, vocab_size=n_tokens)
    size = networks_per_block(spec, n_tokens, layer_numbers=gram_numbers)
    spent = seconds_per_network(spec, n_tokens, size, "gram") * size
    parameters = n_layers * sum(row.n_parameters for row in layer_table(spec, 1).values())
    row = {"d_model": d_model, "n_layers": n_layers, "n_tokens": n_tokens, "n_networks": size, "seconds": spent}
    row |= {"parameters_per_network": parameters, "d_ff": spec.feed_forward.d_ff if spec.feed_forward else 0}
    row["mebibytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(row, flush=True)
    return [row]


PARTS = {"ratio": ratio_table, "memory": memory_table, "root": root_table, "wide": wide_and_deep}


def main(arguments: list[str] | None = None) -> None:
    """Print the rows of a part and write them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=[*PARTS, "all"], nargs="?", default="all")
    parser.add_argument("--smoke", action="store_true", help="small shapes, nothing written")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "results")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for part in PARTS if chosen.part == "all" else [chosen.part]:
        rows = PARTS[part](chosen.smoke)
        if not chosen.smoke:
            found = {"command": f"python -m experiments.benchmarks.gram_speed {part}", "rows": rows}
            found |= {"device": "one CPU thread, processor time", "torch": str(torch.__version__)}
            write_text(chosen.out / f"gram_speed_{part}.json", json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
