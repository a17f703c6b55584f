"""Weights on disk: safetensors files, one or several with an index, and the names and shapes between them and ours."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from varprop.errors import ArgumentError, require
from varprop.files import write_text
from varprop.hf.families import Family
from varprop.spec import ModelSpec, TensorRow

SHARD_BYTES = 5 * 10**9
"""Largest file, unless one tensor is larger."""
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def write(
    folder: Path, spec: ModelSpec, weights: Mapping[str, Tensor], family: Family, dtype: torch.dtype, shard_bytes: int
) -> None:
    """Write the tensors of a plain spec under the family's names, in as many files as `shard_bytes` asks for."""
    shards: list[dict[str, Tensor]] = [{}]
    held = total = 0
    for name, tensor in _disk_tensors({**weights, **empty_tensors(spec, family)}, family):
        size = tensor.numel() * dtype.itemsize
        if shards[-1] and held + size > shard_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = tensor
        held, total = held + size, total + size
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, shard in zip([SINGLE] if len(shards) == 1 else files, shards, strict=True):
        save(folder / file, {name: tensor.to(dtype) for name, tensor in shard.items()}, {"format": "pt"})
    if len(shards) > 1:
        where = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


def save(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """`save_file` of tensors that may be views or on a device; a full disk is an `OSError`."""
    own = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    try:
        save_file(own, path, metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from None


def _disk_tensors(weights: Mapping[str, Tensor], family: Family) -> Iterator[tuple[str, Tensor]]:
    """Names on disk and tensors, one for each expert."""
    for name, tensor in weights.items():
        disk = family.disk_name(name)
        if "{expert}" in disk:
            yield from ((disk.format(expert=i), own) for i, own in enumerate(tensor.unbind()))
        else:
            yield disk, tensor


def empty_tensors(spec: ModelSpec, family: Family) -> dict[str, Tensor]:
    """Our names and tensors of the shared expert of width 0 that a mixture without one has in `family`."""
    if spec.moe is None or spec.moe.n_shared_experts or not family.has_shared_expert:
        return {}
    d = spec.d_model
    within = {
        "moe.shared.gate": torch.zeros(0, d),
        "moe.shared.up": torch.zeros(0, d),
        "moe.shared.down": torch.zeros(d, 0),
        "moe.shared_gate": torch.zeros(1, d),
    }
    layers = (layer for layer in range(1, spec.n_layers + 1) if spec.is_moe(layer))
    return {f"layers.{layer - 1}.{name}": tensor for layer in layers for name, tensor in within.items()}


class Reader:
    """The tensors of the safetensors files of a folder, read one at a time.

    Raises `ArgumentError` for a folder without them (also one with pickled weights only) and for damaged files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Any] = {}
        self.where = self._index()
        self.unread = set(self.where)

    def _index(self) -> dict[str, str]:
        """Tensor name -> file name."""
        if (self._folder / INDEX).is_file():
            try:
                where = dict(json.loads((self._folder / INDEX).read_text())["weight_map"])
            except (OSError, ValueError, KeyError, TypeError, RecursionError):
                raise ArgumentError(f"file={str(self._folder / INDEX)!r} is damaged; expected a weight_map") from None
            for file in where.values():
                own = isinstance(file, str) and Path(file).name == file and file.endswith(".safetensors")
                require(own, ArgumentError, "weight_map", file, "no file of the folder", "a .safetensors file name")
            return where
        if (self._folder / SINGLE).is_file():
            return dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        there = self._folder.iterdir() if self._folder.is_dir() else ()
        pickled = any(path.suffix in PICKLED for path in there)
        wrong = "a folder of pickled weights, which are never read" if pickled else f"a folder without {SINGLE}"
        raise ArgumentError(f"directory={str(self._folder)!r} is {wrong}; expected safetensors files")

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                self._files[file] = safe_open(self._folder / file, framework="pt")
            except (OSError, SafetensorError):
                path = str(self._folder / file)
                raise ArgumentError(f"file={path!r} is missing or damaged; expected a whole safetensors file") from None
        return self._files[file]

    def __contains__(self, name: str) -> bool:
        return name in self.where

    def get(self, name: str) -> Tensor:
        """The tensor called `name`; `ArgumentError` if there is none."""
        require(name in self, ArgumentError, "tensor", name, "missing", "a file with all tensors of its config.json")
        self.unread.discard(name)
        try:
            return self._open(self.where[name]).get_tensor(name)
        except SafetensorError:
            wrong = f"not in {self.where[name]}, where the index has it"
            raise ArgumentError(f"tensor={name!r} is {wrong}; expected a whole download") from None


def read(folder: Path, spec: ModelSpec, family: Family) -> Iterator[tuple[str, Tensor]]:
    """Our names and tensors of the weights in a folder, in the order of the tensor table.

    Experts may lie one by one or fused as `experts.gate_up_proj` (E, 2 F, D), as transformers 5 holds them in memory.
    Raises `ArgumentError` for a missing, superfluous or misshapen tensor.
    """
    reader = Reader(folder)
    for row in spec.tensor_table():
        tensor = _read_row(reader, row, family)
        found, wanted = tuple(tensor.shape), row.shape
        require(found == wanted, ArgumentError, row.name, found, "another shape than the config's", f"{wanted}")
        yield row.name, tensor
    unused = {family.disk_name(name) for name in empty_tensors(spec, family)}
    unused |= {family.disk_name("unembed")} if spec.tied_embeddings else set()
    rest = sorted(name for name in reader.unread - unused if not name.endswith("rotary_emb.inv_freq"))
    if rest:
        raise ArgumentError(
            f"tensor={rest[0]!r} is unknown to a {family.model_type}; expected those of its config.json"
        )


def _read_row(reader: Reader, row: TensorRow, family: Family) -> Tensor:
    disk = family.disk_name(row.name)
    if "{expert}" not in disk:
        in_memory = disk.replace(".block_sparse_moe.", ".mlp.")
        return reader.get(in_memory if in_memory in reader else disk)
    base = f"model.layers.{row.name.split('.')[1]}.mlp.experts"
    if row.matrix == "down" and f"{base}.down_proj" in reader:
        return reader.get(f"{base}.down_proj")
    if row.matrix in ("gate", "up") and f"{base}.gate_up_proj" in reader:
        return reader.get(f"{base}.gate_up_proj").chunk(2, dim=1)[row.matrix == "up"]
    return torch.stack([reader.get(disk.format(expert=i)) for i in range(row.shape[0])])
