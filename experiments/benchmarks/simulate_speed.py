"""Speed of `simulate.sample` against the straightforward loop, in one process and on one CPU thread.

Claim: drawing networks in stacks, layer by layer, costs less than one fresh `Transformer` after another. The loop
builds a network, runs one sequence through its blocks and computes the same statistics at every site; both sides draw
as many normal numbers for the blocks, and the vocabulary is as small as the sequence, so that the embedding does not
count. Cost: one CPU core, about a minute; `--smoke` takes seconds. Outcome expected: a ratio between 1 and 2, largest
for small dense networks, as most of the time of `sample` goes into drawing normal numbers, which both sides must.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch

from varprop import presets
from varprop.nn import Transformer
from varprop.simulate import sample
from varprop.simulate.recorder import Recorder
from varprop.spec import ModelSpec


def cases(smoke: bool) -> list[tuple[str, ModelSpec, int, int]]:
    """Label, spec, tokens and networks of every row of the table."""
    presets_and_sizes = [
        ("tiny", 64, 64),
        ("tiny", 8, 64),
        ("tiny-masked", 64, 64),
        ("tiny-moe", 64, 64),
        ("d256", 64, 16),
    ]
    if smoke:
        presets_and_sizes = [("tiny", 8, 8)]
    return [(name, presets.get(name).with_fields(vocab_size=t), t, n) for name, t, n in presets_and_sizes]


@torch.inference_mode()
def loop(spec: ModelSpec, n_tokens: int, n_networks: int) -> None:
    """One fresh network at a time, with the statistics of `sample`."""
    tokens = torch.arange(n_tokens)[None]
    for seed in range(n_networks):
        Transformer(spec, seed=seed).hidden(tokens, Recorder(spec, 1, "cpu"))


def seconds(actions: list[Callable[[], object]], repeats: int) -> list[float]:
    """Shortest time of each action over `repeats` rounds, taken in turn so that both see the same machine."""
    best = [float("inf")] * len(actions)
    for _ in range(repeats):
        for i, action in enumerate(actions):
            start = time.perf_counter()
            action()
            best[i] = min(best[i], time.perf_counter() - start)
    return best


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--smoke", action="store_true", help="one small case")
    smoke = parser.parse_args().smoke
    torch.set_num_threads(1)
    print(f"{'spec':<12} {'tokens':>6} {'networks':>8} {'sample s':>9} {'loop s':>9} {'ratio':>6}")
    for name, spec, n_tokens, n_networks in cases(smoke):
        arguments = {"n_networks": n_networks, "n_tokens": n_tokens}
        sides = [partial(sample, spec, **arguments, progress=False), partial(loop, spec, **arguments)]
        fast, slow = seconds(sides, repeats=2 if smoke else 5)
        print(f"{name:<12} {n_tokens:>6} {n_networks:>8} {fast:>9.3f} {slow:>9.3f} {slow / fast:>6.2f}")


if __name__ == "__main__":
    main()
