"""`TrainConfig`: how a model is trained. Plain numbers and strings; it knows nothing of torch or of the model."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

from varprop.errors import ArgumentError, SpecError, require
from varprop.spec import serialise

Decay = Literal["matrices", "everything"]
Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run, all of it: the same config and spec give the same result on the same device.

    n_steps: parameter updates, each on `batch_size` sequences of `n_tokens` tokens. learning_rate: the peak;
    it rises linearly over `warmup_steps` updates and falls as a cosine to `final_lr_fraction` of the peak at `n_steps`.
    weight_decay, betas, eps: AdamW. decay: what decays: `matrices` (every tensor with two or more dimensions except
    the embedding and the unembedding) or `everything`. clip_norm: largest global gradient norm, None = no clipping.
    seed: of the initial weights and of the data order. log_every: steps between records; the first and the last step
    are always recorded. n_validation_batches: batches of each validation loss. checkpoint_every: steps between
    checkpoints, where a run directory is given. corpus: see `load_corpus`. precision: of the matrix products;
    weights, gradients and optimiser are float32; auto = bfloat16 on CUDA, else float32. device: a torch device, auto =
    CUDA where there is one, else the CPU. compile: torch.compile for the steps without a record.

    A field outside its domain raises `ArgumentError`.

    >>> TrainConfig(n_steps=10, warmup_steps=2).tokens_per_step
    1024
    >>> TrainConfig.from_json(TrainConfig(seed=3).to_json()).seed
    3
    """

    n_steps: int = 200
    batch_size: int = 8
    n_tokens: int = 128
    learning_rate: float = 3e-3
    warmup_steps: int = 20
    final_lr_fraction: float = 0.1
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip_norm: float | None = 1.0
    decay: Decay = "matrices"
    seed: int = 0
    log_every: int = 20
    n_validation_batches: int = 4
    checkpoint_every: int = 100
    corpus: str = "embedded"
    precision: Precision = "auto"
    device: str = "auto"
    compile: bool = False

    def __post_init__(self) -> None:
        hints = get_type_hints(TrainConfig)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            hint = hints[field.name]
            if hint is int:
                _whole(field.name, value, _MINIMUM[field.name])
            elif isinstance(value, int) and not isinstance(value, bool) and field.name in _INTERVALS:
                object.__setattr__(self, field.name, float(value))  # one canonical form
        for name, (low, high, domain) in _INTERVALS.items():
            if not (name == "clip_norm" and self.clip_norm is None):
                _number(name, getattr(self, name), low, high, domain)
        pair = isinstance(self.betas, (tuple, list)) and len(self.betas) == 2
        require(pair, ArgumentError, "betas", self.betas, "not a pair", "two numbers in [0, 1)")
        for beta in self.betas:
            _number("betas", beta, 0.0, math.nextafter(1.0, 0.0), "two numbers in [0, 1)")
        object.__setattr__(self, "betas", (float(self.betas[0]), float(self.betas[1])))
        fits = self.warmup_steps <= self.n_steps
        require(fits, ArgumentError, "warmup_steps", self.warmup_steps, "too large", f"at most n_steps={self.n_steps}")
        for name, choices in (("decay", Decay), ("precision", Precision)):
            allowed = get_args(choices)
            known = getattr(self, name) in allowed
            require(known, ArgumentError, name, getattr(self, name), "unknown", "one of " + ", ".join(allowed))
        for name in ("corpus", "device"):
            text = isinstance(getattr(self, name), str) and getattr(self, name) != ""
            require(text, ArgumentError, name, getattr(self, name), "not a name", "a non-empty string")
        require(
            isinstance(self.compile, bool), ArgumentError, "compile", self.compile, "not a boolean", "true or false"
        )

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one update."""
        return self.batch_size * self.n_tokens

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


_MINIMUM = {
    "n_steps": 1,
    "batch_size": 1,
    "n_tokens": 2,  # the correlation between tokens needs two
    "warmup_steps": 0,
    "seed": 0,
    "log_every": 1,
    "n_validation_batches": 1,
    "checkpoint_every": 1,
}
_POSITIVE = (5e-324, 1.7e308, "a finite number > 0")
_INTERVALS = {
    "learning_rate": _POSITIVE,
    "final_lr_fraction": (0.0, 1.0, "a number in [0, 1]"),
    "weight_decay": (0.0, 1.7e308, "a finite number >= 0"),
    "eps": _POSITIVE,
    "clip_norm": (5e-324, 1.7e308, "a finite number > 0, or null"),
}


def _whole(name: str, value: Any, minimum: int) -> None:
    domain = f"an integer >= {minimum}"
    whole = isinstance(value, int) and not isinstance(value, bool)
    require(whole, ArgumentError, name, value, "not an integer", domain)
    require(minimum <= value < 2**63, ArgumentError, name, value, "outside the domain", domain)


def _number(name: str, value: Any, low: float, high: float, domain: str) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    require(number and low <= value <= high, ArgumentError, name, value, "outside the domain", domain)
