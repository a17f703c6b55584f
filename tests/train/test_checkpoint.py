"""A killed run resumes as if it had not been killed; a run directory of another run is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from varprop import results
from varprop.errors import ArgumentError
from varprop.spec import ModelSpec
from varprop.train import TrainConfig, checkpoint, fit, load_model
from varprop.train.loop import Trainer

CHILD = """
import os, signal, sys
from pathlib import Path
import torch
from varprop.spec import ModelSpec
from varprop.train import TrainConfig, fit, checkpoint
from varprop.train.loop import Trainer

spec, config, run_dir, place, step = *sys.argv[1:5], int(sys.argv[5])
torch.set_num_threads(int(sys.argv[6]))
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
if place == "update":
    update = Trainer.update
    Trainer.update = lambda self, at: die() if at == step else update(self, at)
else:  # the new checkpoint is written but not yet renamed
    replace = Path.replace
    def killed(source, target):
        if "checkpoint" in str(target) and checkpoint._load(source)[0]["step"] == step:
            die()
        replace(source, target)
    Path.replace = killed
fit(ModelSpec.from_json(spec), TrainConfig.from_json(config), run_dir=run_dir)
"""


def run_until_killed(spec: ModelSpec, config: TrainConfig, run_dir: Path, place: str, step: int) -> None:
    arguments = [spec.to_json(), config.to_json(), str(run_dir), place, str(step), str(torch.get_num_threads())]
    child = subprocess.run([sys.executable, "-c", CHILD, *arguments], timeout=120, capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr


def test_kill_and_resume_twice_is_bitwise_the_same(spec: ModelSpec, config: TrainConfig, tmp_path: Path) -> None:
    """Checkpoints at 3, 6, 9: killed in update 4, resumed, killed while writing checkpoint 6, resumed to the end."""
    spec = spec.with_fields(density=0.5)
    undisturbed = fit(spec, config, run_dir=tmp_path / "whole")
    run_dir = tmp_path / "killed"
    run_until_killed(spec, config, run_dir, "update", 4)
    run_until_killed(spec, config, run_dir, "checkpoint", 6)
    assert checkpoint._load(run_dir / "checkpoint.safetensors")[0]["step"] == 3
    assert results.identical(fit(spec, config, run_dir=run_dir), undisturbed)
    whole, resumed = load_model(tmp_path / "whole").state_dict(), load_model(run_dir).state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.long
def test_many_kills_at_random_steps(spec: ModelSpec, config: TrainConfig, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    config = dataclasses.replace(config, n_steps=40, record_every=5)
    undisturbed = fit(spec, config)
    done = 0
    for _ in range(8):
        step = int(rng.integers(done, 40))
        place = "update" if rng.random() < 0.5 or step // 3 * 3 <= done else "checkpoint"
        step = step if place == "update" else step // 3 * 3
        run_until_killed(spec, config, tmp_path / "run", place, step)
        saved = tmp_path / "run" / "checkpoint.safetensors"
        done = checkpoint._load(saved)[0]["step"] if saved.exists() else 0
    assert results.identical(fit(spec, config, run_dir=tmp_path / "run"), undisturbed)


def test_a_finished_run_is_returned_again(
    spec: ModelSpec, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fit(spec, config, run_dir=tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint.safetensors", "model.safetensors", "run.json"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "forward_backward", lambda *_: pytest.fail("trained again"))
        assert results.identical(fit(spec, config, run_dir=tmp_path), first)
    assert results.identical(fit(spec, config), first)


def test_another_run_is_refused(spec: ModelSpec, config: TrainConfig, tmp_path: Path) -> None:
    fit(spec, config, run_dir=tmp_path)
    with pytest.raises(ArgumentError, match=r"holds a run with config\.seed=0; expected 1$"):
        fit(spec, dataclasses.replace(config, seed=1), run_dir=tmp_path)
    with pytest.raises(ArgumentError, match=r"holds a run with spec\.n_layers=2; expected 3$"):
        fit(spec.with_fields(n_layers=3), config, run_dir=tmp_path)


def test_damaged_run_directories(spec: ModelSpec, config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"has no model\.safetensors"):
        load_model(tmp_path)
    fit(spec, config, run_dir=tmp_path)
    saved = tmp_path / "checkpoint.safetensors"
    saved.write_bytes(saved.read_bytes()[:-100])
    with pytest.raises(ArgumentError, match=r"checkpoint\.safetensors' is truncated or damaged"):
        fit(spec, config, run_dir=tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ArgumentError, match=r"model\.safetensors' is truncated or damaged"):
        load_model(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ArgumentError, match=r"run\.json' is damaged"):
        fit(spec, config, run_dir=tmp_path)
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(ArgumentError, match="holds a run with"):
        fit(spec, config, run_dir=tmp_path)
    with pytest.raises(ArgumentError, match="cannot be made"):
        fit(spec, config, run_dir=tmp_path / "run.json" / "below")


def test_a_failed_write_leaves_the_last_checkpoint(
    spec: ModelSpec, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, targets = Path.replace, []

    def full_at_the_fourth(source: Path, target: Path) -> None:
        targets.append(target)
        if len(targets) == 4:  # run.json, then the checkpoints of steps 3, 6 and 9
            raise OSError(28, os.strerror(28))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full_at_the_fourth)
        with pytest.raises(ArgumentError, match=r"checkpoint\.safetensors' cannot be written \(No space left"):
            fit(spec, config, run_dir=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.safetensors", "run.json"]
    assert checkpoint._load(tmp_path / "checkpoint.safetensors")[0]["step"] == 6
    assert results.identical(fit(spec, config, run_dir=tmp_path), fit(spec, config))


def test_no_pickle(spec: ModelSpec, config: TrainConfig, tmp_path: Path) -> None:
    """A safetensors file starts with the length of its JSON header."""
    fit(spec, config, run_dir=tmp_path)
    for name in ("checkpoint.safetensors", "model.safetensors"):
        content = (tmp_path / name).read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        assert "varprop" in header["__metadata__"]


def test_a_checkpoint_without_its_description_is_refused(spec: ModelSpec, config: TrainConfig, tmp_path: Path) -> None:
    fit(spec, config, run_dir=tmp_path)
    (tmp_path / "run.json").unlink()
    with pytest.raises(ArgumentError, match=r"has a checkpoint without run\.json; expected a whole run directory"):
        fit(spec, dataclasses.replace(config, seed=1), run_dir=tmp_path)
