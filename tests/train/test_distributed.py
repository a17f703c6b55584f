"""Two processes on the CPU train as one does; what they add up is exact; an error in one of them ends both."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.train.ranks import CONFIG, Run, launch
from varprop.errors import ArgumentError
from varprop.train.distributed import World, accumulate, global_norm, shard

ONE = World(0, 1, 0, torch.device("cpu"))
Outcome = tuple[list[dict[str, Any]], list[dict[str, Tensor]]]


@pytest.fixture(scope="module")
def one() -> Run:
    return Run(ONE).steps(0, 4)


@pytest.fixture(scope="module")
def outcome(one: Run, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Numbers and tensors of each process of the program `everything`."""
    folder = tmp_path_factory.mktemp("everything")
    with one.directory(folder / "one") as directory:
        one.save(directory, 4)
    assert launch("everything", folder, "2") == ([0], [])
    for parallel in ("ddp", "fsdp"):  # two processes to one, while the files are here
        run = Run(ONE)
        with run.directory(folder / parallel) as directory:
            assert run.restore(directory) == 4
        one.__dict__.setdefault("from_two", {})[parallel] = run.state()
    names = [f"rank{rank}" for rank in range(2)]
    numbers = [json.loads((folder / f"{name}.json").read_text()) for name in names]
    return numbers, [load_file(folder / f"{name}.safetensors") for name in names]


def part(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("way", ("ddp/None", "ddp/2", "fsdp/None", "fsdp/2"))
def test_two_processes_train_as_one(one: Run, outcome: Outcome, way: str) -> None:
    """Losses, gradient norms (all of them clipped) and weights; `/2`: in two micro-batches on each process."""
    numbers, tensors = outcome
    for rank in range(2):
        assert numbers[rank][way]["losses"] == pytest.approx(one.losses, rel=1e-6)
        assert numbers[rank][way]["norms"] == pytest.approx(one.norms, rel=1e-6)
        found = part(tensors[rank], way)
        assert found.keys() == one.state().keys()
        for name, expected in one.state().items():
            torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("parallel", ("ddp", "fsdp"))
def test_a_checkpoint_of_one_process_is_read_by_two(one: Run, outcome: Outcome, parallel: str) -> None:
    numbers, tensors = outcome
    for rank in range(2):
        assert numbers[rank][f"one to {parallel}"] == [4, one.losses]
        assert equal(part(tensors[rank], f"one to {parallel}"), one.state())


@pytest.mark.parametrize("saved, read", (("ddp", "fsdp"), ("fsdp", "ddp")))
def test_checkpoints_between_ways_to_share(outcome: Outcome, saved: str, read: str) -> None:
    _, tensors = outcome
    for rank in range(2):
        assert equal(part(tensors[rank], f"{saved} to {read}"), part(tensors[rank], f"{saved}/None"))


@pytest.mark.parametrize("parallel", ("ddp", "fsdp"))
def test_a_checkpoint_of_two_processes_is_read_by_one(one: Run, outcome: Outcome, parallel: str) -> None:
    assert equal(one.__dict__["from_two"][parallel], part(outcome[1][0], f"{parallel}/None"))


def test_sums_gathers_and_a_shared_error(outcome: Outcome) -> None:
    for numbers in outcome[0]:
        assert numbers["sum"] == [2.0, 1.0]
        assert numbers["tiny sum"] == pytest.approx(1e-12, rel=1e-3)  # float64: in float32 it would be 0
        assert numbers["mean"] == 0.5
        assert numbers["gather"] == [[0, 7], [1, 7]]
        assert numbers["texts"] == ["", "é"]
        assert numbers["error"] == "corpus='x' is damaged; expected it whole"


def test_an_error_in_one_process_ends_both_with_its_line(tmp_path: Path) -> None:
    assert launch("one_raises", tmp_path, "2") == ([2], ["corpus='x' is damaged; expected it whole"] * 2)


def test_a_killed_process_ends_the_other_and_the_run_resumes(tmp_path: Path) -> None:
    """Process 1 dies before update 4, while checkpoint 4 is perhaps being written; then one process goes on."""
    (tmp_path / "n_steps").write_text("6")
    codes, lines = launch("resumed", tmp_path, "2:1 before 5", "1")
    assert codes == [2, 0]
    assert len(lines) == 1
    assert lines[0].startswith("rank=0 of 2 lost another process (")
    assert lines[0].endswith("); expected all of them to live; the run resumes from its last checkpoint")
    losses = json.loads((tmp_path / "losses.json").read_text())
    assert losses == pytest.approx(Run(ONE).steps(0, 6).losses, rel=1e-6)


def test_one_process_needs_no_group() -> None:
    world = World.start(CONFIG)
    assert (world.rank, world.size, world.is_main, world.device) == (0, 1, True, torch.device("cpu"))
    model = torch.nn.Linear(2, 2)
    assert shard(model, world, CONFIG) is model
    assert shard(model, world, dataclasses.replace(CONFIG, parallel="fsdp")) is model
    with accumulate(model, last=False):
        pass
    values = torch.tensor([1.0, 2.0])
    assert world.sum(values).dtype == torch.float64
    assert world.mean(values).tolist() == [1.0, 2.0]
    assert world.gather(values).tolist() == [[1.0, 2.0]]
    assert world.gather_text("a") == ["a"]
    assert float(global_norm([torch.tensor([3.0]), torch.tensor([4.0])])) == 5.0
    with pytest.raises(KeyError), world.raise_together():
        raise KeyError("own type")


def test_bad_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ArgumentError, match=r"^WORLD_SIZE='two' is not a number; expected what torchrun sets$"):
        World.start(CONFIG)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ArgumentError, match=r"^WORLD_SIZE=2 processes did not meet .*expected all of them within 1 s$"):
        World.start(CONFIG, timeout=1)
    with pytest.raises(ArgumentError, match=r"^batch_size=3 is not divisible; expected a multiple of 2 processes$"):
        World(0, 2, 0, torch.device("cpu")).share(3)
    with pytest.raises(ArgumentError, match=r"^device='cpu:0' is one device for several processes"):
        World.start(dataclasses.replace(CONFIG, device="cpu:0"))
    with pytest.raises(ArgumentError, match=r"^device='nowhere' is not available"):
        World.start(dataclasses.replace(CONFIG, device="nowhere"))
