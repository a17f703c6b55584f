"""Tokens per second of the training step of `varprop.train`, against a plain loop, in one run.

Claim: the chunked loss and the statistics cost nothing that matters: `fit`'s step is at least as fast as a plain loop
(autocast, all logits in float32, torch's cross-entropy) on the same model, and recording the statistics of every layer
and site costs a stated share of a step. Cost: about two minutes on one GPU; seconds with --smoke, on a CPU.
MFU counts 6 FLOP per weight of a matrix product and token (the unembedding included) and 6 L d T per token for causal
attention, over 989 TFLOP/s (dense bfloat16 of an H100 or H200); on other devices it is not given.

    python -m experiments.benchmarks.train_speed --preset d512 --n-tokens 1024 --batch-size 64 --compile
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional

from varprop import presets
from varprop.corpus import load_corpus
from varprop.spec import ModelSpec
from varprop.train import TrainConfig
from varprop.train.data import batch
from varprop.train.loop import Trainer

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}


def flops_per_token(spec: ModelSpec, n_tokens: int) -> float:
    """Training FLOP per token: 6 per active weight of a matrix product, 6 L d T for causal attention."""
    rows = [row for row in spec.tensor_table() if len(row.shape) >= 2 and row.matrix != "embed"]
    unembedding = spec.vocab_size * spec.d_model if spec.tied_embeddings else 0
    attention = spec.n_layers * spec.n_heads * spec.head_dim * n_tokens if spec.attention else 0
    return 6 * (sum(row.n_active for row in rows) + unembedding + attention)


class PlainTrainer(Trainer):
    """The same model, optimiser and batches; the loss over all tokens at once."""

    def _loss(self, tokens: torch.Tensor, tracker: object = None) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            logits = self.model.unembed(self._hidden(tokens[:, :-1]))
            return functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def seconds_per_call(call: Callable[[int], object], device: torch.device, n_calls: int, n_repeats: int = 3) -> float:
    """Median over `n_repeats` of the mean time of `n_calls` calls, after two calls that are not counted."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = []
    for repeat in range(n_repeats + 1):
        wait()
        start = time.perf_counter()
        count = n_calls if repeat else 2
        for number in range(count):
            call(number)
        wait()
        times.append((time.perf_counter() - start) / count)
    return statistics.median(times[1:])


def measure(
    spec: ModelSpec, config: TrainConfig, n_calls: int, corpus_dir: str | None = None
) -> dict[str, float | str]:
    """Speed of the three kinds of step; ratios are times over that of `fit`'s step without a record."""
    corpus = load_corpus(config.corpus, corpus_dir)
    seconds, memory = {}, {}
    device = torch.device("cpu")
    for name, cls, recording in (("plain", PlainTrainer, False), ("fit", Trainer, False), ("recorded", Trainer, True)):
        trainer = cls(spec, config, corpus)
        trainer.validation_loss = lambda: torch.zeros(())  # type: ignore[method-assign]  # not part of the step
        device = trainer.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

        def step(number: int, trainer: Trainer = trainer, recording: bool = recording) -> None:
            trainer.forward_backward(number, recording)
            trainer.update(number)

        seconds[name] = seconds_per_call(step, device, n_calls)
        memory[name] = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
        del trainer, step
    data = seconds_per_call(
        lambda number: batch(corpus, 0, number, config.batch_size, config.n_tokens, device), device, n_calls
    )
    kind = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in kind), None)
    row: dict[str, float | str] = {"device": kind, "batch_s": data}
    for name, value in seconds.items():
        rate = config.tokens_per_step / value
        row |= {f"{name}_s": value, f"{name}_tokens_per_s": rate}
        if peak:
            row |= {f"{name}_mfu": rate * flops_per_token(spec, config.n_tokens) / peak, f"{name}_gib": memory[name]}
    row |= {
        "plain_over_fit": seconds["plain"] / seconds["fit"],
        "recorded_over_fit": seconds["recorded"] / seconds["fit"],
    }
    return row


def main() -> None:
    """Print one line of JSON per preset."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", action="append", help="name of a preset; may be given more than once")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--n-tokens", type=int, default=1024)
    parser.add_argument("--n-calls", type=int, default=10, help="steps in one timing")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--corpus", default="embedded")
    parser.add_argument("--corpus-dir")
    parser.add_argument("--smoke", action="store_true", help="the tiny preset, a few steps of 8 x 128 tokens")
    arguments = parser.parse_args()
    config = TrainConfig(
        batch_size=arguments.batch_size, n_tokens=arguments.n_tokens, compile=arguments.compile, corpus=arguments.corpus
    )
    n_calls, names = arguments.n_calls, arguments.preset or ["d256", "d512"]
    if arguments.smoke:
        n_calls, names = 2, arguments.preset or ["tiny"]
        config = dataclasses.replace(config, batch_size=8, n_tokens=128)
    for name in names:
        row = measure(presets.get(name), config, n_calls, arguments.corpus_dir)
        shape = {
            "preset": name,
            "batch_size": config.batch_size,
            "n_tokens": config.n_tokens,
            "compile": config.compile,
        }
        print(
            json.dumps({**shape, **{k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}}), flush=True
        )


if __name__ == "__main__":
    main()
