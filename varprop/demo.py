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
from varprop.corpus import load_corpus
from varprop.errors import ArgumentError
from varprop.spec import ModelSpec

N_TOKENS = 64
N_NETWORKS = 400
N_STEPS = 120
RESOLUTION = 0.1
"""Error beyond the claimed one that a verdict of the demo has to resolve in every cell."""
VARIANTS = {"dense": "tiny", "masked 1/4": "tiny_masked", "GQA 4:1": "tiny_gqa", "MoE 8/2": "tiny_moe"}
TRAINED = ("dense", "masked 1/4")
REAL_TEXT = ", real text"
TITLE = "When does sparsity mitigate the curse of depth? A small model, measured"


@dataclass(frozen=True)
class Outcome:
    """What the demo measured: Datasets by label, and the verdict of each pair of prediction and simulation."""

    predicted: Mapping[str, xr.Dataset]
    simulated: Mapping[str, xr.Dataset]
    checks: Mapping[str, compare.Check]
    trained: Mapping[str, xr.Dataset]
    expected: Mapping[str, xr.Dataset]
    """Closed form of each trained model before its first step, on the text of its first batch."""


def run(
    folder: str | Path,
    *,
    n_steps: int = N_STEPS,
    n_networks: int = N_NETWORKS,
    specs: Mapping[str, ModelSpec] | None = None,
) -> str:
    """Run everything, write the Datasets and `report.html` into `folder`, return one screen of findings.

    specs: the spec of each variant by label (default four variants of the preset `tiny`); the labels in `TRAINED` are
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
    report.write_report(target / "report.html", TITLE, _sections(outcome))
    lines = [*_table(INITIAL_HEAD, initial_rows(outcome)), "", *_table(TRAINED_HEAD, trained_rows(outcome)), ""]
    lines += [*findings(outcome), ""]
    seconds = time.monotonic() - started
    return "\n".join([*lines, f"report and Datasets in {target}/ after {seconds:.0f} s: open {target / 'report.html'}"])


def _file_name(label: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in label.lower())


def _measure(variants: Mapping[str, ModelSpec], target: Path, n_steps: int, n_networks: int) -> Outcome:
    """The four stages; every Dataset is saved before anything is drawn."""
    console = Console(stderr=True)
    text = _text_window()
    predicted, simulated, checks, trained, expected = {}, {}, {}, {}, {}
    for label, spec in variants.items():
        console.print(f"[bold]{label}[/bold]: closed form and {n_networks} random networks")
        predicted[label] = theory.predict(spec, n_tokens=N_TOKENS)
        simulated[label] = simulate.sample(spec, n_networks=n_networks, n_tokens=N_TOKENS)
    label, spec = next(iter(variants.items()))
    on_text = f"{label}{REAL_TEXT}"
    console.print(f"[bold]{on_text}[/bold]: the same for the first {N_TOKENS} tokens of the embedded text")
    predicted[on_text] = theory.predict(spec, n_tokens=N_TOKENS, token_correlation=simulate.same_token(text))
    simulated[on_text] = simulate.sample(spec, n_networks=n_networks, inputs=text)
    for label in predicted:
        checks[label] = compare.check(predicted[label], simulated[label], resolution=RESOLUTION)
        results.save(predicted[label], target / f"predicted-{_file_name(label)}.nc")
        results.save(simulated[label], target / f"simulated-{_file_name(label)}.nc")
        results.save(checks[label].dataset, target / f"check-{_file_name(label)}.nc")
    config = train.TrainConfig(n_steps=n_steps, warmup_steps=max(1, n_steps // 10), record_every=max(1, n_steps // 12))
    for label in TRAINED:
        console.print(f"[bold]{label}[/bold]: {n_steps} training steps on the embedded text")
        expected[label] = _expected_at_start(variants[label], config)
        trained[label] = train.fit(variants[label], config)
        results.save(expected[label], target / f"expected-{_file_name(label)}.nc")
        results.save(trained[label], target / f"trained-{_file_name(label)}.nc")
    return Outcome(predicted, simulated, checks, trained, expected)


def _text_window() -> np.ndarray:
    """Ids of the first tokens of the embedded training text."""
    return np.asarray(load_corpus("embedded").train[:N_TOKENS], dtype=np.int64)


def _expected_at_start(spec: ModelSpec, config: train.TrainConfig) -> xr.Dataset:
    """The closed form for the first training batch: its sequences enter through their mean token correlation."""
    ids = train.batch(load_corpus("embedded"), config.seed, 0, config.batch_size, config.n_tokens)[:, :-1]
    return theory.predict(
        spec, n_tokens=config.n_tokens, token_correlation=simulate.same_token(ids.numpy()).mean(axis=0)
    )


def _stream(dataset: xr.Dataset, variable: str = "second_moment") -> np.ndarray:
    """A profile over layers of the stream after each block, averaged over replicates."""
    values = dataset[variable].sel(site="resid_post")
    return values.mean([d for d in values.dims if d != "layer"]).values


def _block_share(dataset: xr.Dataset, layer: int = -1) -> float:
    """v / q of one layer: what its two branches add, over the stream that leaves it."""
    moments = dataset.second_moment.mean([d for d in dataset.second_moment.dims if d not in ("layer", "site")])
    added = moments.sel(site="attn_out") + moments.sel(site="mlp_out")
    return float((added / moments.sel(site="resid_post")).isel(layer=layer))


def initial_rows(outcome: Outcome) -> list[list[str]]:
    """One row a variant: predicted and simulated second moment of the last layer, block share, verdict."""
    rows = []
    for label, predicted in outcome.predicted.items():
        cell = outcome.checks[label].dataset.sel(site="resid_post").isel(layer=-1)
        rows.append(
            [
                label,
                f"{cell.prediction.item():.4g}",
                f"{cell.estimate.item():.4g} ± {1.96 * cell.stderr.item():.2g}",
                f"{100 * _block_share(predicted, 1):.1f} %",
                f"{100 * _block_share(predicted):.1f} %",
                outcome.checks[label].verdict,
            ]
        )
    return rows


def trained_rows(outcome: Outcome) -> list[list[str]]:
    """One row a trained model: last-layer second moment and block share at the start and the end, r, bits per byte."""
    rows = []
    for label, dataset in outcome.trained.items():
        start, end = results.at_step(dataset, 0), results.at_step(dataset)
        bits = [d.bits_per_byte.sel(evaluation="fixed_length").item() for d in (start, end)]
        correlation = [float(d.branch_correlation.isel(layer=slice(1, None)).mean()) for d in (start, end)]
        rows.append(
            [
                label,
                f"{_stream(start)[-1]:.4g} → {_stream(end)[-1]:.4g}",
                f"{100 * _block_share(start):.1f} → {100 * _block_share(end):.1f} %",
                f"{round(correlation[0], 2) + 0.0:.2f} → {round(correlation[1], 2) + 0.0:.2f}",
                f"{bits[0]:.2f} → {bits[1]:.2f}",
            ]
        )
    return rows


INITIAL_HEAD = [
    "variant",
    "predicted q_L",
    "simulated q_L (95 %)",
    "share v/q layer 1",
    "share v/q last layer",
    "verdict",
]
TRAINED_HEAD = ["trained", "q_L start → end", "share v/q last layer", "branch correlation r", "bits per byte"]


def findings(outcome: Outcome) -> list[str]:
    """What the numbers of this run say, sentence by sentence; every sentence is computed."""
    dense, sparse = (outcome.predicted[label] for label in TRAINED)
    growth = [_stream(d)[-1] / _stream(d)[0] for d in (dense, sparse)]
    shares = [(_block_share(d, 1), _block_share(d)) for d in (dense, sparse)]
    less, shallower = growth[1] < growth[0], shares[1][1] < shares[0][1]
    first = (
        f"At initialisation an unrescaled weight mask of density 1/4 {'lowers' if less else 'raises'} q_L/q_0 from "
        f"{growth[0]:.3g} to {growth[1]:.3g}, as smaller initial weights would. The share v/q of a block goes from "
        f"{100 * shares[0][0]:.1f} % in layer 1 to {100 * shares[0][1]:.1f} % in the last layer when dense, and from "
        f"{100 * shares[1][0]:.1f} % to {100 * shares[1][1]:.1f} % when masked"
    )
    first += ": less variance, and yet every deep block is closer to the identity." if less and shallower else "."
    agree = [label for label, check in outcome.checks.items() if check.verdict == "agrees"]
    second = f"Prediction and random networks agree in {len(agree)} of {len(outcome.checks)} cases"
    second += f" ({'; '.join(agree)})." if agree else "."
    ends = "; ".join(
        f"{label}: q_L {_stream(d.isel(step=0))[-1]:.3g} to {_stream(d.isel(step=-1))[-1]:.3g}, "
        f"last block's share {100 * _block_share(d.isel(step=0)):.1f} % to {100 * _block_share(d.isel(step=-1)):.1f} %"
        for label, d in outcome.trained.items()
    )
    third = (
        f"From the first to the last training step, {ends}. One seed each: differences between runs have no error bar."
    )
    return [second, first, third]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]
    ]


def _sections(outcome: Outcome) -> list[report.Section]:
    """The report: findings first, then theory against random networks, training, and where everything came from."""
    dense, sparse = TRAINED
    drawn = [label for label in outcome.predicted if not label.endswith(REAL_TEXT)]
    tables = [
        report.Table(
            INITIAL_HEAD,
            initial_rows(outcome),
            "q: second moment of the stream; v: sum of those of a block's two branches.",
        ),
        report.Table(
            TRAINED_HEAD,
            trained_rows(outcome),
            "r: correlation of branch and stream, mean over layers and over the two branches.",
        ),
    ]
    return [
        report.Section("What was found", findings(outcome), tables=tables),
        report.Section(
            "At initialisation: predictions and random networks",
            [
                "Lines are predictions with the error that they claim, points are means over independent random "
                "networks with 95 % intervals. No constant enters the prediction; "
                "the error that it claims was calibrated once (experiments/theory_error.py). A verdict covers "
                "all layers and sites.",
                "“Real text” is the first tokens of the embedded corpus, whose repeated words correlate tokens.",
            ],
            figures=[
                plot.plot_profiles(
                    {
                        **_named({label: outcome.predicted[label] for label in drawn}, "theory"),
                        **_named({label: outcome.simulated[label] for label in drawn}, "networks"),
                    }
                )
            ],
        ),
        *(
            report.Section(f"Verdict: {label}", figures=[plot.plot_ratio(check)], checks=[check])
            for label, check in outcome.checks.items()
        ),
        report.Section(
            "Training on the embedded text",
            [
                f"The {dense} and the {sparse} model: the same steps, batches and learning rates. Statistics are read "
                "in every layer before the final norm, in the forward pass of the step.",
            ],
            figures=[plot.plot_growth(outcome.trained, "second_moment")],
        ),
        *(
            report.Section(f"Training: {label}", figures=[plot.plot_training(dataset), plot.plot_depth_map(dataset)])
            for label, dataset in outcome.trained.items()
        ),
        report.Section(
            "Trained networks against the theory at initialisation",
            [
                "The line is the closed form for the text of the first batch; the first recorded step is one random "
                "network on that batch, so it scatters around the line as single networks do. The last step is what "
                "training made of it. The closed form describes independent blocks: where branches have become "
                "correlated with the stream (the table's r), what they add no longer sums like independent terms.",
            ],
            figures=[
                plot.plot_profiles({f"{label}: theory": outcome.expected[label], label: outcome.trained[label]})
                for label in TRAINED
            ],
        ),
        report.Section("Where the numbers come from", tables=[report.provenance(_all_results(outcome))]),
    ]


def _all_results(outcome: Outcome) -> dict[str, xr.Dataset]:
    kinds = (("predicted", outcome.predicted), ("simulated", outcome.simulated), ("trained", outcome.trained))
    return {f"{kind} {label}": dataset for kind, datasets in kinds for label, dataset in datasets.items()}


def _named(datasets: Mapping[str, xr.Dataset], suffix: str) -> dict[str, xr.Dataset]:
    return {f"{label}: {suffix}": dataset for label, dataset in datasets.items()}
