"""`TrainConfig`: how a model is trained. Plain numbers and strings; it knows nothing of torch or of the model."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from varprop.errors import ArgumentError, SpecError, require
from varprop.spec import serialise

Decay = Literal["matrices", "everything"]
Precision = Literal["auto", "float32", "bfloat16"]
Schedule = Literal["cosine", "wsd", "constant"]
Parallel = Literal["ddp", "fsdp"]
EXECUTION_FIELDS = (
    *("micro_batch_size", "device", "compile", "compile_layers", "cuda_graph", "parallel"),
    *("activation_checkpointing", "checkpoint_every", "deterministic", "max_loss_rise"),
)
"""Fields that say how a run is computed and not what: a run may be resumed with others, equal to rounding; but the
load-balance loss of a mixture is of each micro-batch of each process, so that how the batch is cut changes it."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run, all of it: the same config and spec give the same result on the same device.

    Budget, exactly one of them (200 steps where none is given): n_steps parameter updates; total_tokens tokens;
    total_flops training FLOP as `flops_per_token` counts them. An update reads batch_size sequences of n_tokens tokens,
    over all devices; a forward pass has at most micro_batch_size sequences on a device (None = all of its share).

    learning_rate: the peak; it rises linearly over `warmup_steps` updates. schedule: `cosine` then falls to
    `final_lr_fraction` of the peak at the end, `wsd` stays and falls linearly over the last `decay_fraction` of the
    updates, `constant` stays. weight_decay, betas, eps: AdamW. decay: what decays: `matrices` (every tensor with two or
    more dimensions except the embedding and the unembedding) or `everything`. clip_norm: largest global gradient norm,
    None = no clipping. base_d_model, base_n_layers: the shape that learning_rate, eps, weight_decay were tuned at, to
    transfer them by CompleteP (arXiv 2505.01618); None = as they are. load_balance_weight, router_z_weight: of the two
    auxiliary losses of every mixture layer, the same at every layer and depth. router_bias_rate: step of the selection
    bias of a spec with `router_bias` (arXiv 2408.15664).

    seed: of the initial weights and of the data order. corpus: embedded, docs, books, a directory of `varprop data
    tokenize` or a token file (`load_corpus`). document_mask: attention stays within a document. record_every,
    probe_every, evaluate_every: updates between records of the training batch, of the fixed probe batch of
    n_probe_sequences, and evaluations on n_evaluation_sequences held-out sequences of evaluation_length (and as many
    tokens at the training length); the first and the last state are always measured. max_loss_rise: a loss this many
    nats above the mean of the last records stops the run, None = never.

    How it is computed (`EXECUTION_FIELDS`, which a resumed run may change). micro_batch_size: above. device: a torch
    device, auto = CUDA where there is one, else the CPU. compile: torch.compile, compile_layers layers at a time.
    cuda_graph: on one GPU the kernels of a step are recorded once and launched together. parallel: each of several
    processes holds the whole model (`ddp`) or a part of it (`fsdp`). activation_checkpointing: blocks are computed
    again in the backward pass. checkpoint_every: updates between checkpoints, where a run directory is given.
    deterministic: deterministic kernels alone. Not one of them is precision, of the matrix products and the stream
    (weights, gradients and optimiser are float32): auto = bfloat16 on CUDA, else float32.

    A field outside its domain raises `ArgumentError`.

    >>> TrainConfig(n_steps=10, warmup_steps=2).tokens_per_step
    1024
    >>> TrainConfig.from_json(TrainConfig(seed=3).to_json()).seed
    3
    """

    n_steps: int | None = None
    total_tokens: int | None = None
    total_flops: float | None = None
    batch_size: int = 8
    micro_batch_size: int | None = None
    n_tokens: int = 128
    learning_rate: float = 3e-3
    schedule: Schedule = "cosine"
    warmup_steps: int = 20
    final_lr_fraction: float = 0.1
    decay_fraction: float = 0.2
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip_norm: float | None = 1.0
    decay: Decay = "matrices"
    base_d_model: int | None = None
    base_n_layers: int | None = None
    load_balance_weight: float = 0.01
    router_z_weight: float = 0.001
    router_bias_rate: float = 0.001
    seed: int = 0
    corpus: str = "embedded"
    document_mask: bool = False
    record_every: int = 10
    probe_every: int = 100
    n_probe_sequences: int = 4
    evaluate_every: int = 100
    evaluation_length: int = 128
    n_evaluation_sequences: int = 32
    max_loss_rise: float | None = 3.0
    precision: Precision = "auto"
    device: str = "auto"
    compile: bool = False
    compile_layers: int = 1
    cuda_graph: bool = False
    parallel: Parallel = "ddp"
    activation_checkpointing: bool = False
    checkpoint_every: int = 100
    deterministic: bool = False

    def __post_init__(self) -> None:
        hints = get_type_hints(TrainConfig)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in _MINIMUM and not (value is None and hints[field.name] is not int):
                _whole(field.name, value, _MINIMUM[field.name])
            elif field.name in _INTERVALS and not (value is None and hints[field.name] is not float):
                low, high, domain = _INTERVALS[field.name]
                _number(field.name, value, low, high, domain)
                object.__setattr__(self, field.name, float(value or 0))  # one canonical form
            elif hints[field.name] is bool:
                require(isinstance(value, bool), ArgumentError, field.name, value, "not a boolean", "true or false")
            elif get_origin(hints[field.name]) is Literal:
                allowed = get_args(hints[field.name])
                require(value in allowed, ArgumentError, field.name, value, "unknown", "one of " + ", ".join(allowed))
            elif hints[field.name] is str:
                text = isinstance(value, str) and value != ""
                require(text, ArgumentError, field.name, value, "not a name", "a non-empty string")
        pair = isinstance(self.betas, (tuple, list)) and len(self.betas) == 2
        require(pair, ArgumentError, "betas", self.betas, "not a pair", "two numbers in [0, 1)")
        for beta in self.betas:
            _number("betas", beta, 0.0, math.nextafter(1.0, 0.0), "two numbers in [0, 1)")
        object.__setattr__(self, "betas", (float(self.betas[0]), float(self.betas[1])))
        self._check_budget()

    def _check_budget(self) -> None:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if not given:
            object.__setattr__(self, "n_steps", 200)
        wrong = "given with " + " and ".join(given[:-1])
        name = given[-1] if given else "n_steps"
        require(len(given) < 2, ArgumentError, name, getattr(self, name), wrong, "one of " + ", ".join(BUDGETS))
        if self.n_steps is not None:
            domain = f"at most n_steps={self.n_steps}"
            good = self.warmup_steps <= self.n_steps
            require(good, ArgumentError, "warmup_steps", self.warmup_steps, "too large", domain)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one update."""
        return self.batch_size * self.n_tokens

    def identity(self) -> dict[str, Any]:
        """The fields that say what is computed: all but `EXECUTION_FIELDS`."""
        return {k: v for k, v in serialise.to_dict(self).items() if k not in EXECUTION_FIELDS}

    def to_json(self) -> str:
        """The canonical JSON: every field, keys sorted, no white space."""
        return serialise.canonical_json(self)

    @classmethod
    def from_json(cls, text: str) -> TrainConfig:
        """A config from JSON; broken JSON and unknown or ill-typed fields raise `ArgumentError`."""
        try:
            return serialise.from_dict(cls, serialise.parse_json(text))
        except SpecError as error:
            raise ArgumentError(str(error)) from None


BUDGETS = ("n_steps", "total_tokens", "total_flops")
_MINIMUM = {
    **dict.fromkeys(("n_steps", "total_tokens", "batch_size", "micro_batch_size", "base_d_model", "base_n_layers"), 1),
    **dict.fromkeys(("record_every", "probe_every", "evaluate_every", "checkpoint_every", "compile_layers"), 1),
    **dict.fromkeys(("n_probe_sequences", "n_evaluation_sequences"), 1),
    **dict.fromkeys(("n_tokens", "evaluation_length"), 2),  # the correlation between tokens needs two
    **dict.fromkeys(("warmup_steps", "seed"), 0),
}
_POSITIVE = (5e-324, 1.7e308, "a finite number > 0")
_NOT_NEGATIVE = (0.0, 1.7e308, "a finite number >= 0")
_FRACTION = (0.0, 1.0, "a number in [0, 1]")
_INTERVALS = {
    **dict.fromkeys(("total_flops", "learning_rate", "eps", "clip_norm", "max_loss_rise"), _POSITIVE),
    **dict.fromkeys(("weight_decay", "load_balance_weight", "router_z_weight", "router_bias_rate"), _NOT_NEGATIVE),
    **dict.fromkeys(("final_lr_fraction", "decay_fraction"), _FRACTION),
}


def _whole(name: str, value: Any, minimum: int) -> None:
    domain = f"an integer >= {minimum}"
    whole = isinstance(value, int) and not isinstance(value, bool)
    require(whole, ArgumentError, name, value, "not an integer", domain)
    require(minimum <= value < 2**63, ArgumentError, name, value, "outside the domain", domain)


def _number(name: str, value: Any, low: float, high: float, domain: str) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    require(number and low <= value <= high, ArgumentError, name, value, "outside the domain", domain)
