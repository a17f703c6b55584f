"""What is recorded while a network trains, from the device to the result.

Legend: B sequences, T tokens, D d_model, L layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from varprop import results
from varprop.corpus import Corpus
from varprop.spec import ModelSpec
from varprop.train import probe, weights
from varprop.train.config import TrainConfig
from varprop.train.model import Forward
from varprop.train.optim import learning_rate

EVALUATIONS = ("fixed_length", "training_length")
OF_BATCH: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("variance", "second_moment"), ("layer", "site")),
    "branch_correlation": ("layer", "branch"),
    "gate_second_moment": ("layer",),
    "expert_load": ("layer", "expert"),
    **dict.fromkeys(("train_loss", "gradient_norm", "load_balance_loss", "router_z_loss"), ()),
}
"""Variables of the training batch, along `step`: their dimensions."""
OF_PROBE: dict[str, tuple[str, ...]] = {
    **{name: dims for name, dims in {**probe.DIMENSIONS, **weights.DIMENSIONS}.items() if name not in OF_BATCH},
}
"""Variables of the probe batch and of the weights, along `probe_step`; `update_ratio` is along `update_step`."""
DIMENSIONS = {
    "step": OF_BATCH,
    "probe_step": OF_PROBE,
    "update_step": {"update_ratio": weights.DIMENSIONS["update_ratio"]},
    "evaluation_step": {"validation_loss": ("evaluation",), "bits_per_byte": ("evaluation",)},
}
VARIABLES = frozenset(
    {name for named in DIMENSIONS.values() for name in named}
    | {"learning_rate", "tokens_seen", "evaluation_length", "bits_per_byte"}
)
"""Every variable that the result of a training can have."""


def batch_statistics(found: Forward, spec: ModelSpec) -> dict[str, Tensor]:
    """The variables of `OF_BATCH` that a forward pass gives, float64, on the device: means over its sequences.

    variance, second_moment, branch_correlation: as in `varprop.measure`, NaN where there is no such site. expert_load:
    share of each expert in the assignments of a layer, NaN in layers without a mixture, whose gate_second_moment is 1.
    Means over equal micro-batches and ranks are those of the whole batch, but for load_balance_loss, which is of each
    micro-batch of each rank.
    """
    values = found.stream | {"train_loss": found.cross_entropy.double()}
    if not found.mixtures:
        return values
    load = found.mixtures["expert_load"].double()
    shares = iter(load / load.sum(dim=-1, keepdim=True))
    gates = iter(found.mixtures["gate_second_moment"].double())
    mixture = [False, *(spec.is_moe(layer) for layer in range(1, spec.n_layers + 1))]
    absent, one = torch.full_like(load[0], math.nan), torch.ones_like(load[0, 0])
    by_layer = [next(gates) if own else one for own in mixture]
    values["gate_second_moment"] = torch.stack([absent[0], *by_layer[1:]])
    values["expert_load"] = torch.stack([next(shares) if own else absent for own in mixture])
    losses = {f"{name}_loss": found.mixtures[name].double().mean() for name in ("load_balance", "router_z")}
    return values | losses


class Fetcher:
    """Records on their way from the device, copied while it computes."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, dict[str, torch.Size], Tensor, Any]] = []

    def put(self, step: int, record: Mapping[str, Tensor]) -> None:
        """Begin to copy the record of a step."""
        flat = torch.cat([value.detach().double().flatten() for value in record.values()])
        copied = None
        if flat.is_cuda:
            host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
            flat, copied = host.copy_(flat, non_blocking=True), torch.cuda.Event()
            copied.record()
        self._waiting.append((step, {name: value.shape for name, value in record.items()}, flat, copied))

    def take(self, before: int | None = None) -> list[tuple[int, dict[str, np.ndarray]]]:
        """Records of the steps below `before`, or all, in order; waits for those that have not come."""
        ready = []
        while self._waiting and (before is None or self._waiting[0][0] < before):
            step, shapes, flat, copied = self._waiting.pop(0)
            if copied is not None:
                copied.synchronize()
            parts = flat.split([shape.numel() for shape in shapes.values()])
            arrays = {name: p.view(shapes[name]).numpy().copy() for name, p in zip(shapes, parts, strict=True)}
            ready.append((step, arrays))
        return ready


class History:
    """Records by dimension of steps: arrays of float64 on the CPU."""

    def __init__(self) -> None:
        self.steps: dict[str, list[int]] = {dimension: [] for dimension in DIMENSIONS}
        self._rows: dict[str, list[np.ndarray]] = {}

    def append(self, dimension: str, step: int, record: Mapping[str, np.ndarray]) -> None:
        """Add a record."""
        self.steps[dimension].append(step)
        for name, value in record.items():
            self._rows.setdefault(name, []).append(value)

    def of(self, name: str) -> list[np.ndarray]:
        """The values of a variable so far."""
        return self._rows.get(name, [])

    def arrays(self) -> dict[str, np.ndarray]:
        """Every variable with its steps as first axis, and the steps themselves."""
        labels = {name: np.array(steps, np.int64) for name, steps in self.steps.items() if steps}
        return labels | {name: np.stack(rows) for name, rows in self._rows.items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> History:
        """The history that `arrays` was made from."""
        history = cls()
        for name, values in arrays.items():
            if name in DIMENSIONS:
                history.steps[name] = [int(step) for step in values]
            else:
                history._rows[name] = list(values)
        return history


def dataset(
    history: History,
    spec: ModelSpec,
    config: TrainConfig,
    corpus: Corpus,
    *,
    n_steps: int,
    device: str,
    dtype: str,
    end_condition: str = "complete",
    attributes: Mapping[str, Any] | None = None,
) -> xr.Dataset:
    """The result of a run: every variable of the history along (seed, its steps), and what follows from the step.

    `learning_rate` is that of the update made after `step` updates, `tokens_seen` the tokens of the updates before it,
    `evaluation_length` the tokens of a sequence of each evaluation. The attribute `bits_per_byte` says whether the
    bytes are those of the tokens evaluated ("exact") or of the mean token of the held-out text ("approximate").
    """
    arrays = history.arrays()
    variables: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
    for dimension, named in DIMENSIONS.items():
        for name in named.keys() & arrays.keys():
            variables[name] = (("seed", dimension, *named[name]), arrays[name][None])
    steps = arrays["step"]
    rates = np.array([learning_rate(config, n_steps, int(step)) for step in steps])
    variables["learning_rate"] = (("seed", "step"), rates[None])
    variables["tokens_seen"] = (("seed", "step"), steps[None] * config.tokens_per_step)
    if "validation_loss" in arrays:
        lengths = np.array([[config.evaluation_length, config.n_tokens]])
        variables["evaluation_length"] = (("seed", "evaluation"), lengths)
    bytes_known = {} if "bits_per_byte" not in arrays else {"bits_per_byte": _exactness(corpus)}
    coordinates = {
        **{name: labels for name, labels in arrays.items() if name in DIMENSIONS},
        **(probe.coordinates(spec) if "probe_step" in arrays else {}),
        "seed": [config.seed],
        "evaluation": list(EVALUATIONS),
        "matrix": weights.matrix_labels(spec),
    }
    used = {dim for dims, _ in variables.values() for dim in dims}
    return results.new(
        variables,
        source="training",
        spec_json=spec.to_json(),
        spec_id=spec.spec_id,
        n_tokens=config.n_tokens,
        coords={name: labels for name, labels in coordinates.items() if name in used},
        seed_entropy=str(config.seed),
        dtype=dtype,
        device=device,
        end_condition=end_condition,
        attributes={
            "config": config.to_json(),
            "corpus": corpus.name,
            "corpus_sha256": corpus.sha256,
            **bytes_known,
            **(attributes or {}),
        },
    )


def _exactness(corpus: Corpus) -> str:
    return "approximate" if corpus.token_bytes is None else "exact"
