"""Weak scaling of training: tokens per second of N processes over that of one, each with the same micro-batch.

Claim: two GPUs train at least 1.9 times as many tokens per second as one. Gradients are summed over NVLink while the
backward pass goes on. Run it once alone and once under torchrun, on the same machine; the second call divides.

    python -m experiments.benchmarks.scaling --out one.json
    torchrun --standalone --nproc-per-node 2 -m experiments.benchmarks.scaling --beside one.json --out two.json
    ... --parallel fsdp
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch

from experiments.benchmarks.train_speed import VOCABULARY, corpus_of, seconds_per_step, spec_of
from varprop.train import TrainConfig
from varprop.train.distributed import World
from varprop.train.trainer import Trainer


def measure(world: World, config: TrainConfig, d_model: int, n_layers: int | None, n_calls: int) -> dict[str, object]:
    """Tokens per second of all processes together: the median of 5 repeats."""
    trainer = Trainer(spec_of(d_model, n_layers=n_layers), config, corpus_of(config.n_tokens), world)
    number = iter(range(10**9))

    def step(tokens: torch.Tensor) -> None:
        trainer.forward_backward(tokens, True)
        trainer.update(next(number))

    generator = torch.Generator().manual_seed(world.rank)
    shape = (len(trainer.rows), config.n_tokens + 1)
    batches = [torch.randint(VOCABULARY, shape, generator=generator).to(world.device) for _ in range(4)]
    seconds_per_step(step, batches, 6 if world.device.type == "cuda" else 1)
    own = torch.tensor([seconds_per_step(step, batches, n_calls) for _ in range(5)], dtype=torch.float64)
    times = world.mean(own.to(world.device)).tolist()
    return {
        "n_processes": world.size,
        "parallel": config.parallel,
        "d_model": d_model,
        "tokens_per_s": config.tokens_per_step / statistics.median(times),
        "ms_repeats": [t * 1e3 for t in times],
    }


def main() -> None:
    """Measure; the first process prints and writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--d-model", type=int, default=1024)
    parser.add_argument("--n-layers", type=int, default=None)
    parser.add_argument("--sequences", type=int, default=64, help="of one process")
    parser.add_argument("--n-tokens", type=int, default=1024)
    parser.add_argument("--n-calls", type=int, default=5)
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--beside", type=Path, help="the result of one process")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="small, on a CPU")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.d_model, arguments.n_layers, arguments.sequences, arguments.n_tokens = 256, 2, 2, 32
        arguments.n_calls = 1
    cuda = torch.cuda.is_available() and not arguments.smoke
    base = TrainConfig(
        n_tokens=arguments.n_tokens,
        compile=cuda,
        compile_layers=4 if arguments.parallel == "ddp" else 1,
        parallel=arguments.parallel,
        device="cuda" if cuda else "cpu",
        n_probe_sequences=1,
        n_evaluation_sequences=1,
    )
    with World.start(base) as world:
        fields = {**json.loads(base.to_json()), "batch_size": arguments.sequences * world.size}
        config = TrainConfig.from_json(json.dumps(fields))
        row = measure(world, config, arguments.d_model, arguments.n_layers, arguments.n_calls)
        if not world.is_main:
            return
        if arguments.beside:
            one = json.loads(arguments.beside.read_text())
            row["speed_over_one"] = row["tokens_per_s"] / one["tokens_per_s"]  # type: ignore[operator]
        print(json.dumps(row))
        if arguments.out:
            arguments.out.write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
