"""What is recorded while a network trains: statistics of the stream in the forward pass of a step, and the losses.

Legend: B sequences, T tokens, D d_model, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import xarray as xr

from varprop import results
from varprop.corpus import Corpus
from varprop.measure import moments
from varprop.spec import ModelSpec
from varprop.train.budget import n_steps
from varprop.train.config import TrainConfig
from varprop.train.optim import learning_rate

STATISTICS = {
    "variance": moments.variance,
    "second_moment": moments.second_moment,
    "token_correlation": moments.token_correlation,
}
"""Statistics of every layer and site; each maps (B, T, D) to (B,)."""


class Tracker:
    """Records one forward pass: pass it as `record`; every value stays on the device until `History.append`.

    Values are means over the sequences of the batch, float64. `resid_pre` is the `resid_post` of the layer before.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._n_layers = spec.n_layers
        self._values: dict[tuple[str, int, str], torch.Tensor] = {}
        self._streams: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def __call__(self, layer: int, site: str, tensor: torch.Tensor) -> None:
        tensor = tensor.detach()
        with torch.autocast(tensor.device.type, enabled=False):
            self._record(layer, site, tensor)

    def _record(self, layer: int, site: str, tensor: torch.Tensor) -> None:
        for name, statistic in STATISTICS.items():
            if site == "resid_pre":  # the stream after the block before, measured there
                self._values[name, layer, site] = self._values[name, layer - 1, "resid_post"]
            else:
                self._values[name, layer, site] = statistic(tensor).mean()
        if site in moments.BRANCH_STREAM:
            stream = self._streams[moments.BRANCH_STREAM[site]]
            self._values["branch_correlation", layer, site] = moments.branch_correlation(stream, tensor).mean()
        else:
            self._streams[site] = tensor

    def values(self) -> dict[str, torch.Tensor]:
        """Tensors (L + 1, sites) per statistic and (L + 1, branches) for the branch correlation, NaN where absent."""
        tables = dict.fromkeys(STATISTICS, results.SITES)
        sites = {**tables, "branch_correlation": tuple(f"{branch}_out" for branch in results.BRANCHES)}
        return {name: self._table(name, columns) for name, columns in sites.items()}

    def _table(self, name: str, sites: tuple[str, ...]) -> torch.Tensor:
        absent = torch.full_like(next(iter(self._values.values())), math.nan)
        layers = range(self._n_layers + 1)
        rows = [self._values.get((name, layer, site), absent) for layer in layers for site in sites]
        return torch.stack(rows).view(len(layers), len(sites))


class History:
    """Records by step: arrays of float64 on the CPU."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self._rows: dict[str, list[np.ndarray]] = {}

    def append(self, step: int, record: Mapping[str, torch.Tensor]) -> None:
        """Add the record of a step; all of it is fetched from the device in one copy."""
        flat = torch.cat([value.detach().double().flatten() for value in record.values()]).cpu().numpy()
        ends = np.cumsum([value.numel() for value in record.values()])[:-1]
        self.steps.append(step)
        for (name, value), row in zip(record.items(), np.split(flat, ends), strict=True):
            self._rows.setdefault(name, []).append(row.reshape(value.shape))

    def last(self, name: str) -> float:
        """The latest value of a scalar variable."""
        return float(self._rows[name][-1])

    def arrays(self) -> dict[str, np.ndarray]:
        """Every variable with its steps as first axis, and `step` itself."""
        return {"step": np.array(self.steps, np.int64), **{name: np.stack(rows) for name, rows in self._rows.items()}}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> History:
        """The history that `arrays` was made from."""
        history = cls()
        history.steps = [int(step) for step in arrays["step"]]
        history._rows = {name: list(values) for name, values in arrays.items() if name != "step"}
        return history


def dataset(
    history: History, spec: ModelSpec, config: TrainConfig, corpus: Corpus, *, device: str, dtype: str
) -> xr.Dataset:
    """The result of a run: every variable of the history along (seed, step), and what follows from the step.

    `learning_rate` is that of the update made after `step` updates, `tokens_seen` the tokens of the updates before it,
    `bits_per_byte` = validation_loss / ln 2 / (bytes per token), absent where the tokeniser is not known.
    """
    arrays = history.arrays()
    steps = arrays.pop("step")
    variables: dict[str, tuple[Sequence[str], np.ndarray]] = {}
    for name, values in arrays.items():
        within = ("layer", "branch") if name == "branch_correlation" else ("layer", "site")
        variables[name] = (("seed", "step", *within[: values.ndim - 1]), values[None])
    rates = np.array([learning_rate(config, n_steps(config, spec), int(step)) for step in steps])
    variables["learning_rate"] = (("seed", "step"), rates[None])
    variables["tokens_seen"] = (("seed", "step"), steps[None] * config.tokens_per_step)
    if corpus.bytes_per_token is not None:
        bits = arrays["validation_loss"] / math.log(2) / corpus.bytes_per_token
        variables["bits_per_byte"] = (("seed", "step"), bits[None])
    return results.new(
        variables,
        source="training",
        spec_json=spec.to_json(),
        spec_id=spec.spec_id,
        n_tokens=config.n_tokens,
        coords={"seed": [config.seed], "step": steps},
        seed_entropy=str(config.seed),
        dtype=dtype,
        device=device,
        attributes={"config": config.to_json(), "corpus": corpus.name, "corpus_sha256": corpus.sha256},
    )
