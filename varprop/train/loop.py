"""`fit`: train the network of a spec and return what was recorded on the way.

State `s` is the network after s updates. It is recorded, where it is, in the forward pass of batch s, before that
batch's update; the last state is recorded on batch n_steps, which makes no update.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from varprop import results
from varprop.corpus import load_corpus
from varprop.errors import ArgumentError, Stopped
from varprop.spec import ModelSpec
from varprop.train import budget, log
from varprop.train.check import check_run
from varprop.train.checkpoint import RunDirectory
from varprop.train.config import TrainConfig
from varprop.train.data import batches
from varprop.train.distributed import World
from varprop.train.signals import stop_on_signals
from varprop.train.track import EVALUATIONS, Fetcher, History, dataset
from varprop.train.trainer import Trainer, deterministic_kernels, is_finite

RISE_WINDOW = 50
"""Records whose mean a loss is compared with by `max_loss_rise`."""
RISE_RECORDS = 10
"""Records that must be there before a loss is compared."""


def fit(
    spec: ModelSpec,
    config: TrainConfig | None = None,
    *,
    run_dir: str | Path | None = None,
    corpus_dir: str | Path | None = None,
    initial: Mapping[str, Tensor] | None = None,
    logs: Sequence[str] = (),
    progress: bool = True,
) -> xr.Dataset:
    """Train the network of `spec` and return its statistics by step: a Dataset with source="training".

    Along `step`, in the forward pass of the training batch and before the final norm: variance, second_moment (seed,
    step, layer, site), branch_correlation (seed, step, layer, branch), train_loss (nats per token), gradient_norm,
    learning_rate, tokens_seen; of a mixture gate_second_moment, expert_load, load_balance_loss, router_z_loss. Along
    `probe_step`: the variables of `train.probe` and `train.weights`. Along `evaluation_step`: validation_loss (nats per
    token) and bits_per_byte at the fixed evaluation length and at the training length.

    run_dir: where checkpoints and the final weights are kept; the same call resumes a killed run, on a CPU bitwise as
    if it had not been killed (with config.deterministic it is meant to on one GPU too). corpus_dir: of `load_corpus`.
    initial: tensors by the names of the network's state to start from, such as `train.grow` makes; not needed where
    run_dir has a checkpoint. logs: of `train.log.NAMES`.
    progress: the console log where stderr is a terminal. Under torchrun all processes train together.
    Raises `ArgumentError` for bad input, a run directory of another run, a loss that is not finite or rises by more
    than config.max_loss_rise (then `run_dir` holds `stopped.nc` and `stopped.safetensors`), and `Stopped` after a
    signal that asks to end, when the state is saved.
    """
    config = config or TrainConfig()
    with ExitStack() as stack:
        world = stack.enter_context(World.start(config))
        stack.enter_context(deterministic_kernels(config.deterministic))
        stop_requested = stack.enter_context(stop_on_signals())
        names = _names(logs, progress)
        with world.raise_together():
            log.check_names(names, run_dir)
            corpus = load_corpus(config.corpus, corpus_dir)
            check_run(spec, config, corpus, world.size)
        trainer = Trainer(spec, config, corpus, world, initial)
        run = None
        if run_dir is not None:
            run = stack.enter_context(RunDirectory(run_dir, spec, config, corpus, world, _fingerprint(initial)))
        return _Loop(trainer, run, names, stop_requested, run.initial if run else _fingerprint(initial)).run()


def _names(logs: Sequence[str], progress: bool) -> tuple[str, ...]:
    shown = progress and sys.stderr.isatty() and "console" not in logs
    return ("console", *logs) if shown else tuple(logs)


def _fingerprint(initial: Mapping[str, Tensor] | None) -> str:
    """Of the tensors that a run starts from, empty for those that its seed draws."""
    if initial is None:
        return ""
    digest = hashlib.sha256()
    for name in sorted(initial):
        digest.update(name.encode())
        digest.update(initial[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class _Loop:
    """One call of `fit`: the steps, and what is measured, logged and saved between them."""

    def __init__(
        self,
        trainer: Trainer,
        run: RunDirectory | None,
        logs: Sequence[str],
        stop_requested: Callable[[], bool],
        fingerprint: str,
    ) -> None:
        self._trainer, self._run, self._fingerprint = trainer, run, fingerprint
        self._stop_requested = stop_requested
        self._config, self._world = trainer.config, trainer.world
        restored = None if run is None else run.restore(trainer.model, trainer.optimizer)
        self._start, arrays = restored or (0, {})
        self._last: dict[str, Tensor] = {}  # loss and gradient norm of the last step
        self._history, self._fetcher = History.from_arrays(arrays), Fetcher()
        with self._world.raise_together():
            wanted = logs if self._world.is_main else ()
            path = None if run is None else run.path
            self._logs = log.loggers(wanted, path, self._start, n_steps=trainer.n_steps)
        self._timer = _Timer(self._start)

    def run(self) -> xr.Dataset:
        """The steps from where the run stands to its end."""
        trainer, config, corpus = self._trainer, self._config, self._trainer.corpus
        rows = slice(trainer.rows.start, trainer.rows.stop)
        stream = batches(
            corpus,
            config.seed,
            config.batch_size,
            config.n_tokens,
            first_step=self._start,
            device=self._world.device,
            rows=rows,
        )
        try:
            with stream as tokens:
                for step in range(self._start, trainer.n_steps + 1):
                    self._save_if_due(step)
                    self._step(step, next(tokens))
                    on_cpu = self._world.device.type == "cpu"
                    self._take(None if on_cpu or step == trainer.n_steps else step)
        finally:
            for each in self._logs:
                each.close()
        if self._run is not None:
            self._run.finish(trainer.model)
            if self._world.is_main:
                for name in ("stopped.nc", "stopped.safetensors"):  # of an attempt before
                    (self._run.path / name).unlink(missing_ok=True)
            if self._start <= trainer.n_steps:  # nothing is left to do
                self._run.save(trainer.n_steps + 1, trainer.model, trainer.optimizer, self._history.arrays())
                self._run.wait()
        return self._dataset()

    def _step(self, step: int, tokens: Tensor) -> None:
        trainer, last = self._trainer, step == self._trainer.n_steps
        due = {
            name: last or step % getattr(self._config, f"{name}_every") == 0 for name in ("record", "probe", "evaluate")
        }
        record = trainer.forward_backward(tokens, any(due.values()))
        if due["evaluate"] or due["probe"]:
            with self._timer.pause():
                self._measure(step, due, record)
        before = trainer.snapshot() if due["probe"] and not last else None
        norm = trainer.gradient_norm() if last else trainer.update(step)
        if before is not None:
            self._history.append("update_step", step, trainer.update_ratios(before))
        if due["record"]:
            self._fetcher.put(step, {**record, "gradient_norm": norm})
        self._last = {"train_loss": record["train_loss"], "gradient_norm": norm}

    def _measure(self, step: int, due: Mapping[str, bool], record: Mapping[str, Tensor]) -> None:
        self._take()
        losses = {"train_loss": record["train_loss"], "gradient_norm": self._trainer.gradient_norm()}
        self._require_good(step, {name: value.cpu().numpy() for name, value in losses.items()})
        if due["probe"]:
            self._history.append("probe_step", step, self._trainer.probe())
        if due["evaluate"]:
            losses = self._trainer.evaluate()
            self._history.append("evaluation_step", step, losses)
            pairs = zip(EVALUATIONS, losses["validation_loss"], strict=True)
            self._write(step, {f"validation/loss_{name}": float(loss) for name, loss in pairs})

    # Between steps ----------------------------------------------------------------------------------------------------

    def _save_if_due(self, step: int) -> None:
        stopping = self._is_stopping()
        if self._run is not None and step > self._start and (stopping or step % self._config.checkpoint_every == 0):
            self._take()
            self._require_finite(step - 1)
            self._run.save(step, self._trainer.model, self._trainer.optimizer, self._history.arrays())
        if stopping:
            where = "nothing is saved without a run directory"
            if self._run is not None:
                self._run.wait()
                where = f"the same call goes on from {str(self._run.path)!r}"
            raise Stopped(f"stopped before update {step} of {self._trainer.n_steps}; {where}")

    def _is_stopping(self) -> bool:
        # At every step: torchrun kills what has not ended after 30 s. The answer takes a fraction of a millisecond.
        return self._world.any(self._stop_requested())

    def _take(self, before: int | None = None) -> None:
        """Put the records of the steps below `before`, or all, into the history and the logs; look at the losses.

        Which ones does not depend on when they come: all processes find a bad loss at the same step.
        """
        for step, record in self._fetcher.take(before):
            self._require_good(step, record)
            self._history.append("step", step, record)
            self._write(step, self._values(step, record))

    def _require_good(self, step: int, record: Mapping[str, np.ndarray]) -> None:
        problem = self._problem(step, record)
        if problem:
            raise ArgumentError(problem + self._keep_stopped(step))

    def _require_finite(self, step: int) -> None:
        """Look at the step before a save, recorded or not: what is kept can be trained on."""
        good = is_finite({name: value.cpu().numpy() for name, value in self._last.items()})
        if self._world.any(not good):
            raise ArgumentError(self._not_finite(step) + self._keep_stopped(step))

    def _not_finite(self, step: int) -> str:
        rate = self._trainer.learning_rate(step)
        return f"loss or gradient at step {step} is not finite; expected a finite one (learning_rate={rate:g} there)"

    def _problem(self, step: int, record: Mapping[str, np.ndarray]) -> str:
        rate = self._trainer.learning_rate(step)
        if not is_finite(record):
            return self._not_finite(step)
        before = self._history.of("train_loss")[-RISE_WINDOW:]
        limit, loss = self._config.max_loss_rise, float(record["train_loss"])
        if limit is None or len(before) < RISE_RECORDS or loss <= float(np.mean(before)) + limit:
            return ""
        return (
            f"train_loss={loss:.4g} at step {step} is more than max_loss_rise={limit:g} above the mean of the records "
            f"before, {float(np.mean(before)):.4g}; expected a smaller rise (learning_rate={rate:g} there)"
        )

    def _keep_stopped(self, step: int) -> str:
        """Keep what a failed run has come to; what the line of the failure says of it."""
        if self._run is None:
            return ""
        weights = self._run.path / "stopped.safetensors"
        self._run.finish(self._trainer.model, weights)
        if self._world.is_main and self._history.steps["step"]:
            results.save(self._dataset(f"stopped at step {step}"), self._run.path / "stopped.nc")
        return f"; weights and statistics up to there: {str(self._run.path / 'stopped.*')!r}"

    def _values(self, step: int, record: Mapping[str, np.ndarray]) -> dict[str, float]:
        values = {
            log.LOSS: float(record["train_loss"]),
            "train/gradient_norm": float(record["gradient_norm"]),
            "train/learning_rate": self._trainer.learning_rate(step),
            "stream/variance_last_layer": float(record["variance"][-1, -1]),
        }
        speed = self._timer.steps_per_second(step)
        if speed is not None:
            tokens_per_s = speed * self._config.tokens_per_step
            values[log.SPEED] = tokens_per_s
            cuda = self._world.device.type == "cuda"
            name = torch.cuda.get_device_name(self._world.device) if cuda else "cpu"
            spec, length = self._trainer.spec, self._config.n_tokens
            share = budget.mfu(spec, length, tokens_per_s, name, self._world.size)
            if share is not None:
                values[log.MFU] = share
            if cuda:
                values["memory/peak_gib"] = torch.cuda.max_memory_allocated(self._world.device) / 2**30
        return values

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        for each in self._logs:
            each.write(step, values)

    def _dataset(self, end_condition: str = "complete") -> xr.Dataset:
        trainer = self._trainer
        about: dict[str, Any] = {
            "n_steps": trainer.n_steps,
            "device": self._world.device.type,
            "dtype": str(trainer.dtype).removeprefix("torch."),
            "attributes": {"initial": self._fingerprint},
        }
        return dataset(self._history, trainer.spec, self._config, trainer.corpus, end_condition=end_condition, **about)


class _Timer:
    """Steps per second between records, without the pauses of measurements."""

    def __init__(self, step: int) -> None:
        self._step, self._since, self._paused = step, time.monotonic(), 0.0

    def pause(self) -> ExitStack:
        """A context whose time does not count."""
        stack, began = ExitStack(), time.monotonic()
        stack.callback(lambda: setattr(self, "_paused", self._paused + time.monotonic() - began))
        return stack

    def steps_per_second(self, step: int) -> float | None:
        """Since the record before; None for the first one."""
        now = time.monotonic()
        seconds, steps = now - self._since - self._paused, step - self._step
        self._step, self._since, self._paused = step, now, 0.0
        return steps / seconds if steps > 0 and seconds > 0 else None
