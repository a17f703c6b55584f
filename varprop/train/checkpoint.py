"""A run directory: `run.json` (what is run), `checkpoint.safetensors` (where it stands), `model.safetensors` (the end).

Every file is written under a temporary name and renamed, so a kill at any moment leaves whole files. No pickle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from varprop.corpus import Corpus
from varprop.errors import ArgumentError
from varprop.files import replacing, write_text
from varprop.nn import Transformer
from varprop.spec import ModelSpec
from varprop.train.config import TrainConfig
from varprop.train.track import History

FORMAT = 1


class RunDirectory:
    """The files of one run; a directory that holds a run of another spec, config or corpus raises `ArgumentError`."""

    def __init__(self, path: str | Path, spec: ModelSpec, config: TrainConfig, corpus: Corpus) -> None:
        self.path = Path(path)
        self._spec, self._seed = spec, config.seed
        wanted = {
            "format": FORMAT,
            "spec": spec.to_dict(),
            "config": json.loads(config.to_json()),
            "corpus": {"name": corpus.name, "sha256": corpus.sha256},
        }
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArgumentError(
                f"run_dir={str(path)!r} cannot be made ({error.strerror}); expected a writable directory"
            ) from None
        description = self.path / "run.json"
        if description.exists():
            difference = _first_difference(_read_json(description), wanted)
            if difference:
                name, found, expected = difference
                raise ArgumentError(f"run_dir={str(path)!r} holds a run with {name}={found!r}; expected {expected!r}")
        elif self.checkpoint.exists():
            raise ArgumentError(
                f"run_dir={str(path)!r} has a checkpoint without run.json; expected a whole run directory"
            )
        else:
            write_text(description, json.dumps(wanted, indent=1, sort_keys=True) + "\n")

    @property
    def checkpoint(self) -> Path:
        """The file that a killed run resumes from."""
        return self.path / "checkpoint.safetensors"

    def save(self, step: int, model: Transformer, optimizer: torch.optim.Optimizer, history: History) -> None:
        """Write the state from which a resumed run goes on with batch `step`, in place of the last one."""
        tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        for name, parameter in model.named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}"] = value
        for name, values in history.arrays().items():
            tensors[f"history.{name}"] = torch.from_numpy(values)
        _save(tensors, self.checkpoint, {"format": FORMAT, "step": step})

    def restore(self, model: Transformer, optimizer: torch.optim.Optimizer) -> tuple[int, History]:
        """Put the last saved state into `model` and `optimizer`; its step and history, (0, empty) if there is none."""
        if not self.checkpoint.exists():
            return 0, History()
        metadata, tensors = _load(self.checkpoint)
        model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
        for name, parameter in model.named_parameters():
            prefix = f"optimizer.{name}."
            for key in (key for key in tensors if key.startswith(prefix)):
                # A fresh tensor rather than the mapped one: its alignment is the one an undisturbed run has.
                like = torch.empty_like(parameter) if tensors[key].shape else torch.empty((), device=parameter.device)
                optimizer.state[parameter][key.removeprefix(prefix)] = like.detach().copy_(tensors[key])
        arrays = {k.removeprefix("history."): v.numpy() for k, v in tensors.items() if k.startswith("history.")}
        return int(metadata["step"]), History.from_arrays(arrays)

    def save_model(self, model: Transformer) -> None:
        """Write the final weights, which `load_model` reads."""
        metadata = {"format": FORMAT, "spec": self._spec.to_dict(), "seed": self._seed}
        _save(model.state_dict(), self.path / "model.safetensors", metadata)


def load_model(run_dir: str | Path, device: str | torch.device = "cpu") -> Transformer:
    """The trained network of a finished run; `ArgumentError` if `run_dir` has none."""
    path = Path(run_dir) / "model.safetensors"
    if not path.is_file():
        raise ArgumentError(
            f"run_dir={str(run_dir)!r} has no model.safetensors; expected the directory of a finished run"
        )
    metadata, tensors = _load(path)
    # The seed is that of the key masks too, which are no tensors of the state.
    model = Transformer(ModelSpec.from_dict(metadata["spec"]), seed=metadata["seed"], device=device)
    model.load_state_dict(tensors)
    return model


def _save(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, Any]) -> None:
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(held, temporary, {"varprop": json.dumps(metadata, sort_keys=True)})
        except SafetensorError as error:
            raise OSError(str(error)) from None


def _load(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = json.loads((opened.metadata() or {})["varprop"])
            return metadata, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError):
        raise ArgumentError(f"file={str(path)!r} is truncated or damaged; expected a file of a varprop run") from None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        raise ArgumentError(f"file={str(path)!r} is damaged; expected the description of a varprop run") from None


def _first_difference(found: Any, wanted: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """Dotted name and both values of the first leaf in which two JSON objects differ."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted({*found, *wanted}):
            difference = _first_difference(found.get(key), wanted.get(key), f"{name}.{key}" if name else key)
            if difference:
                return difference
        return None
    return None if found == wanted else (name, found, wanted)
