"""What ends a run before its time, how it goes on, what it starts from, and its logs."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from varprop import results
from varprop.errors import ArgumentError, Stopped
from varprop.nn import Transformer
from varprop.spec import ModelSpec, MoESpec
from varprop.train import TrainConfig, fit, load_model
from varprop.train.checkpoint import goes_on_alone
from varprop.train.trainer import Trainer

MOE: dict[str, Any] = {"feed_forward": None, "moe": MoESpec(n_experts=4, top_k=2, d_expert=16, router_bias=True)}
NO_CUDA = not torch.cuda.is_available()
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(NO_CUDA, reason="needs a CUDA device")])


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def weights(run_dir: Path) -> dict[str, Tensor]:
    return dict(load_model(run_dir).state_dict())


def before_update(monkeypatch: pytest.MonkeyPatch, step: int, act: Any) -> None:
    """Call act(trainer) once, before update number `step`."""
    update = Trainer.update

    def changed(self: Trainer, at: int) -> Tensor:
        if at == step:
            act(self)
        return update(self, at)

    monkeypatch.setattr(Trainer, "update", changed)


# Stops ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("changes", [{}, MOE], ids=["dense", "mixture"])
def test_a_signal_saves_the_state_and_the_run_goes_on(
    spec: ModelSpec,
    config: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    changes: dict[str, Any],
    device: str,
) -> None:
    """Between two checkpoints: nothing is computed twice, and weights, records and logs are the undisturbed run's."""
    spec = spec.with_fields(changes)
    config = dataclasses.replace(
        config, checkpoint_every=100, probe_every=3, record_every=1, device=device, deterministic=device == "cuda"
    )
    undisturbed = fit(spec, config, run_dir=tmp_path / "whole", logs=["jsonl"])
    stopped = tmp_path / "stopped"
    line = rf"^stopped before update 6 of 10; the same call goes on from '{stopped}'$"
    with monkeypatch.context() as patch:
        before_update(patch, 5, lambda _: os.kill(os.getpid(), number))
        with pytest.raises(Stopped, match=line):
            fit(spec, config, run_dir=stopped, logs=["jsonl"])
    assert not (stopped / "model.safetensors").exists()
    steps: list[int] = []
    update = Trainer.update
    monkeypatch.setattr(Trainer, "update", lambda self, step: steps.append(step) or update(self, step))
    resumed = fit(spec, config, run_dir=stopped, logs=["jsonl"])
    assert steps == [6, 7, 8, 9]
    assert results.identical(resumed, undisturbed)
    assert equal(weights(stopped), weights(tmp_path / "whole"))
    assert logged(stopped) == logged(tmp_path / "whole")


def test_a_signal_without_a_run_directory(
    spec: ModelSpec, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_update(monkeypatch, 2, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped, match=r"^stopped before update 3 of 10; .*") as error:
        fit(spec, config)
    assert "\n" not in str(error.value)


def stop_files(run_dir: Path, spec: ModelSpec) -> list[int]:
    """The records of a run that failed, whose weights load; it has no result."""
    assert not (run_dir / "model.safetensors").exists()
    Transformer(spec).load_state_dict(load_file(run_dir / "stopped.safetensors"))
    recorded = results.load(run_dir / "stopped.nc")
    assert recorded.attrs["end_condition"].startswith("stopped at step ")
    assert np.isfinite(recorded.train_loss).all()
    return recorded.step.values.tolist()


@pytest.mark.parametrize("changes", [{}, MOE], ids=["dense", "mixture"])
def test_a_loss_that_rises_too_much(
    spec: ModelSpec, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    spec, config = spec.with_fields(changes), dataclasses.replace(config, n_steps=14, record_every=1, max_loss_rise=2.0)

    def spoil(trainer: Trainer) -> None:
        trainer.plain.transformer.get_parameter("embed").data.mul_(30)  # also the unembedding: logits 30 times as large

    before_update(monkeypatch, 10, spoil)
    line = (
        r"^train_loss=[\d.]+ at step 11 is more than max_loss_rise=2 above the mean of the records before, [\d.]+; "
        rf"expected a smaller rise \(learning_rate=[\d.]+ there\); weights and statistics up to there: '{tmp_path}/stop"
    )
    with pytest.raises(ArgumentError, match=line) as error:
        fit(spec, config, run_dir=tmp_path)
    assert "\n" not in str(error.value)
    assert stop_files(tmp_path, spec) == list(range(11))
    monkeypatch.undo()
    monkeypatch.delenv("VARPROP_CORPUS", raising=False)
    ds = fit(spec, config, run_dir=tmp_path)  # from the checkpoint before
    assert results.identical(ds, fit(spec, config))
    before_update(monkeypatch, 10, spoil)
    assert float(fit(spec, dataclasses.replace(config, max_loss_rise=None)).train_loss[0, 11]) > 10
    monkeypatch.undo()
    monkeypatch.delenv("VARPROP_CORPUS", raising=False)
    before_update(monkeypatch, 8, spoil)
    early = dataclasses.replace(config, n_steps=9)  # fewer than ten records to compare with
    assert float(fit(spec, early).train_loss[0, 9]) > 10


@pytest.mark.parametrize("record_every", [1, 100])
def test_diverging_run_stops_with_one_line(
    spec: ModelSpec, config: TrainConfig, tmp_path: Path, record_every: int
) -> None:
    config = dataclasses.replace(config, learning_rate=1e30, record_every=record_every, clip_norm=None)
    config = dataclasses.replace(config, max_loss_rise=None)
    with pytest.raises(ArgumentError, match=r"^loss or gradient at step \d+ is not finite; expected") as error:
        fit(spec, config, run_dir=tmp_path)
    assert "\n" not in str(error.value)
    assert stop_files(tmp_path, spec)[0] == 0
    with pytest.raises(ArgumentError, match=r"is not finite; expected a finite one \(learning_rate=.* there\)$"):
        fit(spec, config)


# What a run starts from -----------------------------------------------------------------------------------------------


def test_a_run_from_given_tensors(spec: ModelSpec, config: TrainConfig, tmp_path: Path) -> None:
    """It is known by them: another start is another run; its checkpoints go on without them."""
    given = dict(Transformer(spec, seed=9).state_dict())
    kept = {name: tensor.clone() for name, tensor in given.items()}
    ds = fit(spec, config, run_dir=tmp_path / "run", initial=given)
    assert equal(given, kept)
    from_seed = fit(spec, dataclasses.replace(config, seed=9))
    np.testing.assert_array_equal(ds.weight_rms.sel(probe_step=0), from_seed.weight_rms.sel(probe_step=0))
    assert len(ds.attrs["initial"]) == 64
    assert results.identical(fit(spec, config, run_dir=tmp_path / "run", initial=given), ds)
    for path in (tmp_path / "run").glob("checkpoints/*"):
        shutil.rmtree(path)
    for other in (None, given | {"embed": given["embed"] + 1}):
        with pytest.raises(ArgumentError, match=r"holds a run with initial='[0-9a-f]{64}'; expected '"):
            fit(spec, config, run_dir=tmp_path / "run", initial=other)
    with pytest.raises(ArgumentError, match=r"^initial\.embed=\(1, 16\) is not that of the spec; expected \(32, 16\)$"):
        fit(spec, config, run_dir=tmp_path / "other", initial=given | {"embed": given["embed"][:1]})
    assert not (tmp_path / "other").exists()


def test_a_run_in_deterministic_mode(
    spec: ModelSpec, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    before_update(monkeypatch, 0, lambda _: seen.append(torch.are_deterministic_algorithms_enabled()))
    spec = spec.with_fields(MOE)
    ds = fit(spec, config, run_dir=tmp_path)
    again = fit(spec, dataclasses.replace(config, deterministic=True), run_dir=tmp_path / "other")
    assert seen == [False, True]
    assert not torch.are_deterministic_algorithms_enabled()
    assert ds.drop_attrs().equals(again.drop_attrs())


# Logs -----------------------------------------------------------------------------------------------------------------


def logged(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of log.jsonl without what depends on the time or on what the process did before."""
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name.split("/")[0] not in ("throughput", "time", "memory")}
        for line in lines
    ]


def test_log_lines(spec: ModelSpec, config: TrainConfig, tmp_path: Path) -> None:
    ds = fit(spec, dataclasses.replace(config, evaluate_every=8), run_dir=tmp_path, logs=["jsonl"])
    expected: list[dict[str, Any]] = []
    for step in (0, 4, 8, 10):
        if step in (0, 8, 10):
            losses = ds.validation_loss.sel(evaluation_step=step)[0]
            names = [f"validation/loss_{name}" for name in ds.evaluation.values]
            expected.append({"step": step, **dict(zip(names, losses.values.tolist(), strict=True))})
        at = ds.sel(step=step, seed=0)
        values = {
            "train/loss": float(at.train_loss),
            "train/gradient_norm": float(at.gradient_norm),
            "train/learning_rate": float(at.learning_rate),
            "stream/variance_last_layer": float(at.variance.sel(layer=2, site="resid_post")),
        }
        expected.append({"step": step, **values})
    assert logged(tmp_path) == expected
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    speeds = [line["throughput/tokens_per_s"] for line in lines if "throughput/tokens_per_s" in line]
    assert len(speeds) == 3  # not of the first record
    assert min(speeds) > 0


def test_unknown_log(spec: ModelSpec, config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"^log='paper' is unknown; expected one of console, jsonl"):
        fit(spec, config, run_dir=tmp_path, logs=["paper"])
    with pytest.raises(ArgumentError, match=r"^log='jsonl' is given without a run directory"):
        fit(spec, config, logs=["jsonl"])


def test_bad_input_makes_no_run_directory(
    spec: ModelSpec, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    run_dir = tmp_path / "run"
    for logs, changes in (
        (["paper"], {}),
        (["wandb"], {}),
        ([], {"micro_batch_size": 3}),
        ([], {"n_tokens": 250}),
        ([], {"corpus": "nowhere"}),
        ([], {"device": "meta"}),
    ):
        with pytest.raises(ArgumentError):
            fit(spec, dataclasses.replace(config, **changes), run_dir=run_dir, logs=logs)
    with pytest.raises(ArgumentError, match=r"^initial\."):
        fit(spec, config, run_dir=run_dir, initial={})
    for path in ("", "a\0b"):
        with pytest.raises(ArgumentError, match=r"^run_dir=.* is no path; expected the path of a folder$"):
            fit(spec, config, run_dir=path)
    assert list(tmp_path.iterdir()) == []


def test_a_loss_between_records_that_is_not_finite_is_not_saved(
    spec: ModelSpec, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saves at 3 and 6, a record at 4: the weights are spoilt after it."""

    def spoil(trainer: Trainer) -> None:
        trainer.plain.transformer.get_parameter("final_norm.gain").data.fill_(float("nan"))

    undisturbed = fit(spec, config)
    every = dataclasses.replace(config, record_every=100, probe_every=100, evaluate_every=100)
    before_update(monkeypatch, 4, spoil)
    with pytest.raises(ArgumentError, match=r"^loss or gradient at step 5 is not finite; .*stopped"):
        fit(spec, every, run_dir=tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
    monkeypatch.undo()
    monkeypatch.delenv("VARPROP_CORPUS", raising=False)
    assert (tmp_path / "stopped.safetensors").exists()
    ds = fit(spec, every, run_dir=tmp_path)
    assert ds.train_loss[0, -1] == undisturbed.train_loss[0, -1]
    assert not list(tmp_path.glob("stopped.*"))  # what is left of the attempt before goes with the end


def test_a_run_from_given_tensors_goes_on_without_them(
    spec: ModelSpec, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    initial = Transformer(spec, seed=7).state_dict()
    undisturbed = fit(spec, config, initial=initial)
    assert not goes_on_alone(tmp_path)
    with monkeypatch.context() as patch:
        before_update(patch, 5, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped):
            fit(spec, config, run_dir=tmp_path, initial=initial)
    assert goes_on_alone(tmp_path)
    other = Transformer(spec, seed=8).state_dict()
    with pytest.raises(ArgumentError, match=r"holds a run with initial="):
        fit(spec, config, run_dir=tmp_path, initial=other)
    assert results.identical(fit(spec, config, run_dir=tmp_path), undisturbed)


def test_the_same_corpus_by_another_path_is_the_same_run(spec: ModelSpec, config: TrainConfig, tmp_path: Path) -> None:
    ds = fit(spec, config, run_dir=tmp_path / "run")
    copied = shutil.copy(config.corpus, tmp_path / "copy.u16")
    again = fit(spec, dataclasses.replace(config, corpus=str(copied)), run_dir=tmp_path / "run")
    np.testing.assert_array_equal(ds.train_loss, again.train_loss)
    assert not goes_on_alone(tmp_path / "run")


# Micro-batches, documents ---------------------------------------------------------------------------------------------


def test_micro_batches_train_alike_and_may_change_on_resume(
    spec: ModelSpec, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fit(spec, config)
    divided = dataclasses.replace(config, micro_batch_size=2)
    with monkeypatch.context() as patch:
        before_update(patch, 5, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped):
            fit(spec, divided, run_dir=tmp_path)
    ds = fit(spec, dataclasses.replace(config, micro_batch_size=1), run_dir=tmp_path)
    # ten updates of a float32 network: sums in another order, amplified by training
    for name in ("train_loss", "gradient_norm", "variance", "validation_loss"):
        np.testing.assert_allclose(ds[name], whole[name], rtol=1e-4)
    line = "^micro_batch_size=3 is not a divisor; expected a divisor of the 4 sequences of a process$"
    with pytest.raises(ArgumentError, match=line):
        fit(spec, dataclasses.replace(config, micro_batch_size=3), run_dir=tmp_path / "other")


def test_document_mask_needs_a_corpus_that_knows_its_documents(spec: ModelSpec, config: TrainConfig) -> None:
    with pytest.raises(ArgumentError, match=r"^document_mask=True is not possible; expected a corpus that says what"):
        fit(spec, dataclasses.replace(config, document_mask=True))
