"""Programs for several processes on the CPU: `python -m tests.train.ranks N PROGRAM FOLDER` forks N of them.

torch is imported once, by the parent. Each process prints the line of a `VarpropError` and ends with 2, as the command
line does.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from varprop.corpus import Corpus
from varprop.errors import ArgumentError, VarpropError
from varprop.nn import Transformer
from varprop.spec import AttentionSpec, FeedForwardSpec, ModelSpec
from varprop.train import TrainConfig, optim
from varprop.train.checkpoint import RunDirectory
from varprop.train.distributed import World, accumulate, full, shard, unwrapped

SPEC = ModelSpec(
    d_model=8,
    n_layers=2,
    vocab_size=32,
    attention=AttentionSpec(n_heads=2),
    feed_forward=FeedForwardSpec(d_ff=12),
).with_fields(density=0.5)
CONFIG = TrainConfig(n_steps=4, batch_size=8, n_tokens=8, warmup_steps=1, clip_norm=0.1, device="cpu")
CORPUS = Corpus(np.zeros(0, np.uint16), np.zeros(0, np.uint16), 32, None, "none", "0" * 64)


class LossOfTransformer(nn.Module):
    """A network whose forward pass gives its mean loss."""

    def __init__(self, spec: ModelSpec, seed: int) -> None:
        super().__init__()
        self.transformer = Transformer(spec, seed=seed)

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.transformer(tokens[:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


class Run:
    """A network in training, with what the tests look at."""

    def __init__(self, world: World, config: TrainConfig = CONFIG) -> None:
        self.world, self.config = world, config
        self.model = shard(LossOfTransformer(SPEC, config.seed), world, config)
        self.optimizer = optim.adamw(unwrapped(self.model).transformer, SPEC, config)  # type: ignore[arg-type]
        self.losses: list[float] = []
        self.norms: list[float] = []

    def steps(self, start: int, stop: int) -> Run:
        """Make the updates start..stop - 1."""
        for step in range(start, stop):
            tokens = torch.randint(32, (8, 9), generator=torch.Generator().manual_seed(step))
            micro = tokens[list(self.world.share(8))].split(self.config.micro_batch_size or 8)
            self.optimizer.zero_grad()
            loss = torch.zeros(())
            for number, rows in enumerate(micro):
                with accumulate(self.model, last=number == len(micro) - 1):
                    part = self.model(rows) / len(micro)
                    part.backward()
                loss += part.detach()
            norm = optim.clip_gradients(self.model.parameters(), self.config.clip_norm)
            self.optimizer.step()
            self.losses.append(float(self.world.mean(loss)))
            self.norms.append(float(norm))
        return self

    def state(self) -> dict[str, Tensor]:
        """Weights, masks and the state of the optimiser, whole."""
        transformer = unwrapped(self.model).transformer
        tensors = {name: full(tensor).clone() for name, tensor in transformer.state_dict().items()}  # type: ignore[union-attr]
        for name, parameter in transformer.named_parameters():  # type: ignore[union-attr]
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{name}.{key}"] = full(value).clone()
        return tensors

    def save(self, path: Path, step: int) -> None:
        """Save and end."""
        with RunDirectory(path, SPEC, self.config, CORPUS, self.world) as run:
            run.save(step, self.model, self.optimizer, {"loss": np.array(self.losses)})

    def restore(self, path: Path) -> tuple[int, dict[str, np.ndarray]]:
        """Go to the last saved state."""
        with RunDirectory(path, SPEC, self.config, CORPUS, self.world) as run:
            found = run.restore(self.model, self.optimizer)
        assert found is not None
        return found


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
                run.save(folder / parallel, 4)
    for saved, parallel in (("one", "ddp"), ("one", "fsdp"), ("ddp", "fsdp"), ("fsdp", "ddp")):
        run = Run(world, config(parallel=parallel))
        step, arrays = run.restore(folder / saved)
        numbers[f"{saved} to {parallel}"] = [step, arrays["loss"].tolist()]
        tensors.update({f"{saved} to {parallel}/{key}": value for key, value in run.state().items()})
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
    (folder / f"rank{world.rank}.json").write_text(json.dumps(numbers))
    save_file(tensors, folder / f"rank{world.rank}.safetensors")


def one_raises(world: World, folder: Path) -> None:
    """Process 1 has a bad input while the other waits for its gradients."""
    if world.rank == 1:
        raise ArgumentError("corpus='x' is damaged; expected it whole")
    world.sum(torch.ones(1))


def one_dies(world: World, folder: Path) -> None:
    """Process 1 is killed between two updates after a checkpoint."""
    run = Run(world).steps(0, 2)
    with RunDirectory(folder / "run", SPEC, CONFIG, CORPUS, world) as directory:
        directory.save(2, run.model, run.optimizer, {"loss": np.array(run.losses)})
        directory.wait()
        if world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        run.steps(2, 4)


PROGRAMS: dict[str, Callable[[World, Path], None]] = {
    program.__name__: program for program in (everything, one_raises, one_dies)
}


def launch(n: int, program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a program in n processes; stderr has their lines, the return code is that of process 0."""
    command = [sys.executable, "-m", "tests.train.ranks", str(n), program, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, timeout=120, capture_output=True, text=True, env=environment)


def _main(n: int, program: str, folder: Path) -> int:
    if "RANK" in os.environ:  # torchrun has made the processes
        return _child(program, folder)
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
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return codes[0]


def _child(program: str, folder: Path) -> int:
    try:
        with World.start(CONFIG, timeout=60) as world:
            PROGRAMS[program](world, folder)
    except VarpropError as error:
        print(error, file=sys.stderr, flush=True)
        return 2
    except Exception:
        import traceback

        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])))
