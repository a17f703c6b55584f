"""Speed of the layer scores beside plain programs of the same definitions, in one run on one device.

Claim (one GPU, L = 32, d_model 1024 and 2048): beside one full forward pass for each variant, everything on the device,
causal is at least 1.8 times as fast, usefulness 3, permutation of all pairs 1.3, the Jacobian 10 at a probe standard
error of 5 %; causal at least 20 times beside the released procedure. Memory beside the model at most 4 GiB. Models are
Hugging Face's Llama with random weights in bfloat16 (head_dim 128, 50,304 tokens). Each program is run once to warm up
on few sequences, then timed once (seconds to minutes); the largest difference between their numbers is printed too.

    python -m experiments.benchmarks.diagnose_speed --d-model 1024 --out diagnose_speed_1024.json   # one GPU
    python -m experiments.benchmarks.diagnose_speed --table diagnose_speed_*.json
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.benchmarks import plain_scores
from varprop.diagnose import Batch, Limits, Replay, Session
from varprop.diagnose.causal import causal
from varprop.diagnose.jacobian import jacobian
from varprop.diagnose.permutation import permutation
from varprop.diagnose.usefulness import usefulness

WIDTHS = {32: (64, 2), 1024: (2816, 8), 2048: (5632, 16)}
"""d_ff and heads by d_model."""
AIMS = {"causal": 1.8, "usefulness": 3.0, "permutation": 1.3, "jacobian": 10.0, "causal_released": 20.0}
VOCABULARY = 50_304


def llama(d_model: int, n_layers: int, vocab_size: int, device: torch.device) -> Any:
    """A Llama with random weights, its layers made unequal so that scores differ."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    d_ff, n_heads = WIDTHS[d_model]
    config = LlamaConfig(
        hidden_size=d_model,
        intermediate_size=d_ff,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_heads,
        vocab_size=vocab_size,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return model.to(device, dtype).eval().requires_grad_(False)


class Timer:
    """Seconds and the largest memory of a call, the device waited for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, compute: Callable[[], Any]) -> tuple[Any, float, float]:
        gc.collect()
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated() if cuda else 0
        started = time.perf_counter()
        result = compute()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        peak = (torch.cuda.max_memory_allocated() - held) / 2**30 if cuda else 0.0
        return result, seconds, peak


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of ours and of the plain programs, their ratio, memory, and how far the numbers are apart."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = llama(arguments.d_model, arguments.n_layers, arguments.vocab_size, device)
    shape = arguments.n_sequences, arguments.n_tokens
    tokens = torch.randint(0, arguments.vocab_size, shape, generator=torch.Generator().manual_seed(1))
    on_device = tokens.to(device)
    replay = Replay(model, Limits.of(device, arguments.memory))
    timer, rows = Timer(device), []
    batch = arguments.plain_batch

    def session(n: int, short: bool = False, **options: Any) -> Session:
        length = arguments.released_tokens if short else arguments.n_tokens
        return Session(replay, Batch.causal(tokens[:n, :length]), options=options)

    def compare(name: str, ours: Callable[[int], Any], plain: Callable[[int], Any], gap: Callable[..., float]) -> None:
        few = min(2, arguments.n_sequences)
        ours(few), plain(few)
        n = min(arguments.sequences_of.get(name, arguments.n_sequences), arguments.n_sequences)
        found, seconds, peak = timer(lambda: ours(n))
        expected, plain_seconds, plain_peak = timer(lambda: plain(n))
        row = {"score": name, "seconds": seconds, "plain_seconds": plain_seconds, "ratio": plain_seconds / seconds}
        row |= {"aim": AIMS[name], "gib": peak, "plain_gib": plain_peak, "n_sequences": n}
        row["difference"] = gap(found, expected)
        rows.append(row)
        print(json.dumps(row), flush=True)

    def of_pairs(found: Any, expected: torch.Tensor) -> float:
        values = torch.as_tensor(found["causal_effect"][1])[1:, 1:].float()
        return float((values - expected.cpu().float()).abs().max() / values.abs().max())

    chosen = arguments.scores.split(",")
    if "causal" in chosen:
        compare(
            "causal",
            lambda n: causal(session(n)),
            lambda n: plain_scores.plain_causal(model, on_device[:n], batch),
            of_pairs,
        )
    if "causal_released" in chosen:
        compare(
            "causal_released",
            lambda n: causal(session(n, short=True)),
            lambda n: plain_scores.released_causal(model, on_device[:n, : arguments.released_tokens]),
            of_pairs,
        )
    if "usefulness" in chosen:
        compare(
            "usefulness",
            lambda n: usefulness(session(n)),
            lambda n: plain_scores.plain_usefulness(model, on_device[: n // 2], on_device[n // 2 : n], batch),
            lambda found, expected: _gap(found["usefulness_loss_ratio"][1][1:], expected),
        )
    if "permutation" in chosen:
        pairs = list(itertools.combinations(range(arguments.n_layers), 2))
        options: dict[str, Any] = {"permutation_pairs": 0, "permutation_tokens": 10**9}
        compare(
            "permutation",
            lambda n: permutation(session(n, **options)),
            lambda n: plain_scores.plain_permutation(model, on_device[:n], pairs, batch),
            lambda found, expected: _gap([found["permutation_score"][1][i + 1][j + 1] for i, j in pairs], expected),
        )
    if "jacobian" in chosen:
        which = range(0, arguments.n_layers, max(1, arguments.n_layers // arguments.jacobian_layers))
        options: dict[str, Any] = {"n_probes": arguments.n_probes, "jacobian_stderr": 0.05, "jacobian_tokens": 10**9}
        options["jacobian_spectral_steps"] = 0  # which the plain program does not give
        layers_share = len(which) / arguments.n_layers

        def gap(found: Any, expected: torch.Tensor) -> float:
            values = torch.as_tensor(found["jacobian_deviation"][1])[[i + 1 for i in which], -1]
            errors = torch.as_tensor(found["jacobian_deviation_stderr"][1])[[i + 1 for i in which], -1]
            print("probe stderr", (errors / values).tolist(), "z", ((values - expected.cpu()) / errors).tolist())
            return float((values / expected.cpu() - 1).abs().max())

        compare(
            "jacobian",
            lambda n: jacobian(session(n, **options)),
            lambda n: plain_scores.plain_jacobian(model, on_device[:n], which),
            gap,
        )
        rows[-1]["plain_seconds"] /= layers_share
        rows[-1]["ratio"] /= layers_share
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    about = {"device": name, "torch": torch.__version__, **vars(arguments), "out": str(arguments.out)}
    about.pop("table")
    return {"about": about, "rows": rows}


def _gap(values: Any, expected: torch.Tensor) -> float:
    found = torch.as_tensor(values).float()
    return float((found - expected.cpu().float()).abs().max() / found.abs().max())


def table(paths: Sequence[Path]) -> str:
    """Markdown of the files."""
    lines = ["| d_model | score | ours s | plain s | ratio | aim | GiB ours | GiB plain | largest difference |"]
    lines.append("|" + "---|" * 9)
    for path in paths:
        found = json.loads(path.read_text())
        for row in found["rows"]:
            cells = [found["about"]["d_model"], row["score"], f"{row['seconds']:.2f}", f"{row['plain_seconds']:.2f}"]
            cells += [f"{row['ratio']:.2f}", row["aim"], f"{row['gib']:.2f}", f"{row['plain_gib']:.2f}"]
            cells.append(f"{row['difference']:.1e}")
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-model", type=int, default=1024, choices=sorted(WIDTHS))
    parser.add_argument("--n-layers", type=int, default=32)
    parser.add_argument("--vocab-size", type=int, default=VOCABULARY)
    parser.add_argument("--n-sequences", type=int, default=48, help="most sequences of a score")
    parser.add_argument("--n-tokens", type=int, default=1024)
    parser.add_argument("--plain-batch", type=int, default=8, help="sequences of a plain pass")
    parser.add_argument("--n-probes", type=int, default=4)
    parser.add_argument("--jacobian-layers", type=int, default=4, help="layers that the plain Jacobian is timed on")
    parser.add_argument("--memory", type=float, default=4.0, help="GiB beside the model")
    parser.add_argument("--scores", default=",".join(AIMS))
    parser.add_argument(
        "--sequences-of", type=json.loads, default={"causal": 16, "usefulness": 16, "permutation": 4, "jacobian": 2}
    )
    parser.add_argument("--released-tokens", type=int, default=512, help="length of the released procedure's sequences")
    parser.add_argument("--out", type=Path, default=Path("diagnose_speed.json"))
    parser.add_argument("--table", type=Path, nargs="*", default=None)
    arguments = parser.parse_args()
    if arguments.table is not None:
        print(table(arguments.table))
        return
    found = measure(arguments)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
