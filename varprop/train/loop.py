"""`fit`: train the network of a spec and return what was recorded on the way.

State `s` is the network after s updates. It is recorded, where it is, in the forward pass of batch s, before that
batch's update; the last state is recorded on batch n_steps, which makes no update.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import xarray as xr
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from varprop.corpus import Corpus, load_corpus
from varprop.errors import ArgumentError, require
from varprop.nn import Transformer
from varprop.spec import ModelSpec
from varprop.train import budget, optim
from varprop.train.checkpoint import RunDirectory
from varprop.train.config import TrainConfig
from varprop.train.data import batch, validation_batches
from varprop.train.loss import chunk_size, chunked_mean_loss

sum_of_losses = None
from varprop.train.track import History, Tracker, dataset


def fit(
    spec: ModelSpec,
    config: TrainConfig | None = None,
    *,
    run_dir: str | Path | None = None,
    corpus_dir: str | Path | None = None,
    progress: bool = True,
) -> xr.Dataset:
    """Train the network of `spec` and return its statistics by step: a Dataset with source="training".

    Variables: variance, second_moment, token_correlation (seed, step, layer, site), branch_correlation (seed, step,
    layer, branch), all in the forward pass of the training batch and before the final norm; train_loss,
    validation_loss (nats per token), bits_per_byte, learning_rate, gradient_norm, tokens_seen (seed, step).

    run_dir: where checkpoints and the final weights are kept; the same call resumes a killed run, on a CPU bitwise as
    if it had not been killed. corpus_dir: of `load_corpus`. progress: a bar on stderr where that is a terminal.
    Raises `ArgumentError` for bad input, a run directory of another run, and a loss that is not finite.
    """
    config = config or TrainConfig()
    corpus = load_corpus(config.corpus, corpus_dir)
    fits = corpus.vocab_size <= spec.vocab_size
    expected = f"a vocab_size of at least {corpus.vocab_size}, that of the corpus {corpus.name}"
    require(fits, ArgumentError, "vocab_size", spec.vocab_size, "too small", expected)
    trainer = Trainer(spec, config, corpus)
    run = None if run_dir is None else RunDirectory(run_dir, spec, config, corpus)
    start, history = (0, History()) if run is None else run.restore(trainer.model, trainer.optimizer)
    with _progress_bar(trainer.n_steps, progress) as show:
        for step in range(start, trainer.n_steps + 1):
            if run is not None and step % config.checkpoint_every == 0 and step > start:
                trainer.require_finite()
                run.save(step, trainer.model, trainer.optimizer, history)
            recording = step % config.record_every == 0 or step == trainer.n_steps
            record = trainer.forward_backward(step, recording)
            if recording:
                trainer.require_finite()
                history.append(step, record)
            if step < trainer.n_steps:
                trainer.update(step)
            show(step, history)
    if run is not None and start <= trainer.n_steps:
        run.save_model(trainer.model)
        run.save(trainer.n_steps + 1, trainer.model, trainer.optimizer, history)  # nothing is left to do
    return dataset(history, spec, config, corpus, device=trainer.device.type, dtype=trainer.dtype)


class Trainer:
    """A network, its optimiser and the two halves of a step."""

    def __init__(self, spec: ModelSpec, config: TrainConfig, corpus: Corpus) -> None:
        self.device = resolve_device(config.device)
        wide = config.precision == "float32" or (config.precision == "auto" and self.device.type == "cpu")
        self.dtype = "float32" if wide else "bfloat16"
        self.model = Transformer(spec, seed=config.seed, device=self.device)
        self.optimizer = optim.adamw(self.model, spec, config)
        self._spec, self._config, self._corpus = spec, config, corpus
        self.n_steps = budget.n_steps(config, spec)
        self._validation = validation_batches(
            corpus,
            -(-config.n_evaluation_sequences // config.batch_size),
            config.batch_size,
            config.n_tokens,
            self.device,
        )
        self._table = dict(self.model.named_parameters())["embed" if spec.tied_embeddings else "unembed"]
        self._chunk = chunk_size(self.device.type, spec.vocab_size)
        self._hidden = self.model.hidden
        self._sum_of_losses = functools.partial(sum_of_losses, self.model.unembed)
        if config.compile:
            self._hidden = torch.compile(self._hidden, dynamic=False)
            self._sum_of_losses = torch.compile(self._sum_of_losses)
        # Step of the first loss or gradient that is not finite, -1 if none: kept on the device, read at records.
        self._first_bad = torch.full((), -1, device=self.device)

    def forward_backward(self, step: int, recording: bool = False) -> dict[str, torch.Tensor]:
        """Leave the clipped gradients of batch `step` in the parameters; the record, if asked for, else empty."""
        config = self._config
        tokens = batch(self._corpus, config.seed, step, config.batch_size, config.n_tokens, self.device)
        tracker = Tracker(self._spec) if recording else None
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(tokens, tracker)
        loss.backward()
        norm = optim.clip_gradients(self.model.parameters(), config.clip_norm)
        finite = torch.isfinite(loss.detach()) & torch.isfinite(norm)
        self._first_bad = torch.where(finite | (self._first_bad >= 0), self._first_bad, step)
        if self.device.type == "cpu":
            self.require_finite()
        if tracker is None:
            return {}
        losses = {"train_loss": loss, "validation_loss": self.validation_loss(), "gradient_norm": norm}
        return {**tracker.values(), **losses}

    def update(self, step: int) -> None:
        """The update number `step`, from the gradients that are there."""
        optim.set_learning_rate(self.optimizer, optim.learning_rate(self._config, self.n_steps, step))
        self.optimizer.step()

    @torch.no_grad()
    def validation_loss(self) -> torch.Tensor:
        """Mean loss in nats per token over the fixed validation batches."""
        total = sum(self._loss(tokens).double() * len(tokens) for tokens in self._validation)
        return total / sum(map(len, self._validation))  # type: ignore[operator]

    def require_finite(self) -> None:
        """Raise `ArgumentError` if a loss or gradient so far was not finite."""
        step = int(self._first_bad)
        if step >= 0:
            rate = optim.learning_rate(self._config, self.n_steps, step)
            raise ArgumentError(
                f"loss or gradient at step {step} is not finite; expected a finite one (learning_rate={rate:g} there)"
            )

    def _loss(self, tokens: torch.Tensor, tracker: Tracker | None = None) -> torch.Tensor:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            hidden = self._hidden(inputs) if tracker is None else self.model.hidden(inputs, tracker)
            return chunked_mean_loss(self._sum_of_losses, [self._table], hidden, targets, self._chunk)


def resolve_device(name: str) -> torch.device:
    """The torch device called `name`; `auto` is CUDA where there is one. `ArgumentError` for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise ArgumentError(f"device={name!r} is not available; expected auto, cpu or a CUDA device") from None
    return device


@contextmanager
def _progress_bar(n_steps: int, wanted: bool) -> Iterator:
    """A function (step, history) that moves a bar on stderr, or does nothing where stderr is no terminal."""
    if not (wanted and sys.stderr.isatty()):
        yield lambda step, history: None
        return
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("training", total=n_steps, loss="")

        def show(step: int, history: History) -> None:
            loss = history.last("validation_loss")
            bar.update(task, completed=step, loss=f"validation loss {loss:.3f}")

        yield show
