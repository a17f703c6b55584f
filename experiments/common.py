"""What the experiments share: command line, tasks side by side, work on an accelerator, extrapolation, verdicts."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import joblib
import numpy as np

from varprop.simulate.block import networks_per_block
from varprop.spec import ModelSpec, layer_table

T = TypeVar("T")
Task = TypeVar("Task")
DEVICE_RATES = {"flops": 2.5e13, "draws": 2.5e11, "launches": 1.5e5}
"""Work per second of one accelerator (float32 products, random numbers, kernels of one process): rough."""


def options(
    description: str | None,
    arguments: Sequence[str] | None,
    device: str = "cpu",
    extend: Callable[[argparse.ArgumentParser], None] | None = None,
) -> argparse.Namespace:
    """`--smoke --device --n-workers --runs --out`, with both folders made; `extend` adds an experiment's own."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="seconds on a CPU")
    parser.add_argument("--device", default=device, help="torch device (default %(default)s)")
    parser.add_argument("--n-workers", type=int, default=1, help="tasks at a time")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the single tasks, kept for a resume")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    if extend is not None:
        extend(parser)
    parsed = parser.parse_args(arguments)
    for folder in (parsed.runs, parsed.out):
        folder.mkdir(parents=True, exist_ok=True)
    return parsed


def run_all(function: Callable[[Task], T], tasks: Sequence[Task], n_workers: int) -> list[T]:
    """`function` of every task, `n_workers` at a time, in the order of the tasks."""
    done = joblib.Parallel(n_jobs=n_workers)(joblib.delayed(function)(task) for task in tasks)
    return list(done)  # type: ignore[arg-type]


def device_work(spec: ModelSpec, n_tokens: int, n_networks: float) -> dict[str, float]:
    """Float operations, random numbers, kernel launches and seconds of `sample` on an accelerator: a rough estimate.

    Whole blocks of networks, drawn on the accelerator; about 200 launches a layer. Norms, softmax and statistics are
    left out: about as much again for 512 neurons and 128 tokens.
    """
    size = networks_per_block(spec, n_tokens, "cuda")
    n_blocks = math.ceil(n_networks / size)
    amounts = dict.fromkeys(DEVICE_RATES, 0.0)
    for layer in range(1, spec.n_layers + 1):
        table = layer_table(spec, layer).values()
        mixing = 2 * n_tokens * spec.n_heads * spec.head_dim if spec.attention else 0
        amounts["flops"] += 2 * n_tokens * (sum(row.n_active for row in table) + mixing) * size * n_blocks
        amounts["draws"] += sum(row.n_parameters * (1 if row.mask is None else 2) for row in table) * size * n_blocks
        amounts["launches"] += 200 * n_blocks
    return {**amounts, "seconds": sum(amount / DEVICE_RATES[name] for name, amount in amounts.items())}


def extrapolate(widths: Sequence[float], values: Sequence[float], stderrs: Sequence[float]) -> tuple[float, float]:
    """Value at infinite width and its standard error: a line in 1/width, weighted by 1/stderr^2.

    >>> value, stderr = extrapolate([256, 512, 1024], [1.04, 1.02, 1.01], [0.01, 0.01, 0.01])
    >>> round(value, 6), round(stderr, 6)
    (1.0, 0.012247)
    """
    weights = 1 / np.asarray(stderrs, dtype=float) ** 2
    design = np.stack([np.ones(len(widths)), 1 / np.asarray(widths, dtype=float)], axis=1)
    covariance = np.linalg.inv(design.T @ (weights[:, None] * design))
    return float((covariance @ design.T @ (weights * np.asarray(values)))[0]), float(covariance[0, 0] ** 0.5)


def judge(deviation: float, stderr: float, tolerance: float) -> str:
    """`within`, `outside` or `undecided` at two standard errors.

    >>> judge(0.01, 0.005, 0.03), judge(-0.05, 0.005, 0.03), judge(0.029, 0.005, 0.03)
    ('within', 'outside', 'undecided')
    """
    if abs(deviation) + 2 * stderr <= tolerance:
        return "within"
    return "outside" if abs(deviation) - 2 * stderr > tolerance else "undecided"
