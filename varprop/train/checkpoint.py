"""A run directory: `run.json` (what is run), `checkpoints/step-<n>` (where it stands), `model.safetensors` (the end),
`tokenizer.json` (of the corpus, where it is known).

Files are written under a temporary name, then renamed, so a kill at any moment leaves whole ones. No pickle.
Checkpoints are written by a thread while training goes on.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from varprop.corpus import Corpus
from varprop.corpus.directory import TOKENIZER
from varprop.errors import ArgumentError, DamagedShardWarning, SchemaError, require
from varprop.files import replacing, write_text
from varprop.hf.export import load_run
from varprop.nn import Transformer
from varprop.spec import ModelSpec
from varprop.train import shards
from varprop.train.config import TrainConfig
from varprop.train.distributed import World, full, unwrapped
from varprop.train.shards import Piece, Shards

FORMAT = 3
KEPT = 2
"""Checkpoints that are kept: the last one, and one before it should that be damaged."""


class RunDirectory:
    """The files of one run, open to one process (or one world of processes) at a time; a context manager.

    path: made if it is not there, and seen by every process. Every method is called by all processes of `world`.
    `ArgumentError`, on all of them, for a directory that cannot be made, that another process uses, or that holds a run
    of another spec, corpus or config (`EXECUTION_FIELDS` may differ). initial: fingerprint of the tensors that the run
    starts from, empty for drawn ones; empty too where a checkpoint is there, which knows it.
    """

    def __init__(
        self, path: str | Path, spec: ModelSpec, config: TrainConfig, corpus: Corpus, world: World, initial: str = ""
    ) -> None:
        require_path(path)
        self.path, self.checkpoints = Path(path), Path(path) / "checkpoints"
        self._spec, self._seed, self._world, self._tokenizer = spec, config.seed, world, corpus.tokenizer
        self._run = {
            "format": FORMAT,
            "spec": spec.to_dict(),
            "config": {name: value for name, value in config.identity().items() if name != "corpus"},
            # Not the corpus' name: the same file may be given by another path.
            "corpus": {"sha256": corpus.sha256, "document_end": corpus.document_end},
            "initial": initial,
        }
        self._run = json.loads(json.dumps(self._run))  # tuples as lists, as they are read
        self._lock = FileLock(self.path / "run.lock", blocking=False)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._staging: dict[str, Tensor] = {}
        try:
            with world.raise_together():
                if world.is_main:
                    self._open()
            with world.raise_together():
                seen, wrong = self.checkpoints.is_dir(), f"not seen by process {world.rank}"
                require(seen, ArgumentError, "run_dir", str(path), wrong, "a folder that all processes share")
            self._run["initial"] = world.gather_text(self._run["initial"])[0]
        except BaseException:
            self._lock.release()
            raise

    @property
    def initial(self) -> str:
        """Fingerprint of the tensors that the run started from, empty for those that its seed drew."""
        return self._run["initial"]

    def save(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, history_arrays: Mapping[str, np.ndarray]
    ) -> None:
        """Begin to write the state from which a resumed run goes on with batch `step`.

        Returns when the state is copied to the memory of the CPU (on CUDA, when the copy is queued); the files are
        written meanwhile, after those of the save before. Raises `ArgumentError` if that one failed: the checkpoints
        before it stay.
        """
        self.wait()
        tensors = {f"model.{name}": tensor for name, tensor in _state(model).items()}
        for name, parameter in _parameters(model).items():
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}"] = value
        for name, values in history_arrays.items():
            tensors[f"history.{name}"] = torch.from_numpy(np.ascontiguousarray(values))
        pieces = shards.own_pieces(tensors, self._world.rank, self._world.size)
        staged = {name: self._stage(name, piece) for name, piece in pieces.items()}
        copied = torch.cuda.current_stream().record_event() if self._world.device.type == "cuda" else None
        self._pending = self._thread.submit(self._write, step, staged, copied)

    def wait(self) -> None:
        """Wait until the last save is on the disk; `ArgumentError`, on all processes, if it could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, dict[str, np.ndarray]] | None:
        """Put the last whole checkpoint into `model` and `optimizer`; its step and history, None if there is none.

        The number of processes and how they share the model may be others than when it was saved. A damaged
        checkpoint is passed over with a `DamagedShardWarning`; `ArgumentError` if all of them are damaged.
        """
        found = last_whole(self.path, self._world)
        if found is None:
            return None
        self._require_same(found.run)
        state = {f"model.{name}": tensor for name, tensor in _state(model).items()}
        for name, parameter in _parameters(model).items():
            prefix = f"optimizer.{name}."
            for key in (key for key in found.tensors if key.startswith(prefix)):
                # Fresh tensors rather than mapped ones: their alignment is the one an undisturbed run has.
                scalar = not found.tensors[key][0]
                held = torch.empty((), device=parameter.device) if scalar else torch.empty_like(parameter).detach()
                optimizer.state[parameter][key.removeprefix(prefix)] = state[key] = held
        arrays = {
            name: torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")))
            for name, (shape, dtype) in found.tensors.items()
            if name.startswith("history.")
        }
        found.read_into({**state, **arrays})
        return found.step, {name.removeprefix("history."): tensor.numpy() for name, tensor in arrays.items()}

    def finish(self, model: nn.Module, path: Path | None = None) -> None:
        """Wait for the last save and write the weights, the final ones, which `load_model` reads, unless to `path`."""
        self.wait()
        held = {}
        for name, tensor in _state(model).items():
            whole = full(tensor)  # one tensor at a time is whole on a device
            if self._world.is_main:
                held[name] = whole.cpu()
        with self._world.raise_together():
            if self._world.is_main:
                metadata = {"format": FORMAT, "spec": self._spec.to_dict(), "seed": self._seed}
                _save(held, path or self.path / "model.safetensors", metadata)

    def close(self) -> None:
        """Let a save in flight end, and give the directory free. `ArgumentError` if that save failed."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._lock.release()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except (ArgumentError, RuntimeError) as failed:
            if error is None:
                raise
            # The first error is the one that is raised; a RuntimeError says once more that another process is lost.
            if isinstance(failed, ArgumentError):
                warnings.warn(f"{failed}", DamagedShardWarning, stacklevel=2)

    def _open(self) -> None:
        shown = str(self.path)
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except (Timeout, RuntimeError):  # RuntimeError: this very thread holds it
            raise ArgumentError(f"run_dir={shown!r} is in use by another run; expected one at a time") from None
        except OSError as error:
            raise ArgumentError(
                f"run_dir={shown!r} cannot be made ({error.strerror}); expected a writable directory"
            ) from None
        for rest in self.checkpoints.glob(".step-*"):
            shutil.rmtree(rest, ignore_errors=True)
        description = self.path / "run.json"
        if description.exists():
            found = _read_json(description)
            if not self._run["initial"] and shards.saved(self.checkpoints) and isinstance(found, dict):
                self._run["initial"] = str(found.get("initial", ""))
            self._require_same(found)
        elif shards.saved(self.checkpoints):
            raise ArgumentError(f"run_dir={shown!r} has checkpoints without run.json; expected a whole run directory")
        else:
            if self._tokenizer is not None:
                with replacing(self.path / TOKENIZER) as temporary:
                    shutil.copyfile(self._tokenizer, temporary)
            write_text(description, json.dumps(self._run, indent=1, sort_keys=True) + "\n")

    def _require_same(self, found: Any) -> None:
        difference = _first_difference(found, self._run)
        if difference:
            name, held, expected = difference
            raise ArgumentError(f"run_dir={str(self.path)!r} holds a run with {name}={held!r}; expected {expected!r}")

    def _stage(self, name: str, piece: Piece) -> Piece:
        """The piece in memory that the next update does not change; pinned, so that CUDA copies while it computes."""
        held = self._staging.get(name)
        if held is None or held.shape != piece.tensor.shape:
            pinned = piece.tensor.device.type == "cuda"
            held = torch.empty(piece.tensor.shape, dtype=piece.tensor.dtype, pin_memory=pinned)
            self._staging[name] = held
        return Piece(held.copy_(piece.tensor, non_blocking=True), piece.offset, piece.shape)

    def _write(self, step: int, pieces: dict[str, Piece], copied: torch.Event | None) -> None:
        """Write a checkpoint, in the thread. It is renamed when every process has written its file."""
        world, name = self._world, f"step-{step:08d}"
        part = self.checkpoints / f".{name}.part"
        report: dict[str, Any] = {"problem": ""}
        try:
            if copied is not None:
                copied.synchronize()
            part.mkdir(exist_ok=True)
            report["file"] = shards.write_shard(part, world.rank, world.size, pieces)
        except OSError as error:
            report["problem"] = error.strerror or str(error)
        reports = [json.loads(text) for text in world.gather_text(json.dumps(report), background=True)]
        problem = next(filter(None, (each["problem"] for each in reports)), "")
        if world.is_main:
            try:
                if not problem:
                    shards.write_manifest(part, step, self._run, [each["file"] for each in reports])
                    self._commit(part, self.checkpoints / name)
            except OSError as error:
                problem = error.strerror or str(error)
            if problem:
                shutil.rmtree(part, ignore_errors=True)
        problem = world.gather_text(problem, background=True)[0]
        if problem:
            raise ArgumentError(
                f"checkpoint={str(self.checkpoints / name)!r} cannot be written ({problem}); expected room on a "
                "writable disk; the checkpoints before it are whole"
            )

    def _commit(self, part: Path, target: Path) -> None:
        if target.exists():  # a damaged one that was passed over
            shutil.rmtree(target)
        part.rename(target)
        shards.sync(self.checkpoints)
        saved = shards.saved(self.checkpoints)
        place = saved.index(target)
        for old in saved[:place] + saved[place + KEPT :]:  # later ones were passed over as damaged
            shutil.rmtree(old, ignore_errors=True)


def require_path(run_dir: str | Path, name: str = "run_dir") -> None:
    """`ArgumentError` for what cannot be the path of a folder."""
    good = str(run_dir) != "" and "\0" not in str(run_dir)
    require(good, ArgumentError, name, str(run_dir), "no path", "the path of a folder")


def last_whole(run_dir: Path, world: World | None = None) -> Shards | None:
    """The last checkpoint of a run that is whole, None where there is none.

    world: the processes that look together, each at a part of the files. Damaged checkpoints are passed over with a
    `DamagedShardWarning`; `ArgumentError` if all of them are damaged.
    """
    world = world or World(0, 1, 0, torch.device("cpu"))
    # Process 0 looks: a shared file system may show the others an older list.
    names = json.loads(world.gather_text(json.dumps([path.name for path in shards.saved(run_dir / "checkpoints")]))[0])
    problems: list[str] = []
    for name in names:
        own = ""
        try:
            found = Shards(run_dir / "checkpoints" / name)
            found.require_whole(world.rank, world.size)
        except SchemaError as error:
            found, own = None, str(error)
        problem = next(filter(None, world.gather_text(own)), "")
        if found is not None and not problem:
            for damaged in problems if world.is_main else ():
                warnings.warn(f"{damaged}; the checkpoint of step {found.step} is taken", DamagedShardWarning, 3)
            return found
        problems.append(problem)
    if problems:
        raise ArgumentError(f"run_dir={str(run_dir)!r} has no whole checkpoint: {problems[0]}")
    return None


def goes_on_alone(run_dir: str | Path) -> bool:
    """Whether a run directory has a checkpoint of a run that started from given tensors: it needs them no more."""
    require_path(run_dir)
    if not shards.saved(Path(run_dir) / "checkpoints"):
        return False
    run = _read_json(Path(run_dir) / "run.json")
    return isinstance(run, dict) and bool(run.get("initial"))


def load_model(run_dir: str | Path, device: str | torch.device = "cpu") -> Transformer:
    """The trained network of a finished run; `ArgumentError` if `run_dir` has none."""
    require_path(run_dir)
    path = Path(run_dir) / "model.safetensors"
    if not path.is_file():
        raise ArgumentError(
            f"run_dir={str(run_dir)!r} has no model.safetensors; expected the directory of a finished run"
        )
    return load_run(run_dir, device=torch.device(device))


def _transformer(model: nn.Module) -> nn.Module:
    """The network inside what is trained: the tensors of a run have the names of `spec.tensor_table()`."""
    return unwrapped(model).transformer  # type: ignore[return-value]


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Weights and masks by name; under `fsdp` their split form, also where a forward pass has left them gathered."""
    return _transformer(model).state_dict()


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by name; call `_state` first, which brings them into their split form."""
    return dict(_transformer(model).named_parameters())


def _save(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, Any]) -> None:
    with replacing(path) as temporary:
        try:
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()},
                temporary,
                {"varprop": json.dumps(metadata, sort_keys=True)},
            )
        except SafetensorError as error:
            raise OSError(str(error)) from None
        shards.sync(temporary)


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
