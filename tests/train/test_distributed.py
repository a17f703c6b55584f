"""Two processes on the CPU train as one does; what they add up is exact; an error in one of them ends both."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.train.ranks import CONFIG, KILLED, QUIET, SPEC, Run, fit_config, launch
from varprop import results
from varprop.errors import ArgumentError
from varprop.train import fit
from varprop.train.checkpoint import load_model
from varprop.train.distributed import World, accumulate, global_norm, shard

ONE = World(0, 1, 0, torch.device("cpu"))


FITS = ("fit_ddp:2:1 update 5", "fit_ddp:1", "fit_fsdp:1:0 update 4", "fit_fsdp:2")


class Outcome:
    """What one process and two have come to, all in one start of the interpreter.

    one: the run of one process. ended: return code and lines by program. numbers, tensors: of the program `everything`,
    by process. read_by_one: the state that one process has read from the checkpoint of two, by how they shared
    it; finished: the weights that they have written at the end; stopped, stopped_at: lines and checkpoints of a run
    that was asked to stop.
    """

    def __init__(self, folder: Path) -> None:
        self.one = Run(ONE).steps(0, 4)
        with self.one.directory(folder / "one") as directory:
            self.one.save(directory, 4)
        (folder / "n_steps").write_text("6")
        np.random.default_rng(0).integers(0, 32, 4000).astype("<u2").tofile(folder / "tokens.u16")
        runs = ("everything:2", "one_raises:2", "resumed:2:1 before 5", "resumed:1", "one_is_asked_to_stop:2", *FITS)
        self.ended = dict(zip(runs, launch(folder, *runs), strict=True))
        assert self.ended["everything:2"] == (0, [])
        self.read_by_one, self.finished = {}, {}
        for parallel in ("ddp", "fsdp"):
            run = Run(ONE)
            with run.directory(folder / parallel) as directory:
                assert run.restore(directory) == 4
            self.read_by_one[parallel] = run.state()
            self.finished[parallel] = dict(load_model(folder / parallel).state_dict())
        self.fit_of_one = fit(SPEC, fit_config(folder))
        self.fits = {name: results.load(folder / f"{name}.nc") for name in ("fit_ddp", "fit_fsdp")}
        self.stopped = [(folder / f"stopped{rank}").read_text() for rank in range(2)]
        self.stopped_at = sorted(path.name for path in (folder / "stopped" / "checkpoints").iterdir())
        names = [folder / f"rank{rank}" for rank in range(2)]
        self.numbers = [json.loads(name.with_suffix(".json").read_text()) for name in names]
        self.tensors = [load_file(name.with_suffix(".safetensors")) for name in names]
        self.resumed_losses = json.loads((folder / "losses.json").read_text())

    def states(self, name: str) -> list[dict[str, Tensor]]:
        """A state that both processes have kept."""
        prefix = f"{name}/"
        return [{k.removeprefix(prefix): v for k, v in kept.items() if k.startswith(prefix)} for kept in self.tensors]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return Outcome(tmp_path_factory.mktemp("outcome"))


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("way", ("ddp/None", "ddp/2", "fsdp/None", "fsdp/2"))
def test_two_processes_train_as_one(outcome: Outcome, way: str) -> None:
    """Losses, gradient norms (all of them clipped) and weights; `/2`: in two micro-batches on each process."""
    one = outcome.one
    for numbers, state in zip(outcome.numbers, outcome.states(way), strict=True):
        assert numbers[way]["losses"] == pytest.approx(one.losses, rel=1e-6)
        assert numbers[way]["norms"] == pytest.approx(one.norms, rel=1e-6)
        assert state.keys() == one.state().keys()
        for name, expected in one.state().items():
            torch.testing.assert_close(state[name], expected, rtol=1e-5, atol=1e-6)


def test_a_signal_to_one_process_stops_both_at_once(outcome: Outcome) -> None:
    """Before the next update, not some steps later: torchrun kills after 30 s what has not ended."""
    assert outcome.ended["one_is_asked_to_stop:2"] == (0, [])
    for line in outcome.stopped:
        assert line.startswith("stopped before update 3 of 6; the same call goes on from ")
    assert outcome.stopped_at == ["step-00000002", "step-00000003"]


def test_both_ways_round_alike_in_bfloat16(outcome: Outcome) -> None:
    """Gathering parameters in bfloat16 would change these losses in the fourth digit: routers and gains are float32."""
    first, _ = outcome.numbers
    assert first["fsdp/bfloat16"] == pytest.approx(first["ddp/bfloat16"], rel=1e-5)
    assert first["ddp/bfloat16"] != pytest.approx(outcome.one.losses, rel=1e-5)


@pytest.mark.parametrize("parallel", ("ddp", "fsdp"))
def test_a_checkpoint_of_one_process_is_read_by_two(outcome: Outcome, parallel: str) -> None:
    for numbers, state in zip(outcome.numbers, outcome.states(f"one to {parallel}"), strict=True):
        assert numbers[f"one to {parallel}"] == [4, outcome.one.losses]
        assert equal(state, outcome.one.state())


@pytest.mark.parametrize("saved, read", (("ddp", "fsdp"), ("fsdp", "ddp")))
def test_checkpoints_between_ways_to_share(outcome: Outcome, saved: str, read: str) -> None:
    for state in outcome.states(f"{saved} to {read}"):
        assert equal(state, outcome.states(f"{saved}/None")[0])


@pytest.mark.parametrize("parallel", ("ddp", "fsdp"))
def test_a_checkpoint_of_two_processes_is_read_by_one(outcome: Outcome, parallel: str) -> None:
    state = outcome.states(f"{parallel}/None")[0]
    assert equal(outcome.read_by_one[parallel], state)
    assert equal(outcome.finished[parallel], {name: state[name] for name in outcome.finished[parallel]})


def test_sums_gathers_and_a_shared_error(outcome: Outcome) -> None:
    for numbers in outcome.numbers:
        assert numbers["sum"] == [2.0, 1.0]
        assert numbers["tiny sum"] == pytest.approx(1e-12, rel=1e-3)  # float64: in float32 it would be 0
        assert numbers["mean"] == 0.5
        assert numbers["gather"] == [[0, 7], [1, 7]]
        assert numbers["texts"] == ["", "é"]
        assert numbers["error"] == "corpus='x' is damaged; expected it whole"
        not_seen = "run_dir='of another machine' is not seen by process 1; expected a folder that all processes share"
        assert numbers["not shared"] == not_seen


def test_a_fault_of_one_process_is_known_to_both(outcome: Outcome) -> None:
    for numbers in outcome.numbers:
        step, line = numbers["faults"]
        assert step == 1
        assert re.fullmatch(r"checkpoint='.*step-00000003' cannot be written \(No space left on device\); .*", line)


def test_an_error_in_one_process_ends_both_with_its_line(outcome: Outcome) -> None:
    assert outcome.ended["one_raises:2"] == (2, ["corpus='x' is damaged; expected it whole"] * 2)


def test_a_killed_process_ends_the_other_and_the_run_resumes(outcome: Outcome) -> None:
    """Process 1 dies before update 4, while checkpoint 4 is perhaps being written; then one process goes on."""
    code, (line,) = outcome.ended["resumed:2:1 before 5"]
    assert code == 2
    assert line.startswith("rank=0 of 2 lost another process (")
    assert line.endswith("); expected all of them to live; the run resumes from its last checkpoint")
    assert outcome.ended["resumed:1"] == (0, [])
    assert outcome.resumed_losses == pytest.approx(Run(ONE).steps(0, 6).losses, rel=1e-6)


@pytest.mark.long
def test_a_process_that_does_not_answer_ends_the_other_in_time(tmp_path: Path) -> None:
    ((code, (line,)),) = launch(tmp_path, "one_sleeps:2")
    assert code == 2
    assert re.fullmatch(r"rank=0 of 2 lost another process \(.*[Tt]imed out.*\); expected all .*", line)


@pytest.mark.long
def test_a_killed_process_under_torchrun(tmp_path: Path) -> None:
    """torchrun ends with 1 and a report of its own, below the line of the other process if it let that one finish."""
    (tmp_path / "n_steps").write_text("6")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, **QUIET, "VARPROP_KILL": "1 before 5"}
    command = [*torchrun, "-m", "tests.train.ranks", str(tmp_path), "resumed"]
    ended = subprocess.run(command, timeout=120, capture_output=True, text=True, env=environment)
    assert ended.returncode == 1
    assert "Signal 9 (SIGKILL)" in ended.stderr
    assert sum("Traceback" in line for line in ended.stderr.splitlines()) == 1  # torchrun's
    environment["VARPROP_KILL"] = "-1 nowhere 0"
    ended = subprocess.run(command, timeout=120, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr
    losses = json.loads((tmp_path / "losses.json").read_text())
    assert losses == pytest.approx(Run(ONE).steps(0, 6).losses, rel=1e-6)


@pytest.mark.parametrize("name", ("fit_ddp", "fit_fsdp"))
def test_fit_goes_on_with_another_number_of_processes(outcome: Outcome, name: str) -> None:
    """`ddp` from two processes to one, `fsdp` from one to two: every variable is that of one process, to rounding."""
    assert [outcome.ended[run][0] for run in FITS] == [2, 0, KILLED, 0]
    one, other = outcome.fit_of_one, outcome.fits[name]
    assert set(one.data_vars) == set(other.data_vars)
    # The balance of the load is one of the tokens that are routed together: of half the batch it is another.
    for variable in set(one.data_vars) - {"load_balance_loss"}:
        np.testing.assert_allclose(
            other[variable].values, one[variable].values, rtol=1e-4, atol=1e-6, err_msg=str(variable)
        )


def test_one_process_needs_no_group() -> None:
    world = World.start(CONFIG)
    assert (world.rank, world.size, world.is_main, world.device) == (0, 1, True, torch.device("cpu"))
    model = torch.nn.Linear(2, 2)
    assert shard(model, world, CONFIG) is model
    assert shard(model, world, dataclasses.replace(CONFIG, parallel="fsdp")) is model
    two = World(0, 2, 0, torch.device("cpu"))
    with pytest.raises(ArgumentError, match=r"^compile_layers=2 is too large; expected 1 with parallel='fsdp'"):
        shard(model, two, dataclasses.replace(CONFIG, parallel="fsdp", compile_layers=2))
    with accumulate(model, last=False):
        pass
    values = torch.tensor([1.0, 2.0])
    assert world.sum(values).dtype == torch.float64
    assert world.mean(values).tolist() == [1.0, 2.0]
    assert world.gather(values).tolist() == [[1.0, 2.0]]
    assert world.gather_text("a") == ["a"]
    assert float(global_norm([torch.tensor([3.0]), torch.tensor([4.0])])) == 5.0
    large = torch.full((4096, 2048), 0.1)  # torch's own norm is 0.7 % low
    norm = global_norm([large, large])
    assert float(norm) == pytest.approx(float(large[0, 0]) * (2 * large.numel()) ** 0.5, rel=1e-6)
    assert norm.dtype == torch.float32
    assert float(global_norm([])) == 0
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
    for name in ("nowhere", "meta", "cpu:x"):
        with pytest.raises(ArgumentError, match=f"^device='{name}' is not available; expected auto, cpu or a CUDA"):
            World.start(dataclasses.replace(CONFIG, device=name))
