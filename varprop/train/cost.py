"""What a run costs before it is run: FLOP, memory of a GPU, hours. Estimates, by the formulas that are stated here."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from varprop.errors import ArgumentError, require
from varprop.spec import ModelSpec
from varprop.train.budget import PEAK_FLOPS, flops_per_token, n_steps
from varprop.train.config import TrainConfig
from varprop.train.loss import chunk_size

GIB = 2**30
H200_MEMORY = 139 * GIB
"""Memory of one H200 in bytes, as CUDA reports it."""
PLAIN_LOOP_MFU = ((256, 0.256), (512, 0.379), (1024, 0.464), (2048, 0.562))
"""d_model and the MFU of a plain compiled loop on one H200 (T = 1024, head_dim 128, at least 16k tokens at a time)."""
MIXTURE_SHARE = 0.75
"""MFU of a mixture on its active FLOP, over that of a dense model of the same width: the aim, not a measurement."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The estimate of a run. Bytes and FLOP; memory is that of one GPU at its peak.

    states: float32 weights, gradients and AdamW's two moments; with FSDP a GPU's share of them and, in float32, the
    gathered weights of two blocks and of what stands outside, and gradients that are not yet reduced: those of two
    blocks, and between several micro-batches of an update those of all parameters.
    activations: what the blocks save for the backward pass of one micro-batch, and bfloat16 copies of their matrices.
    working: gradients of one block's saved tensors; of the loss, the logits held and the gradient of the unembedding.
    """

    parameters: int
    active_parameters: int
    steps: int
    tokens: int
    flops_per_token: float
    n_gpus: int
    mfu: float
    micro_batch_size: int
    states: int
    activations: int
    working: int

    @property
    def flops(self) -> float:
        """Training FLOP of the whole run."""
        return self.flops_per_token * self.tokens

    @property
    def memory(self) -> int:
        """Bytes of one GPU, without CUDA's own (about 1 GiB) and without what the allocator loses to fragments."""
        return self.states + self.activations + self.working

    @property
    def hours(self) -> float:
        """flops / (n_gpus mfu 989 TFLOP/s): on H100 or H200, without evaluation, and without loss between GPUs."""
        return self.flops / (self.n_gpus * self.mfu * PEAK_FLOPS["H200"]) / 3600

    def __str__(self) -> str:
        gpus = f"{self.n_gpus} GPU" + "s" * (self.n_gpus > 1)
        fits = "" if self.memory <= H200_MEMORY else ", more than an H200 has"
        return (
            f"{gpus}: {duration(self.hours)} at {self.mfu:.0%} MFU; {self.memory / GIB:.3g} GiB per GPU{fits}"
            f" (states {self.states / GIB:.3g}, activations of {self.micro_batch_size} sequences"
            f" {self.activations / GIB:.3g}, working {self.working / GIB:.3g})"
        )


def duration(hours: float) -> str:
    """A time in hours, or in minutes below one hour.

    >>> duration(0.0276), duration(34.68)
    ('1.66 min', '34.7 h')
    """
    return f"{hours:.3g} h" if hours >= 1 else f"{60 * hours:.3g} min"


def assumed_mfu(spec: ModelSpec) -> float:
    """MFU assumed where none is given: `PLAIN_LOOP_MFU` between its widths linear in log d_model, constant beyond.

    For a spec with a mixture `MIXTURE_SHARE` of it, on active FLOP.

    >>> from varprop import presets
    >>> assumed_mfu(presets.d512()), round(assumed_mfu(presets.paper_moe_7b_1b()), 4)
    (0.379, 0.4215)
    """
    points = PLAIN_LOOP_MFU
    d_model = min(max(spec.d_model, points[0][0]), points[-1][0])
    (d_0, low), (d_1, high) = next((a, b) for a, b in itertools.pairwise(points) if d_model <= b[0])
    dense = low + (high - low) * math.log(d_model / d_0) / math.log(d_1 / d_0)
    return dense * (MIXTURE_SHARE if spec.moe is not None else 1.0)


def estimate(spec: ModelSpec, config: TrainConfig, n_gpus: int = 1, mfu: float | None = None) -> Cost:
    """The cost of a run on `n_gpus` GPUs at a stated MFU, `assumed_mfu` where it is None.

    FLOP: as `flops_per_token`. States: 16 bytes a parameter, shared over the GPUs with FSDP. Activations: as
    `saved_bytes_per_token` for min(micro_batch_size, ceil(batch_size / n_gpus)) sequences, and the copies in the type
    of the products that a forward pass makes of the blocks' matrices, which live until the backward pass, gathered or
    not. With activation checkpointing a block's input is all that is kept; saved tensors and copies are made again,
    one block at a time, and the hours leave out that second forward pass (up to a third more).

    Exactness: above what one H200 takes, by 4 to 9 %. Peaks of 64 x 1024 tokens, vocabulary 8,192, in GiB, measured
    (estimated): d_model 512, 32 layers, d_ff 1536 38.2 (39.8); 1024, 32, 2816 75.0 (79.3); 2048, 16, 8192 99.9 (109.1),
    by `python -m experiments.benchmarks.train_speed`. With FSDP nothing has been measured.
    Raises `ArgumentError` for more GPUs than sequences of an update, an mfu outside (0, 1], and as `n_steps`.

    >>> from varprop import presets
    >>> cost = estimate(presets.paper_dense_1b(), TrainConfig(n_steps=100, batch_size=64, n_tokens=1024))
    >>> cost.tokens, f"{cost.flops:.3g}", round(cost.memory / 2**30)
    (6553600, '4.76e+16', 112)
    """
    domain = f"an integer in 1..{config.batch_size}, the sequences of an update"
    require(1 <= n_gpus <= config.batch_size, ArgumentError, "n_gpus", n_gpus, "outside the domain", domain)
    possible = mfu is None or 0 < mfu <= 1
    require(possible, ArgumentError, "mfu", mfu, "outside the domain", "a number in (0, 1]")
    counts, steps = spec.parameter_counts(), n_steps(config, spec)
    sequences = min(config.micro_batch_size or config.batch_size, -(-config.batch_size // n_gpus))
    tokens = sequences * config.n_tokens
    states, activations, working = _memory(spec, config, tokens, n_gpus, sequences * n_gpus < config.batch_size)
    return Cost(
        parameters=counts["total"],
        active_parameters=counts["active"],
        steps=steps,
        tokens=steps * config.tokens_per_step,
        flops_per_token=flops_per_token(spec, config.n_tokens),
        n_gpus=n_gpus,
        mfu=assumed_mfu(spec) if mfu is None else mfu,
        micro_batch_size=sequences,
        states=states,
        activations=activations,
        working=working,
    )


def _memory(spec: ModelSpec, config: TrainConfig, tokens: int, n_gpus: int, several: bool) -> tuple[int, int, int]:
    """Bytes of states, activations and working memory for `tokens` tokens in a forward pass, one of `several`."""
    size = element_size(config)
    total = spec.parameter_counts()["total"]
    matrices = [0] * (spec.n_layers + 1)  # of the layers; layer 0: what stands outside
    for row in spec.tensor_table():
        matrices[row.layer or 0] += row.n_parameters if len(row.shape) >= 2 else 0
    saved = [saved_bytes_per_token(spec, layer, size) for layer in range(1, spec.n_layers + 1)]
    sharded = config.parallel == "fsdp" and n_gpus > 1
    states = 16 * total // (n_gpus if sharded else 1)
    copies = 0 if size == 4 else size * (max(matrices) if config.activation_checkpointing else sum(matrices[1:]))
    if sharded:  # float32: weights of this block and the next, gradients of this one and of the last, being sent
        states += 4 * (4 * max(matrices[1:]) + matrices[0] + (total if several else 0))
    outside = 3 * size * spec.d_model * tokens  # the last stream, its norm, and the norm's gradient, kept by the loss
    kept = [size * spec.d_model] * spec.n_layers if config.activation_checkpointing else saved
    held = 2 * size * min(tokens, chunk_size("cuda", spec.vocab_size)) * spec.vocab_size  # logits, their gradients
    held += 4 * spec.vocab_size * spec.d_model  # the loss forms the table's gradient in the forward pass
    recomputed = max(saved) if config.activation_checkpointing else 0
    return states, sum(kept) * tokens + outside + copies, (max(saved) + recomputed) * tokens + held


def element_size(config: TrainConfig) -> int:
    """Bytes of an element of the stream on a GPU."""
    return 4 if config.precision == "float32" else 2


def saved_bytes_per_token(spec: ModelSpec, layer: int, size: int = 2) -> int:
    """Bytes that a compiled block saves for the backward pass, per token; `size` bytes an element.

    Elements, with h = n_heads head_dim and g = n_kv_heads head_dim. Of each part: the stream that its norm reads and
    the norm's output, 2 d_model. Attention: queries, keys and values as they are multiplied, h + 2 g; the output by
    heads and in rows, 2 h. Feed-forward: gate, up and what `down` reads, 3 d_ff (without a gate 2 d_ff). Mixture: the
    same of (top_k + n_shared_experts) d_expert, and the gathered rows, top_k d_model; the router reads the norm's
    output in float32, and the other copy is kept for shared experts alone. Beside it: 4 bytes for the scale of a norm
    and the log-sum-exp of a head; 12 an expert (its logit, the sorted choice) and 20 an active one (two places, the
    gate). Only norms before the branch are counted.

    Checked by: tests/train/test_cost.py, exactly, against the tensors that torch's partitioner saves of compiled blocks
    on a CPU.

    >>> from varprop import presets
    >>> saved_bytes_per_token(presets.d512_deep(), 1)  # 2 * (9 * 512 + 3 * 1536) + 4 * (2 + 4)
    18456
    """
    d, total = spec.d_model, 0
    if spec.attention is not None:
        queries, keys = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
        total += size * (2 * d + 3 * queries + 2 * keys) + 4 * (1 + spec.n_heads)
    if spec.is_moe(layer):
        part = spec.moe
        assert part is not None
        inner = (3 if part.gated else 2) * (part.top_k + part.n_shared_experts) * part.d_expert
        normed = 4 * d + (size * d if part.n_shared_experts and size < 4 else 0)
        total += size * (d + inner + part.top_k * d) + normed + 12 * part.n_experts + 20 * part.top_k + 4
    elif spec.feed_forward is not None:
        total += size * (2 * d + (3 if spec.feed_forward.gated else 2) * spec.feed_forward.d_ff) + 4
    return total
