"""A killed run resumes as if it had not been killed; a run directory of another run, or a damaged one, is refused."""

from __future__ import annotations

import dataclasses
import json
import resource
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.train.ranks import CONFIG, CORPUS, KILLED, SPEC, Run, fit_config, launch
from varprop import results
from varprop.errors import ArgumentError, DamagedShardWarning
from varprop.train import fit, load_model, shards
from varprop.train.checkpoint import RunDirectory
from varprop.train.distributed import World

ONE = World(0, 1, 0, torch.device("cpu"))


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def saved_steps(path: Path) -> list[int]:
    return sorted(int(folder.name.removeprefix("step-")) for folder in (path / "checkpoints").iterdir())


def saved_run(path: Path, *steps: int) -> Run:
    """A run that has saved its state at these steps."""
    run = Run(ONE)
    with run.directory(path) as directory:
        for start, stop in zip((0, *steps), steps, strict=False):
            run.steps(start, stop).save(directory, stop)
    return run


def restored(path: Path) -> tuple[int, Run]:
    run = Run(ONE)
    with run.directory(path) as directory:
        return run.restore(directory), run


# Kills ----------------------------------------------------------------------------------------------------------------


def check_end(folder: Path, n_steps: int, exact: bool) -> None:
    """Losses and weights, and the state of the optimiser, are those of the undisturbed run."""
    undisturbed = Run(ONE).steps(0, n_steps)
    losses, state = json.loads((folder / "losses.json").read_text()), load_file(folder / "end.safetensors")
    if exact:
        assert losses == undisturbed.losses
        assert equal(state, undisturbed.state())
        return
    assert losses == pytest.approx(undisturbed.losses, rel=1e-5)
    for name, expected in undisturbed.state().items():
        torch.testing.assert_close(state[name], expected, rtol=1e-4, atol=1e-5)


def test_kill_and_resume_twice_is_bitwise_the_same(tmp_path: Path) -> None:
    """Killed before an update and at a rename, and `fit` before two updates; then resumed to the end."""
    (tmp_path / "n_steps").write_text("8")
    np.random.default_rng(0).integers(0, 32, 4000).astype("<u2").tofile(tmp_path / "tokens.u16")
    runs = ("resumed:1:0 before 4", "resumed:1:0 rename 2", "resumed:1")
    fits = ("fit_ddp:1:0 update 4", "fit_ddp:1:0 update 3", "fit_ddp:1")
    assert launch(tmp_path, *runs, *fits) == [(KILLED, []), (KILLED, []), (0, [])] * 2
    check_end(tmp_path, 8, exact=True)
    weights = dict(load_model(tmp_path / "run").state_dict())
    assert equal(weights, {name: tensor for name, tensor in Run(ONE).steps(0, 8).state().items() if name in weights})
    undisturbed = fit(SPEC, fit_config(tmp_path, parallel="ddp"), run_dir=tmp_path / "undisturbed")
    assert results.identical(results.load(tmp_path / "fit_ddp.nc"), undisturbed)
    models = [load_model(tmp_path / name).state_dict() for name in ("run_ddp", "undisturbed")]
    assert equal(*map(dict, models))


@pytest.mark.long
@pytest.mark.parametrize("n", (1, 2))
def test_many_kills(tmp_path: Path, n: int) -> None:
    """Twenty kills at random places: on one process bitwise the undisturbed run, between one and two to rounding."""
    rng = np.random.default_rng(n)
    (tmp_path / "n_steps").write_text("100")
    runs = []
    for _ in range(20):  # none gets further than four updates
        size = int(rng.integers(1, n + 1))
        place, most = [("before", 4), ("file", 2), ("rename", 2)][rng.integers(3)]
        rank = 0 if place == "rename" else int(rng.integers(size))
        runs.append(f"resumed:{size}:{rank} {place} {rng.integers(most) + 1}")
    *killed, last = launch(tmp_path, *runs, f"resumed:{n}")
    assert {code for code, _ in killed} <= {KILLED, 2}, killed
    assert last == (0, [])
    check_end(tmp_path, 100, exact=n == 1)


# Writing --------------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_the_state_of_that_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on while a checkpoint is written; the next save waits for it."""
    written, writing = threading.Event(), []
    write_shard = shards.write_shard

    def slow(*arguments: Any) -> dict[str, Any]:
        writing.append(arguments[0].name)
        assert written.wait(timeout=60)
        return write_shard(*arguments)

    monkeypatch.setattr(shards, "write_shard", slow)
    run = Run(ONE).steps(0, 1)
    expected = run.state()
    with run.directory(tmp_path) as directory:
        run.save(directory, 1)
        run.steps(1, 2)
        assert not (tmp_path / "checkpoints" / "step-00000001").exists()
        second = threading.Thread(target=run.save, args=(directory, 2))
        second.start()
        second.join(timeout=0.2)
        assert second.is_alive()
        assert writing == [".step-00000001.part"]
        written.set()
        second.join(timeout=60)
    assert saved_steps(tmp_path) == [1, 2]
    (tmp_path / "checkpoints" / "step-00000002" / shards.MANIFEST).write_text("{")
    with pytest.warns(DamagedShardWarning):
        step, found = restored(tmp_path)
    assert step == 1
    assert equal(found.state(), expected)


def test_the_last_two_are_kept_and_remains_are_removed(tmp_path: Path) -> None:
    saved_run(tmp_path, 1, 2, 3)
    assert saved_steps(tmp_path) == [2, 3]
    (tmp_path / "checkpoints" / ".step-00000004.part").mkdir()
    assert restored(tmp_path)[0] == 3
    assert saved_steps(tmp_path) == [2, 3]


def test_no_pickle(tmp_path: Path) -> None:
    """Every file is JSON, an empty lock, or safetensors: the length of a JSON header, the header, bytes."""
    run = saved_run(tmp_path, 1)
    with run.directory(tmp_path) as directory:
        directory.finish(run.model)
    kinds = set()
    for path in filter(Path.is_file, tmp_path.rglob("*")):
        content = path.read_bytes()
        kinds.add(path.suffix)
        if path.suffix == ".safetensors":
            content = content[8 : 8 + int.from_bytes(content[:8], "little")]
        assert path.suffix == ".lock" or json.loads(content)
    assert kinds == {".json", ".lock", ".safetensors"}


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    """The system refuses files larger than 4 kB: one line at the next save, and the run resumes from what is whole."""
    run = Run(ONE).steps(0, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    directory = run.directory(tmp_path)
    run.save(directory, 1)
    run.steps(1, 2)
    directory.wait()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        run.save(directory, 2)
        with pytest.raises(ArgumentError, match=r"step-00000002' cannot be written \(.*File too large.*before it are"):
            directory.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved_steps(tmp_path) == [1]
    step, found = restored(tmp_path)
    assert step == 1
    assert equal(found.steps(1, 2).state(), run.state())


def test_a_failed_save_does_not_hide_another_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "write_manifest", full)
    run = Run(ONE)

    def fails() -> None:
        with run.directory(tmp_path) as directory:
            run.save(directory, 0)
            raise KeyError("first")

    with pytest.warns(DamagedShardWarning, match="No space left"), pytest.raises(KeyError):
        fails()
    assert saved_steps(tmp_path) == []


# Reading --------------------------------------------------------------------------------------------------------------


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", (shorten, flip_a_bit, Path.unlink))
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: Any) -> None:
    run = saved_run(tmp_path, 1, 2)
    damage(tmp_path / "checkpoints" / "step-00000002" / "00000-of-00001.safetensors")
    with pytest.warns(DamagedShardWarning, match=r"step-00000002/00000-of-00001\.safetensors' is truncated or damaged"):
        step, found = restored(tmp_path)
    assert step == 1
    with found.directory(tmp_path) as directory:
        found.steps(1, 2).save(directory, 2)  # in place of the damaged one
    assert equal(found.state(), run.state())
    assert restored(tmp_path)[0] == 2


def test_whole_checkpoints_are_kept_and_damaged_ones_removed(tmp_path: Path) -> None:
    """Damaged checkpoints of later steps do not count among those that are kept."""
    saved_run(tmp_path, 1, 2)
    for step in (6, 7):
        (tmp_path / "checkpoints" / f"step-0000000{step}").mkdir()
    with pytest.warns(DamagedShardWarning, match=r"step-0000000[67].*; the checkpoint of step 2 is taken$") as warned:
        _, found = restored(tmp_path)
    assert len(warned) == 2
    with found.directory(tmp_path) as directory:
        found.steps(2, 3).save(directory, 3)
    assert saved_steps(tmp_path) == [2, 3]
    assert restored(tmp_path)[0] == 3


MANIFESTS: dict[str, Any] = {
    "another step": lambda manifest: manifest.update(step=1),
    "negative step": lambda manifest: manifest.update(step=-3),
    "no files": lambda manifest: manifest.update(files=[]),
    "no offsets": lambda manifest: manifest["files"][0].pop("offsets"),
    "unknown type": lambda manifest: manifest["files"][0]["tensors"].update({"history.loss": [[1], "torch.float99"]}),
    "another file": lambda manifest: manifest["files"][0].update(file="/etc/passwd"),
    "no hash": lambda manifest: manifest.pop("sha256"),
    "another hash": lambda manifest: manifest.update(sha256="0" * 64),
}


@pytest.mark.parametrize("change", MANIFESTS.values(), ids=MANIFESTS)
def test_a_changed_manifest_is_damaged(tmp_path: Path, change: Any) -> None:
    saved_run(tmp_path, 1, 2)
    path = tmp_path / "checkpoints" / "step-00000002" / shards.MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.warns(DamagedShardWarning, match=r"step-00000002/checkpoint\.json' is damaged.* of step 1 is taken$"):
        assert restored(tmp_path)[0] == 1


def test_a_checkpoint_under_another_name_is_damaged(tmp_path: Path) -> None:
    saved_run(tmp_path, 1, 2)
    (tmp_path / "checkpoints" / "step-00000002").rename(tmp_path / "checkpoints" / "step-00000005")
    with pytest.warns(DamagedShardWarning, match="step-00000005"):
        assert restored(tmp_path)[0] == 1


def test_nothing_whole_is_refused(tmp_path: Path) -> None:
    saved_run(tmp_path, 1)
    (tmp_path / "checkpoints" / "step-00000001" / shards.MANIFEST).write_text("[]")
    with pytest.raises(ArgumentError, match=r"has no whole checkpoint: file='.*checkpoint\.json' is damaged"):
        restored(tmp_path)


def test_another_run_is_refused(tmp_path: Path) -> None:
    saved_run(tmp_path, 1)

    def opened(spec: Any = SPEC, config: Any = CONFIG, corpus: Any = CORPUS) -> None:
        RunDirectory(tmp_path, spec, config, corpus, ONE).close()

    with pytest.raises(ArgumentError, match=r"holds a run with config\.seed=0; expected 1$") as kept:
        opened(config=dataclasses.replace(CONFIG, seed=1))
    with pytest.raises(ArgumentError, match=r"holds a run with spec\.n_layers=2; expected 3$"):
        opened(spec=SPEC.with_fields(n_layers=3))
    with pytest.raises(ArgumentError, match=r"holds a run with corpus\.sha256='0+'; expected '1'$"):
        opened(corpus=dataclasses.replace(CORPUS, sha256="1"))
    with pytest.raises(ArgumentError, match=r"holds a run with corpus\.document_end=0; expected 1$"):
        opened(corpus=dataclasses.replace(CORPUS, document_end=1))
    opened(config=dataclasses.replace(CONFIG, micro_batch_size=2, parallel="fsdp", checkpoint_every=7))
    opened(config=dataclasses.replace(CONFIG, corpus="another path"), corpus=dataclasses.replace(CORPUS, name="path"))
    del kept  # the traceback of a refused run does not hold the lock
    other = tmp_path / "other"
    saved_run(other, 1)
    folder = other / "checkpoints" / "step-00000001"
    manifest = json.loads((folder / shards.MANIFEST).read_text())
    manifest["run"]["config"]["seed"] = 5  # as if copied from another run
    shards.write_manifest(folder, 1, manifest["run"], manifest["files"])
    with pytest.raises(ArgumentError, match=r"holds a run with config\.seed=5; expected 0$"):
        restored(other)


def test_a_run_keeps_the_tokenizer_of_its_corpus(tmp_path: Path) -> None:
    source, folder = tmp_path / "source.json", tmp_path / "run"
    source.write_text("{}")
    corpus = dataclasses.replace(CORPUS, tokenizer=source)
    RunDirectory(folder, SPEC, CONFIG, corpus, ONE).close()
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert json.loads((folder / "run.json").read_text())["corpus"]["document_end"] == 0
    source.unlink()
    with pytest.raises(ArgumentError, match=r"tokenizer\.json' cannot be written \(No such file"):
        RunDirectory(tmp_path / "other", SPEC, CONFIG, corpus, ONE).close()
    assert not (tmp_path / "other" / "run.json").exists()  # a run without its tokenizer is none
    RunDirectory(folder, SPEC, CONFIG, corpus, ONE).close()


def test_one_run_at_a_time(tmp_path: Path) -> None:
    run = Run(ONE)
    with (
        run.directory(tmp_path),
        pytest.raises(ArgumentError, match=r"^run_dir='.*' is in use by another run; expected one at a time$"),
    ):
        run.directory(tmp_path)
    run.directory(tmp_path).close()


def test_damaged_run_directories(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"has no model\.safetensors"):
        load_model(tmp_path)
    for path in ("", "a\0b"):
        for call in (load_model, lambda path: RunDirectory(path, SPEC, CONFIG, CORPUS, ONE)):
            with pytest.raises(ArgumentError, match=r"^run_dir=.* is no path; expected the path of a folder$"):
                call(path)
    run = saved_run(tmp_path, 1)
    with run.directory(tmp_path) as directory:
        directory.finish(run.model)
    assert equal(dict(load_model(tmp_path).state_dict()), dict(run.model.transformer.state_dict()))  # type: ignore[operator, union-attr]
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ArgumentError, match=r"model\.safetensors' is truncated or damaged"):
        load_model(tmp_path)
    state = run.model.transformer.state_dict()  # type: ignore[union-attr, operator]
    good = {"spec": SPEC.to_dict(), "seed": 0}
    bad = [[], {"spec": good["spec"]}, good | {"seed": "x"}, good | {"spec": {}}, good | {"seed": -1}]
    for metadata in bad:
        save_file(dict(state), tmp_path / "model.safetensors", {"varprop": json.dumps(metadata)})
        with pytest.raises(ArgumentError, match=r"model\.safetensors' is truncated or damaged; expected .*run$"):
            load_model(tmp_path)
    deeper = good | {"spec": SPEC.with_fields(n_layers=3).to_dict()}
    save_file(dict(state), tmp_path / "model.safetensors", {"varprop": json.dumps(deeper)})
    with pytest.raises(ArgumentError, match=r"^weights are not those of the spec \(.*\); expected a whole model$"):
        load_model(tmp_path)
    description = tmp_path / "run.json"
    for content, message in (("{", r"run\.json' is damaged"), ("[]", "holds a run with")):
        description.write_text(content)
        with pytest.raises(ArgumentError, match=message):
            run.directory(tmp_path)
    with pytest.raises(ArgumentError, match="cannot be made"):
        run.directory(description / "below")
    description.unlink()
    with pytest.raises(ArgumentError, match=r"has checkpoints without run\.json; expected a whole run directory$"):
        run.directory(tmp_path)


@pytest.mark.gpu
def test_the_copy_on_cuda_is_of_that_moment(tmp_path: Path) -> None:
    """Copies to pinned memory are queued, then the weights change: the file has them as they were."""
    config = dataclasses.replace(CONFIG, device="cuda")
    world = World.start(config)
    run = Run(world, config).steps(0, 1)
    expected = run.state()
    with run.directory(tmp_path) as directory:
        run.save(directory, 1)
        run.steps(1, 3)
    again = Run(world, config)
    with again.directory(tmp_path) as directory:
        assert again.restore(directory) == 1
    assert equal(again.state(), expected)
