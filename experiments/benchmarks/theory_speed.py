"""Speed of `predict` against a plain Python loop of the same recursion and against a package from the registry.

CPU seconds of one thread (`time.process_time`, imports excluded), all sides in one process and one run:

(a) 1,000 layers of exchangeable tokens (softmax attention without positions and a GELU feed-forward), cold (a process
    of its own) and warm; aims: 1 s and 0.05 s;
(b) 128 layers of the token Gram matrix at 128 tokens (causal, rotary, SwiGLU); aim: 2 s;
(c) 10,000 specs of 32 layers in one call, `predict(spec, over={...})`; aim: 10 s;
(d) cost against depth: a line through the warm times of 125 to 2,000 layers, and the exponent of a power law;
(e) 1,000 layers of feed-forward alone, the part that the peer covers.

Plain loops: scalar recursion over layers with scipy's quadratures for (a); Python loops over heads, queries and token
pairs, with 8 heads a layer, for (b); one `predict` a spec for (c). They are timed on a few layers (specs) and scaled to
the whole, as every layer costs the same; they leave out the finite-width corrections that `predict` makes, and are
checked against it on a very wide model (`differs`: relative difference of the last stream). Peer: AnyInit 0.4.0 (MIT)
in its analytic mode on a torch stack of the same blocks, width 16; it also sets the weights, has no softmax attention
and no covariance of tokens. It is optional: absent, its row says so.

    python -m experiments.benchmarks.theory_speed            # minutes; `--smoke` a few seconds
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import integrate, special

from varprop.files import write_text
from varprop.spec import AttentionSpec, FeedForwardSpec, ModelSpec, NormSpec
from varprop.theory import predict

Row = dict[str, Any]
WIDE = 2**20
N_TOKENS = 64


def exchangeable_spec(n_layers: int, d_model: int = 512) -> ModelSpec:
    """Full attention without positions and a GELU feed-forward; no eps, which the plain loop has not."""
    attention = AttentionSpec(n_heads=8, pattern="full", rope_theta=None)
    feed_forward = FeedForwardSpec(d_ff=4 * d_model, activation="gelu", gated=False)
    parts = {"attention": attention, "feed_forward": feed_forward, "norm": NormSpec(eps=0.0)}
    return ModelSpec(d_model=d_model, n_layers=n_layers, **parts)


def gram_spec(n_layers: int, d_model: int = 512) -> ModelSpec:
    """Causal rotary attention and SwiGLU."""
    feed_forward = FeedForwardSpec(d_ff=3 * d_model)
    return ModelSpec(d_model=d_model, n_layers=n_layers, attention=AttentionSpec(n_heads=8), feed_forward=feed_forward)


def cpu_seconds(action: Callable[[], object], repeats: int = 1) -> float:
    """Smallest CPU time of an action."""
    best = math.inf
    for _ in range(repeats):
        start = time.process_time()
        action()
        best = min(best, time.process_time() - start)
    return best


def cold_seconds(call: str) -> float:
    """CPU time of an expression on this module's names in a fresh process, imports excluded."""
    program = f"import time; from experiments.benchmarks.theory_speed import *; s = time.process_time(); {call}; "
    run = subprocess.run(
        [sys.executable, "-c", program + "print(time.process_time() - s)"], capture_output=True, text=True, check=True
    )
    return float(run.stdout)


# Plain loops ----------------------------------------------------------------------------------------------------------


def _density(z: float) -> float:
    return math.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def _gelu(x: float) -> float:
    return x * float(special.ndtr(x))


def plain_participation(n_tokens: int, std: float) -> float:
    """E sum p^2 of a softmax over i.i.d. normal logits: T int t^2 E[e^{2sz - t e^{sz}}] M_0^{T-1} dlog t, by `quad`."""

    def mean(power: int, x: float) -> float:
        def integrand(z: float) -> float:
            u = math.exp(min(x + std * z, 30.0))
            return u**power * math.exp(-u) * _density(z)

        return integrate.quad(integrand, -9, 9)[0]

    low = -9 * std - math.log(n_tokens) - 15
    total = integrate.quad(lambda x: mean(2, x) * mean(0, x) ** (n_tokens - 1), low, 9 * std + 4, limit=100)[0]
    return n_tokens * total


def plain_overlap(n_tokens: int, std: float, correlation: float) -> float:
    """E sum p_j p'_j of two queries: the two-dimensional integral as two loops over log t."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    weights = weights / weights.sum()
    a = std * nodes[:, None]
    b = std * (correlation * nodes[:, None] + math.sqrt(1 - correlation**2) * nodes)
    both = weights[:, None] * weights
    grid = np.arange(-7 * std - math.log(n_tokens) - 9, 7 * std + 3, 0.5)
    total = 0.0
    for x in grid:
        u = np.exp(np.minimum(x + a, 30.0))
        for y in grid:
            w = np.exp(np.minimum(y + b, 30.0))
            survival = np.exp(-u - w)
            total += float((both * u * w * survival).sum() * (both * survival).sum() ** (n_tokens - 1))
    return n_tokens * total * 0.25


def plain_exchangeable(n_layers: int, n_tokens: int = N_TOKENS) -> float:
    """Second moment of the last stream of `exchangeable_spec` at infinite width, one layer after another."""
    q, covariance = 1.0, 0.0
    for _ in range(n_layers):
        c = covariance / q
        std = math.sqrt(1 - c)
        q += c + (1 - c) * plain_participation(n_tokens, std)
        covariance += c + (1 - c) * plain_overlap(n_tokens, std, c)
        c = covariance / q
        root = math.sqrt(1 - c * c)

        def pair(y: float, z: float, c: float = c, root: float = root) -> float:
            return _gelu(z) * _gelu(c * z + root * y) * _density(y) * _density(z)

        q += integrate.quad(lambda z: _gelu(z) ** 2 * _density(z), -9, 9)[0]
        covariance += integrate.dblquad(pair, -7, 7, -7, 7, epsabs=1e-6)[0]
    return q


def plain_gram(n_layers: int, n_tokens: int, head_dim: int = 64, n_heads: int = 8) -> float:
    """Mean second moment of the last stream of `gram_spec` at infinite width: loops over heads, queries and pairs."""
    rng = np.random.default_rng(0)
    nodes, weights = np.polynomial.hermite_e.hermegauss(32)
    weights = weights / weights.sum()
    gram = np.eye(n_tokens)
    half = head_dim // 2
    for _ in range(n_layers):
        cosine = gram / np.sqrt(np.outer(np.diagonal(gram), np.diagonal(gram)))
        root = np.linalg.cholesky(cosine + 1e-10 * np.eye(n_tokens))
        for _ in range(n_heads):
            query, key = (root @ rng.standard_normal((n_tokens, head_dim)) for _ in range(2))
            for x in (query, key):
                for t in range(n_tokens):
                    angle = t * 10_000.0 ** (-np.arange(half) / half)
                    first, second = x[t, :half].copy(), x[t, half:].copy()
                    x[t, :half] = first * np.cos(angle) - second * np.sin(angle)
                    x[t, half:] = second * np.cos(angle) + first * np.sin(angle)
            rows = np.zeros((n_tokens, n_tokens))
            for t in range(n_tokens):
                logits = np.array([query[t] @ key[s] / math.sqrt(head_dim) for s in range(t + 1)])
                unnormalised = np.exp(logits - logits.max())
                rows[t, : t + 1] = unnormalised / unnormalised.sum()
            gram = gram + rows @ cosine @ rows.T / n_heads
        cosine = gram / np.sqrt(np.outer(np.diagonal(gram), np.diagonal(gram)))
        for t in range(n_tokens):
            for s in range(t + 1):
                c = min(1.0, float(cosine[t, s]))
                other = c * nodes[:, None] + math.sqrt(1 - c * c) * nodes
                silu = weights @ ((nodes * special.expit(nodes))[:, None] * other * special.expit(other)) @ weights
                added = c * float(silu)
                gram[t, s] += added
                gram[s, t] = gram[t, s]
    return float(np.diagonal(gram).mean())


def plain_feed_forward(n_layers: int) -> float:
    """Second moment of the last stream of GELU blocks without attention."""
    q = 1.0
    for _ in range(n_layers):
        q += integrate.quad(lambda z: _gelu(z) ** 2 * _density(z), -9, 9)[0]
    return q


# Rows -----------------------------------------------------------------------------------------------------------------


def exchangeable_rows(n_layers: int, sampled: int) -> list[Row]:
    """(a)"""
    label = f"(a) {n_layers} layers, exchangeable"
    cold = cold_seconds(f"predict(exchangeable_spec({n_layers}), n_tokens={N_TOKENS})")
    spec = exchangeable_spec(n_layers)
    predict(spec, n_tokens=N_TOKENS)
    warm = cpu_seconds(lambda: predict(spec, n_tokens=N_TOKENS), repeats=3)
    plain = cpu_seconds(lambda: plain_exchangeable(sampled)) * n_layers / sampled
    wide = predict(exchangeable_spec(sampled, WIDE), n_tokens=N_TOKENS).second_moment[-1, -1].item()
    differs = plain_exchangeable(sampled) / wide - 1
    return [
        {"job": label + ", cold", "seconds": cold, "aim": 1.0, "plain": plain, "differs": differs},
        {"job": label + ", warm", "seconds": warm, "aim": 0.05, "plain": plain, "differs": differs},
    ]


def gram_row(n_layers: int, n_tokens: int, sampled: int) -> Row:
    """(b)"""
    seconds = cpu_seconds(lambda: predict(gram_spec(n_layers), n_tokens=n_tokens))
    plain = cpu_seconds(lambda: plain_gram(sampled, n_tokens)) * n_layers / sampled
    wide = predict(gram_spec(sampled, 2**14).with_fields(head_dim=64), n_tokens=n_tokens).second_moment[-1, -1].item()
    label = f"(b) {n_layers} layers, Gram matrix, T = {n_tokens}"
    differs = plain_gram(sampled, n_tokens) / wide - 1
    return {"job": label, "seconds": seconds, "aim": 2.0, "plain": plain, "differs": differs}


def sweep_row(side: int, n_layers: int, sampled: int) -> Row:
    """(c)"""
    spec = exchangeable_spec(n_layers)
    over = {"density": np.linspace(0.1, 1.0, side), "branch_multiplier": np.geomspace(0.1, 2.0, side)}
    row: Row = {"job": f"(c) {side**2} specs of {n_layers} layers in one call", "aim": 10.0}

    def loop() -> None:
        for index in range(sampled):
            i, j = divmod(index * side**2 // sampled, side)
            fields = {"density": float(over["density"][i]), "branch_multiplier": float(over["branch_multiplier"][j])}
            predict(spec.with_fields(fields), n_tokens=N_TOKENS)

    row["plain"] = cpu_seconds(loop) * side**2 / sampled
    try:
        call: Any = predict
        row["seconds"] = cpu_seconds(lambda: call(spec, n_tokens=N_TOKENS, over=over))
    except TypeError as error:
        row["note"] = f"not available: {error}"
    return row


def depth_row(depths: Sequence[int]) -> Row:
    """(d)"""
    times = []
    for n_layers in depths:
        spec = exchangeable_spec(n_layers)
        predict(spec, n_tokens=N_TOKENS)
        times.append(cpu_seconds(lambda spec=spec: predict(spec, n_tokens=N_TOKENS), repeats=3))
    slope, start = np.polyfit(depths, times, 1)
    exponent = np.polyfit(np.log(depths), np.log(times), 1)[0]
    residual = max(abs(start + slope * d - t) / t for d, t in zip(depths, times, strict=True))
    fit = f"{1e6 * slope:.0f} us a layer + {1e3 * start:.1f} ms, furthest {100 * residual:.0f} % off"
    note = f"{fit}, power {exponent:.2f}"
    return {
        "job": f"(d) {depths[0]} to {depths[-1]} layers",
        "seconds": times[-1],
        "note": note,
        "depths": list(depths),
        "times": times,
    }


def feed_forward_row(n_layers: int, sampled: int) -> Row:
    """(e)"""
    spec = exchangeable_spec(n_layers, 16).with_fields(attention=None)
    row: Row = {"job": f"(e) {n_layers} layers, feed-forward alone"}
    row["seconds"] = cpu_seconds(lambda: predict(spec, n_tokens=N_TOKENS), repeats=3)
    row["plain"] = cpu_seconds(lambda: plain_feed_forward(sampled)) * n_layers / sampled
    wide = exchangeable_spec(sampled, WIDE).with_fields(attention=None)
    stream = predict(wide, n_tokens=N_TOKENS).second_moment[-1, -1].item()
    row["differs"] = plain_feed_forward(sampled) / stream - 1
    try:
        import anyinit  # type: ignore[import-not-found]
    except ImportError:
        row["note"] = "peer: AnyInit is not installed"
        return row
    stack = torch.nn.Sequential(*[_TorchBlock(16, 64) for _ in range(n_layers)])
    row["peer"] = cpu_seconds(lambda: anyinit.initialize(stack, "analytic", torch.zeros(2, 16)))
    row["note"] = f"peer: AnyInit {anyinit.__version__}, which also draws the weights"
    return row


class _TorchBlock(torch.nn.Module):
    """A pre-norm residual feed-forward."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.norm = torch.nn.RMSNorm(d_model)
        self.up = torch.nn.Linear(d_model, d_ff, bias=False)
        self.act = torch.nn.GELU()
        self.down = torch.nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every job and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="small jobs, seconds")
    parser.add_argument("--out", type=Path, default=None, help="also write the rows as JSON to this file")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    jobs: list[Callable[[], list[Row]]]
    if chosen.smoke:
        jobs = [lambda: exchangeable_rows(8, 1), lambda: [gram_row(2, 12, 1)], lambda: [sweep_row(2, 2, 2)]]
        jobs += [lambda: [depth_row((4, 8, 16))], lambda: [feed_forward_row(8, 4)]]
    else:
        jobs = [lambda: exchangeable_rows(1000, 3), lambda: [gram_row(128, 128, 2)], lambda: [sweep_row(100, 32, 20)]]
        jobs += [lambda: [depth_row((125, 250, 500, 1000, 2000))], lambda: [feed_forward_row(1000, 100)]]
    head = f"{'job':<40} {'predict s':>10} {'aim s':>6} {'loop s':>9} {'loop/predict':>12}"
    print(head, f"{'peer s':>7} {'differs':>8}  note")
    rows = []
    for job in jobs:
        for row in job():
            rows.append(row)
            print(_line(row), flush=True)
    if chosen.out is not None:
        write_text(chosen.out, json.dumps({"python": sys.version.split()[0], "rows": rows}, indent=1) + "\n")
    return 0


def _line(row: Row) -> str:
    seconds, plain = row.get("seconds"), row.get("plain")
    cells = (
        (seconds, "10.4f"),
        (row.get("aim"), "6.2f"),
        (plain, "9.2f"),
        (plain / seconds if plain and seconds else None, "12.1f"),
        (row.get("peer"), "7.2f"),
        (row.get("differs"), "8.4f"),
    )
    texts = [f"{value:{form}}" if value is not None else " " * int(form.split(".")[0]) for value, form in cells]
    return f"{row['job']:<40} {' '.join(texts)}  {row.get('note', '')}"


if __name__ == "__main__":
    raise SystemExit(main())
