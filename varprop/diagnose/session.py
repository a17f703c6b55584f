"""What the scores share: the model, the sequences, settings, progress, and parts already done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from varprop.diagnose.options import OPTIONS
from varprop.diagnose.replay import Batch, Captured, Replay
from varprop.errors import ArgumentError, ShortMemoryError, require
from varprop.files import replacing
from varprop.spec import ModelSpec

Arrays = dict[str, np.ndarray]
Variables = dict[str, tuple[tuple[str, ...], Any]]
"""What a score gives: name -> (dimensions, values), as `results.new` takes them. A variable over the one dimension that
has its name is the labels of this dimension."""
Kept = TypeVar("Kept")
Progress = Callable[[str, int, int], None]
"""Called with the score, the sequences done and all of them."""


@dataclass
class Session:
    """A model on sequences. batch: all of them, on the CPU. parts: folder of what is done, None = nothing is kept."""

    replay: Replay
    batch: Batch
    seed: int = 0
    parts: Path | None = None
    progress: Progress | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of single scores, where they are not the defaults of `varprop.diagnose.options`."""
    spec: ModelSpec | None = None
    """Of the model, where it has one."""
    found: Variables = field(default_factory=dict)
    """Variables of the scores that were measured before."""
    _kept: dict[str, Any] = field(default_factory=dict)

    @property
    def n_sequences(self) -> int:
        """S."""
        return len(self.batch.tokens)

    @property
    def n_tokens(self) -> int:
        """T."""
        return self.batch.tokens.shape[1]

    def option(self, name: str) -> Any:
        """The setting of a single score."""
        return self.options.get(name, OPTIONS[name].default)

    def first_sequences(self, n_tokens: int, fewest: int = 2) -> slice:
        """So many whole sequences, from the first, that they have about `n_tokens` tokens; at least `fewest` or all.

        Two, since one has no standard error over sequences.
        """
        return slice(0, min(self.n_sequences, max(fewest, n_tokens // self.n_tokens)))

    def rng(self, name: str) -> torch.Generator:
        """Random numbers of their own for everything that has a name; on the CPU."""
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def batch_size(self, kept: int = 1) -> int:
        """Sequences of one pass. kept: tensors of the stream's shape that are kept of each layer."""
        bits = torch.finfo(self.replay.dtype).bits
        per_sequence = kept * (self.replay.n_layers + 1) * self.n_tokens * self.replay.d_model * bits // 8
        return min(self.n_sequences, self.replay.limits.batch_sequences(per_sequence))

    def each_batch(
        self,
        name: str,
        compute: Callable[[Captured], Mapping[str, Tensor | np.ndarray]],
        sequences: slice | None = None,
        batch_size: int | None = None,
    ) -> Arrays:
        """What `compute` gives for the captured passes of all sequences, or some, joined along the leading axis.

        Every array has one entry for each sequence of its batch. name: of the part; what is kept under it already is
        read and not computed.
        """
        start, stop, _ = (sequences or slice(None)).indices(self.n_sequences)
        most = min(batch_size or self.batch_size(), stop - start)
        size = -(-(stop - start) // -(-(stop - start) // most))  # as many batches, of like size
        found: list[Arrays] = []
        for first in range(start, stop, size):
            rows = slice(first, min(stop, first + size))
            found.append(self._part(f"{name}-{rows.start}-{rows.stop}", lambda rows=rows: self._of_rows(compute, rows)))
            if self.progress is not None:
                self.progress(name, rows.stop - start, stop - start)
        return {key: np.concatenate([arrays[key] for arrays in found]) for key in found[0]}

    def _of_rows(self, compute: Callable[[Captured], Mapping[str, Tensor | np.ndarray]], rows: slice) -> Arrays:
        """What `compute` gives, of fewer sequences at a time where the memory is short for all."""
        try:
            return self.replay.limits.retried(lambda: self._finite(compute, rows))
        except ShortMemoryError:
            middle = (rows.start + rows.stop) // 2
            if middle == rows.start:
                raise
        halves = [self._of_rows(compute, half) for half in (slice(rows.start, middle), slice(middle, rows.stop))]
        return {key: np.concatenate([half[key] for half in halves]) for key in halves[0]}

    def _finite(self, compute: Callable[[Captured], Mapping[str, Tensor | np.ndarray]], rows: slice) -> Arrays:
        """What `compute` gives; `ArgumentError` naming the layer where the model ceases to be finite."""
        captured = self.capture(rows)
        arrays = {name: _array(values) for name, values in compute(captured).items()}
        if any(array.dtype.kind == "f" and not np.isfinite(array).all() for array in arrays.values()):
            _ = captured.streams  # raises where it is the model that is not finite
        return arrays

    def capture(self, rows: slice) -> Captured:
        """The pass of some sequences, on the model's device."""
        batch = self.batch.rows(rows)
        device = self.replay.device
        return self.replay.capture(Batch(batch.tokens.to(device), batch.targets.to(device)))

    def kept(self, key: str, compute: Callable[[], Kept]) -> Kept:
        """What `compute` gives, computed once in this session and kept in memory alone, where it lies."""
        if key not in self._kept:
            self._kept[key] = compute()
        return self._kept[key]

    def once(self, key: str, compute: Callable[[], Mapping[str, Tensor | np.ndarray]]) -> Arrays:
        """What `compute` gives, kept under `key` here and in the folder of parts, or taken from there."""
        return self.kept(key, lambda: self._part(key, compute))

    def _part(self, key: str, compute: Callable[[], Mapping[str, Tensor | np.ndarray]]) -> Arrays:
        path = None if self.parts is None else self.parts / f"{key.replace('/', '-')}.safetensors"
        if path is not None and path.is_file():
            try:
                return _load(path)
            except (OSError, SafetensorError):
                path.unlink()
        arrays = {name: _array(values) for name, values in compute().items()}
        if path is not None:
            with replacing(path) as temporary:
                _save(arrays, temporary)
        return arrays


def _shapes(arrays: Arrays) -> str:
    return json.dumps({name: list(array.shape) for name, array in sorted(arrays.items())})


def _save(arrays: Arrays, path: Path) -> None:
    """With the names and shapes beside the arrays; `OSError` where there is no place for them."""
    try:
        save_file(arrays, path, metadata={"shapes": _shapes(arrays)})
    except SafetensorError as error:
        raise OSError(None, str(error)) from None


def _load(path: Path) -> Arrays:
    """What `_save` wrote; `SafetensorError` where it is not whole."""
    with safe_open(path, framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = file.metadata() or {}
    if about.get("shapes") != _shapes(arrays):
        raise SafetensorError("arrays are missing")
    return arrays


def _array(values: Tensor | np.ndarray) -> np.ndarray:
    array = values.detach().cpu().numpy() if torch.is_tensor(values) else np.asarray(values)
    return np.ascontiguousarray(array)


def prepare_parts(folder: Path, identity: Mapping[str, Any]) -> Path:
    """The folder of parts of one measurement, made or found; `ArgumentError` if it is of another one."""
    about = json.dumps(identity, sort_keys=True, indent=1)
    file = folder / "measurement.json"
    if file.is_file():
        same = file.read_bytes() == about.encode()
        expected = "those of this one: delete the folder, or choose another (--out)"
        require(same, ArgumentError, "parts", str(folder), "of another measurement (model, text or options)", expected)
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        temporary.write_bytes(about.encode())
    return folder
