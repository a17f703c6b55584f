"""`measure`: the scores of a model on text, as one Dataset."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import nn

from varprop import hf, results
from varprop._version import __version__
from varprop.diagnose import released
from varprop.diagnose.ablation import ablation
from varprop.diagnose.attention import attention
from varprop.diagnose.causal import causal
from varprop.diagnose.consequence import consequence
from varprop.diagnose.expert_ablation import expert_ablation
from varprop.diagnose.experts import experts
from varprop.diagnose.influence import influence
from varprop.diagnose.initialisation import initialisation
from varprop.diagnose.jacobian import jacobian
from varprop.diagnose.limits import GIBIBYTE, Limits
from varprop.diagnose.moments import moments
from varprop.diagnose.open import require_length
from varprop.diagnose.options import require_options, with_defaults
from varprop.diagnose.permutation import permutation
from varprop.diagnose.replay import IGNORED, Batch, Replay
from varprop.diagnose.replicates import warn_of_few
from varprop.diagnose.screening import screening
from varprop.diagnose.session import Progress, Session, Variables, prepare_parts
from varprop.diagnose.usefulness import usefulness
from varprop.diagnose.weights import weights
from varprop.errors import ArgumentError, AssumptionError, LeftOutWarning, SpecError, UnsuitedError, require
from varprop.measure import QUANTILES
from varprop.measure.jacobian import DEFINITIONS
from varprop.nn import Transformer
from varprop.spec import InitSpec, ModelSpec

Definition = Literal["paper", "released"]
Score = Callable[[Session], Variables]
SCORES: dict[str, Score] = {
    "moments": moments,
    "weights": weights,
    "attention": attention,
    "experts": experts,
    "influence": influence,
    "causal": causal,
    "usefulness": usefulness,
    "jacobian": jacobian,
    "permutation": permutation,
    "screening": screening,
    "ablation": ablation,
    "expert_ablation": expert_ablation,
    "pruning": consequence,
    "initialisation": initialisation,
}
"""The scores by name, in the order they are measured; their docstrings define the variables."""
RELEASED: dict[str, Score] = {
    "experts": released.experts,
    "similarity": released.similarity,
    "causal": released.causal,
    "usefulness": released.usefulness,
    "jacobian": released.jacobian,
    "permutation": released.permutation,
    "defects": released.defects,
}
"""What the released code computes instead, for the scores that it has."""
STANDARD = ("moments", "weights", "attention", "influence", "causal", "usefulness", "jacobian", "permutation")
"""Scores that are measured where none are named; the name "standard" stands for them."""
GROUPS = ("all", "standard")
"""Names that stand for several scores."""


def measure(
    model: nn.Module,
    sequences: Batch | torch.Tensor | np.ndarray,
    *,
    scores: Sequence[str | Score] | Score | str = "standard",
    definition: Definition = "paper",
    seed: int = 0,
    memory_gib: float | None = None,
    parts: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> xr.Dataset:
    """The named scores of `model` on `sequences`, a result with source "checkpoint".

    model: of Hugging Face's transformers or a `varprop.nn.Transformer`, on the device and in the type that it is
    measured in. sequences: token ids (S, T), or a `Batch` with targets, which a masked language model needs. scores:
    names of `SCORES`, or "all" or "standard" (`STANDARD`), of which those that the model lacks something for are left
    out with a warning; and scores of your own, functions `Session -> Variables` known by their __name__, which come
    last in the order given.
    definition: "paper" = as the paper defines them, the defects of its code mended; "released" = as its code computes
    them (`varprop.diagnose.released`), for those of the scores that it has. memory_gib: what a score may hold beside
    the weights. parts: a folder where what is done is kept, so that a killed measurement goes on; it is left there.
    options: of single scores (`varprop.diagnose.options`). Every standard error is over sequences unless its score
    says otherwise; where those are fewer than 8 an `AccuracyWarning` names the score (`varprop.diagnose.replicates`).
    Attributes hold the options as JSON, defaults too, and the memory; parts of scores of your own are not told apart by
    their code.
    Raises `ArgumentError` for unknown names, variables that two scores give, models that cannot be replayed,
    activations that are not finite, and input that the model has no place for (`require_input`).
    """
    batch = as_batch(sequences, model)
    wanted = chosen(scores, definition)
    names = list(wanted)
    require_options(options or {})
    replay = Replay(model, None)
    replay.limits = Limits.of(replay.device, memory_gib)
    require_input(replay, batch, seed, memory_gib)
    settings = {"options": json.dumps(with_defaults(options or {})), "memory_gib": replay.limits.memory / GIBIBYTE}
    if "pruning" in names:
        most = with_defaults(options or {})["most_removed"]
        domain = f"0 to {replay.n_layers}, the model's layers"
        require(most <= replay.n_layers, ArgumentError, "most_removed", most, "outside the domain", domain)
    attributes = about(model) | {"definition": definition, "scores": ",".join(names)}
    folder = None
    if parts is not None:
        identity = attributes | {"sequences": digest(batch), "weights": fingerprint(model), "seed": seed}
        folder = prepare_parts(Path(parts), identity | {"options": dict(options or {}), "dtype": str(replay.dtype)})
    spec = spec_of(model)
    session = Session(replay, batch, seed, folder, progress, options or {}, spec)
    with_targets = (batch.targets != IGNORED).any(dim=1).nonzero()[:2, 0]
    few = with_targets if len(with_targets) > 0 else slice(0, 2)
    first = Batch(batch.tokens[few].to(replay.device), batch.targets[few].to(replay.device))
    attributes["replay_error"] = replay.check(first)
    variables = session.found
    with_errors: list[str] = []
    for name, score in wanted.items():
        try:
            found = score(session)
        except (UnsuitedError, AssumptionError) as error:
            if not isinstance(scores, str) or scores not in GROUPS:
                raise
            warnings.warn(f"{name} is left out: {error}", LeftOutWarning, stacklevel=2)
            continue
        twice = sorted(found.keys() & variables.keys())
        require(not twice, ArgumentError, f"variables of score {name}", twice, "there already", "names of their own")
        variables.update(found)
        if any(variable.endswith("_stderr") for variable in found):
            with_errors.append(name)
    if definition == "paper":
        warn_of_few(session, with_errors)
    coordinates = {name: variables.pop(name)[1] for name in list(variables) if variables[name][0] == (name,)}
    return results.new(
        variables,
        source="checkpoint",
        spec_json="" if spec is None else spec.to_json(),
        spec_id="" if spec is None else spec.spec_id,
        n_tokens=session.n_tokens,
        coords={"quantile": list(QUANTILES), "definition": list(DEFINITIONS)} | coordinates,
        seed_entropy=str(seed),
        dtype=str(replay.dtype).removeprefix("torch."),
        device=replay.device.type,
        attributes=attributes
        | settings
        | {"n_sequences": session.n_sequences, "n_layers": replay.n_layers, "d_model": replay.d_model},
    )


def as_batch(sequences: Batch | torch.Tensor | np.ndarray, model: nn.Module | None = None) -> Batch:
    """Token ids (S, T) as a batch whose targets are the next tokens.

    Raises `ArgumentError` for other shapes and types, and for ids where `model` is a masked language model.
    """
    if isinstance(sequences, Batch):
        return sequences
    masked = type(model).__name__.endswith("ForMaskedLM")
    expected = "a Batch, as text.sequences(..., mask_token=mask_token_of(model, tokens)) gives"
    require(not masked, ArgumentError, "sequences", "token ids", "without targets of a masked language model", expected)
    tokens = torch.as_tensor(sequences)
    good = tokens.ndim == 2 and tokens.dtype in (torch.int64, torch.int32, torch.uint16) and tokens.shape[1] >= 2
    shape = f"{tuple(tokens.shape)} {tokens.dtype}"
    require(
        good and len(tokens) > 0, ArgumentError, "sequences", shape, "no token ids", "integers (S, T), S >= 1, T >= 2"
    )
    return Batch.causal(tokens.long())


def chosen(scores: Sequence[str | Score] | Score | str, definition: str) -> dict[str, Score]:
    """The scores by name, in the order they are measured: those of the table, then functions of the caller's own."""
    require(
        definition in ("paper", "released"), ArgumentError, "definition", definition, "unknown", "paper or released"
    )
    table = SCORES if definition == "paper" else RELEASED
    groups: dict[str, list[str | Score]] = {
        "all": list(table),
        "standard": [name for name in STANDARD if name in table],
    }
    given = groups.get(scores, [scores]) if isinstance(scores, str) else [scores] if callable(scores) else list(scores)
    own: dict[str, Score] = {}
    for score in given:
        if callable(score):
            name = getattr(score, "__name__", type(score).__name__)
            taken = name in table or name in own
            require(not taken, ArgumentError, "scores", name, "the name of another score", "a name of its own")
            own[name] = score
        else:
            require(score in table, ArgumentError, "scores", score, "unknown", "some of " + ", ".join(table))
    return {name: score for name, score in table.items() if name in given} | own


def about(model: nn.Module) -> dict[str, Any]:
    """What a result says of its model."""
    config = getattr(model, "config", None)
    found = {
        "architecture": type(model).__name__,
        "model_type": str(getattr(config, "model_type", "varprop")),
        "n_parameters": sum(p.numel() for p in model.parameters()),
    }
    if type(model).__module__.startswith("transformers."):
        found["transformers_version"] = importlib.metadata.version("transformers")
        found["attention_implementation"] = str(getattr(config, "_attn_implementation", None))
    return found


def spec_of(model: nn.Module) -> ModelSpec | None:
    """The spec of a model, Hugging Face's with its own `initializer_range`; None where it cannot be one of ours."""
    if isinstance(model, Transformer):
        return model.spec
    description: Any = getattr(model, "config", None)
    config = {} if description is None else description.to_dict()
    try:
        init = InitSpec(rule="fixed", std=float(config.get("initializer_range") or 0.02))
        return dataclasses.replace(hf.spec_of(config), init=init)
    except SpecError:
        return None


def digest(batch: Batch) -> str:
    """A hash of tokens and targets."""
    text = batch.tokens.numpy().tobytes() + batch.targets.numpy().tobytes()
    return hashlib.sha256(text + str(tuple(batch.tokens.shape)).encode()).hexdigest()[:16]


def fingerprint(model: nn.Module) -> str:
    """A hash of what the numbers depend on, so that parts of another model are not taken for this one's.

    Name, shape and sum of every parameter and buffer; the config without what only says where it comes from, or the
    spec; the version of this package.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    sums = [f"{name} {tuple(x.shape)} {float(x.detach().sum(dtype=torch.float64)):.17g}" for name, x in tensors]
    description: Any = getattr(model, "config", None)
    if isinstance(model, Transformer):
        config = model.spec.to_json()
    else:
        config = (
            "" if description is None else json.dumps(_settings(description.to_dict()), sort_keys=True, default=str)
        )
    return hashlib.sha256("\n".join([__version__, config, *sums]).encode()).hexdigest()[:16]


def _settings(config: Any) -> Any:
    """A config, and those inside it, without where it comes from and without the cache, which no measurement has."""
    if not isinstance(config, dict):
        return config
    left_out = ("use_cache", "_name_or_path", "transformers_version")
    return {str(name): _settings(value) for name, value in config.items() if name not in left_out}


def require_input(replay: Replay, batch: Batch, seed: int, memory_gib: float | None) -> None:
    """`ArgumentError` for a seed, a memory, ids, targets or a length that the model cannot be measured with."""
    require(seed >= 0, ArgumentError, "seed", seed, "negative", "an integer >= 0")
    good = memory_gib is None or 0 < memory_gib < math.inf
    require(good, ArgumentError, "memory_gib", memory_gib, "outside the domain", "a number of GiB > 0")
    require_length(replay.model, batch.tokens.shape[1])
    same = batch.targets.shape == batch.tokens.shape
    require(same, ArgumentError, "targets", tuple(batch.targets.shape), "not those of the tokens", "their shape")
    for name, ids in (("token id", batch.tokens), ("target", batch.targets[batch.targets != IGNORED])):
        if ids.numel() == 0:
            continue
        lowest, highest = int(ids.min()), int(ids.max())
        require(lowest >= 0, ArgumentError, name, lowest, "negative", "ids >= 0")
        size = replay.vocab_size or _n_embeddings(replay.model) or highest + 1
        require(highest < size, ArgumentError, name, highest, "beyond the vocabulary", f"ids below {size}")


def _n_embeddings(model: nn.Module) -> int:
    """Rows of the embedding of a transformers model; 0 for others."""
    own: Any = getattr(model, "get_input_embeddings", None)
    return 0 if own is None else int(getattr(own(), "num_embeddings", 0))
