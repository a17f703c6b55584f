"""The main job: predict, simulate, judge, train and report four variants of one small model on the embedded text."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr
from rich.console import Console

from varprop import compare, plot, presets, report, results, simulate, theory, train
from varprop.errors import ArgumentError
from varprop.spec import ModelSpec

N_TOKENS = 64
N_NETWORKS = 48
N_STEPS = 120
VARIANTS = {"dense": "tiny", "masked 1/4": "tiny_masked", "GQA 4:1": "tiny_gqa", "MoE 8/2": "tiny_moe"}
TRAINED = ("dense", "masked 1/4")


@dataclass(frozen=True)
class Outcome:
    """What the demo measured: Datasets by label, and the verdict of each pair of prediction and simulation."""

    predicted: Mapping[str, xr.Dataset]
    simulated: Mapping[str, xr.Dataset]
    checks: Mapping[str, compare.Check]
    trained: Mapping[str, xr.Dataset]


def run(
    folder: str | Path, *, n_steps: int = N_STEPS, n_networks: int = N_NETWORKS, specs: Mapping[str, ModelSpec] | None = None
) -> str:
    """Run everything, write the Datasets and `report.html` into `folder`, return one screen of findings.

    specs: label -> spec of the variants (default four variants of the preset `tiny`); the labels in `TRAINED` are
    also trained. Raises `ArgumentError` if the folder cannot be made.
    """
    started = time.monotonic()
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(f"out={str(folder)!r} cannot be made ({error.strerror}); expected a folder") from None
    variants = specs or {label: presets.get(name) for label, name in VARIANTS.items()}
    outcome = _measure(variants, target, n_steps, n_networks)
    figures_and_text = _sections(outcome)
    report.write_report(target / "report.html", "Does sparsity mitigate the curse of depth? A small answer", figures_and_text)
    lines = [*_initial_lines(outcome), "", *_trained_lines(outcome), ""]
    seconds = time.monotonic() - started
    return "\n".join([*lines, f"report and Datasets in {target}/ after {seconds:.0f} s: open {target / 'report.html'}"])


def _file_name(label: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in label.lower())


def _measure(variants: Mapping[str, ModelSpec], target: Path, n_steps: int, n_networks: int) -> Outcome:
    """The four stages; every Dataset is saved before anything is drawn."""
    console = Console(stderr=True)
    text = _text_window()
    predicted, simulated, checks, trained = {}, {}, {}, {}
    for label, spec in variants.items():
        console.print(f"[bold]{label}[/bold]: closed form and {n_networks} random networks")
        predicted[label] = theory.predict(spec, n_tokens=N_TOKENS)
        simulated[label] = simulate.sample(spec, n_networks=n_networks, n_tokens=N_TOKENS)
    label, spec = next(iter(variants.items()))
    on_text = f"{label}, real text"
    console.print(f"[bold]{on_text}[/bold]: the same for the first {N_TOKENS} tokens of the embedded text")
    same_token = (text[:, None] == text[None, :]).astype(float)
    predicted[on_text] = theory.predict(spec, n_tokens=N_TOKENS, token_correlation=same_token)
    simulated[on_text] = simulate.sample(spec, n_networks=n_networks, inputs=text)
    for label in predicted:
        checks[label] = compare.check(predicted[label], simulated[label])
        results.save(predicted[label], target / f"predicted-{_file_name(label)}.nc")
        results.save(simulated[label], target / f"simulated-{_file_name(label)}.nc")
        results.save(checks[label].dataset, target / f"check-{_file_name(label)}.nc")
    config = train.TrainConfig(n_steps=n_steps, warmup_steps=max(1, n_steps // 10), log_every=max(1, n_steps // 12))
    for label in TRAINED:
        console.print(f"[bold]{label}[/bold]: {n_steps} training steps on the embedded text")
        trained[label] = train.fit(variants[label], config)
        results.save(trained[label], target / f"trained-{_file_name(label)}.nc")
    return Outcome(predicted, simulated, checks, trained)


def _text_window() -> np.ndarray:
    """Ids of the first tokens of the embedded training text."""
    return np.asarray(train.load_corpus("embedded").train[:N_TOKENS], dtype=np.int64)


def _stream(dataset: xr.Dataset, variable: str = "second_moment") -> np.ndarray:
    """A profile over layers of the stream after each block, averaged over replicates."""
    values = dataset[variable].sel(site="resid_post")
    return values.mean([d for d in values.dims if d != "layer"]).values
