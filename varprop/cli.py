"""The command line: thin, each command reads a spec or result files and writes one result file."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import xarray as xr
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from varprop import (
    cli_data,
    cli_diagnose,
    cli_grid,
    cli_hf,
    cli_runs,
    cli_sweep,
    cli_train,
    compare,
    demo,
    files,
    presets,
    report,
    results,
    simulate,
    theory,
)
from varprop._version import __version__
from varprop.cli_arguments import add_spec, assignments, profile, spec_of, value
from varprop.errors import ArgumentError
from varprop.theory import collapse, growth, mitigation

N_TOKENS = 64
"""Sequence length where none is given."""


class _Parser(argparse.ArgumentParser):
    """Bad arguments are one line, like every other bad input."""

    def error(self, message: str) -> NoReturn:
        raise ArgumentError(f"{message} (see '{self.prog} --help')")


# Arguments shared by commands -----------------------------------------------------------------------------------------


def _add_tokens(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--n-tokens", type=int, default=N_TOKENS, help=f"sequence length (default {N_TOKENS})")
    parser.add_argument(
        "--token-correlation", type=float, default=0.0, help="of the input tokens (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)


# Commands -------------------------------------------------------------------------------------------------------------


def _predict(arguments: argparse.Namespace) -> int:
    out = files.writable(arguments.out)
    with _layer_bar() as progress:
        dataset = theory.predict(
            spec_of(arguments),
            n_tokens=arguments.n_tokens,
            token_correlation=arguments.token_correlation,
            seed=arguments.seed,
            method=arguments.method,
            over=_axes(arguments.axis) or None,
            backward=arguments.backward,
            progress=progress,
        )
    results.save(dataset, out)
    print(f"grid {dict(dataset.sizes)}" if arguments.axis else profile(dataset))
    print(f"wrote {out}")
    return 0


@contextlib.contextmanager
def _layer_bar() -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error for predictions that resolve every position."""
    columns = TextColumn("layers"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    with bar:
        task = bar.add_task("layers", visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)


def _axes(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Axes given as field=a,b,c or field=[JSON]."""
    axes = {}
    for name, values in assignments(texts, "--axis").items():
        items = values if isinstance(values, (list, str)) else [values]
        axes[name] = [value(item) for item in items.split(",")] if isinstance(items, str) else items
    return axes


def _simulate(arguments: argparse.Namespace) -> int:
    out = files.writable(arguments.out)
    dataset = simulate.sample(
        spec_of(arguments),
        n_networks=arguments.n_networks,
        token_correlation=arguments.token_correlation,
        seed=arguments.seed,
        method=arguments.method,
        backward=arguments.backward,
        n_probes=arguments.n_probes,
        dtype=arguments.dtype,
        device=arguments.device,
        draw_device=arguments.draw_device,
        **_inputs(arguments),
    )
    results.save(dataset, out)
    print(f"{profile(dataset)}\nwrote {out}")
    return 0


def _inputs(arguments: argparse.Namespace) -> dict[str, Any]:
    """`inputs` where --inputs or --text gives them, else `n_tokens`."""
    if arguments.inputs is not None:
        return {"n_tokens": arguments.n_tokens, "inputs": simulate.load_array(arguments.inputs)}
    n_tokens = N_TOKENS if arguments.n_tokens is None else arguments.n_tokens
    if arguments.text is None:
        return {"n_tokens": n_tokens}
    text = {"corpus": arguments.corpus, "corpus_dir": arguments.corpus_dir, "seed": arguments.seed}
    return {"inputs": simulate.text_tokens(n_tokens, n_sequences=arguments.text, **text)}


def _at_step(dataset: xr.Dataset, step: int | None) -> xr.Dataset:
    """A training result at one step (the last by default); other results as they are."""
    if step is not None and not set(results.STEPS) & set(dataset.dims):
        raise ArgumentError(f"step={step} is given for a result without steps; expected a training result")
    return results.at_step(dataset, step)


def _compare(arguments: argparse.Namespace) -> int:
    out = files.writable(arguments.out)
    predicted = results.load(arguments.predicted)
    parts = [_at_step(results.load(path), arguments.step) for path in arguments.measured]
    seeds = [(part.attrs["source"], part.attrs["spec_id"], part.attrs["seed_entropy"]) for part in parts]
    if len(set(seeds)) < len(seeds):
        raise ArgumentError(f"measured={arguments.measured!r} hold one seed twice; expected independent replicates")
    replicate = "seed" if parts[0].attrs["source"] == "training" else "network"
    measured = parts[0] if len(parts) == 1 else results.merge(parts, replicate)
    check = compare.check(
        predicted,
        measured,
        false_fail_rate=arguments.false_fail_rate,
        resolution=arguments.resolution,
        variable=arguments.variable,
    )
    results.save(check.dataset, out)
    print(f"{check}\nwrote {out}")
    return 0 if check.verdict == "agrees" else 1


def _report(arguments: argparse.Namespace) -> int:
    out = files.writable(arguments.out)
    stems = [Path(path).stem for path in arguments.files]
    names = stems if len(set(stems)) == len(stems) else arguments.files
    if len(set(names)) < len(names):
        raise ArgumentError(f"files={arguments.files!r} hold one file twice; expected distinct files")
    datasets = {name: results.load(path) for name, path in zip(names, arguments.files, strict=True)}
    report.write_report(out, arguments.title, report.report_for(datasets, resolution=arguments.resolution))
    print(f"wrote {out}")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    print(demo.run(arguments.out, n_steps=arguments.n_steps, n_networks=arguments.n_networks))
    return 0


def _mitigate(arguments: argparse.Namespace) -> int:
    strengths = assignments(arguments.strength, "--strength")
    effects = mitigation.mitigation_table(
        spec_of(arguments),
        strengths=strengths or None,
        n_tokens=arguments.n_tokens,
        token_correlation=arguments.token_correlation,
        branch_correlation=arguments.branch_correlation,
    )
    print(mitigation.as_markdown(effects))
    return 0


def _growth(arguments: argparse.Namespace) -> int:
    spec, r = spec_of(arguments), arguments.branch_correlation
    c = arguments.token_correlation
    if spec.norm.placement == "pre":
        tokens = collapse.token_collapse(spec, token_correlation=c)
        law = growth.classify_spec(spec, correlation=r, token_correlation=tokens.fixed_point)
        print(f"token correlation over depth: to {tokens.fixed_point:.4g}, as layer^{tokens.exponent:.3g}")
        print(f"  attention gain {tokens.attention_gain:.4g}, feed-forward increment {tokens.increment:.4g}")
        print("  for infinitely many tokens and full attention; the law below holds at that correlation")
    else:
        law = growth.classify_spec(spec, correlation=r, token_correlation=c)
    print(f"q_L over depth L: {law.law}, exponent {law.exponent:.4g}, coefficient {law.coefficient:.4g}")
    print(f"  if {law.assumption}")
    return 0


def _formula(arguments: argparse.Namespace) -> int:
    from varprop import formula  # brings sympy in

    if arguments.name is None:
        width = max(map(len, formula.names()))
        for name in formula.names():
            print(f"{name:<{width}}  {formula.get(name).statement}")
        return 0
    print(formula.latex(arguments.name))
    return 0


def _presets(arguments: argparse.Namespace) -> int:
    if arguments.name is None:
        width = max(map(len, presets.names()))
        for name in presets.names():
            print(f"{name:<{width}}  {presets.summary(name)}")
        return 0
    spec = presets.get(arguments.name).with_fields(assignments(arguments.set, "--set"))
    if arguments.out is None:
        print(spec.describe())
    else:
        files.write_text(files.writable(arguments.out), json.dumps(spec.to_dict(), indent=2, sort_keys=True) + "\n")
        print(f"wrote {arguments.out}")
    return 0


def parser() -> argparse.ArgumentParser:
    """The argument parser with every command."""
    top = _Parser(prog="varprop", description="Variance propagation in Pre-LN transformers.")
    top.add_argument("--version", action="version", version=f"varprop {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, action: Any, text: str, out: str | None) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(action=action)
        if out is not None:
            added.add_argument("--out", default=out, metavar="FILE", help="result file (default %(default)s)")
        return added

    predict = command("predict", _predict, "Closed-form variance profile of a spec.", "prediction.nc")
    add_spec(predict)
    _add_tokens(predict)

    predict.add_argument("--axis", action="append", default=[], metavar="field=a,b,c", help="predict over these values")
    predict.add_argument("--method", default="auto", help="auto, or sampled: attention heads are drawn (default auto)")
    predict.add_argument("--backward", action="store_true", help="also gradients and Jacobians of the blocks")

    mitigate = command("mitigate", _mitigate, "When does sparsity mitigate: every mechanism, as a table.", None)
    growing = command("growth", _growth, "The growth law of a spec, and whether its tokens collapse.", None)
    for one in (mitigate, growing):
        add_spec(one)
        correlated = "of the input tokens (default %(default)s)"
        one.add_argument("--token-correlation", type=float, default=0.0, help=correlated)
    mitigate.add_argument("--n-tokens", type=int, default=64, help="sequence length (default %(default)s)")
    mitigate.add_argument(
        "--branch-correlation", type=float, default=0.5, help="of the coherent stream (default %(default)s)"
    )
    mitigate.add_argument(
        "--strength", action="append", default=[], metavar="mechanism=x", help="density, factor or group size"
    )
    growing.add_argument("--branch-correlation", type=float, default=0.0, help="r (default %(default)s)")

    formulas = command("formula", _formula, "LaTeX of a formula of the theory, or the list of them.", None)
    formulas.add_argument("name", nargs="?", help="a formula")

    sample = command("simulate", _simulate, "Random networks of a spec, one entry per network.", "simulation.nc")
    add_spec(sample)
    _add_tokens(sample)
    sample.add_argument(
        "--n-networks",
        type=int,
        default=400,
        help="independent networks, computed in blocks of 8, up to 256 on a GPU (default %(default)s)",
    )
    sample.add_argument(
        "--method",
        default="explicit",
        help="explicit, or gram: no weight matrices, faster where d_model is several times the number of tokens, slower"
        " in narrow models (default %(default)s)",
    )
    sample.add_argument(
        "--backward", action="store_true", help="also gradients and Jacobians of the blocks (method explicit only)"
    )
    sample.add_argument("--n-probes", type=int, help="random products for a Jacobian (default: exact, or 16 if large)")
    sample.add_argument("--dtype", default="float32", help="of stream and matrices (default %(default)s)")
    sample.add_argument("--device", default="cpu", help="torch device (default %(default)s)")
    sample.add_argument("--draw-device", help="where weights are drawn (default: the device)")
    sample.set_defaults(n_tokens=None)
    source = sample.add_mutually_exclusive_group()
    source.add_argument("--text", type=int, metavar="N_SEQUENCES", help="read windows of real text, in turn")
    source.add_argument("--inputs", metavar="FILE", help="a .npy array of token ids or of embedding outputs")
    texts = "embedded, docs, books, a tokenised directory or a token file"
    sample.add_argument("--corpus", default="embedded", metavar="NAME", help=texts)
    sample.add_argument("--corpus-dir", default=None, help="folder of a prepared corpus (default $VARPROP_CORPUS)")

    cli_grid.add(command("grid", cli_grid.run, "Simulate a whole grid: what a kill ended goes on.", None))

    cli_data.add(command("data", cli_data.run, "Text files to token ids.", None))

    cli_train.add(command("train", cli_train.run, "Train a model and record every layer.", "training.nc"))
    cli_sweep.add(command("sweep", cli_sweep.run, "Train a whole sweep: what a kill ended goes on.", None))
    cli_hf.add(command)
    cli_diagnose.add(command("diagnose", cli_diagnose.run, "Layer scores of any checkpoint.", "diagnosis.nc"))
    cli_runs.add(command("runs", cli_runs.run, "The paper's training runs, their reduced twins, and their cost.", None))

    comparison = command("compare", _compare, "Verdict on a prediction per layer and site.", "comparison.nc")
    comparison.add_argument("predicted", help="a result file of predict")
    comparison.add_argument("measured", nargs="+", help="result files of simulate or train, joined as replicates")
    comparison.add_argument("--step", type=int, default=None, help="training step (default the last)")
    comparison.add_argument("--variable", default="second_moment", help="second_moment or token_correlation")
    comparison.add_argument("--false-fail-rate", type=float, default=0.01)
    comparison.add_argument("--resolution", type=float, default=0.05, help="error beyond theory_error to resolve")

    reporting = command("report", _report, "One self-contained HTML report of result files.", "report.html")
    reporting.add_argument("files", nargs="+", help="result files")
    reporting.add_argument("--title", default="varprop report")
    reporting.add_argument("--resolution", type=float, default=0.05, help="as of compare (default %(default)s)")

    showing = command("demo", _demo, "The main job on the embedded text: report.html and its Datasets.", None)
    showing.add_argument("--out", default="demo", metavar="FOLDER", help="output folder (default %(default)s)")
    showing.add_argument("--n-steps", type=int, default=demo.N_STEPS, help="training steps (default %(default)s)")
    showing.add_argument(
        "--n-networks", type=int, default=demo.N_NETWORKS, help="networks a variant (default %(default)s)"
    )

    listing = command("presets", _presets, "List the presets, describe one, or write it as a spec file.", None)
    listing.add_argument("name", nargs="?", help="a preset to describe")
    listing.add_argument(
        "--set", action="append", default=[], metavar="field=value", help="change a field (repeatable)"
    )
    listing.add_argument("--out", default=None, metavar="FILE", help="write the spec as JSON")
    return top


def run(arguments: Sequence[str]) -> int:
    """Parse and run one command; return its exit code. Bad input raises a `VarpropError`."""
    parsed = parser().parse_args(arguments)
    return parsed.action(parsed)
