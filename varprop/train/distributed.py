"""Several processes that train one model: who they are, what they add up, and how an error in one of them ends all.

`torchrun` starts the processes; without it there is one, and nothing here communicates.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from varprop.errors import ArgumentError, VarpropError, require
from varprop.train.config import TrainConfig

TIMEOUT_SECONDS = 600.0
"""How long a process waits for the others: the slowest compilation or checkpoint must fit."""
LOST = re.compile(r"gloo|nccl|connection (was )?(closed|reset|refused)|timed? ?out|socket|broken pipe", re.IGNORECASE)
"""What the message of a failed collective contains, whatever its type."""
ERROR_KEY = "varprop_error"


@dataclass(frozen=True, eq=False)
class World:
    """The processes of a run and the place of this one: `rank` of `size`, computing on `device`.

    A context manager: an exception in the block of one process ends the others with the same line, as soon as they wait
    for it (or when torchrun stops them); a process that dies ends them with a line that says so.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    _store: Any = None
    _control: Any = None  # gloo: short texts, from the main thread
    _background: Any = None  # gloo: the same from the thread that writes checkpoints

    @classmethod
    def start(cls, config: TrainConfig, timeout: float = TIMEOUT_SECONDS) -> World:
        """The world that torchrun's RANK, WORLD_SIZE and LOCAL_RANK describe; one process where they are absent.

        Processes meet through gloo on a CPU, through nccl on CUDA, where process LOCAL_RANK takes that device. timeout:
        seconds that a process waits for another. NVLink multicast is off unless NCCL_NVLS_ENABLE says otherwise: it
        fails on hosts that do not allow it. Raises `ArgumentError` for a missing device, a broken environment and
        processes that do not meet.
        """
        size, local_rank = _environment("WORLD_SIZE", 1), _environment("LOCAL_RANK", 0)
        if size == 1:
            return cls(0, 1, 0, resolve_device(config.device))
        device = _own_device(config.device, local_rank)
        if device.type == "cuda":
            os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
            torch.cuda.set_device(device)
        waits = timedelta(seconds=timeout)
        try:
            store, rank, _ = next(rendezvous("env://", timeout=waits))
            store.set_timeout(waits)
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=PrefixStore("varprop", store),
                rank=rank,
                world_size=size,
                timeout=waits,
                device_id=device if device.type == "cuda" else None,
            )
            control, background = (dist.new_group(backend="gloo", timeout=waits) for _ in range(2))
        except (RuntimeError, ValueError) as error:
            raise ArgumentError(
                f"WORLD_SIZE={size} processes did not meet ({_first_line(error)}); expected all of them within "
                f"{timeout:g} s"
            ) from None
        return cls(rank, size, local_rank, device, store, control, background)

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def share(self, n: int, name: str = "batch_size") -> range:
        """The numbers of 0..n-1 that fall to this process, in order; `ArgumentError` unless all get as many.

        >>> World(1, 2, 1, torch.device("cpu")).share(6)
        range(3, 6)
        """
        require(n % self.size == 0, ArgumentError, name, n, "not divisible", f"a multiple of {self.size} processes")
        each = n // self.size
        return range(self.rank * each, (self.rank + 1) * each)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the processes, float64, the same on all of them."""
        total = tensor.detach().double()
        if self.size == 1:
            return total
        total = total.clone()  # `double` may have returned the argument
        dist.all_reduce(total)
        return total

    def mean(self, tensor: Tensor) -> Tensor:
        """Mean over the processes, float64."""
        return self.sum(tensor) / self.size

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, (size, ...), which must have one shape and type."""
        if self.size == 1:
            return tensor.detach()[None]
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.detach().contiguous())
        return torch.stack(parts)

    def gather_text(self, text: str, *, background: bool = False) -> list[str]:
        """The texts of all processes by rank. background: from the one thread beside the main thread."""
        if self.size == 1:
            return [text]
        group = self._background if background else self._control
        content = text.encode()
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(content)]), group=group)
        longest = max(1, *(int(length) for length in lengths))
        own = torch.frombuffer(bytearray(content.ljust(longest)), dtype=torch.uint8)
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own, group=group)
        pairs = zip(parts, lengths, strict=True)
        return [part[: int(length)].numpy().tobytes().decode() for part, length in pairs]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on one of the processes; on the CPU, so that no device is waited for."""
        if self.size == 1:
            return flag
        flags = torch.tensor([flag], dtype=torch.uint8)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._control)
        return bool(flags)

    @contextmanager
    def raise_together(self) -> Iterator[None]:
        """What one process raises in this block, all raise at its end. The block itself must not communicate.

        All raise the line of the lowest rank that failed; an error that is no `VarpropError` keeps its type at home.
        """
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        lines = self.gather_text("" if own is None else _first_line(own))
        if own is not None and (self.size == 1 or not isinstance(own, VarpropError)):
            raise own
        for line in filter(None, lines):
            raise ArgumentError(line)

    def close(self) -> None:
        """Leave the other processes; every process must have finished."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def __enter__(self) -> World:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.size == 1 or error is None:
            self.close()
            return
        # The groups are not destroyed: nccl would wait for processes that no longer answer.
        if not _is_lost(error):
            with suppress(RuntimeError):
                self._store.set(ERROR_KEY, _first_line(error))
            return
        reason = re.sub(r"^\[\S+\] ", "", _first_line(error)).split(" [")[0].split(". ")[0]
        line = (
            f"rank={self.rank} of {self.size} lost another process ({reason}); expected all of them to live; the run "
            "resumes from its last checkpoint"
        )
        with suppress(RuntimeError):
            if self._store.check([ERROR_KEY]):
                line = self._store.get(ERROR_KEY).decode()
        raise ArgumentError(line) from None


def resolve_device(name: str) -> torch.device:
    """The CPU or CUDA device called `name`; `auto` is CUDA where there is one.

    `ArgumentError` for one that is not there, and for devices of other types.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ArgumentError(f"device={name!r} is not available; expected auto, cpu or a CUDA device")
    return device


def compute_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """The type of the matrix products and the stream: bfloat16 on CUDA unless `precision` says otherwise.

    >>> compute_dtype(TrainConfig(), torch.device("cpu"))
    torch.float32
    """
    wide = config.precision == "float32" or (config.precision == "auto" and device.type == "cpu")
    return torch.float32 if wide else torch.bfloat16


def shard(model: nn.Module, world: World, config: TrainConfig) -> nn.Module:
    """`model` as the processes of `world` train it together; on one process the model itself.

    model: a module whose forward pass gives the loss, with the blocks in `model.transformer.layers`; the optimiser is
    made from the parameters of what is returned. The loss of a process is the mean over its sequences, gradients are
    the mean over the processes. `ddp`: whole copies. `fsdp`: parameters, gradients and optimiser state are split
    along their first axis (DTensors); parameters are gathered block by block and gradients reduced in float32, and the
    model casts what it multiplies, as it does under `ddp`: routers and gains stay float32, and the two ways agree to
    rounding of float32 in bfloat16 too, for twice the bytes that gathering in bfloat16 would move. `ArgumentError`
    for `fsdp` with several compile_layers.
    """
    if world.size == 1:
        return model
    if config.parallel == "ddp":
        devices = [world.device] if world.device.type == "cuda" else None
        with warnings.catch_warnings():
            # torch 2.13 calls it forward_sync_buffers, torch 2.11 does not know that name. Buffers never change.
            warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
            # No static_graph: it fails where the first micro-batch of a run is not reduced.
            return DistributedDataParallel(
                model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
            )
    require_shardable(config, world.size)
    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in model.transformer.layers:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh)  # type: ignore[arg-type]
    # Without it the root keeps what it has gathered for a pass without gradients, and uses it after the next update.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    return model


def require_shardable(config: TrainConfig, n_processes: int) -> None:
    """`ArgumentError` unless `n_processes` processes can share a model in the way that `config` asks for."""
    good = n_processes == 1 or config.parallel == "ddp" or config.compile_layers == 1
    expected = "1 with parallel='fsdp', which gathers one block at a time"
    require(good, ArgumentError, "compile_layers", config.compile_layers, "too large", expected)


def accumulate(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """The context of the forward and backward pass of one micro-batch: only the `last` of a step is reduced."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    elif isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that was given to `shard`, with its own parameter names."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be split over the processes, all of which must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def global_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all entries of all tensors, a plain float32 scalar; of split tensors that of the whole ones.

    On CUDA torch's own. On a CPU that one adds all squares of a tensor in float32, with few partial sums: of
    50,304 x 2,048 normal numbers it is 1.1 % low. There the norm of each row is float32, and the norm of those float64.
    """
    present = list(tensors)
    if not present or present[0].is_cuda:
        return full(torch.nn.utils.get_total_norm(present))
    rows = (torch.linalg.vector_norm(tensor, dim=-1) for tensor in present)
    norms = [torch.linalg.vector_norm(norm, dtype=torch.float64) for norm in rows]
    return full(torch.linalg.vector_norm(torch.stack(norms))).float()


def _own_device(name: str, local_rank: int) -> torch.device:
    kind = resolve_device(name)
    several = kind.index is None
    require(several, ArgumentError, "device", name, "one device for several processes", "auto, cpu or cuda")
    if kind.type != "cuda":
        return kind
    n_devices = torch.cuda.device_count()
    good = local_rank < n_devices
    require(good, ArgumentError, "LOCAL_RANK", local_rank, "without a CUDA device", f"one of {n_devices} per machine")
    return torch.device("cuda", local_rank)


def _environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    require(text.isdecimal(), ArgumentError, name, text, "not a number", "what torchrun sets")
    return int(text)


def _is_lost(error: BaseException) -> bool:
    """Whether another process did not answer, by type or, because gloo raises a bare RuntimeError, by its text."""
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and bool(LOST.search(str(error))))


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines and lines[0] else type(error).__name__
