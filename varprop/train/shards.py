"""The files of a checkpoint: each process writes its part of the state, any number of processes read it back.

`<rank>-of-<size>.safetensors` holds pieces of tensors, boxes of the whole ones. `checkpoint.json`, written last, says
of each file its size, its SHA-256, and the offset of each piece; of each tensor the whole shape and the type; and the
SHA-256 of all that. Not torch.distributed.checkpoint: its own storage is pickled, its safetensors storage has no hashes
and takes the shape of a tensor from the pieces that are there, so that a missing file is not noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from varprop.corpus.cache import sha256_of_file
from varprop.errors import SchemaError

MANIFEST = "checkpoint.json"
NAME = re.compile(r"step-(\d{8,})")
"""Of the folder of a checkpoint."""
Box = tuple[tuple[int, int], ...]
"""Start and stop along each axis of a whole tensor."""


@dataclass(frozen=True)
class Piece:
    """What one process holds of a tensor: `tensor` begins at `offset` in the whole one of shape `shape`."""

    tensor: Tensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Piece:
        """The local part of a tensor that is split over processes, without a copy; the whole of any other."""
        tensor = tensor.detach()
        if not isinstance(tensor, DTensor):
            return cls(tensor, (0,) * tensor.dim(), tuple(tensor.shape))
        (chunk,) = tensor.__create_chunk_list__()
        return cls(tensor.to_local(), tuple(chunk.offsets), tuple(tensor.shape))

    @property
    def box(self) -> Box:
        """The place of the piece in the whole tensor."""
        return tuple((start, start + n) for start, n in zip(self.offset, self.tensor.shape, strict=True))


def own_pieces(tensors: Mapping[str, Tensor], rank: int, size: int) -> dict[str, Piece]:
    """What process `rank` of `size` writes: its parts of split tensors, and of the others each on one process.

    Whole tensors go, in order, to the process that has the fewest bytes so far, the same on every process.

    >>> import torch
    >>> tensors = {"a": torch.zeros(8), "b": torch.zeros(2), "c": torch.zeros(2)}
    >>> [list(own_pieces(tensors, rank, 2)) for rank in range(2)]
    [['a'], ['b', 'c']]
    """
    pieces, load = {}, [0] * size
    for name, tensor in tensors.items():
        writer = rank
        if not isinstance(tensor, DTensor):
            writer = load.index(min(load))
            load[writer] += tensor.nbytes
        if writer == rank:
            piece = Piece.of(tensor)
            if piece.tensor.numel() or not tensor.numel():  # not the part of a process that has got none
                pieces[name] = piece
    return pieces


def write_shard(folder: Path, rank: int, size: int, pieces: Mapping[str, Piece]) -> dict[str, Any]:
    """Write the pieces of a process, whose tensors are on the CPU, to the disk; the entry of the file in the manifest.

    Raises `OSError` if the file cannot be written.
    """
    path = folder / f"{rank:05d}-of-{size:05d}.safetensors"
    try:
        save_file({name: piece.tensor for name, piece in pieces.items()}, path)
    except SafetensorError as error:
        raise OSError(str(error)) from None
    sync(path)
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "sha256": sha256_of_file(path),
        "offsets": {name: piece.offset for name, piece in pieces.items()},
        "tensors": {name: [list(piece.shape), str(piece.tensor.dtype)] for name, piece in pieces.items()},
    }


def write_manifest(folder: Path, step: int, run: Mapping[str, Any], files: list[dict[str, Any]]) -> None:
    """Write what makes a folder of shards a checkpoint. run: what the state belongs to; files: of `write_shard`."""
    path = folder / MANIFEST
    body = {"step": step, "run": run, "files": files}
    path.write_text(json.dumps({**body, "sha256": _sha256(body)}, sort_keys=True) + "\n")
    sync(path)
    sync(folder)


def _sha256(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def saved(checkpoints: Path) -> list[Path]:
    """The folders of checkpoints, whole or not, the latest first."""
    steps = {int(match[1]): path for path in checkpoints.glob("step-*") if (match := NAME.fullmatch(path.name))}
    return [steps[step] for step in sorted(steps, reverse=True)]


def sync(path: Path) -> None:
    """Wait until a file or the entries of a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Shards:
    """A checkpoint on the disk: `step`, `run` (what it belongs to), `tensors` (shape and type by name).

    Raises `SchemaError` for a manifest that is not as it was written, or is that of another step than the folder's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            written = manifest.pop("sha256") == _sha256(manifest)
            self.step, self.run, self._files = manifest["step"], manifest["run"], manifest["files"]
            self.tensors = {
                name: (tuple(shape), dtype) for file in self._files for name, (shape, dtype) in file["tensors"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            written = False
        if not written or folder.name != f"step-{self.step:08d}":
            raise SchemaError(f"file={str(folder / MANIFEST)!r} is damaged; expected that of a checkpoint")

    def require_whole(self, rank: int = 0, size: int = 1) -> None:
        """Compare every `size`-th file with its size and hash; `SchemaError` for one that is not as it was written."""
        for file in self._files[rank::size]:
            path = self.folder / file["file"]
            try:
                whole = path.stat().st_size == file["bytes"] and sha256_of_file(path) == file["sha256"]
            except OSError:
                whole = False
            if not whole:
                raise SchemaError(f"file={str(path)!r} is truncated or damaged; expected it as it was written")

    def read_into(self, targets: Mapping[str, Tensor]) -> None:
        """Fill each target, whole or split over processes, with the tensor of its name, bit by bit.

        `SchemaError` for a tensor that is not there or has another shape or type.
        """
        places = {name: Piece.of(target) for name, target in targets.items()}
        missing = {name: piece.tensor.numel() for name, piece in places.items()}
        for name, piece in places.items():
            expected = piece.shape, str(piece.tensor.dtype)
            found = self.tensors.get(name)
            if found != expected:
                raise SchemaError(f"checkpoint={str(self.folder)!r} holds {name} as {found}; expected {expected}")
        for file in self._files:
            with safe_open(self.folder / file["file"], framework="pt") as opened:
                for name in places.keys() & file["offsets"].keys():
                    source = opened.get_slice(name)
                    missing[name] -= _copy(source, file["offsets"][name], places[name])
        for name, n in missing.items():
            if n:
                raise SchemaError(f"checkpoint={str(self.folder)!r} lacks {n} entries of {name}; expected all of them")


def _copy(source: Any, offset: list[int], place: Piece) -> int:
    """Copy what a stored piece and a place have in common; how many entries that is."""
    stored: Box = tuple((start, start + n) for start, n in zip(offset, source.get_shape(), strict=True))
    common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(stored, place.box, strict=True)]
    if any(start >= stop for start, stop in common):
        return 0
    read = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(common, stored, strict=True))
    write = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(common, place.box, strict=True))
    part = place.tensor[write]
    part.copy_(source[read])
    return part.numel()
