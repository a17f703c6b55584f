"""The paper's training runs by name, at their true shapes and budgets, each with a reduced twin `NAME-small`.

What is known of them (arXiv 2603.15389, the docs page of the released code, its configs and launch script) stands in
the functions below; what is not stated is listed with each run (`Run.unstated`) beside the value taken here. The twins
keep the depth and what a sweep changes; d_model is 512, and d_ff or d_expert keep their ratio to it.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from varprop import presets
from varprop.errors import ArgumentError
from varprop.spec import ModelSpec
from varprop.train.config import BUDGETS, TrainConfig
from varprop.train.cost import GIB, H200_MEMORY, Cost, duration, estimate

SMALL = "-small"
CORPUS = "fineweb-edu"
"""Folder of the paper's corpus, to be tokenised first: FineWeb-Edu sample-100BT, GPT-NeoX tokenizer."""


@dataclass(frozen=True)
class Run:
    """A training run: what is trained and how, where that comes from, and what its source leaves open."""

    name: str
    spec: ModelSpec
    config: TrainConfig
    source: str = ""
    unstated: tuple[str, ...] = ()

    def changed(self, spec: Mapping[str, Any] | None = None, config: Mapping[str, Any] | None = None) -> Run:
        """The run with fields of spec and config changed; a budget given takes the place of the run's own.

        >>> run = get("paper-dense-1b-l12").changed({"n_kv_heads": 4}, {"n_steps": 2000})
        >>> run.spec.kv_group_size, run.config.n_steps, run.config.total_tokens
        (4, 2000, None)
        """
        options = dict(config or {})
        if any(options.get(name) is not None for name in BUDGETS):
            options = {**dict.fromkeys(BUDGETS), **options}
        known = [field.name for field in dataclasses.fields(TrainConfig)]
        for name in options:
            if name not in known:
                raise ArgumentError(f"config={name!r} is an unknown field; expected one of {', '.join(known)}")
        config_changed = dataclasses.replace(self.config, **options)
        return dataclasses.replace(self, spec=self.spec.with_fields(dict(spec or {})), config=config_changed)


def names() -> tuple[str, ...]:
    """Names of all runs, each followed by its twin.

    >>> names()[:2]
    ('paper-dense-1b-l12', 'paper-dense-1b-l12-small')
    """
    return tuple(_runs())


def get(name: str) -> Run:
    """The run called `name` (dashes or underscores); an unknown name raises `ArgumentError` with the nearest one.

    >>> get("paper-dense-1b-l32").spec.n_layers, get("paper-dense-1b-l32-small").spec.d_model
    (32, 512)
    """
    runs, key = _runs(), name.lower().replace("_", "-")
    if key not in runs:
        close = difflib.get_close_matches(key, runs, n=1)
        hint = f"{close[0]!r}?" if close else "one of " + ", ".join(runs)
        raise ArgumentError(f"run={name!r} is unknown; expected {hint}")
    return runs[key]


# The paper's runs -----------------------------------------------------------------------------------------------------

LAUNCH = "the launch script and README of the released code"
RATE = f"peak rate: 1e-3, the example of {LAUNCH}; its configs have 4e-4"
BATCH = "batch: 256 sequences, the example of the README"
LADDER = "docs page, assets/leading.png"
ODD_HEADS = "ours: attention kernels are slower for heads of 70, no multiple of 8: the hours are an underestimate"
CHECKPOINTED = "ours: activation checkpointing, which 8 GPUs need; the hours leave out what it computes again"
OURS = (
    "ours: embedding and unembedding do not decay; in the released code the unembedding does",
    "ours: update n of the warm-up, counted from 1, has n / warmup_steps of the peak rate; released, it begins at 0",
)


def _config(spec: ModelSpec, n_tokens: int = 1024, batch_size: int = 256, **fields: Any) -> TrainConfig:
    """The released launch script's settings, and how they are computed here."""
    sequences = (16_384 if spec.n_layers > 16 else 32_768) // n_tokens  # in one forward pass of one GPU
    layers = spec.n_layers  # the released weights 0.01 and 0.001 are meant to be divided by L
    auxiliary = {"load_balance_weight": 0.01 / layers, "router_z_weight": 0.001 / layers}
    defaults: dict[str, Any] = {
        "total_tokens": 5_000_000_000,
        "learning_rate": 1e-3,
        "warmup_steps": 1000,
        "seed": 6198,
        "corpus": CORPUS,
        "evaluation_length": 1024,
        "n_evaluation_sequences": 256,
        "record_every": 1,
        "probe_every": 3000,
        "evaluate_every": 3000,
        "checkpoint_every": 1000,
        "precision": "bfloat16",
        "compile": True,
        "parallel": "fsdp" if spec.parameter_counts()["total"] > 5e9 else "ddp",
    }
    shape = {"n_tokens": n_tokens, "batch_size": batch_size, "micro_batch_size": sequences}
    return TrainConfig(**{**defaults, **auxiliary, **shape, **fields})


def _depth() -> list[Run]:
    runs = []
    for n_layers in (12, 16, 24, 32):
        spec = presets.paper_dense_1b().with_fields(n_layers=n_layers)
        source = f"docs page, final_layer_variance.png and scores_comparison.png; adamw-1B.yaml, {LAUNCH}"
        steps = "19,074 updates of 262,144 tokens: the figure's curves end there"
        runs.append(Run(f"paper-dense-1b-l{n_layers}", spec, _config(spec), source, (RATE, steps, *OURS)))
    return runs


def _decay() -> list[Run]:
    runs = []
    for text in ("0", "0.01", "0.1", "1", "3"):
        spec = presets.paper_dense_1b()
        batch = "batch: 0.52 M tokens by the figure's 9.54k updates; taken as 512 x 1024 and not 256 x 2048"
        runs.append(
            Run(
                f"paper-decay-{text}",
                spec,
                _config(spec, batch_size=512, weight_decay=float(text)),
                f"docs page, table of lambda and WD.png; adamw-1B.yaml, {LAUNCH}",
                (RATE, batch, *OURS),
            )
        )
    return runs


def _length() -> list[Run]:
    runs = []
    for n_tokens in (256, 512, 1024, 2048, 4096, 8192):
        spec = presets.paper_dense_1b()
        source = f"docs page, table of T and Length.png; adamw-1B.yaml, {LAUNCH}"
        batch = "batch: 256 sequences at every T (the T = 1024 curve is that of L = 16), so 76,294 to 2,385 updates"
        evaluated = "evaluation: at 256 tokens for all, and at T; the table's PPL is probably at T"
        config = _config(spec, n_tokens, evaluation_length=256)
        runs.append(Run(f"paper-length-{n_tokens}", spec, config, source, (RATE, batch, evaluated, *OURS)))
    return runs


LONG = "T = 4096 and 256 sequences: the figure's 4.78k updates and the PPL 14.52 that T = 4096 and G = 1 share"


def _group() -> list[Run]:
    runs = []
    for size in (1, 4, 16):
        spec = presets.paper_dense_1b().with_fields(n_kv_heads=16 // size)
        source = f"docs page, table of G and GQA.png; adamw-1B.yaml, {LAUNCH}"
        runs.append(Run(f"paper-group-{size}", spec, _config(spec, 4096), source, (RATE, LONG, *OURS)))
    return runs


def _mixture() -> list[Run]:
    auxiliary = "ours: auxiliary losses weigh 0.01 / L and 0.001 / L at every layer; released, layer l has w / L^l"
    runs = []
    for name, yaml in (
        ("dense-400m", "adamw-400M-momentum"),
        ("moe-2b-400m", "olmoe-400M-2B"),
        ("moe-7b-1b", "olmoe-1B-7B"),
    ):
        spec = presets.get(f"paper-{name}")
        unstated = (RATE, LONG, *OURS)
        if name.endswith("400m"):
            unstated = ("the pair: d_model 1536 (dense) and 768 (mixture), the only 400M configs", *unstated)
        if name == "moe-7b-1b":
            size = "size: 13.4 B with 2.1 B active as released; 7 B is reached with experts of 1024"
            unstated = (
                size,
                "the dense run beside it: paper-group-1, whose curve is the same in both figures",
                *unstated,
            )
        if spec.moe is not None:
            unstated = (*unstated, auxiliary)
        fields: dict[str, Any] = {}
        if name == "moe-7b-1b":  # without it 8 GPUs hold one sequence at a time at best
            fields["activation_checkpointing"] = True
            unstated = (*unstated, CHECKPOINTED)
        source = f"docs page, table of MoE, MoE-400M.png and MoE-1B.png; {yaml}.yaml, {LAUNCH}"
        runs.append(Run(f"paper-{name}", spec, _config(spec, 4096, **fields), source, unstated))
    return runs


def _recipe() -> list[Run]:
    """The ladder: T, then decay, then G, then experts, each with what was kept before."""
    deep = presets.paper_dense_l32()
    shape = "shape of the dense L = 32 model: inferred from '1.2B' and the mixture's active width"
    mixture = presets.paper_moe_l32().with_fields(n_kv_heads=8)
    steps: list[tuple[str, ModelSpec, dict[str, Any]]] = [
        ("l16", presets.paper_dense_1b(), {}),
        ("l32", deep, {}),
        ("length-4096", deep, {"n_tokens": 4096}),
        ("length-8192", deep, {"n_tokens": 8192}),
        ("decay-0.3", deep, {"n_tokens": 4096, "weight_decay": 0.3}),
        ("decay-0.6", deep, {"n_tokens": 4096, "weight_decay": 0.6}),
        ("decay-1", deep, {"n_tokens": 4096, "weight_decay": 1.0}),
        ("group-2", deep.with_fields(n_kv_heads=8), {"n_tokens": 4096, "weight_decay": 0.3}),
        ("moe", mixture, {"n_tokens": 4096, "weight_decay": 0.3}),
    ]
    source = f"{LADDER}; olmoe-1B-7B-ablation.yaml (the mixture), adamw-1B.yaml (L = 16), {LAUNCH}"
    runs = []
    for name, spec, fields in steps:
        inferred = (shape,) if spec.n_layers == 32 and spec.moe is None else ()
        odd = (ODD_HEADS,) if spec.head_dim % 8 else ()
        unstated = (*inferred, RATE, BATCH, *OURS, *odd)
        runs.append(Run(f"paper-recipe-{name}", spec, _config(spec, **fields), source, unstated))
    return runs


# Reduced twins --------------------------------------------------------------------------------------------------------

SMALL_TOKENS = 40_000_000
SMALL_TOKENS_PER_STEP = 32_768
SMALL_NOTE = (
    "twin: d_model 512, vocabulary 8,192, 40 M tokens of `docs` in 1,221 updates of 32,768 at every T, rate 3e-3,"
    " 100 updates of warm-up, initial std 0.02 sqrt(d_model / 512), which keeps the gains of the full shape; not tuned"
)


def _small(run: Run) -> Run:
    """Depth, group size, experts and ratios of widths as in `run`; heads of 128, or 16 of 32 in the sweep of G."""
    spec, config = run.spec, run.config
    ratio = 512 / spec.d_model
    n_heads = 16 if run.name.startswith("paper-group") else 4
    changes: dict[str, Any] = {
        "d_model": 512,
        "vocab_size": 8192,
        "attention.n_heads": n_heads,
        "attention.n_kv_heads": n_heads // spec.kv_group_size,
        "init.std": 0.02 * ratio**-0.5,
        "init.embedding_std": 0.02,
    }
    if spec.moe is not None:
        changes["moe.d_expert"] = round(spec.moe.d_expert * ratio)
    if spec.feed_forward is not None:
        changes["feed_forward.d_ff"] = round(spec.feed_forward.d_ff * ratio)
    kept = tuple(item for item in run.unstated if item != ODD_HEADS)
    small_config = dataclasses.replace(
        config,
        total_tokens=SMALL_TOKENS,
        batch_size=SMALL_TOKENS_PER_STEP // config.n_tokens,
        micro_batch_size=None,
        learning_rate=3e-3,
        warmup_steps=100,
        corpus="docs",
        record_every=10,
        probe_every=200,
        evaluate_every=200,
        checkpoint_every=500,
        n_evaluation_sequences=64,
        parallel="ddp",
    )
    return Run(run.name + SMALL, spec.with_fields(changes), small_config, run.source, (*kept, SMALL_NOTE))


@functools.cache
def _runs() -> dict[str, Run]:
    full = [*_depth(), *_decay(), *_length(), *_group(), *_mixture(), *_recipe()]
    return {one.name: one for run in full for one in (run, _small(run))}


# What they cost -------------------------------------------------------------------------------------------------------


def describe(run: Run, mfu: float | None = None) -> str:
    """The run in a few lines: shape, budget, FLOP, memory per GPU and hours on 1 and 8 H200, sources. All estimates.

    >>> print(describe(get("paper-dense-1b-l16")).splitlines()[2])
    budget: 19074 updates of 256 x 1024 tokens = 5e+09 tokens, 3.63e+19 FLOP (7.26e+09 per token)
    """
    spec, config = run.spec, run.config
    one = estimate(spec, config, 1, mfu)
    lines = [
        f"run {run.name}, spec {spec.spec_id}",
        f"shape: {_shape(spec)}; {one.parameters:,} parameters, {one.active_parameters:,} active",
        f"budget: {one.steps} updates of {config.batch_size} x {config.n_tokens} tokens = {one.tokens:.3g} tokens,"
        f" {one.flops:.3g} FLOP ({one.flops_per_token:.3g} per token)",
        f"schedule: {config.schedule}, peak {config.learning_rate:g}, {config.warmup_steps} updates of warm-up;"
        f" weight decay {config.weight_decay:g} of {config.decay}; corpus {config.corpus}",
        *(str(estimate(spec, config, n_gpus, mfu)) for n_gpus in (1, 8) if n_gpus <= config.batch_size),
        *([f"source: {run.source}"] if run.source else []),
        *(f"not stated: {item}" if not item.startswith(("ours:", "twin:")) else item for item in run.unstated),
    ]
    return "\n".join(lines)


def _shape(spec: ModelSpec) -> str:
    heads = f"{spec.n_heads} heads of {spec.head_dim}, {spec.n_kv_heads} of keys and values"
    if spec.moe is not None:
        part = spec.moe
        shared = f" and {part.n_shared_experts} shared" if part.n_shared_experts else ""
        width = f"{part.n_experts} experts of {part.d_expert}, {part.top_k} active{shared}"
    else:
        width = f"d_ff {spec.feed_forward.d_ff}" if spec.feed_forward else "no feed-forward"
    return f"d_model {spec.d_model}, {spec.n_layers} layers, {heads}, {width}, vocabulary {spec.vocab_size}"


def as_markdown(chosen: Sequence[str] | None = None, mfu: float | None = None) -> str:
    """A table of runs (all where None is given): parameters, budget, FLOP, and time and GiB per GPU on 1 and 8 H200.

    An asterisk marks memory beyond an H200's. mfu: for all; None = `assumed_mfu` of each.

    >>> print(as_markdown(["paper-group-4"]).splitlines()[2])
    | paper-group-4 | 16 | 1.18 B | 1.18 B | 4096 | 4769 | 5 B | 3.63e+19 | 56% | 18.1 h | 62 | 2.27 h | 62 |
    """
    head = ("run", "L", "parameters", "active", "T", "updates", "tokens", "FLOP", "MFU")
    head = (*head, "1 GPU", "GiB", "8 GPUs", "GiB each")
    rows = [head, ("---",) * len(head)]
    for name in names() if chosen is None else chosen:
        run = get(name)
        one = estimate(run.spec, run.config, 1, mfu)
        cells = [name, str(run.spec.n_layers), _count(one.parameters), _count(one.active_parameters)]
        cells += [str(run.config.n_tokens), str(one.steps), _count(one.tokens), f"{one.flops:.2e}", f"{one.mfu:.0%}"]
        cells += _time_and_memory(one)
        enough = run.config.batch_size >= 8
        cells += _time_and_memory(estimate(run.spec, run.config, 8, mfu)) if enough else ["-", "-"]
        rows.append(tuple(cells))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _time_and_memory(cost: Cost) -> list[str]:
    return [duration(cost.hours), f"{cost.memory / GIB:.0f}" + "*" * (cost.memory > H200_MEMORY)]


def _count(number: int) -> str:
    return f"{number / 1e9:.3g} B" if number >= 1e9 else f"{number / 1e6:.3g} M"
