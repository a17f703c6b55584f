"""Programs for several processes on the CPU: `python -m tests.train.ranks FOLDER PROGRAM:N` forks N of them.

torch is imported once, by the parent. Each process prints the line of a `VarpropError` and ends with 2, as the command
line does.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from varprop import results
from varprop.corpus import Corpus
from varprop.errors import ArgumentError, DamagedShardWarning, Stopped, VarpropError
from varprop.spec import AttentionSpec, FeedForwardSpec, ModelSpec, MoESpec
from varprop.train import TrainConfig, fit, optim, shards
from varprop.train.checkpoint import RunDirectory
from varprop.train.config import Parallel
from varprop.train.distributed import World, accumulate, compute_dtype, full, shard, unwrapped
from varprop.train.model import TrainingModel
from varprop.train.trainer import Trainer

SPEC = ModelSpec(
    d_model=8,
    n_layers=2,
    vocab_size=32,
    tied_embeddings=False,  # an unembedding of its own is split too
    attention=AttentionSpec(n_heads=2),
    feed_forward=FeedForwardSpec(d_ff=13),
    moe=MoESpec(n_experts=3, top_k=1, d_expert=5),
    moe_pattern=(False, True),
).with_fields(density=0.5)
"""Sizes that two processes cannot share evenly."""
CONFIG = TrainConfig(
    n_steps=4,
    batch_size=8,
    n_tokens=8,
    warmup_steps=1,
    clip_norm=0.1,
    load_balance_weight=0.0,  # of the sequences that are computed together: the one loss that is no mean over them
    device="cpu",
)
CORPUS = Corpus(np.zeros(0, np.uint16), np.zeros(0, np.uint16), 32, None, "none", "0" * 64, 0)
SHORT_TIMEOUT = 10.0


class Run:
    """A network in training, with what the tests look at."""

    def __init__(self, world: World, config: TrainConfig = CONFIG) -> None:
        self.world, self.config = world, config
        dtype = compute_dtype(config, world.device)
        model = TrainingModel(SPEC, config, device=world.device, compute_dtype=dtype)
        self.model = shard(model, world, config)
        self.optimizer = optim.adamw(unwrapped(self.model).transformer, SPEC, config)  # type: ignore[arg-type]
        self.losses: list[float] = []
        self.norms: list[float] = []

    def steps(self, start: int, stop: int) -> Run:
        """Make the updates start..stop - 1."""
        for step in range(start, stop):
            tokens = torch.randint(32, (8, 9), generator=torch.Generator().manual_seed(step)).to(self.world.device)
            micro = tokens[list(self.world.share(8))].split(self.config.micro_batch_size or 8)
            self.optimizer.zero_grad()
            loss = torch.zeros((), device=self.world.device)
            for number, rows in enumerate(micro):
                with accumulate(self.model, last=number == len(micro) - 1):
                    part = self.model(rows[:, :-1], rows[:, 1:]).loss / len(micro)
                    part.backward()
                loss += part.detach()
            self.evaluate()
            norm = optim.clipped_step(self.optimizer, self.config.clip_norm)
            self.losses.append(float(self.world.mean(loss)))
            self.norms.append(float(norm))
        return self

    @torch.no_grad()
    def evaluate(self) -> None:
        """A pass without gradients, as an evaluation between backward pass and update makes it."""
        tokens = torch.zeros(2, 3, dtype=torch.long, device=self.world.device)
        self.model(tokens, tokens)

    def state(self) -> dict[str, Tensor]:
        """Weights, masks and the state of the optimiser, whole."""
        transformer = unwrapped(self.model).transformer
        tensors = {name: full(tensor).clone() for name, tensor in transformer.state_dict().items()}  # type: ignore[union-attr]
        for name, parameter in transformer.named_parameters():  # type: ignore[union-attr]
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{name}.{key}"] = full(value).clone()
        return tensors

    def directory(self, path: Path) -> RunDirectory:
        """The run directory of this network and config."""
        return RunDirectory(path, SPEC, self.config, CORPUS, self.world)

    def save(self, directory: RunDirectory, step: int) -> None:
        """Begin to save, with the losses as history."""
        directory.save(step, self.model, self.optimizer, {"loss": np.array(self.losses)})

    def restore(self, directory: RunDirectory) -> int:
        """Go to the last saved state; its step, 0 if there is none."""
        found = directory.restore(self.model, self.optimizer)
        step, arrays = (0, {"loss": np.zeros(0)}) if found is None else found
        self.losses = arrays["loss"].tolist()
        return step


def config(**fields: object) -> TrainConfig:
    """The tests' config with other fields."""
    return TrainConfig(**{**vars(CONFIG), **fields})  # type: ignore[arg-type]


# Programs -------------------------------------------------------------------------------------------------------------


def everything(world: World, folder: Path) -> None:
    """Training each way, checkpoints each way, sums and errors; one result file per process."""
    numbers: dict[str, object] = {}
    tensors: dict[str, Tensor] = {}

    def keep(name: str, run: Run) -> None:
        numbers[name] = {"losses": run.losses, "norms": run.norms}
        tensors.update({f"{name}/{key}": value for key, value in run.state().items()})

    for parallel in ("ddp", "fsdp"):
        for micro in (None, 2):
            run = Run(world, config(parallel=parallel, micro_batch_size=micro)).steps(0, 4)
            keep(f"{parallel}/{micro}", run)
            if micro is None:
                run.evaluate()
                with run.directory(folder / parallel) as directory:
                    run.save(directory, 4)  # also where an evaluation has left the parameters gathered
                    directory.finish(run.model)
    for parallel in ("ddp", "fsdp"):
        run = Run(world, config(parallel=parallel, precision="bfloat16")).steps(0, 4)
        numbers[f"{parallel}/bfloat16"] = run.losses
    for saved, parallel in (("one", "ddp"), ("one", "fsdp"), ("ddp", "fsdp"), ("fsdp", "ddp")):
        run = Run(world, config(parallel=parallel))
        with run.directory(folder / saved) as directory:
            numbers[f"{saved} to {parallel}"] = [run.restore(directory), run.losses]
        tensors.update({f"{saved} to {parallel}/{key}": value for key, value in run.state().items()})
    numbers["faults"] = list(faults(world, folder))
    numbers["sum"] = world.sum(torch.tensor([1.0, world.rank])).tolist()
    numbers["tiny sum"] = float(world.sum(torch.tensor(1e-12 if world.rank else 1.0)) - 1)
    numbers["mean"] = float(world.mean(torch.tensor(float(world.rank))))
    numbers["gather"] = world.gather(torch.tensor([world.rank, 7])).tolist()
    numbers["texts"] = world.gather_text("é" * world.rank)
    try:
        with world.raise_together():
            if world.rank == 1:
                raise ArgumentError("corpus='x' is damaged; expected it whole")
    except VarpropError as error:
        numbers["error"] = str(error)
    try:
        Run(world).directory(folder if world.is_main else Path("of another machine"))
    except VarpropError as error:
        numbers["not shared"] = str(error)
    (folder / f"rank{world.rank}.json").write_text(json.dumps(numbers))
    save_file(tensors, folder / f"rank{world.rank}.safetensors")


def faults(world: World, folder: Path) -> Iterator[object]:
    """The step that is restored where process 1's file is short, and the error where process 1 has a full disk."""
    run = Run(world)
    with run.directory(folder / "faults") as directory:
        run.save(directory, 1)
        run.save(directory, 2)
    if world.is_main:
        path = folder / "faults" / "checkpoints" / "step-00000002" / "00001-of-00002.safetensors"
        os.truncate(path, path.stat().st_size - 1)
    world.gather_text("truncated")
    with run.directory(folder / "faults") as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore", DamagedShardWarning)
        yield run.restore(directory)

    def full_disk(*_: object) -> dict[str, Any]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_shard = shards.write_shard
    try:
        shards.write_shard = full_disk if world.rank == 1 else write_shard
        with run.directory(folder / "faults") as directory:
            run.save(directory, 3)
    except ArgumentError as error:
        yield str(error)
    finally:
        shards.write_shard = write_shard


def one_raises(world: World, folder: Path) -> None:
    """Process 1 has a bad input while the other waits for its gradients."""
    if world.rank == 1:
        raise ArgumentError("corpus='x' is damaged; expected it whole")
    world.sum(torch.ones(1))


def one_sleeps(world: World, folder: Path) -> None:
    """Process 1 does not answer within the timeout."""
    if world.rank == 1:
        time.sleep(2 * SHORT_TIMEOUT)
        os._exit(0)
    world.sum(torch.ones(1))


def resumed(world: World, folder: Path) -> None:
    """Train to the end from where the last process got, with a checkpoint every other step.

    VARPROP_KILL = "rank place count": that process is killed at a place it comes to for the count-th time: `before` an
    update, when it has written its `file` of a checkpoint, just before the `rename` of one.
    """
    rank, place, count = os.environ["VARPROP_KILL"].split()
    left = {place: int(count)}

    def die(here: str) -> None:
        left[here] = left.get(here, 0) - 1
        if (world.rank, here, left[here]) == (int(rank), place, 0):
            os.kill(os.getpid(), signal.SIGKILL)

    write_shard, commit = shards.write_shard, RunDirectory._commit

    def write(*arguments: Any) -> dict[str, Any]:
        entry = write_shard(*arguments)
        die("file")
        return entry

    def rename(self: RunDirectory, part: Path, target: Path) -> None:
        die("rename")
        commit(self, part, target)

    shards.write_shard, RunDirectory._commit = write, rename
    run = Run(world)
    n_steps = int((folder / "n_steps").read_text())
    with run.directory(folder / "run") as directory:
        for step in range(run.restore(directory), n_steps):
            if step % 2 == 0 and step > 0:
                run.save(directory, step)
            die("before")
            run.steps(step, step + 1)
        run.save(directory, n_steps)
        directory.finish(run.model)
    state = run.state()
    if world.is_main:
        save_file(state, folder / "end.safetensors")
        (folder / "losses.json").write_text(json.dumps(run.losses))


def fits(parallel: Parallel, folder: Path) -> None:
    """`fit`, perhaps of a run to go on with; VARPROP_KILL: a process is killed before its count-th `update`."""
    rank, place, count = os.environ["VARPROP_KILL"].split()
    update, left = Trainer.update, [int(count)]

    def killed(self: Trainer, step: int) -> Tensor:
        left[0] -= 1
        if place == "update" and (self.world.rank, left[0]) == (int(rank), 0):
            os.kill(os.getpid(), signal.SIGKILL)
        return update(self, step)

    Trainer.update = killed
    dataset = fit(SPEC, fit_config(folder, parallel=parallel), run_dir=folder / f"run_{parallel}", progress=False)
    if os.environ["RANK"] == "0":
        results.save(dataset, folder / f"fit_{parallel}.nc")


def one_is_asked_to_stop(folder: Path) -> None:
    """`fit`; process 1 gets a signal in update 2. Each process keeps the line with which it ended."""
    update, rank = Trainer.update, os.environ["RANK"]

    def signalled(self: Trainer, step: int) -> Tensor:
        if (rank, step) == ("1", 2):
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, step)

    Trainer.update = signalled
    try:
        fit(SPEC, fit_config(folder), run_dir=folder / "stopped", progress=False)
    except Stopped as stopped:
        (folder / f"stopped{rank}").write_text(str(stopped))


def fit_config(folder: Path, **fields: object) -> TrainConfig:
    """A config over the token file of the folder, with something of everything measured."""
    every = dict.fromkeys(("record_every", "checkpoint_every"), 2) | dict.fromkeys(("probe_every", "evaluate_every"), 3)
    few = {"n_probe_sequences": 2, "n_evaluation_sequences": 5, "evaluation_length": 6}
    return config(n_steps=6, corpus=str(folder / "tokens.u16"), **every, **few, **fields)


def in_world(program: Callable[[World, Path], None], timeout: float = 60.0) -> Callable[[Path], None]:
    """A program that is given its world."""

    def run(folder: Path) -> None:
        with World.start(CONFIG, timeout=timeout) as world:
            program(world, folder)

    return run


PROGRAMS: dict[str, Callable[[Path], None]] = {
    **{program.__name__: in_world(program) for program in (everything, one_raises, resumed)},
    "one_is_asked_to_stop": one_is_asked_to_stop,
    "one_sleeps": in_world(one_sleeps, timeout=SHORT_TIMEOUT),
    "fit_ddp": functools.partial(fits, "ddp"),
    "fit_fsdp": functools.partial(fits, "fsdp"),
}


QUIET = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
"""Process 0 holds the store here, not torchrun: when it dies, torch warns of that too."""
KILLED = -signal.SIGKILL
END_OF_RUN = "--- end of run"


def launch(folder: Path, *runs: str) -> list[tuple[int, list[str]]]:
    """Run programs one after the other; of each the return code of its process 0, and its lines on stderr.

    runs: `program:processes`, or `program:processes:kill` with VARPROP_KILL.
    """
    command = [sys.executable, "-m", "tests.train.ranks", str(folder), *runs]
    ended = subprocess.run(command, timeout=300, capture_output=True, text=True, env={**os.environ, **QUIET})
    assert ended.returncode == 0, ended.stderr
    lines = [part.splitlines() for part in ended.stderr.split(f"{END_OF_RUN}\n")[:-1]]
    return list(zip(json.loads(ended.stdout), lines, strict=True))


def _run(n: int, program: str, folder: Path) -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(n))
    children = []
    for rank in range(n):
        child = os.fork()
        if child == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            os._exit(_child(program, folder))
        children.append(child)
    first, *_ = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return first


def _child(program: str, folder: Path) -> int:
    try:
        PROGRAMS[program](folder)
    except VarpropError as error:
        print(error, file=sys.stderr, flush=True)
        return 2
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _main(folder: Path, runs: list[str]) -> None:
    Run(World(0, 1, 0, torch.device("cpu")))  # what is imported late is imported once
    codes = []
    for run in runs:
        program, n, *kill = run.split(":")
        os.environ["VARPROP_KILL"] = kill[0] if kill else "-1 nowhere 0"
        codes.append(_run(int(n), program, folder))
        print(END_OF_RUN, file=sys.stderr, flush=True)
    print(json.dumps(codes))


if __name__ == "__main__":
    if "RANK" in os.environ:  # torchrun has made the processes
        sys.exit(_child(sys.argv[2], Path(sys.argv[1])))
    _main(Path(sys.argv[1]), sys.argv[2:])
